"""Layers: in-memory, delta and image; their files and the map that finds them."""

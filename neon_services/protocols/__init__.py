"""Wire formats, sans-IO: bytes in, messages out. Imports only the ground layer."""

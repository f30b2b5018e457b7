"""Postgres WAL: page framing, decoding (C and the pure Python oracle), pg_control, redo helpers."""

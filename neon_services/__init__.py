"""Neon's storage architecture as Python services for stock Postgres."""

__version__ = "0.1.0"

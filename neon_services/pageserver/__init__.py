"""The pageserver service: any page at any LSN."""

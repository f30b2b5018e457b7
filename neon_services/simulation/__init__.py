"""A deterministic simulator that drives the production state machines; used by tests only."""

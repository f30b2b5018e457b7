"""The storage broker service: gossip between safekeepers and pageservers."""

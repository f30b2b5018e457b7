"""The safekeeper service: makes WAL durable and serves it."""

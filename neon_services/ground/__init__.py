"""The ground layer: ids, LSNs, errors, durable files, processes, object storage. Imports nothing above it."""

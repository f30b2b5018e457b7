"""Time spent in the engine's operations, under Neon's metric names."""

from prometheus_client import Histogram

STORAGE_OPERATIONS = Histogram(
    "pageserver_storage_operations_seconds_global",
    "Time of storage operations",
    ["operation"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)

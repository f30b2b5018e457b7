"""What one schedule did."""

from dataclasses import dataclass


@dataclass(slots=True)
class Stats:
    """That a schedule did something."""

    events: int = 0
    real: int = 0
    elections: int = 0
    commits: int = 0
    committed_bytes: int = 0
    unruly_commits: int = 0
    truncations: int = 0
    short_ways: int = 0
    crashes: int = 0
    kills: int = 0
    deposed: int = 0
    broken: int = 0
    migrations: int = 0
    pulls: int = 0
    pulls_given_up: int = 0
    removals: int = 0
    clock_jumps: int = 0
    disk_operations: int = 0
    disk_failures: int = 0
    disk_full: int = 0
    power_losses: int = 0
    torn: int = 0

"""Leases on LSNs: a promise to a reader that pages at its LSN stay readable for a while.

Invariant: a lease is granted only at or above the garbage collection cutoff, and an existing one is only ever extended. Leases
live in memory; what collects garbage must spare ``held()`` and wait out one lease length after an attach.
"""

from neon_services.ground.lsn import Lsn, skip_page_header


class LsnLeases:
    """The leases of one timeline. Times are milliseconds since the Unix epoch, given by the caller."""

    def __init__(self) -> None:
        self._valid_until_ms: dict[int, int] = {}

    def grant(self, lsn: int, *, cutoff_lsn: int, now_ms: int, length_ms: int) -> int | None:
        """Make or extend the lease on an LSN; until when it is valid, or None when the LSN may be collected already."""
        if lsn < cutoff_lsn:
            return None
        normal = skip_page_header(lsn)
        self._valid_until_ms[normal] = max(self._valid_until_ms.get(normal, 0), now_ms + length_ms)
        return self._valid_until_ms[normal]

    def held(self, now_ms: int) -> list[Lsn]:
        """The LSNs under lease, in order; forgets the leases that have ended."""
        self._valid_until_ms = {lsn: until for lsn, until in self._valid_until_ms.items() if until > now_ms}
        return [Lsn(lsn) for lsn in sorted(self._valid_until_ms)]

"""Which safekeeper to receive WAL from: the table of candidates and the rules for choosing and changing. No sockets, no clock.

Invariant: a candidate is what a safekeeper last said of itself, and is forgotten when it has been silent for
``lagging_wal_timeout``. Chosen is the one with the highest commit_lsn that is not cooling down after a failure.
"""

from dataclasses import dataclass
from typing import Any

_BACKOFF_FIRST_S, _BACKOFF_FACTOR, _BACKOFF_MAX_S = 0.1, 1.5, 15.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One safekeeper that has the timeline."""

    safekeeper_id: int
    connstr: str  #: ``host:port``
    commit_lsn: int
    availability_zone: str | None
    standby_horizon: int
    seen_at: float


@dataclass(slots=True)
class ConnectionView:
    """What the rules need to know of the present connection; times on the caller's clock, in seconds."""

    safekeeper_id: int
    availability_zone: str | None
    heard_at: float  #: anything came from the safekeeper (or the connection was begun)
    wal_at: float  #: WAL came (or the connection was begun)
    commit_lsn: int  #: the end of WAL as the safekeeper last said on the connection


@dataclass(frozen=True, slots=True)
class Rules:
    """The tenant's settings."""

    connect_timeout_s: float
    lagging_wal_timeout_s: float
    max_lsn_wal_lag: int
    availability_zone: str | None


@dataclass(slots=True)
class _Failures:
    count: int = 0
    until: float = 0.0


class Candidates:
    """The safekeepers of one timeline."""

    def __init__(self) -> None:
        self._known: dict[int, Candidate] = {}
        self._failures: dict[int, _Failures] = {}

    def update(self, message: Any, now: float) -> None:
        """A SafekeeperTimelineInfo or SafekeeperDiscoveryResponse of this timeline."""
        zone = message.availability_zone if message.HasField("availability_zone") else None
        self._known[message.safekeeper_id] = Candidate(
            message.safekeeper_id, message.safekeeper_connstr, message.commit_lsn, zone, message.standby_horizon, now
        )

    def forget(self, safekeeper_id: int) -> None:
        """It has no more WAL for us; it counts again when it speaks again."""
        self._known.pop(safekeeper_id, None)

    def expire(self, now: float, rules: Rules) -> None:
        """Drop who has been silent for too long."""
        self._known = {
            number: candidate
            for number, candidate in self._known.items()
            if now - candidate.seen_at <= rules.lagging_wal_timeout_s
        }

    def connection_failed(self, safekeeper_id: int, started_at: float) -> float:
        """Cool down, counted from the start of the connection; how many seconds."""
        failures = self._failures.setdefault(safekeeper_id, _Failures())
        delay = min(_BACKOFF_FIRST_S * _BACKOFF_FACTOR**failures.count, _BACKOFF_MAX_S)
        failures.count += 1
        failures.until = started_at + delay
        return delay

    def made_progress(self, safekeeper_id: int) -> None:
        """WAL of it was ingested: it is healthy."""
        self._failures.pop(safekeeper_id, None)

    def __len__(self) -> int:
        return len(self._known)

    def all(self) -> list[Candidate]:
        """The known ones, by id."""
        return [self._known[number] for number in sorted(self._known)]

    def choose(self, now: float, rules: Rules) -> Candidate | None:
        """The best candidate; among equals one in our availability zone, then the lowest id."""
        usable = [
            candidate
            for candidate in self._known.values()
            if candidate.commit_lsn and candidate.connstr and self._failures.get(candidate.safekeeper_id, _IDLE).until <= now
        ]
        return max(
            usable,
            key=lambda c: (c.commit_lsn, c.availability_zone == rules.availability_zone, -c.safekeeper_id),
            default=None,
        )

    def why_switch(self, current: ConnectionView, last_record_lsn: int, now: float, rules: Rules) -> str | None:
        """A reason to give up the present connection; None to keep it."""
        if now - current.heard_at > rules.connect_timeout_s:
            return f"nothing heard for {rules.connect_timeout_s:g} s"
        best = self.choose(now, rules)
        if best is None or best.safekeeper_id == current.safekeeper_id:
            return None
        if best.commit_lsn >= max(current.commit_lsn, last_record_lsn) + rules.max_lsn_wal_lag:
            return f"safekeeper {best.safekeeper_id} is ahead by {best.commit_lsn - current.commit_lsn} bytes"
        zone = rules.availability_zone
        if zone is not None and best.availability_zone == zone != current.availability_zone:
            return f"safekeeper {best.safekeeper_id} is in our availability zone and not behind"
        if best.commit_lsn > last_record_lsn and now - current.wal_at > rules.lagging_wal_timeout_s:
            return f"no WAL for {rules.lagging_wal_timeout_s:g} s while safekeeper {best.safekeeper_id} has more"
        return None


_IDLE = _Failures()

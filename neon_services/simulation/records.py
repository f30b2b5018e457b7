"""What the proposers of the simulation write: records of a model log, or real WAL.

Every record is unlike all others, so that two logs that differ somewhere have different bytes.
"""

import random
from typing import Protocol

from neon_services.ground.lsn import Lsn
from neon_services.wal.framing import RM_XLOG, XLOG_SWITCH, build_record, place_record, record_start

SEGMENT_SIZE = 1 << 20  # the smallest that a control file may name
PG_VERSION = 150000
SYSTEM_ID = 0x1122334455667788
_RM_LOGICAL_MESSAGE = 21
#: Distances of a log's first byte from the end of a segment: page and segment ends are met in every schedule.
_BEFORE_SEGMENT_END = (0, 8, 64, 512, 2000, 8000, 20_000)


class Writer(Protocol):
    """Makes the bytes of a log."""

    segment_size: int
    #: Most WAL bytes in one append are these times the profile's chunk.
    stretch: int

    def start_lsn(self) -> Lsn:
        """Where the log begins."""

    def record(self, lsn: Lsn, term: int) -> bytes:
        """What follows at this position, a record end."""


class ModelWriter:
    """Records whose first byte is their length in units of 8 bytes."""

    segment_size = 1 << 24
    stretch = 1

    def __init__(self, rng: random.Random) -> None:
        self._random = rng
        self._records = 0

    def start_lsn(self) -> Lsn:
        """Where the log begins."""
        return Lsn(4096)

    def record(self, lsn: Lsn, term: int) -> bytes:
        """What follows at this position."""
        self._records += 1
        units = 1 + int(self._random.random() * 5)
        return bytes((units, term & 0xFF)) + self._records.to_bytes(6, "big") + bytes((term & 0xFF,)) * (units * 8 - 8)


class WalWriter:
    """Records with real headers and checksums, laid over pages and segments as Postgres does; now and then a switch."""

    segment_size = SEGMENT_SIZE
    stretch = 4

    def __init__(self, rng: random.Random) -> None:
        self._random = rng
        self._records = 0

    def start_lsn(self) -> Lsn:
        """Where the log begins: soon before the end of a segment."""
        return Lsn(3 * SEGMENT_SIZE - self._random.choice(_BEFORE_SEGMENT_END))

    def record(self, lsn: Lsn, term: int) -> bytes:
        """What follows at this position."""
        self._records += 1
        roll = self._random.random()
        left = -lsn % SEGMENT_SIZE
        if roll < 0.02 and 64 < left < 8192:
            return self._place(lsn, build_record(RM_XLOG, XLOG_SWITCH, b"", prev_lsn=lsn)).ljust(left, b"\0")
        # few different lengths: what a cut leaves behind then often begins where the new log ends
        size = 16 if roll < 0.7 else 40 if roll < 0.95 else self._random.randint(16, 1500)
        payload = self._records.to_bytes(8, "big") + bytes((term & 0xFF,)) * (size - 8)
        return self._place(lsn, build_record(_RM_LOGICAL_MESSAGE, 0, payload, prev_lsn=lsn))

    def _place(self, lsn: Lsn, record: bytes) -> bytes:
        start = record_start(lsn, SEGMENT_SIZE)
        major = PG_VERSION // 10000
        writes = place_record(start, record, pg_major=major, system_identifier=SYSTEM_ID, segment_size=SEGMENT_SIZE)
        return b"".join([data for _, data in writes])

"""Valid WAL without a Postgres: records of random bytes, laid over pages and segments as Postgres would."""

import random
from dataclasses import dataclass, field

from neon_services.ground.lsn import Lsn
from neon_services.wal.framing import RM_XLOG, XLOG_SWITCH, build_record, place_record, record_start

PG_VERSION = 150004
SYSTEM_ID = 0x1122334455667788
RM_LOGICAL_MESSAGE = 21


@dataclass
class WalMaker:
    """Appends records at ``end``; ``data`` are the bytes from ``start`` on, ``record_ends`` the ends of all records."""

    start: Lsn
    segment_size: int
    seed: int = 1
    data: bytearray = field(default_factory=bytearray)
    record_ends: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._previous = 0

    @property
    def end(self) -> Lsn:
        return Lsn(self.start + len(self.data))

    def record(self, size: int) -> "WalMaker":
        """One record with this many bytes of payload."""
        return self._place(build_record(RM_LOGICAL_MESSAGE, 0, self._random.randbytes(size), prev_lsn=self._previous))

    def records(self, count: int, largest: int = 2000) -> "WalMaker":
        """Records of random sizes."""
        for _ in range(count):
            self.record(self._random.randrange(largest))
        return self

    def until(self, lsn: int, largest: int = 2000) -> "WalMaker":
        """Records until the log is at least this long."""
        while self.end < lsn:
            self.record(self._random.randrange(largest))
        return self

    def switch(self) -> "WalMaker":
        """XLOG_SWITCH and the zeros that fill its segment."""
        self._place(build_record(RM_XLOG, XLOG_SWITCH, b"", prev_lsn=self._previous))
        self.data += bytes(-self.end % self.segment_size)
        self.record_ends[-1] = self.end
        return self

    def _place(self, record: bytes) -> "WalMaker":
        start = record_start(self.end, self.segment_size)
        writes = place_record(
            start, record, pg_major=PG_VERSION // 10000, system_identifier=SYSTEM_ID, segment_size=self.segment_size
        )
        for position, written in writes:
            assert position == self.end
            self.data += written
        self._previous = start
        self.record_ends.append(self.end)
        return self

    def slice(self, begin: int, end: int) -> bytes:
        """The bytes of a range."""
        return bytes(self.data[begin - self.start : end - self.start])

    def last_record_end(self, limit: int) -> int:
        """The end of the last record that is complete at ``limit``; the start when there is none."""
        return max((end for end in self.record_ends if end <= limit), default=self.start)

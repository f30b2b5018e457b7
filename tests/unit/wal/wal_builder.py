"""Synthetic WAL for tests: records laid end to end over pages and small segments, as a server would."""

import random

from neon_services.ground.lsn import Lsn
from neon_services.wal.framing import RM_XLOG, XLOG_SWITCH, build_record, place_record, record_end, record_start

SMALL_SEGMENT = 64 * 1024
NOOP = 0x20
RM_LOGICALMSG = 21


class WalBuilder:
    """A growing piece of WAL that starts at a segment start."""

    def __init__(self, *, pg_major: int = 15, segment_size: int = SMALL_SEGMENT, segment: int = 3) -> None:
        self.pg_major = pg_major
        self.segment_size = segment_size
        self.start = Lsn(segment * segment_size)
        self.end = self.start
        """End of the last record."""
        self.buffer = bytearray()
        self.starts: list[Lsn] = []
        self.ends: list[Lsn] = []
        self.records: list[bytes] = []
        self.switches: list[tuple[Lsn, Lsn]] = []
        """(start of the record, start of the next segment) of each XLOG_SWITCH."""

    def put(self, lsn: int, data: bytes) -> None:
        """Write bytes at a position, with zeros before them where nothing was written."""
        at = lsn - self.start
        self.buffer.extend(bytes(max(0, at + len(data) - len(self.buffer))))
        self.buffer[at : at + len(data)] = data

    def append(self, main_data: bytes, *, rmid: int = RM_LOGICALMSG, info: int = 0) -> Lsn:
        """Add a record with this main data; its end."""
        record = build_record(rmid, info, main_data, prev_lsn=self.starts[-1] if self.starts else 0, xid=7)
        start = record_start(self.end, self.segment_size)
        for lsn, data in place_record(
            start, record, pg_major=self.pg_major, system_identifier=42, segment_size=self.segment_size
        ):
            self.put(lsn, data)
        self.starts.append(start)
        self.records.append(record)
        self.end = record_end(start, len(record), self.segment_size)
        self.ends.append(self.end)
        return self.end

    def switch(self) -> Lsn:
        """Add XLOG_SWITCH and fill the segment with zeros; the start of the next segment."""
        self.append(b"", rmid=RM_XLOG, info=XLOG_SWITCH)
        self.end = Lsn(-(-self.end // self.segment_size) * self.segment_size)
        self.ends[-1] = self.end
        self.put(self.end, b"")
        self.switches.append((self.starts[-1], self.end))
        return self.end

    def fill_page_to(self, offset: int) -> None:
        """Add a record such that the next one starts `offset` bytes into a page (offset % 8 == 0, or 8192 for its end)."""
        room = offset - self.end % 8192 if self.end % 8192 else 0
        assert room >= 24 + 8, "start at a position with room on this page"
        self.append(bytes(room - 26 if room - 26 < 256 else room - 29))
        assert self.end % 8192 == offset % 8192

    @property
    def data(self) -> bytes:
        """All bytes from the start to the end of the last record."""
        return bytes(self.buffer[: self.end - self.start])


def random_wal(rng: random.Random, records: int, **options: int) -> WalBuilder:
    """Records of many sizes, now and then a switch."""
    wal = WalBuilder(**options)
    for _ in range(records):
        if rng.random() < 0.02:
            wal.switch()
        else:
            size = rng.choice((0, 1, 6, 30, 200, 255, 256, 1000, 8000, 8192, 30000))
            wal.append(rng.randbytes(size and size + rng.randrange(8)))
    return wal


def random_chunks(rng: random.Random, data: bytes) -> list[bytes]:
    """Cut the bytes at random places, at all scales."""
    chunks, at = [], 0
    while at < len(data):
        size = rng.choice((1, 2, 3, 7, 8, 23, 24, 25, 40, 100, 1000, 4096, 8191, 8192, 8193, 50000, 131072))
        chunks.append(data[at : at + size])
        at += size
    return chunks

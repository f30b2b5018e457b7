"""The WAL decoder and scanner in plain Python: the test oracle for the C ones, and the scanner's fallback without a library.

Invariant: the same bytes give the same rows, blob, positions and stops as postgres_ext/waldec, at any chunking. It is written
the obvious way (gather a record's bytes, then look at them), not translated, so that both are wrong only independently.
"""

import struct
from collections.abc import Callable

import numpy as np

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, XLOG_BLCKSZ, Lsn, align_lsn, format_lsn, page_header_size
from neon_services.wal import framing
from neon_services.wal.oracle_record import parse_record
from neon_services.wal.records import (
    RECORD_DTYPE,
    REF_DTYPE,
    STOP_INVALID,
    STOP_STALE_PAGE,
    STOP_ZERO_LENGTH,
    STOP_ZERO_PAGE,
    WalBatch,
    WalDecodeError,
)

_KNOWN_MAGICS = frozenset(magic for major, magic in framing.PAGE_MAGICS.items() if major >= 15)


def _stop(reason: int, what: str, lsn: int) -> WalDecodeError:
    return WalDecodeError(f"{what} at {format_lsn(lsn)}", reason)


class _Stream:
    """Pages and record boundaries; calls `on_record(start_lsn, raw, end_lsn)` for each complete record."""

    def __init__(
        self,
        start_lsn: int,
        segment_size: int,
        magics: frozenset[int],
        on_record: Callable[[int, bytes, int], None],
        verify_crc: bool,
    ) -> None:
        self.position = start_lsn
        self.record_end = start_lsn
        self._segment_size = segment_size
        self._magics = magics
        self._on_record = on_record
        self._verify_crc = verify_crc
        self._pending_end: int = align_lsn(start_lsn)
        self._skip_to = 0
        self._need_header = start_lsn % XLOG_BLCKSZ == 0
        self._resync = self._need_header
        self._tail = 0
        self._record_lsn: int | None = None
        self._gathered = bytearray()  # a page header or a record, whichever is being collected
        self._held = bytearray()  # the record while a page header is being collected

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self._step(view) :]

    def _step(self, view: memoryview) -> int:
        if self.position < self._skip_to:
            return self._advance(min(len(view), self._skip_to - self.position))
        if self._need_header:
            return self._header_step(view)
        room = min(len(view), XLOG_BLCKSZ - self.position % XLOG_BLCKSZ)
        if self._tail:
            n = min(room, self._tail)
            self._tail -= n
            self._resync = self._tail != 0
            return self._advance(n)
        if self._record_lsn is None:
            if padding := -self.position % 8:
                return self._advance(min(room, padding))
            self._record_lsn = self.position
            self._held.clear()
        return self._record_step(view[:room])

    def _advance(self, n: int) -> int:
        self.position += n
        if self.position % XLOG_BLCKSZ == 0:
            self._need_header = True
        if self._pending_end and self.position >= self._pending_end:
            self.record_end, self._pending_end = self._pending_end, 0
        return n

    def _header_step(self, view: memoryview) -> int:
        page = self.position - len(self._gathered)
        size = page_header_size(page, self._segment_size)
        part = view[: size - len(self._gathered)]
        self._gathered += part
        self.position += len(part)
        if len(self._gathered) == size:
            raw = bytes(self._gathered)
            self._gathered.clear()
            self._need_header = False
            self._check_header(raw, page)
        return len(part)

    def _check_header(self, raw: bytes, page: int) -> None:
        if not any(raw):
            raise _stop(STOP_ZERO_PAGE, "page of zeros", page)
        magic, info = struct.unpack_from("<HH", raw)
        if magic not in self._magics:
            raise _stop(STOP_INVALID, "wrong page magic (damage, or WAL of another Postgres major)", page)
        if struct.unpack_from("<Q", raw, 8)[0] != page:
            raise _stop(STOP_STALE_PAGE, "page header of another position", page)
        if bool(info & framing.XLP_LONG_HEADER) != (len(raw) == 40):
            raise _stop(STOP_INVALID, "page header of the wrong size", page)
        header = framing.parse_page_header(raw)
        if header.segment_size not in (0, self._segment_size) or (len(raw) == 40 and not header.segment_size):
            raise _stop(STOP_INVALID, "page header with another WAL segment size", page)
        self._continue_record(header, page)

    def _continue_record(self, header: framing.PageHeader, page: int) -> None:
        if header.info & framing.XLP_FIRST_IS_OVERWRITE_CONTRECORD:
            self._record_lsn = None
            self._tail = 0
        elif header.info & framing.XLP_FIRST_IS_CONTRECORD:
            if self._record_lsn is not None:
                if header.remaining_len != struct.unpack_from("<I", self._held)[0] - len(self._held):
                    raise _stop(STOP_INVALID, "continuation of another length than expected", page)
            elif not self._resync:
                raise _stop(STOP_INVALID, "unexpected continuation of a record", page)
            elif not 0 < header.remaining_len <= framing.MAX_RECORD:
                raise _stop(STOP_INVALID, "continuation of an impossible length", page)
            else:
                self._tail = header.remaining_len
        elif self._record_lsn is not None or self._tail:
            raise _stop(STOP_INVALID, "missing continuation of a record", page)
        self._resync = self._resync and self._tail != 0

    def _record_step(self, view: memoryview) -> int:
        assert self._record_lsn is not None
        held = self._held
        if len(held) < 4:
            n = min(len(view), 4 - len(held))
            held += view[:n]
            self._advance(n)
            if len(held) == 4:
                self._check_length(struct.unpack("<I", held)[0])
            return n
        total = struct.unpack_from("<I", held)[0]
        n = min(len(view), total - len(held))
        held += view[:n]
        self._advance(n)
        if len(held) == total:
            self._finish(bytes(held))
        return n

    def _check_length(self, total: int) -> None:
        assert self._record_lsn is not None
        if total == 0:
            raise _stop(STOP_ZERO_LENGTH, "record of length 0", self._record_lsn)
        if not framing.RECORD_HEADER_SIZE <= total <= framing.MAX_RECORD:
            raise _stop(STOP_INVALID, "record of an impossible length", self._record_lsn)

    def _finish(self, raw: bytes) -> None:
        start = self._record_lsn
        assert start is not None
        header = framing.parse_record_header(raw)
        if self._verify_crc and framing.record_crc(raw) != header.crc:
            raise _stop(STOP_INVALID, "wrong CRC of the record", start)
        end = align_lsn(self.position)
        if header.rmid == framing.RM_XLOG and header.info & 0xF0 == framing.XLOG_SWITCH:
            end = Lsn(-(-end // self._segment_size) * self._segment_size)
            self._skip_to = end
        self._record_lsn = None
        self._on_record(start, raw, end)
        self._pending_end = end
        self._advance(0)


class OracleScanner:
    """What WalScanner does, at perhaps 100 MB/s."""

    def __init__(self, start_lsn: int, *, segment_size: int = WAL_SEGMENT_SIZE) -> None:
        self._stream = _Stream(start_lsn, segment_size, _KNOWN_MAGICS, self._ignore, True)
        self._error: WalDecodeError | None = None

    @staticmethod
    def _ignore(start_lsn: int, raw: bytes, end_lsn: int) -> None:
        """Only the boundaries matter."""

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Consume all of the chunk. Raises WalDecodeError, and goes on raising it."""
        if self._error is not None:
            raise self._error
        try:
            self._stream.feed(data)
        except WalDecodeError as error:
            self._error = error
            raise

    @property
    def position(self) -> Lsn:
        """LSN of the next input byte."""
        return Lsn(self._stream.position)

    @property
    def record_end_lsn(self) -> Lsn:
        """End of the last complete record."""
        return Lsn(self._stream.record_end)


class OracleDecoder:
    """What WalDecoder does, at about half a million records a second on a good day."""

    def __init__(self, start_lsn: int, pg_major: int, *, segment_size: int = WAL_SEGMENT_SIZE, verify_crc: bool = True) -> None:
        magics = frozenset({framing.page_magic(pg_major)})
        self._stream = _Stream(start_lsn, segment_size, magics, self._on_record, verify_crc)
        self._records: list[tuple] = []
        self._refs: list[tuple] = []
        self._blob = bytearray()
        self.next_lsn = align_lsn(start_lsn)

    @property
    def position(self) -> Lsn:
        """LSN of the next input byte."""
        return Lsn(self._stream.position)

    def _on_record(self, start_lsn: int, raw: bytes, end_lsn: int) -> None:
        header = framing.parse_record_header(raw)
        try:
            parsed = parse_record(raw, header)
        except ValueError as error:
            raise _stop(STOP_INVALID, str(error), start_lsn) from None
        index = len(self._records)
        self._records.append(
            (
                start_lsn,
                end_lsn,
                len(self._blob),
                header.tot_len,
                header.xid,
                len(raw) - parsed.main_len,
                parsed.main_len,
                len(self._refs),
                len(parsed.refs),
                header.rmid,
                header.info,
                parsed.toplevel_xid,
            )
        )
        for ref in parsed.refs:
            self._refs.append((end_lsn, index, *ref, header.rmid))
        self._blob += struct.pack("<Q", end_lsn) + raw + bytes(-len(raw) % 8)
        self.next_lsn = Lsn(end_lsn)

    def feed(self, data: bytes | bytearray | memoryview) -> WalBatch:
        """Consume all of the chunk and return what it completed. Raises WalDecodeError."""
        self._stream.feed(data)
        batch = WalBatch(
            np.array(self._records, RECORD_DTYPE), np.array(self._refs, REF_DTYPE), bytes(self._blob), self.next_lsn
        )
        self._records, self._refs, self._blob = [], [], bytearray()
        return batch

    def close(self) -> None:
        """Nothing to free; here so that either decoder can be used."""

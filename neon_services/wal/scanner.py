"""The record scanner of safekeepers: where does the last complete record end? And the end of WAL in files.

Invariant: `record_end_lsn` never passes `position`, and every record before it has a right CRC. The scanner knows nothing
of what is inside a record, so it serves every Postgres major.
"""

import ctypes
import logging
from collections.abc import Callable

from neon_services.ground.errors import ConfigError
from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn
from neon_services.wal.buffers import address_of
from neon_services.wal.libraries import load_any_waldec
from neon_services.wal.records import STOP_NO_MEMORY, WalDecodeError, check_segment_size

log = logging.getLogger(__name__)

READ_SIZE = 256 * 1024
_fallback_reported = False


def _bind() -> ctypes.CDLL:
    library = load_any_waldec()
    library.walscan_new.restype = ctypes.c_void_p
    library.walscan_new.argtypes = [ctypes.c_uint64, ctypes.c_uint32]
    library.walscan_free.restype = None
    library.walscan_free.argtypes = [ctypes.c_void_p]
    library.walscan_feed.restype = ctypes.c_int
    library.walscan_feed.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    library.walscan_error.restype = ctypes.c_char_p
    library.walscan_error.argtypes = [ctypes.c_void_p]
    return library


class _CompiledScanner:
    """The scanner in C: about a microsecond per call."""

    def __init__(self, start_lsn: int, segment_size: int) -> None:
        self._library = _bind()
        self._feed = self._library.walscan_feed
        self._handle = self._library.walscan_new(start_lsn, segment_size)
        if self._handle is None:
            raise MemoryError("no memory for a WAL scanner")
        # the C structure begins with position and record_end_lsn
        self._positions = (ctypes.c_uint64 * 2).from_address(self._handle)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        status = self._feed(self._handle, address_of(data), len(data))
        if status:
            text = self._library.walscan_error(self._handle).decode()
            if status == STOP_NO_MEMORY:
                raise MemoryError(text)
            raise WalDecodeError(text, status)

    @property
    def handle(self) -> int | None:
        """The C structure, for C code that feeds it."""
        return self._handle

    @property
    def error(self) -> str:
        """Why the last chunk was refused."""
        return self._library.walscan_error(self._handle).decode()

    @property
    def position(self) -> Lsn:
        return Lsn(self._positions[0])

    @property
    def record_end_lsn(self) -> Lsn:
        return Lsn(self._positions[1])

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            self._library.walscan_free(handle)


def _new_scanner(start_lsn: int, segment_size: int):
    global _fallback_reported
    try:
        return _CompiledScanner(start_lsn, segment_size)
    except ConfigError as error:
        if not _fallback_reported:
            _fallback_reported = True
            log.warning("WAL is scanned by the slow Python implementation: %s", error)
    from neon_services.wal.oracle import OracleScanner

    return OracleScanner(start_lsn, segment_size=segment_size)


class WalScanner:
    """Follows record boundaries through a stream of WAL that arrives in any chunks.

    `start_lsn` is the start of a record, of a page or of a segment; at a page start the tail of an older record is skipped
    unverified. After an error the scanner is of no more use: make a new one at a known record end.
    """

    def __init__(self, start_lsn: int, *, segment_size: int = WAL_SEGMENT_SIZE) -> None:
        check_segment_size(segment_size)
        self._scanner = _new_scanner(start_lsn, segment_size)
        self.feed: Callable[[bytes | bytearray | memoryview], None] = self._scanner.feed
        """Consume all of the chunk. Raises WalDecodeError (it names the LSN) on anything that is not valid WAL."""

    @property
    def handle(self) -> int | None:
        """The C scanner, for C code that feeds it while Python waits; None when Python scans."""
        return getattr(self._scanner, "handle", None)

    @property
    def error(self) -> str:
        """What C code that fed it was told by it."""
        return str(self._scanner.error)

    @property
    def position(self) -> Lsn:
        """Bytes consumed so far, as an LSN: the LSN of the next input byte."""
        return self._scanner.position

    @property
    def record_end_lsn(self) -> Lsn:
        """End of the last complete record, 8-aligned; the start LSN before the first one.

        A record counts when its padding has been consumed too; XLOG_SWITCH counts when the rest of its segment has been, and
        ends where the next segment begins.
        """
        return self._scanner.record_end_lsn


def find_end_of_wal(read: Callable[[Lsn, int], bytes], start_lsn: int, *, segment_size: int = WAL_SEGMENT_SIZE) -> Lsn:
    """The end of the last valid record at or after `start_lsn`, which is a record start, or a page or segment start.

    `read(lsn, n)` returns up to n bytes of WAL from lsn on, and b"" where there is no more. WAL ends at a record of length 0,
    a page of zeros, a page of another position (a recycled file), a record with a wrong CRC or anything else that is not
    WAL: whatever follows the last valid record was never acknowledged. Returns `start_lsn` when no record follows it.
    """
    scanner = WalScanner(start_lsn, segment_size=segment_size)
    try:
        while data := read(scanner.position, READ_SIZE - scanner.position % READ_SIZE):
            scanner.feed(data)
    except WalDecodeError as error:
        log.info("WAL ends at record end %X/%X: %s", scanner.record_end_lsn >> 32, scanner.record_end_lsn & 0xFFFFFFFF, error)
    return scanner.record_end_lsn

"""WAL pages and records as bytes: headers, CRC, and the way a record is laid over pages.

Invariant: `place_record` gives exactly what a Postgres at that position would have in its WAL file, so that a record made
here and one made by Postgres can follow each other. Nothing here decodes streams: that is decoder, scanner and oracle.
"""

import struct
from dataclasses import dataclass

import crc32c

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import (
    LONG_PAGE_HEADER,
    SHORT_PAGE_HEADER,
    TLI,
    WAL_SEGMENT_SIZE,
    XLOG_BLCKSZ,
    Lsn,
    align_lsn,
    format_lsn,
    page_header_size,
    skip_page_header,
)

# Postgres major -> XLOG_PAGE_MAGIC
PAGE_MAGICS = {14: 0xD10D, 15: 0xD110, 16: 0xD113, 17: 0xD116, 18: 0xD118}
MAJOR_BY_MAGIC = {magic: major for major, magic in PAGE_MAGICS.items()}

# xlp_info
XLP_FIRST_IS_CONTRECORD = 0x0001
XLP_LONG_HEADER = 0x0002
XLP_BKP_REMOVABLE = 0x0004
XLP_FIRST_IS_OVERWRITE_CONTRECORD = 0x0008

RM_XLOG = 0
XLOG_CHECKPOINT_SHUTDOWN = 0x00
XLOG_CHECKPOINT_ONLINE = 0x10
XLOG_SWITCH = 0x40
XLR_BLOCK_ID_DATA_SHORT = 255
XLR_BLOCK_ID_DATA_LONG = 254

# magic u16, info u16, tli u32, pageaddr u64, rem_len u32, pad; the long header goes on with sysid u64, seg_size u32, blcksz u32
_SHORT_HEADER = struct.Struct("<HHIQI4x")
_LONG_TAIL = struct.Struct("<QII")
# tot_len u32, xid u32, prev u64, info u8, rmid u8, pad, crc u32
RECORD_HEADER = struct.Struct("<IIQBB2xI")
RECORD_HEADER_SIZE = RECORD_HEADER.size
_CRC_OFFSET = 20
MAX_RECORD = 1020 * 1024 * 1024


def page_magic(pg_major: int) -> int:
    """The magic of a WAL page of this major. Raises ValueError when the major is not known."""
    try:
        return PAGE_MAGICS[pg_major]
    except KeyError:
        raise ValueError(f"no WAL page magic known for Postgres {pg_major}") from None


@dataclass(frozen=True, slots=True)
class PageHeader:
    """XLogPageHeaderData, and XLogLongPageHeaderData on the first page of a segment."""

    magic: int
    info: int
    tli: int
    page_addr: Lsn
    remaining_len: int
    """Bytes of the record that continues on this page, 0 when none does."""
    system_identifier: int = 0
    segment_size: int = 0
    block_size: int = 0

    @property
    def size(self) -> int:
        """Bytes of this header on disk: 40 when long, else 24."""
        return LONG_PAGE_HEADER if self.info & XLP_LONG_HEADER else SHORT_PAGE_HEADER

    def to_bytes(self) -> bytes:
        """The header as on disk."""
        head = _SHORT_HEADER.pack(self.magic, self.info, self.tli, self.page_addr, self.remaining_len)
        if self.info & XLP_LONG_HEADER:
            return head + _LONG_TAIL.pack(self.system_identifier, self.segment_size, self.block_size)
        return head


def parse_page_header(data: bytes | memoryview) -> PageHeader:
    """Read the header at the start of a page. Raises CorruptionError when the bytes are too few; judges nothing else."""
    if len(data) < SHORT_PAGE_HEADER:
        raise CorruptionError(f"a WAL page header needs {SHORT_PAGE_HEADER} bytes, there are {len(data)}")
    magic, info, tli, page_addr, remaining = _SHORT_HEADER.unpack_from(data)
    if not info & XLP_LONG_HEADER:
        return PageHeader(magic, info, tli, Lsn(page_addr), remaining)
    if len(data) < LONG_PAGE_HEADER:
        raise CorruptionError(f"a long WAL page header needs {LONG_PAGE_HEADER} bytes, there are {len(data)}")
    return PageHeader(magic, info, tli, Lsn(page_addr), remaining, *_LONG_TAIL.unpack_from(data, SHORT_PAGE_HEADER))


def build_page_header(
    page_addr: int,
    *,
    pg_major: int,
    system_identifier: int,
    remaining_len: int = 0,
    segment_size: int = WAL_SEGMENT_SIZE,
    tli: int = TLI,
    info: int = 0,
) -> bytes:
    """The header of the page at `page_addr`: long at a segment start. `remaining_len` > 0 sets FIRST_IS_CONTRECORD."""
    if page_addr % XLOG_BLCKSZ:
        raise ValueError(f"{format_lsn(page_addr)} is not the start of a WAL page")
    if remaining_len:
        info |= XLP_FIRST_IS_CONTRECORD
    if page_addr % segment_size == 0:
        info |= XLP_LONG_HEADER
    return PageHeader(
        page_magic(pg_major), info, tli, Lsn(page_addr), remaining_len, system_identifier, segment_size, XLOG_BLCKSZ
    ).to_bytes()


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """XLogRecord."""

    tot_len: int
    xid: int
    prev: Lsn
    info: int
    rmid: int
    crc: int


def parse_record_header(data: bytes | memoryview, offset: int = 0) -> RecordHeader:
    """Read the 24 bytes of a record's header."""
    tot_len, xid, prev, info, rmid, crc = RECORD_HEADER.unpack_from(data, offset)
    return RecordHeader(tot_len, xid, Lsn(prev), info, rmid, crc)


def record_crc(record: bytes | memoryview) -> int:
    """The CRC that belongs into the header of this whole record: over the body first, then the header before xl_crc."""
    return crc32c.crc32c(record[:_CRC_OFFSET], crc32c.crc32c(record[RECORD_HEADER_SIZE:]))


def build_record(rmid: int, info: int, main_data: bytes, *, prev_lsn: int, xid: int = 0) -> bytes:
    """A record with main data only, with its CRC; not padded."""
    if not main_data:
        body = b""
    elif len(main_data) < 256:
        body = struct.pack("<BB", XLR_BLOCK_ID_DATA_SHORT, len(main_data)) + main_data
    else:
        body = struct.pack("<BI", XLR_BLOCK_ID_DATA_LONG, len(main_data)) + main_data
    unsigned = RECORD_HEADER.pack(RECORD_HEADER_SIZE + len(body), xid, prev_lsn, info, rmid, 0) + body
    return unsigned[:_CRC_OFFSET] + struct.pack("<I", record_crc(unsigned)) + body


def build_shutdown_checkpoint_record(checkpoint: bytes, *, prev_lsn: int) -> bytes:
    """The XLOG_CHECKPOINT_SHUTDOWN record around a CheckPoint struct, whose redo must be the record's own start."""
    return build_record(RM_XLOG, XLOG_CHECKPOINT_SHUTDOWN, checkpoint, prev_lsn=prev_lsn)


def record_start(lsn: int, segment_size: int = WAL_SEGMENT_SIZE) -> Lsn:
    """Where a record inserted at this end of WAL begins: aligned, and past the page header at a page start."""
    return skip_page_header(align_lsn(lsn), segment_size)


def record_end(start_lsn: int, length: int, segment_size: int = WAL_SEGMENT_SIZE) -> Lsn:
    """The end LSN (EndRecPtr, 8-aligned) of a record of `length` bytes that starts at `start_lsn`."""
    lsn, left = start_lsn, length
    while True:
        lsn = skip_page_header(lsn, segment_size)
        fits = min(left, XLOG_BLCKSZ - lsn % XLOG_BLCKSZ)
        lsn += fits
        left -= fits
        if not left:
            return align_lsn(lsn)


def place_record(
    start_lsn: int,
    record: bytes,
    *,
    pg_major: int,
    system_identifier: int,
    segment_size: int = WAL_SEGMENT_SIZE,
    tli: int = TLI,
) -> list[tuple[Lsn, bytes]]:
    """The writes that put a record into WAL at `start_lsn` (a `record_start`): (position, bytes) in order of position.

    When the record is the first of its page, the page's header is written too; so are the headers of all pages it runs
    into, as continuations. The last write ends with the padding to 8 bytes, so that it ends at `record_end`.
    """
    padded = record + bytes(-len(record) % 8)
    header_size = page_header_size(start_lsn - start_lsn % XLOG_BLCKSZ, segment_size)
    first_of_page = start_lsn % XLOG_BLCKSZ == header_size
    if start_lsn % 8 or (start_lsn % XLOG_BLCKSZ < header_size):
        raise ValueError(f"no record can start at {format_lsn(start_lsn)}")
    writes = []
    offset, lsn = 0, start_lsn
    while offset < len(padded):
        page = lsn - lsn % XLOG_BLCKSZ
        header = b""
        if offset or first_of_page:
            header = build_page_header(
                page,
                pg_major=pg_major,
                system_identifier=system_identifier,
                remaining_len=len(record) - offset if offset else 0,
                segment_size=segment_size,
                tli=tli,
            )
            lsn = page + len(header)
        part = padded[offset : offset + XLOG_BLCKSZ - lsn % XLOG_BLCKSZ]
        writes.append((Lsn(lsn - len(header)), header + part))
        offset += len(part)
        lsn += len(part)
    return writes

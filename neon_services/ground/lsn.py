"""Log sequence numbers: byte positions in the WAL stream, and the arithmetic of WAL pages and segments.

An LSN is an unsigned 64-bit byte position. Its text form is ``X/X``: the high and the low 32 bits in upper-case hex
without padding. 0 means "no position".
"""

from typing import NewType

Lsn = NewType("Lsn", int)

INVALID_LSN = Lsn(0)
MAX_LSN = Lsn(0xFFFF_FFFF_FFFF_FFFF)
XLOG_BLCKSZ = 8192
WAL_SEGMENT_SIZE = 16 * 1024 * 1024
SHORT_PAGE_HEADER = 24
LONG_PAGE_HEADER = 40
TLI = 1  # Neon WAL always stays on Postgres timeline 1


def parse_lsn(text: str) -> Lsn:
    """Read ``X/X``. Raises ValueError that quotes the text when it is not an LSN."""
    high, slash, low = text.partition("/")
    if slash and 1 <= len(high) <= 8 and 1 <= len(low) <= 8:
        try:
            if not set(high + low) - set("0123456789abcdefABCDEF"):
                return Lsn(int(high, 16) << 32 | int(low, 16))
        except ValueError:
            pass
    raise ValueError(f"not an LSN: {text!r} (expected two hexadecimal numbers like 0/169AD58)")


def format_lsn(lsn: int) -> str:
    """Write an LSN as ``X/X``."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFF_FFFF:X}"


def align_lsn(lsn: int) -> Lsn:
    """Round up to the 8-byte alignment of WAL records."""
    return Lsn((lsn + 7) & ~7)


def segment_number(lsn: int, segment_size: int = WAL_SEGMENT_SIZE) -> int:
    """The number of the WAL segment that holds the byte at this position."""
    return lsn // segment_size


def segment_file_name(segment: int, segment_size: int = WAL_SEGMENT_SIZE, tli: int = TLI) -> str:
    """Postgres's 24-digit file name of a WAL segment."""
    per_log = 0x1_0000_0000 // segment_size
    return f"{tli:08X}{segment // per_log:08X}{segment % per_log:08X}"


def parse_segment_file_name(name: str, segment_size: int = WAL_SEGMENT_SIZE) -> int:
    """The segment number of a 24-digit WAL file name. Raises ValueError when the name is not one."""
    if len(name) != 24 or set(name) - set("0123456789ABCDEF"):
        raise ValueError(f"not a WAL segment file name: {name!r}")
    return int(name[8:16], 16) * (0x1_0000_0000 // segment_size) + int(name[16:24], 16)


def page_header_size(page_start: int, segment_size: int = WAL_SEGMENT_SIZE) -> int:
    """Bytes of the header of the WAL page that begins here: long at the start of a segment, else short."""
    return LONG_PAGE_HEADER if page_start % segment_size == 0 else SHORT_PAGE_HEADER


def skip_page_header(lsn: int, segment_size: int = WAL_SEGMENT_SIZE) -> Lsn:
    """Where a record that starts at or after this position really begins: past the page header at a page start."""
    if lsn % XLOG_BLCKSZ == 0:
        return Lsn(lsn + page_header_size(lsn, segment_size))
    return Lsn(lsn)

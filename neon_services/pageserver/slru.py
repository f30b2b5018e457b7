"""SLRUs: transaction status, multixact members and offsets, as segments of 32 pages.

Invariant: a segment is in the directory of its SLRU exactly when it has a size, and all pages below the size have values.
"""

import struct

from neon_services.ground.errors import CorruptionError
from neon_services.pageserver import keys
from neon_services.pageserver.keys import PAGE_SIZE
from neon_services.pageserver.native_records import CLOG_XIDS_PER_PAGE
from neon_services.pageserver.timeline import Timeline

MASK32 = 0xFFFF_FFFF


def encode_segments(segments: set[int]) -> bytes:
    """SlruSegmentDirectory, bincode-BE: count u64, then u32 numbers."""
    return struct.pack(f">Q{len(segments)}I", len(segments), *sorted(segments))


def decode_segments(value: bytes) -> set[int]:
    """The inverse of ``encode_segments``. Raises CorruptionError."""
    if len(value) < 8 or len(value) != 8 + 4 * int.from_bytes(value[:8], "big"):
        raise CorruptionError(f"an SLRU directory is malformed ({len(value)} bytes): restore the layer from remote storage")
    return set(struct.unpack(f">{(len(value) - 8) // 4}I", value[8:]))


async def list_segments(timeline: Timeline, kind: int, lsn: int) -> list[tuple[int, int]]:
    """(segment number, pages) of an SLRU at an LSN, sorted."""
    numbers = sorted(decode_segments(await timeline.get(*keys.slru_directory(kind), lsn)))
    halves = [keys.slru_segment_size(kind, number) for number in numbers]
    sizes = await timeline.get_many([hi for hi, _ in halves], [lo for _, lo in halves], lsn)
    for size in sizes:
        if isinstance(size, Exception):
            raise size
    return [(number, int.from_bytes(size, "little")) for number, size in zip(numbers, sizes, strict=True)]


async def read_segment(timeline: Timeline, kind: int, segment: int, pages: int, lsn: int) -> bytes:
    """The pages of a segment, 8192 bytes each (a clog page without its commit time)."""
    halves = [keys.slru_block(kind, segment, block) for block in range(pages)]
    values = await timeline.get_many([hi for hi, _ in halves], [lo for _, lo in halves], lsn)
    for value in values:
        if isinstance(value, Exception):
            raise value
    return b"".join(value[:PAGE_SIZE] for value in values)


def _xid_precedes(first: int, second: int) -> bool:
    """Whether a transaction id is older, modulo 2^32; permanent ids (below 3) compare as plain numbers."""
    if first < 3 or second < 3:
        return first < second
    return (first - second & MASK32) >= 0x8000_0000


def clog_page_precedes(first: int, second: int) -> bool:
    """Whether all transactions of one clog page are older than all of another, modulo 2^32."""
    xid_first = first * CLOG_XIDS_PER_PAGE + 4 & MASK32
    xid_second = second * CLOG_XIDS_PER_PAGE + 4 & MASK32
    last_of_second = xid_second + CLOG_XIDS_PER_PAGE - 1 & MASK32
    return _xid_precedes(xid_first, xid_second) and _xid_precedes(xid_first, last_of_second)


def clog_segments_before(segments: set[int], cutoff_page: int) -> set[int]:
    """The segments whose pages all precede the page from which clog is kept."""
    per_segment = keys.SLRU_PAGES_PER_SEGMENT
    cutoff = cutoff_page - cutoff_page % per_segment
    return {
        segment
        for segment in segments
        if clog_page_precedes(segment * per_segment, cutoff)
        and clog_page_precedes(segment * per_segment + per_segment - 1, cutoff)
    }

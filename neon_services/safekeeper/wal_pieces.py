"""What the log writes: pieces of received WAL, and the page headers in front of a log that begins in mid-segment."""

from collections.abc import Iterator

from neon_services.ground.lsn import XLOG_BLCKSZ, page_header_size
from neon_services.wal.framing import PAGE_MAGICS, build_page_header


def split(views: list[memoryview | bytes], size: int) -> tuple[list[memoryview | bytes], list[memoryview | bytes]]:
    """The first ``size`` bytes and the rest."""
    head: list[memoryview | bytes] = []
    for index, view in enumerate(views):
        if len(view) > size:
            whole = memoryview(view)
            head.append(whole[:size])
            return head, [whole[size:], *views[index + 1 :]]
        head.append(view)
        size -= len(view)
    return head, []


def first_page_headers(lsn: int, segment_size: int, pg_version: int, system_id: int) -> Iterator[tuple[int, bytes]]:
    """Headers of the segment's first page and of the page that the position lies in, for a log that begins in mid-segment."""
    major = pg_version // 10000
    if major not in PAGE_MAGICS:
        return
    for page in sorted({lsn - lsn % segment_size, lsn - lsn % XLOG_BLCKSZ}):
        if lsn - page >= page_header_size(page, segment_size):
            yield page, build_page_header(page, pg_major=major, system_identifier=system_id, segment_size=segment_size)

"""Commit status at the tip, kept in memory so that its pages get a fresh image now and then.

Invariant: a page in memory has all changes up to the rows that have been put. After ``IMAGE_INTERVAL`` changes the next
hand-over stores it whole, so that reading a clog page (each basebackup reads all of them) never has to apply more than about
that many records and one batch's.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neon_services.pageserver import keys
from neon_services.pageserver.ingest_rows import RowBuilder
from neon_services.pageserver.keys import PAGE_SIZE
from neon_services.pageserver.native_records import CLOG_XIDS_PER_PAGE
from neon_services.pageserver.timeline import MissingKey, Timeline

IMAGE_INTERVAL = 512
PAGES_MAX = 8
COMMITTED, ABORTED = 1, 2


@dataclass(slots=True)
class _Page:
    status: npt.NDArray[np.uint8]
    changes: int = 0  # since the last image
    lsn: int = 0  # of the newest change
    commit_lsn: int = 0  # of the newest commit
    commit_time: bytes = b""  # 8 bytes as stored behind the page; empty: no commit yet


class ClogTip:
    """The clog pages that are being written to."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._pages: dict[int, _Page] = {}

    async def prefetch(self, numbers: Iterable[int]) -> None:
        """Load pages that are about to be changed."""
        missing = [number for number in numbers if number not in self._pages]
        if not missing:
            return
        halves = [keys.slru_page(keys.CLOG, number) for number in missing]
        lsn = self._timeline.last_record_lsn
        values = await self._timeline.get_many([hi for hi, _ in halves], [lo for _, lo in halves], lsn)
        for number, value in zip(missing, values, strict=True):
            if isinstance(value, MissingKey):
                continue  # a record of this batch makes it
            if isinstance(value, Exception):
                raise value
            status = np.frombuffer(value, np.uint8, PAGE_SIZE).copy()
            # a long history, which an earlier process left, is cut short at the next change
            self._pages[number] = _Page(status, IMAGE_INTERVAL, commit_time=value[PAGE_SIZE:])

    def zeroed(self, number: int) -> None:
        """The page was made anew."""
        self._pages[number] = _Page(np.zeros(PAGE_SIZE, np.uint8))

    def changed(self, number: int, xids: Sequence[int] | npt.NDArray[np.integer], status: int, lsn: int) -> None:
        """Transactions of one page have ended; ``lsn`` is that of the newest."""
        page = self._pages.get(number)
        if page is None:
            return
        within = np.asarray(xids, np.int64) % CLOG_XIDS_PER_PAGE
        shift = (within % 4 * 2).astype(np.uint8)
        np.bitwise_and.at(page.status, within // 4, ~(np.uint8(3) << shift))
        np.bitwise_or.at(page.status, within // 4, np.uint8(status) << shift)
        page.changes += len(within)
        page.lsn = max(page.lsn, lsn)

    def committed(self, number: int, lsn: int, time_us: int) -> None:
        """The time of a commit on the page; of several, the newest counts."""
        page = self._pages.get(number)
        if page is not None and lsn >= page.commit_lsn:
            page.commit_lsn, page.commit_time = lsn, struct.pack(">q", time_us)

    def forget(self, segments: Iterable[int]) -> None:
        """Segments are gone."""
        gone = set(segments)
        self._pages = {n: page for n, page in self._pages.items() if n // keys.SLRU_PAGES_PER_SEGMENT not in gone}

    def put_images(self, rows: RowBuilder) -> None:
        """Store the pages that have changed much. All changes up to here must have been told."""
        for number, page in self._pages.items():
            if page.changes >= IMAGE_INTERVAL and page.lsn:
                rows.put_image(keys.slru_page(keys.CLOG, number), page.lsn, page.status.tobytes() + page.commit_time)
                page.changes = 0
        while len(self._pages) > PAGES_MAX:
            del self._pages[min(self._pages, key=lambda number: self._pages[number].lsn)]

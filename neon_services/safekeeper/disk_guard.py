"""A safekeeper stops accepting WAL before its disk is full, and goes on by itself when there is room.

Three limits: bytes of one timeline (--max-timeline-disk-usage-bytes), part of the file system that may be used
(--max-global-disk-usage-ratio), and a floor that is always on: room for four segments stays free, because segments are made
ahead of need and control files must be replaceable. It takes room for a fifth to accept WAL again, else it would flap.
Only proposers are refused; readers, uploads and removal go on, so the way out stays open.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from neon_services.ground import failpoints
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import WAL_SEGMENT_SIZE
from neon_services.safekeeper import metrics
from neon_services.safekeeper.timelines import Timelines

log = logging.getLogger(__name__)

FLOOR_SEGMENTS = 4
FLOOR_CHECK_INTERVAL_S = 1.0
_GLOBAL_USAGE = failpoints.declare("sk-global-disk-usage")


class DiskLimitReached(NeonError):
    """WAL is refused because it would fill the disk."""


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """A file system's bytes; ``available`` is what this process may still use."""

    capacity: int
    available: int

    @classmethod
    def of(cls, directory: Path) -> "DiskSpace":
        """Ask the system. Raises OSError."""
        found = os.statvfs(directory)
        return cls(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    @property
    def used(self) -> int:
        """Bytes that are not available."""
        return self.capacity - self.available


def floor_bytes(segment_sizes: Iterable[int], *, refusing: bool) -> int:
    """How much must stay free with timelines of these segment sizes, or be free again."""
    return (FLOOR_SEGMENTS + refusing) * max(segment_sizes, default=WAL_SEGMENT_SIZE)


def refusal_below_floor(space: DiskSpace, floor: int) -> str | None:
    """Why the disk accepts no WAL; None when it does."""
    if space.available >= floor:
        return None
    return f"the disk is nearly full: {space.available} bytes are free, at least {floor} must stay free to accept WAL"


def refusal_above_ratio(space: DiskSpace, max_ratio: float) -> str | None:
    """The same for the part of the disk that may be used; 0 is no limit."""
    if not max_ratio or space.used <= max_ratio * space.capacity:
        return None
    return (
        f"Global disk usage exceeded limit: {space.used} of {space.capacity} bytes are used, the limit is {max_ratio:g} of them"
    )


def refusal_of_timeline(usage_bytes: int, max_bytes: int) -> str | None:
    """The same for one timeline; 0 is no limit."""
    if not max_bytes or usage_bytes <= max_bytes:
        return None
    return f"WAL storage utilization exceeds configured limit of {max_bytes} bytes: current disk usage: {usage_bytes} bytes"


def _pretended(space: DiskSpace) -> DiskSpace:
    """With the failpoint sk-global-disk-usage set to return(N), N bytes are used; without a number none."""
    hit = _GLOBAL_USAGE.hit()
    if hit is None:
        return space
    used = int(hit.value) if hit.value is not None and hit.value.isascii() and hit.value.isdecimal() else 0
    return DiskSpace(space.capacity, max(0, space.capacity - used))


class DiskGuard:
    """Keeps ``Timelines.disk_refusal`` true."""

    def __init__(
        self,
        timelines: Timelines,
        datadir: Path,
        *,
        max_ratio: float = 0.0,
        ratio_interval_s: float = 60.0,
        space: Callable[[Path], DiskSpace] = DiskSpace.of,
    ) -> None:
        self._timelines = timelines
        self._datadir = datadir
        self._max_ratio = max_ratio
        self._ratio_interval_s = ratio_interval_s
        self._space = space
        self._above_ratio: str | None = None
        self._next_ratio_check = float("-inf")
        timelines.on_segment = self.look

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(min(FLOOR_CHECK_INTERVAL_S, self._ratio_interval_s))

    def look(self) -> None:
        """Ask the system and decide: every second, and whenever a segment was begun. Takes microseconds."""
        try:
            with metrics.GLOBAL_DISK_UTILIZATION_CHECK_SECONDS.time():
                space = _pretended(self._space(self._datadir))
        except OSError as error:
            log.error("%s: cannot ask how full the disk is: %s", self._datadir, error)
        else:
            self.judge(space, time.monotonic())

    def judge(self, space: DiskSpace, now: float) -> None:
        """Decide whether WAL is accepted; the ratio is looked at no more often than its interval says."""
        if now >= self._next_ratio_check:
            self._next_ratio_check = now + self._ratio_interval_s
            self._above_ratio = refusal_above_ratio(space, self._max_ratio)
        before = self._timelines.disk_refusal
        sizes = (timeline.segment_size for timeline in self._timelines.all())
        refusal = self._above_ratio or refusal_below_floor(space, floor_bytes(sizes, refusing=before is not None))
        self._timelines.disk_refusal = refusal
        if refusal is not None:
            for timeline in self._timelines.all():
                timeline.store.recall()
        metrics.WAL_REFUSED.set(refusal is not None)
        if refusal is not None and before is None:
            log.error("WAL is refused from now on: %s", refusal)
        elif refusal is None and before is not None:
            log.warning("there is room again: WAL is accepted")

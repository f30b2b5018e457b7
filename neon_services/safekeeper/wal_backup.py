"""Full WAL segments go to object storage.

Invariants: only segments wholly below commit_lsn are sent, so an object is never replaced by other bytes, and two safekeepers
that both think it is their turn do no harm. backup_lsn moves only over segments that are in the bucket, in order.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from neon_services.ground import failpoints
from neon_services.ground.errors import Cancelled, NeonError
from neon_services.ground.ids import TimelineId
from neon_services.ground.lsn import Lsn, format_lsn, segment_file_name
from neon_services.safekeeper import metrics
from neon_services.safekeeper.segment_check import read_segment
from neon_services.safekeeper.timeline import Timeline

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.01
MAX_BACKOFF_S = 5.0
#: No more than so many bytes of one timeline are in memory at a time.
MAX_BYTES_IN_FLIGHT = 128 * 1024 * 1024
_BEFORE_UPLOADS = failpoints.declare("backup-lsn-range-pausable", can_wait=True)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A member that the broker told about not long ago."""

    node_id: int
    local_start_lsn: Lsn
    commit_lsn: Lsn


def elect_offloader(
    timeline_id: TimelineId,
    candidates: Iterable[Candidate],
    backup_lsn: Lsn,
    *,
    max_offloader_lag: int,
    max_reelect_lag: int = 0,
) -> int | None:
    """Which member sends the timeline's segments; None when nobody can. Every member finds the same one by itself.

    It must have the WAL from backup_lsn on and be close to the newest known commit_lsn. When the backlog has grown to
    ``max_reelect_lag`` bytes (0 = never), the one whose turn it is does not get ahead, and another takes over.
    """
    known = list(candidates)
    commit_lsn = max((c.commit_lsn for c in known), default=Lsn(0))
    able = sorted(
        c.node_id for c in known if c.local_start_lsn <= backup_lsn and c.commit_lsn >= commit_lsn - max_offloader_lag
    )
    if not able:
        return None
    number = int.from_bytes(timeline_id.raw, "big")
    chosen = able[number % len(able)]
    if max_reelect_lag and commit_lsn - backup_lsn >= max_reelect_lag and len(able) > 1:
        able.remove(chosen)
        chosen = able[number % len(able)]
    return chosen


def backup_required(computes: int, commit_lsn: Lsn, backup_lsn: Lsn, segment_size: int) -> bool:
    """Whether somebody must be ready to send segments: there is a full one, or there soon will be."""
    return computes > 0 or commit_lsn // segment_size > backup_lsn // segment_size


def backoff_s(failures: int) -> float:
    """How long to wait after so many failures in a row."""
    return min(FIRST_BACKOFF_S * 2 ** min(failures - 1, 20), MAX_BACKOFF_S)


@dataclass(slots=True)
class UploadWindow:
    """Several segments are under way at once; what they complete is counted in order."""

    segment_size: int
    jobs: int
    _under_way: set[int] = field(default_factory=set)
    _done: set[int] = field(default_factory=set)

    def next(self, backup_lsn: Lsn, commit_lsn: Lsn) -> list[int]:
        """Segments to start now: wholly below commit_lsn, from backup_lsn on, no more than ``jobs`` at once."""
        first, end = backup_lsn // self.segment_size, commit_lsn // self.segment_size
        end = min(end, first + self.jobs)
        started = [s for s in range(first, end) if s not in self._under_way and s not in self._done]
        started = started[: self.jobs - len(self._under_way)]
        self._under_way.update(started)
        return started

    def finished(self, segment: int, backup_lsn: Lsn) -> Lsn:
        """A segment is in the bucket; the new backup_lsn."""
        self._under_way.discard(segment)
        self._done.add(segment)
        first = reached = backup_lsn // self.segment_size
        while reached in self._done:
            reached += 1
        self._done = {s for s in self._done if s >= reached}
        return backup_lsn if reached == first else Lsn(reached * self.segment_size)


async def upload_segment(timeline: Timeline, segment: int) -> None:
    """Check one full, committed segment and put it into the bucket. Raises NeonError, OSError."""
    remote = timeline.remote
    assert remote is not None
    size = timeline.segment_size
    start = timeline.acceptor.state.timeline_start_lsn
    content = await asyncio.to_thread(read_segment, timeline.directory, segment, size, start, (segment + 1) * size)
    if timeline.cancelled:
        raise Cancelled(f"timeline {timeline.ttid} is being deleted or shut down")
    await timeline.unbroken(remote.storage.put(remote.segment_key(segment, size), content))


class WalBackup:
    """Sends one timeline's segments until stopped. ``news`` is set when commit_lsn or backup_lsn moved."""

    def __init__(self, timeline: Timeline, permits: asyncio.Semaphore, jobs: int) -> None:
        self._timeline = timeline
        self._permits = permits
        size = timeline.segment_size
        self._window = UploadWindow(size, max(1, min(jobs, MAX_BYTES_IN_FLIGHT // size)))
        self.news = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        acceptor = self._timeline.acceptor
        async with asyncio.TaskGroup() as tasks:
            while True:
                self.news.clear()
                for segment in self._window.next(acceptor.backup_lsn, acceptor.commit_lsn):
                    tasks.create_task(self._send(segment))
                await self.news.wait()

    async def _send(self, segment: int) -> None:
        timeline, acceptor = self._timeline, self._timeline.acceptor
        end = (segment + 1) * timeline.segment_size
        failures = 0
        await _BEFORE_UPLOADS.reach()
        while acceptor.backup_lsn < end and not timeline.cancelled:  # else another member was faster
            try:
                async with self._permits:
                    await upload_segment(timeline, segment)
                metrics.BACKED_UP_SEGMENTS.inc()
                break
            except (NeonError, OSError) as error:
                failures += 1
                metrics.BACKUP_ERRORS.inc()
                name = segment_file_name(segment, timeline.segment_size)
                level = logging.WARNING if failures in (1, 100) else logging.DEBUG
                log.log(level, "timeline %s: sending segment %s failed, trying again: %s", timeline.ttid, name, error)
                await asyncio.sleep(backoff_s(failures))
        moved = self._window.finished(segment, acceptor.backup_lsn)
        if moved > acceptor.backup_lsn:
            acceptor.backup_lsn = moved
            log.debug("timeline %s: backup_lsn %s", timeline.ttid, format_lsn(moved))
            timeline.on_change(timeline)
        self.news.set()

"""What a safekeeper does with object storage in the background, for every timeline: when each piece of work begins and ends.

Invariant: per timeline at most one task of each kind runs. The decisions are made whenever the manager looks at the timeline,
from its state at that moment; the tasks themselves look again before they change anything that cannot be undone.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from neon_services.ground.errors import NeonError
from neon_services.safekeeper import metrics
from neon_services.safekeeper.config import OffloadConfig
from neon_services.safekeeper.eviction import evict, look, may_evict
from neon_services.safekeeper.partial_backup import back_up_partial, describe, garbage, is_uploaded
from neon_services.safekeeper.removal import remove_wal
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.wal_backup import Candidate, WalBackup, backoff_s, backup_required, elect_offloader

log = logging.getLogger(__name__)

MAX_EVICTIONS = 2


@dataclass(slots=True)
class _Work:
    """What is under way for one timeline. Times are of the monotonic clock."""

    min_resident_s: float
    backup: WalBackup | None = None
    backup_task: asyncio.Task[None] | None = None
    chosen: int | None = None
    reelected: bool = False
    failures: dict[str, int] = field(default_factory=dict)
    not_before: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    partial_segment: int = -1
    partial_due: float = 0.0


class Offload:
    """Begins and ends the work."""

    def __init__(self, config: OffloadConfig, node_id: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._node_id = node_id
        self._clock = clock
        self._random = random.Random()
        self._permits = asyncio.Semaphore(config.backup_parallel_jobs)
        self._partial_permits = asyncio.Semaphore(config.partial_backup_concurrency)
        self._eviction_permits = asyncio.Semaphore(MAX_EVICTIONS)
        self._work: dict[Timeline, _Work] = {}

    @property
    def backs_up(self) -> bool:
        """Whether this safekeeper sends WAL."""
        return self._config.wal_backup

    def required(self, timeline: Timeline) -> bool:
        """Whether some member must be ready to send the timeline's WAL."""
        acceptor = timeline.acceptor
        return self.backs_up and backup_required(
            timeline.computes, acceptor.commit_lsn, acceptor.backup_lsn, timeline.segment_size
        )

    def tend(self, timeline: Timeline) -> None:
        """One look at one timeline."""
        work = self._work.get(timeline)
        if work is None:
            work = self._work[timeline] = _Work(self._config.eviction_min_resident_s * self._random.uniform(1.0, 1.5))
        if self.backs_up:
            self._tend_backup(timeline, work)
            self._tend_partial(timeline, work)
        if self._config.eviction:
            self._tend_eviction(timeline, work)

    def prune(self, alive: set[Timeline]) -> None:
        """End the work for timelines that are gone."""
        for timeline in [t for t in self._work if t not in alive or t.cancelled]:
            work = self._work.pop(timeline)
            self._stop_backup(timeline, work)
            for task in work.tasks.values():
                task.cancel()

    async def stop(self) -> None:
        """End all work; what is on its way to the bucket may still arrive."""
        tasks = [task for work in self._work.values() for task in (*work.tasks.values(), work.backup_task) if task is not None]
        self.prune(set())
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, timeline: Timeline, work: _Work, kind: str, steps: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Start a task unless one of its kind runs or failed a moment ago."""
        if kind in work.tasks or self._clock() < work.not_before.get(kind, 0.0):
            return

        async def supervised() -> None:
            try:
                await steps()
                work.failures.pop(kind, None)
            except Exception as error:
                failures = work.failures[kind] = work.failures.get(kind, 0) + 1
                work.not_before[kind] = self._clock() + 10 * backoff_s(failures)
                unforeseen = not isinstance(error, NeonError | OSError)
                log.error("timeline %s: %s failed: %s", timeline.ttid, kind, error, exc_info=error if unforeseen else None)
            finally:
                work.tasks.pop(kind, None)
                timeline.on_change(timeline)

        work.tasks[kind] = asyncio.create_task(supervised(), name=f"{kind} of {timeline.ttid}")

    # -- full segments

    def _tend_backup(self, timeline: Timeline, work: _Work) -> None:
        if work.backup_task is not None and work.backup_task.done():
            error = None if work.backup_task.cancelled() else work.backup_task.exception()
            log.error("timeline %s: sending WAL ended, it begins anew", timeline.ttid, exc_info=error)
            self._stop_backup(timeline, work)
        mine = self.required(timeline) and self._elect(timeline, work) == self._node_id
        if mine and work.backup is None:
            work.backup = WalBackup(timeline, self._permits, self._config.backup_parallel_jobs)
            work.backup_task = asyncio.create_task(work.backup.run(), name=f"WAL backup of {timeline.ttid}")
            timeline.offloading = True
            metrics.WAL_BACKUP_TASKS_STARTED.inc()
        elif not mine and work.backup is not None:
            self._stop_backup(timeline, work)
        elif work.backup is not None:
            work.backup.news.set()

    def _stop_backup(self, timeline: Timeline, work: _Work) -> None:
        if work.backup_task is not None:
            work.backup_task.cancel()
            metrics.WAL_BACKUP_TASKS_FINISHED.inc()
        work.backup = work.backup_task = None
        timeline.offloading = False

    def _elect(self, timeline: Timeline, work: _Work) -> int | None:
        heard_after = self._clock() - self._config.heartbeat_timeout_s
        candidates = [
            Candidate(peer.sk_id, peer.local_start_lsn, peer.info.commit_lsn)
            for peer in timeline.peers.values()
            if peer.seen_at >= heard_after
        ]
        backup_lsn = timeline.acceptor.backup_lsn
        max_lag, reelect_lag = self._config.max_offloader_lag, self._config.max_reelect_offloader_lag
        timeline_id = timeline.ttid.timeline_id
        usual = elect_offloader(timeline_id, candidates, backup_lsn, max_offloader_lag=max_lag)
        chosen = elect_offloader(timeline_id, candidates, backup_lsn, max_offloader_lag=max_lag, max_reelect_lag=reelect_lag)
        if (chosen != usual) and not work.reelected:
            metrics.BACKUP_REELECT_LEADER.inc()
            log.warning("timeline %s: safekeeper %s does not get ahead with sending WAL, now %s", timeline.ttid, usual, chosen)
        work.reelected = chosen != usual
        if chosen != work.chosen:
            log.info("timeline %s: safekeeper %s sends its WAL", timeline.ttid, chosen)
            work.chosen = chosen
        return chosen

    # -- removal

    def remove_below(self, timeline: Timeline, segment: int) -> None:
        """The segments with lower numbers are needed by nobody here."""
        if timeline.remote is not None and not timeline.removal_held:
            work = self._work.get(timeline)
            if work is not None:
                self._begin(timeline, work, "removing WAL", lambda: remove_wal(timeline, segment, send_missing=self.backs_up))

    # -- the last segment

    def _tend_partial(self, timeline: Timeline, work: _Work) -> None:
        now, timeout = self._clock(), self._config.partial_backup_timeout_s
        segment = timeline.acceptor.flush_lsn // timeline.segment_size
        if segment != work.partial_segment:
            # after a start not all timelines at once
            wait = timeout if work.partial_segment >= 0 else timeout * self._random.random()
            work.partial_segment, work.partial_due = segment, now + wait
        if timeline.offloaded or now < work.partial_due:
            return
        wanted, segments = describe(timeline), timeline.control.partial_backup
        if (wanted is not None and not is_uploaded(segments, wanted)) or garbage(segments):

            async def steps() -> None:
                async with self._partial_permits:
                    await timeline.unbroken(back_up_partial(timeline))
                work.partial_due = self._clock() + timeout

            self._begin(timeline, work, "sending the partial segment", steps)

    def _tend_eviction(self, timeline: Timeline, work: _Work) -> None:
        view = look(timeline, self._clock())
        if not may_evict(replace(view, unsaved=False), work.min_resident_s):
            return
        if view.unsaved:
            try:
                timeline.run(timeline.acceptor.persist_volatile())
            except NeonError as error:
                log.error("timeline %s: %s", timeline.ttid, error)
                return

        async def steps() -> None:
            async with self._eviction_permits:
                await timeline.unbroken(
                    evict(
                        timeline,
                        min_resident_s=work.min_resident_s,
                        delete_file=self._config.delete_offloaded_wal,
                        clock=self._clock,
                    )
                )

        self._begin(timeline, work, "eviction", steps)

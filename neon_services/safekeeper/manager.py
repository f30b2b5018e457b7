"""What is done for every timeline in the background: saving the control file, deciding whether it is active, removing WAL.

Invariant: WAL leaves a safekeeper only when it is in the bucket as WAL (below the saved backup_lsn) and its effects as layers
(below the saved remote_consistent_lsn). The decisions are functions of the timeline's state; the loop carries them out.
"""

import asyncio
import logging
import time

from neon_services.consensus.acceptor import Acceptor
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn
from neon_services.safekeeper import metrics
from neon_services.safekeeper.disk_guard import refusal_of_timeline
from neon_services.safekeeper.offload import Offload
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines

log = logging.getLogger(__name__)

MIN_INTERVAL_S = 0.3
SWEEP_INTERVAL_S = 5.0


def is_broker_active(acceptor: Acceptor, computes: int, *, backup_required: bool = False) -> bool:
    """Whether the broker should know about the timeline: somebody writes, or committed WAL is not yet where it must go."""
    return backup_required or computes > 0 or acceptor.remote_consistent_lsn < acceptor.commit_lsn


def must_save(acceptor: Acceptor, segment_size: int, since_saved_s: float, save_interval_s: float) -> bool:
    """Whether the LSNs in memory are far enough ahead of the control file, or it is old."""
    state = acceptor.state
    ahead_commit = acceptor.commit_lsn - state.commit_lsn
    ahead_of_others = max(
        acceptor.backup_lsn - state.backup_lsn,
        acceptor.remote_consistent_lsn - state.remote_consistent_lsn,
        acceptor.peer_horizon_lsn - state.peer_horizon_lsn,
    )
    if ahead_commit >= segment_size or ahead_of_others > segment_size:
        return True
    return (ahead_commit > 0 or ahead_of_others > 0) and since_saved_s >= save_interval_s


def removal_horizon(timeline: Timeline, *, walsenders_keep_horizon: bool) -> Lsn:
    """WAL below is needed by nobody. Only saved positions count: those in memory may be lost."""
    state = timeline.acceptor.state
    horizon = min(state.remote_consistent_lsn, state.backup_lsn, state.commit_lsn, timeline.acceptor.flush_lsn)
    if walsenders_keep_horizon:
        received = [s.pageserver.last_received_lsn for s in timeline.senders.values() if s.pageserver is not None]
        horizon = min([horizon, *received])
    return horizon


def removal_waits_for_save(acceptor: Acceptor, segment_size: int) -> bool:
    """Whether a segment could be removed if the LSNs in memory were saved."""
    state = acceptor.state
    saved = min(state.remote_consistent_lsn, state.backup_lsn, state.commit_lsn)
    known = min(acceptor.remote_consistent_lsn, acceptor.backup_lsn, acceptor.commit_lsn)
    return known // segment_size > saved // segment_size


class Manager:
    """Looks at each timeline soon after it changed, at most every 300 ms, and at all of them every few seconds."""

    def __init__(
        self,
        timelines: Timelines,
        *,
        save_interval_s: float,
        walsenders_keep_horizon: bool,
        offload: Offload | None = None,
        max_timeline_disk_usage_bytes: int = 0,
    ) -> None:
        self._timelines = timelines
        self._offload = offload
        self._max_timeline_disk_usage_bytes = max_timeline_disk_usage_bytes
        self._save_interval_s = save_interval_s
        self._walsenders_keep_horizon = walsenders_keep_horizon
        self._changed: set[Timeline] = set()
        self._news = asyncio.Event()
        timelines.on_change = self._on_change

    def _on_change(self, timeline: Timeline) -> None:
        self._changed.add(timeline)
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        next_sweep = 0.0
        while True:
            if time.monotonic() >= next_sweep:
                next_sweep = time.monotonic() + SWEEP_INTERVAL_S
                self._changed.update(self._timelines.all())
                if self._offload is not None:
                    self._offload.prune(set(self._timelines.all()))
            changed, self._changed = self._changed, set()
            self._news.clear()
            for timeline in changed:
                if not timeline.cancelled:
                    self.tend(timeline)
            await asyncio.sleep(MIN_INTERVAL_S)
            try:
                async with asyncio.timeout(max(0.0, next_sweep - time.monotonic())):
                    await self._news.wait()
            except TimeoutError:
                pass

    def tend(self, timeline: Timeline) -> None:
        """One look at one timeline."""
        metrics.MANAGER_ITERATIONS.inc()
        required = self._offload is not None and self._offload.required(timeline)
        active = is_broker_active(timeline.acceptor, timeline.computes, backup_required=required)
        if active != timeline.active:
            timeline.active = active
            timeline.push_once = True
            metrics.MANAGER_ACTIVE_CHANGES.inc()
        since_saved = time.monotonic() - timeline.control_saved_at
        try:
            if must_save(timeline.acceptor, timeline.segment_size, since_saved, self._save_interval_s) or (
                self._offload is not None and removal_waits_for_save(timeline.acceptor, timeline.segment_size)
            ):
                timeline.run(timeline.acceptor.persist_volatile())
        except NeonError as error:
            log.error("timeline %s: %s", timeline.ttid, error)
        if self._offload is not None:
            self._offload.tend(timeline)
            self._remove_wal(timeline, self._offload)
        timeline.wal_refusal = refusal_of_timeline(timeline.disk_usage_bytes, self._max_timeline_disk_usage_bytes)
        if timeline.wal_refusal is not None:
            timeline.store.recall()

    def _remove_wal(self, timeline: Timeline, offload: Offload) -> None:
        horizon = removal_horizon(timeline, walsenders_keep_horizon=self._walsenders_keep_horizon)
        last = horizon // timeline.segment_size - 1
        if last > timeline.removed_segment:
            offload.remove_below(timeline, last + 1)

"""A timeline that nobody uses needs no disk: its last segment stays in object storage only, until somebody needs it.

Invariant: the control file says Offloaded only when every byte of the log is in the bucket: the full segments as such (they
left the disk before), the rest as the Uploaded partial segment, compared byte by byte. The file goes after that is saved.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from neon_services.ground.errors import CorruptionError
from neon_services.ground.remote_storage import ObjectNotFound
from neon_services.safekeeper import metrics
from neon_services.safekeeper.partial_backup import condemn, describe, is_uploaded
from neon_services.safekeeper.segment_check import read_segment
from neon_services.safekeeper.timeline import Timeline

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvictionView:
    """All that the decision rests on."""

    offloaded: bool
    broker_active: bool
    guards: int
    computes: int
    senders: int
    sends_wal: bool
    removal_held: bool
    unsaved: bool
    partial_uploaded: bool
    only_last_segment: bool
    resident_s: float


def look(timeline: Timeline, now: float) -> EvictionView:
    """The timeline as it is now."""
    acceptor = timeline.acceptor
    state = acceptor.state
    wanted = describe(timeline)
    memory = (acceptor.commit_lsn, acceptor.backup_lsn, acceptor.peer_horizon_lsn, acceptor.remote_consistent_lsn)
    return EvictionView(
        offloaded=timeline.offloaded,
        broker_active=timeline.active,
        guards=timeline.guards,
        computes=timeline.computes,
        senders=len(timeline.senders),
        sends_wal=timeline.offloading or timeline.partial_backup_lock.locked(),
        removal_held=timeline.removal_held,
        unsaved=memory != (state.commit_lsn, state.backup_lsn, state.peer_horizon_lsn, state.remote_consistent_lsn),
        # a log that ends with its segment has no partial one, and nothing to evict
        partial_uploaded=wanted is not None and is_uploaded(timeline.control.partial_backup, wanted),
        only_last_segment=acceptor.flush_lsn // timeline.segment_size == timeline.first_local_segment,
        resident_s=now - timeline.resident_since,
    )


def may_evict(view: EvictionView, min_resident_s: float) -> bool:
    """Whether nobody needs the timeline's WAL here, and all of it is in the bucket."""
    in_use = view.broker_active or view.guards or view.computes or view.senders or view.sends_wal or view.removal_held
    everything_safe = view.partial_uploaded and view.only_last_segment and not view.unsaved
    return not view.offloaded and not in_use and everything_safe and view.resident_s >= min_resident_s


async def evict(timeline: Timeline, *, min_resident_s: float, delete_file: bool, clock: Callable[[], float]) -> bool:
    """Compare, save, let go of the file. False when the timeline came into use meanwhile. Raises NeonError, OSError."""
    wanted, size, remote = describe(timeline), timeline.segment_size, timeline.remote
    assert wanted is not None and remote is not None
    metrics.EVICTION_EVENTS_STARTED.labels("evict").inc()
    segment, count = wanted.flush_lsn // size, wanted.flush_lsn % size
    start = timeline.acceptor.state.timeline_start_lsn
    local = await asyncio.to_thread(read_segment, timeline.directory, segment, size, start, wanted.flush_lsn)
    key = remote.key(wanted.name)
    try:
        same = await remote.read(key, 0, count) == local
        problem = "its bytes differ from the segment's"
    except (ObjectNotFound, CorruptionError) as error:
        same, problem = False, str(error)
    if not may_evict(look(timeline, clock()), min_resident_s) or describe(timeline) != wanted or timeline.cancelled:
        return False
    if not same:
        # sent again by the next run, from the good bytes here
        timeline.save_partial_backup(condemn(timeline.control.partial_backup, uploaded_too=True))
        raise CorruptionError(f"object {key} is not what was sent there: {problem}; it is sent again")
    timeline.save_eviction(wanted.flush_lsn)
    timeline.store.release()
    if delete_file:
        timeline.store.segments.remove_above(segment - 1)
    metrics.EVICTION_EVENTS_COMPLETED.labels("evict").inc()
    log.info("timeline %s: evicted to object storage", timeline.ttid)
    return True

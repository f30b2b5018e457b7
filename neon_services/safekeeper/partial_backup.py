"""The last, incomplete segment of a timeline that does not move goes to object storage too.

The control file lists every object that is or may be in the bucket, and each step is saved before the next begins:

    InProgress saved -> object put -> it Uploaded, all others Deleting, saved -> those deleted -> list without them, saved

Invariants: at most one entry is Uploaded, and its object is whole. An object whose entry is not Deleting is never deleted. A
name is listed once. So a crash between two steps leaves garbage that is listed, and the next run deletes it.
"""

import asyncio
import logging
from dataclasses import replace

from neon_services.ground.lsn import segment_file_name
from neon_services.safekeeper import metrics
from neon_services.safekeeper.control_file import PartialSegment
from neon_services.safekeeper.segment_check import read_segment
from neon_services.safekeeper.timeline import Timeline

log = logging.getLogger(__name__)

IN_PROGRESS, UPLOADED, DELETING = range(3)
#: With more entries than this (uploads kept failing), the others are deleted before a new one is added.
MAX_ENTRIES = 10
METADATA = {"sk_type": "partial_segment"}

Segments = tuple[PartialSegment, ...]


def partial_name(segment_name: str, term: int, flush_lsn: int, commit_lsn: int, node_id: int) -> str:
    """The object's name. ``term`` is that of the log's end: a vote alone changes nothing that would have to be sent."""
    return f"{segment_name}_{term}_{flush_lsn:016X}_{commit_lsn:016X}_sk{node_id}.partial"


def describe(timeline: Timeline) -> PartialSegment | None:
    """The entry for the log as it ends now; None when its last segment has no bytes, or its begin was never here."""
    acceptor, size = timeline.acceptor, timeline.segment_size
    flush_lsn, commit_lsn = acceptor.flush_lsn, acceptor.commit_lsn
    begin = flush_lsn - flush_lsn % size
    if flush_lsn == begin or acceptor.state.local_start_lsn > max(begin, acceptor.state.timeline_start_lsn):
        return None
    term = acceptor.last_log_term
    name = partial_name(segment_file_name(flush_lsn // size, size), term, flush_lsn, commit_lsn, acceptor.node_id)
    return PartialSegment(IN_PROGRESS, name, commit_lsn, flush_lsn, term)


def uploaded(segments: Segments) -> PartialSegment | None:
    """The entry whose object is in the bucket."""
    return next((part for part in segments if part.status == UPLOADED), None)


def is_uploaded(segments: Segments, wanted: PartialSegment) -> bool:
    """Whether the bucket has exactly this."""
    return replace(wanted, status=UPLOADED) in segments


def begin(segments: Segments, wanted: PartialSegment) -> Segments:
    """Before the object is put. An older entry of the same name is this one: what is to be put must not be deleted."""
    assert not is_uploaded(segments, wanted)
    return (*(part for part in segments if part.name != wanted.name), replace(wanted, status=IN_PROGRESS))


def finish(segments: Segments, name: str) -> Segments:
    """When the object is put: it is the current one, everything else is garbage."""
    return tuple(replace(part, status=UPLOADED if part.name == name else DELETING) for part in segments)


def condemn(segments: Segments, *, uploaded_too: bool = False) -> Segments:
    """What is not known to be whole, or everything, becomes garbage."""
    return tuple(part if part.status == UPLOADED and not uploaded_too else replace(part, status=DELETING) for part in segments)


def garbage(segments: Segments) -> list[str]:
    """Names of the objects to delete."""
    return [part.name for part in segments if part.status == DELETING]


def forget(segments: Segments, names: list[str]) -> Segments:
    """When they are deleted."""
    return tuple(part for part in segments if part.status != DELETING or part.name not in names)


async def back_up_partial(timeline: Timeline) -> None:
    """One run. Raises NeonError, OSError. To be awaited to its end: see Timeline.unbroken()."""
    async with timeline.partial_backup_lock:
        if timeline.cancelled or timeline.offloaded:
            return
        if len(timeline.control.partial_backup) > MAX_ENTRIES:
            timeline.save_partial_backup(condemn(timeline.control.partial_backup))
            await _collect_garbage(timeline)
        wanted = describe(timeline)
        if wanted is not None and not is_uploaded(timeline.control.partial_backup, wanted):
            await _upload(timeline, wanted)
        await _collect_garbage(timeline)


async def _upload(timeline: Timeline, wanted: PartialSegment) -> None:
    remote, size = timeline.remote, timeline.segment_size
    assert remote is not None
    start = timeline.acceptor.state.timeline_start_lsn
    try:
        segment = wanted.flush_lsn // size
        content = await asyncio.to_thread(read_segment, timeline.directory, segment, size, start, wanted.flush_lsn)
        if not still_true(timeline, wanted):
            metrics.PARTIAL_BACKUP_UPLOADS.labels("outdated").inc()
            return
        timeline.save_partial_backup(begin(timeline.control.partial_backup, wanted))
        await remote.storage.put(remote.key(wanted.name), content, metadata=METADATA)
    except BaseException:
        metrics.PARTIAL_BACKUP_UPLOADS.labels("error").inc()
        raise
    if timeline.cancelled:
        return
    if not still_true(timeline, wanted):
        metrics.PARTIAL_BACKUP_UPLOADS.labels("outdated").inc()
        return  # its entry stays InProgress, and becomes garbage with the next run
    timeline.save_partial_backup(finish(timeline.control.partial_backup, wanted.name))
    metrics.PARTIAL_BACKUP_UPLOADS.labels("ok").inc()
    metrics.PARTIAL_BACKUP_UPLOADED_BYTES.inc(len(content))


def still_true(timeline: Timeline, part: PartialSegment) -> bool:
    """Whether the log still contains what was read: it was not cut meanwhile."""
    acceptor = timeline.acceptor
    return not timeline.cancelled and acceptor.last_log_term == part.term and acceptor.flush_lsn >= part.flush_lsn


async def _collect_garbage(timeline: Timeline) -> list[str]:
    names = garbage(timeline.control.partial_backup)
    if names:
        remote = timeline.remote
        assert remote is not None
        await remote.storage.delete([remote.key(name) for name in names])
        if not timeline.cancelled:
            timeline.save_partial_backup(forget(timeline.control.partial_backup, names))
    return names


async def reset_partial_backup(timeline: Timeline) -> list[str]:
    """Delete all objects that the control file lists; their names. The timeline must be resident. Raises NeonError."""
    async with timeline.partial_backup_lock:
        timeline.save_partial_backup(condemn(timeline.control.partial_backup, uploaded_too=True))
        return await _collect_garbage(timeline)

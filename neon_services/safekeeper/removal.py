"""WAL leaves the disk.

Invariant: a segment's file is deleted only when this safekeeper has seen the whole segment in the bucket. What the others say
through the broker (backup_lsn) only tells when to look; an object that is missing is sent again from the file.
"""

import logging

from neon_services.ground.errors import CorruptionError
from neon_services.safekeeper import metrics
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.wal_backup import upload_segment

log = logging.getLogger(__name__)


async def remove_wal(timeline: Timeline, below: int, *, send_missing: bool = True) -> None:
    """Delete the segments with lower numbers, which nobody needs any more here. Raises NeonError, OSError."""
    remote, size = timeline.remote, timeline.segment_size
    if remote is None:
        return
    for segment in sorted(timeline.store.segments.existing()):
        if segment >= below:
            break
        if not await remote.has_segment(segment, size):
            key = remote.segment_key(segment, size)
            if not send_missing:
                raise CorruptionError(
                    f"object {key} is missing or short, and --disable-wal-backup forbids to send it: WAL stays"
                )
            log.error("timeline %s: object %s is missing or short although it was sent: it is sent again", timeline.ttid, key)
            await upload_segment(timeline, segment)
    if timeline.cancelled or timeline.removal_held:
        return
    removed = timeline.store.remove_below(below)
    timeline.removed_segment = max(timeline.removed_segment, below - 1)
    if removed:
        metrics.REMOVED_WAL_SEGMENTS.inc(removed)
        log.info("timeline %s: removed %d WAL segments up to number %d", timeline.ttid, removed, below - 1)

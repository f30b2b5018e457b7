"""Bringing an evicted timeline's last segment back from object storage.

Invariant: the segment's file gets its name only when it is whole, is WAL up to the end that the control file promises, and is
durable. A crash before leaves the timeline evicted; a crash behind leaves a file that the next try finds good.
"""

import asyncio
import os
from pathlib import Path

from neon_services.ground.durable import sync_directory
from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import Lsn, format_lsn
from neon_services.ground.remote_storage import ObjectNotFound
from neon_services.safekeeper.control_file import ControlFile, PartialSegment
from neon_services.safekeeper.remote_wal import RemoteWal
from neon_services.safekeeper.segment_check import check_wal, read_segment
from neon_services.safekeeper.segments import DOWNLOAD_NAME, SegmentDirectory

UPLOADED = 1


def uploaded_partial(control: ControlFile, end: Lsn) -> PartialSegment | None:
    """The partial segment in the bucket that holds the log up to ``end``."""
    return next((p for p in control.partial_backup if p.status == UPLOADED and p.flush_lsn == end), None)


async def bring_back(directory: Path, control: ControlFile, segment_size: int, remote: RemoteWal | None, *, sync: bool) -> None:
    """Have the last segment's file on the disk again. Raises CorruptionError, ObjectNotFound, RemoteStorageError, OSError."""
    end = control.offloaded_flush_lsn
    assert end is not None
    segment = end // segment_size
    start = control.acceptor.timeline_start_lsn
    if SegmentDirectory(directory, segment_size).find(segment) is not None:
        # eviction may leave the file, or a crash
        await asyncio.to_thread(read_segment, directory, segment, segment_size, start, end)
        return
    part = uploaded_partial(control, end)
    if part is None or remote is None:
        why = "this safekeeper has no --remote-storage" if remote is None else "the control file names no such object"
        raise CorruptionError(
            f"{directory}: its WAL up to {format_lsn(end)} is in object storage, but {why}: give the storage that it was "
            f"evicted to, or pull the timeline from another safekeeper"
        )
    key, begin = remote.key(part.name), segment * segment_size
    try:
        content = await remote.read(key, 0, end - begin)
    except ObjectNotFound as error:
        raise CorruptionError(
            f"{directory}: its WAL up to {format_lsn(end)} is missing: {error}; pull the timeline from another safekeeper"
        ) from error
    check_wal(content, begin, max(begin, start), segment_size, f"object {key}")
    await asyncio.to_thread(_install, directory, segment, segment_size, content, sync)


def _install(directory: Path, segment: int, segment_size: int, content: bytes, sync: bool) -> None:
    staged = directory / DOWNLOAD_NAME
    with staged.open("wb") as file:
        file.write(content)
        file.write(bytes(segment_size - len(content)))
        file.flush()
        if sync:
            os.fsync(file.fileno())
    staged.rename(SegmentDirectory(directory, segment_size).partial_path(segment))
    if sync:
        sync_directory(directory)

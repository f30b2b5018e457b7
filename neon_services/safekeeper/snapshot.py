"""The donor's side of pull_timeline: a copy of a timeline as of one moment, streamed while proposers go on appending.

Invariants:

1. The copy is what this safekeeper had on disk at one moment: the control file is saved and taken, and the log's end fixed,
   in one step of the event loop; bytes below that end are only rewritten by a cut of the log, and every cut changes
   last_log_term, which is looked at again after each read and before its bytes are sent.
2. No WAL is removed meanwhile (``Timeline.hold_removal``).
3. A copy that cannot be finished ends without the archive's end mark, so nobody takes it for whole.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from dataclasses import replace

from neon_services.ground import failpoints
from neon_services.ground.errors import Cancelled, NeonError
from neon_services.ground.lsn import Lsn, format_lsn, segment_file_name
from neon_services.safekeeper.control_file import FILE_NAME, ControlFile
from neon_services.safekeeper.segments import PARTIAL_SUFFIX
from neon_services.safekeeper.snapshot_tar import END_OF_ARCHIVE, member_header, member_padding
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.wal_reader import WalNotHere

MAX_SEGMENTS = 1000
CHUNK_BYTES = 1024 * 1024
_AFTER_LIST = failpoints.declare("sk-snapshot-after-list-pausable", can_wait=True)


class SnapshotRefused(NeonError):
    """The timeline cannot be copied as it is now."""


class SnapshotAborted(NeonError):
    """The timeline changed under the copy: another leader, or its deletion. Try again."""


class Snapshot:
    """What is going to be copied: a control file, and the log up to ``end_lsn``. Make and read it while removal is held."""

    def __init__(self, timeline: Timeline, control: ControlFile, begin_lsn: int, end_lsn: Lsn) -> None:
        """Take the log from the segment with ``begin_lsn`` on. Raises SnapshotRefused when it is too long or not here."""
        if timeline.control.offloaded_flush_lsn is not None:
            raise SnapshotRefused(f"the WAL of timeline {timeline.ttid} is in object storage only: bring it back first")
        self._timeline = timeline
        self._term = timeline.acceptor.last_log_term
        # the parts uploaded from here stay ours: the copy has their bytes on its own disk
        self._control = replace(control, partial_backup=()).encode()
        self.end_lsn = end_lsn
        size = timeline.segment_size
        #: Numbers of the segments to copy; none when no WAL was ever written here or all of it is in object storage.
        self.segments = range(0)
        if end_lsn > control.acceptor.local_start_lsn:
            self.segments = range(begin_lsn // size, (end_lsn - 1) // size + 1)
        if len(self.segments) > MAX_SEGMENTS:
            raise SnapshotRefused(
                f"timeline {timeline.ttid} has {len(self.segments)} WAL segments from {format_lsn(begin_lsn)} to "
                f"{format_lsn(end_lsn)}, more than the {MAX_SEGMENTS} that a copy may have: wait for its offloading"
            )
        here = timeline.store.segments.existing() if self.segments else {}
        missing = [segment_file_name(segment, size) for segment in self.segments if segment not in here]
        if missing:
            raise SnapshotRefused(f"timeline {timeline.ttid} lacks WAL on this safekeeper's disk, first segment {missing[0]}")

    @classmethod
    def of(cls, timeline: Timeline) -> "Snapshot":
        """The timeline as it is now, for another member; saves the control file. Raises as above, Cancelled, WalStoreError."""
        timeline.run(timeline.acceptor.persist_volatile())
        state, end_lsn = timeline.acceptor.state, timeline.store.flush_lsn
        begin = min(state.remote_consistent_lsn, state.backup_lsn, state.commit_lsn, end_lsn)
        return cls(timeline, timeline.control, max(begin, state.local_start_lsn), end_lsn)

    async def stream(self) -> AsyncGenerator[bytes]:
        """The archive in pieces. Raises SnapshotAborted, WalNotHere, Cancelled or OSError."""
        yield member_header(FILE_NAME, len(self._control)) + self._control + member_padding(len(self._control))
        await _AFTER_LIST.reach()
        size = self._timeline.segment_size
        for segment in self.segments:
            length = min(size, self.end_lsn - segment * size)
            name = segment_file_name(segment, size) + (PARTIAL_SUFFIX if length < size else "")
            yield member_header(name, size)
            self._check_unchanged()
            descriptor = await asyncio.to_thread(self._open, segment)
            try:
                for offset in range(0, size, CHUNK_BYTES):
                    wanted = min(CHUNK_BYTES, size - offset)
                    data = await asyncio.to_thread(_read, descriptor, min(wanted, max(0, length - offset)), offset)
                    self._check_unchanged()
                    yield data.ljust(wanted, b"\0")
            finally:
                os.close(descriptor)
            yield member_padding(size)
        self._check_unchanged()
        yield END_OF_ARCHIVE

    def _open(self, segment: int) -> int:
        segments = self._timeline.store.segments
        for _ in range(2):  # a segment may be completed, which renames it, between the two steps
            path = segments.find(segment)
            if path is not None:
                with contextlib.suppress(FileNotFoundError):
                    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        raise WalNotHere(f"segment {segment_file_name(segment, segments.segment_size)} is not on this safekeeper's disk")

    def _check_unchanged(self) -> None:
        timeline = self._timeline
        if timeline.cancelled:
            raise Cancelled(f"timeline {timeline.ttid} is being deleted or shut down")
        if timeline.acceptor.last_log_term != self._term:
            raise SnapshotAborted(
                f"the log of timeline {timeline.ttid} went from term {self._term} to {timeline.acceptor.last_log_term} "
                f"while it was copied"
            )


def _read(descriptor: int, count: int, offset: int) -> bytes:
    """Exactly so many bytes. Raises WalNotHere when the file is shorter."""
    parts = []
    while count:
        data = os.pread(descriptor, count, offset)
        if not data:
            raise WalNotHere("a segment file is shorter than a segment")
        parts.append(data)
        count -= len(data)
        offset += len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)

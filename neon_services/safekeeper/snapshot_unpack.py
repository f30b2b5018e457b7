"""The destination's side of a snapshot: files written from the stream, and the checks that make them a timeline.

Invariant: ``finish`` returns only when the directory holds a whole, durable timeline: its control file belongs to the timeline,
its segments are full and without gaps, their bytes are valid WAL up to a record's end that is not below commit_lsn, and
nothing but zeros follows that end. Used by one thread at a time; ``close`` may come from another one.

A donor of Neon's sends an evicted timeline without WAL: it has copied the last segment in the bucket to a name of the
destination's. Then ``finish`` gives a directory that is whole only after offloaded_segment.bring_back and ``make_resident``.
"""

import os
import struct
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from neon_services.consensus import term_history
from neon_services.ground.durable import sync_directory
from neon_services.ground.errors import Cancelled, CorruptionError
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import (
    SHORT_PAGE_HEADER,
    WAL_SEGMENT_SIZE,
    XLOG_BLCKSZ,
    Lsn,
    align_lsn,
    format_lsn,
    page_header_size,
    parse_segment_file_name,
    segment_file_name,
)
from neon_services.protocols.safekeeper_messages import MembershipConfiguration
from neon_services.safekeeper.control_file import FILE_NAME, MAX_BYTES, ControlFile, PartialSegment
from neon_services.safekeeper.offloaded_segment import UPLOADED, uploaded_partial
from neon_services.safekeeper.segments import PARTIAL_SUFFIX
from neon_services.safekeeper.snapshot import MAX_SEGMENTS
from neon_services.safekeeper.snapshot_tar import Member, MemberEnd, TarReader
from neon_services.safekeeper.wal_store import WalStore
from neon_services.wal.records import WalDecodeError
from neon_services.wal.scanner import WalScanner

_REMAINING_LENGTH, _REMAINING_LENGTH_OFFSET = struct.Struct("<I"), 16  # xlp_rem_len of a page header


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What the directory holds now."""

    control: ControlFile
    flush_lsn: Lsn
    segments: int

    @property
    def position(self) -> tuple[int, int]:
        """(last_log_term, flush_lsn): how good the log is."""
        return term_history.last_log_term(self.control.acceptor.term_history, self.flush_lsn), self.flush_lsn


class SnapshotUnpacker:
    """Feed it the stream; then ``finish``."""

    def __init__(
        self, directory: Path, ttid: TenantTimelineId, *, sync: bool = True, node_id: int | None = None, bucket: bool = False
    ) -> None:
        """``node_id``: whose copy it will be; ``bucket``: whether this node can read object storage."""
        self._node_id = node_id
        self._bucket = bucket
        self._directory = directory
        self._ttid = ttid
        self._sync = sync
        self._lock = threading.Lock()
        self._closed = False
        self._reader = TarReader()
        self._control_bytes = bytearray()
        self._control: ControlFile | None = None
        self._file: BinaryIO | None = None
        self._partial_seen = False
        self._first = self._next = -1  # segment numbers
        self._wal: _WalCheck | None = None

    def feed(self, data: bytes) -> None:
        """Write what this piece brings. Raises CorruptionError, OSError or Cancelled."""
        with self._lock:
            if self._closed:
                raise Cancelled(f"the copy of timeline {self._ttid} was given up")
            for event in self._reader.feed(data):
                if isinstance(event, Member):
                    self._begin(event)
                elif isinstance(event, MemberEnd):
                    self._end()
                elif self._control is None:
                    self._control_bytes += event
                else:
                    assert self._file is not None and self._wal is not None
                    self._file.write(event)
                    self._wal.feed(event)

    def _begin(self, member: Member) -> None:
        if self._control is None:
            if member.name != FILE_NAME or not 0 < member.size <= MAX_BYTES:
                raise CorruptionError(f"the snapshot begins with {member.name!r} of {member.size} bytes, not with {FILE_NAME}")
            return
        size = self._segment_size
        try:
            segment = parse_segment_file_name(member.name.removesuffix(PARTIAL_SUFFIX), size)
        except ValueError:
            segment = -1
        name = segment_file_name(segment, size) if segment >= 0 else ""
        if name != member.name.removesuffix(PARTIAL_SUFFIX):
            raise CorruptionError(f"the snapshot has a member {member.name!r} that is no WAL segment")
        if member.size != size:
            raise CorruptionError(f"segment {member.name} of the snapshot has {member.size} bytes instead of {size}")
        if self._first < 0:
            self._first = self._next = segment
            start = max(segment * size, self._control.acceptor.local_start_lsn)
            self._wal = _WalCheck(segment * size, start, size)
        if segment != self._next or self._partial_seen:
            raise CorruptionError(f"segment {member.name} of the snapshot does not follow the one before")
        if segment - self._first >= MAX_SEGMENTS:
            raise CorruptionError(f"the snapshot has more than {MAX_SEGMENTS} segments")
        self._next = segment + 1
        self._partial_seen = member.name.endswith(PARTIAL_SUFFIX)
        self._file = (self._directory / member.name).open("xb")

    def _end(self) -> None:
        if self._control is None:
            self._control = ControlFile.decode(bytes(self._control_bytes), name=f"{FILE_NAME} of the snapshot")
            if self._control.ttid != self._ttid:
                raise CorruptionError(f"the snapshot is of timeline {self._control.ttid}, not of {self._ttid}")
            self._check_offloaded(self._control)
            return
        self._end_file()

    def _check_offloaded(self, control: ControlFile) -> None:
        """What is without its WAL must say where the WAL is, for this node."""
        end = control.offloaded_flush_lsn
        if end is None:
            return
        without = f"the snapshot of timeline {self._ttid} is without its WAL, which is in object storage"
        if not self._bucket:
            raise CorruptionError(f"{without}, and this safekeeper has no --remote-storage")
        if uploaded_partial(replace(control, partial_backup=self._own_parts(control)), end) is None:
            raise CorruptionError(f"{without}, and it names no object there for safekeeper {self._node_id}")
        if control.acceptor.commit_lsn > end:
            raise CorruptionError(
                f"{without} up to {format_lsn(end)}, before commit_lsn {format_lsn(control.acceptor.commit_lsn)}"
            )

    def _own_parts(self, control: ControlFile) -> tuple[PartialSegment, ...]:
        """Objects in the bucket that the donor made for this node; the others stay the donor's to delete."""
        ending = f"_sk{self._node_id}.partial"
        return tuple(part for part in control.partial_backup if part.status == UPLOADED and part.name.endswith(ending))

    def _end_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with file:
                file.flush()
                if self._sync:
                    os.fsync(file.fileno())

    @property
    def _segment_size(self) -> int:
        assert self._control is not None
        return self._control.acceptor.wal_seg_size or WAL_SEGMENT_SIZE

    def finish(self, mconf: MembershipConfiguration | None, promised: int = 0) -> Unpacked:
        """Check everything and write the control file. Raises as feed().

        It follows ``mconf`` if that is newer than the donor's, and keeps the promise of a term (``promised``) if it is higher.
        """
        with self._lock:
            control = self._control
            if not self._reader.complete or control is None:
                raise CorruptionError(f"the snapshot of timeline {self._ttid} ends before its end")
            flush_lsn, state = self._checked_end(control), control.acceptor
            if control.offloaded_flush_lsn is None:
                check_recovery(self._directory, self._segment_size, state.commit_lsn, flush_lsn)
            if self._first >= 0:
                # what lies before was never on this disk: readers and the choice of who offloads WAL must know
                state = replace(state, local_start_lsn=Lsn(max(state.local_start_lsn, self._first * self._segment_size)))
            elif control.offloaded_flush_lsn is not None:
                last = flush_lsn - flush_lsn % self._segment_size
                state = replace(state, local_start_lsn=Lsn(max(state.local_start_lsn, last)))
            elif flush_lsn > state.local_start_lsn:
                state = replace(state, local_start_lsn=flush_lsn)
            if mconf is not None and mconf.generation > state.mconf.generation:
                state = replace(state, mconf=mconf)
            state = replace(state, term=max(state.term, promised))
            adopted = replace(control, acceptor=state, partial_backup=self._own_parts(control))
            adopted.save(self._directory, sync=self._sync)
            if self._sync:
                sync_directory(self._directory)
            return Unpacked(adopted, flush_lsn, self._next - self._first if self._first >= 0 else 0)

    def _checked_end(self, control: ControlFile) -> Lsn:
        commit_lsn = control.acceptor.commit_lsn
        if control.offloaded_flush_lsn is not None:
            if self._wal is not None:
                raise CorruptionError(
                    f"the snapshot of timeline {self._ttid} has WAL that is said to be in object storage only"
                )
            return control.offloaded_flush_lsn
        if self._wal is None:
            return commit_lsn
        first_lsn = self._wal.start
        if commit_lsn < first_lsn:
            raise CorruptionError(
                f"the snapshot's WAL begins at {format_lsn(first_lsn)}, after commit_lsn {format_lsn(commit_lsn)}"
            )
        end = self._wal.end()
        if end < commit_lsn:
            raise CorruptionError(f"the snapshot's WAL ends at {format_lsn(end)}, before commit_lsn {format_lsn(commit_lsn)}")
        return end

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()
                self._file = None


def check_recovery(directory: Path, segment_size: int, commit_lsn: Lsn, flush_lsn: Lsn) -> None:
    """What a boot will find must be what was copied. Raises CorruptionError, OSError."""
    store = WalStore(directory, segment_size, sync=False)
    store.recover(commit_lsn)
    store.close()
    if store.flush_lsn != flush_lsn:
        raise CorruptionError(
            f"the snapshot's WAL ends at {format_lsn(flush_lsn)}, but read from commit_lsn {format_lsn(commit_lsn)} "
            f"at {format_lsn(store.flush_lsn)}"
        )


def make_resident(directory: Path, unpacked: Unpacked, segment_size: int, *, sync: bool) -> Unpacked:
    """The last segment of an evicted timeline's copy is there now: the directory is whole. Raises CorruptionError, OSError."""
    check_recovery(directory, segment_size, unpacked.control.acceptor.commit_lsn, unpacked.flush_lsn)
    control = replace(unpacked.control, offloaded_flush_lsn=None)
    control.save(directory, sync=sync)
    if sync:
        sync_directory(directory)
    return Unpacked(control, unpacked.flush_lsn, 1)


class _WalCheck:
    """Follows the bytes of consecutive segments: where do valid records end, and does anything follow them?"""

    def __init__(self, begin: int, start: int, segment_size: int) -> None:
        self.start = Lsn(start)
        self._position = begin
        self._segment_size = segment_size
        self._scanner = WalScanner(start, segment_size=segment_size)
        self._error: WalDecodeError | None = None
        self._content_end = start  # behind the last byte that is not zero
        self._first_page = b""

    def feed(self, data: bytes) -> None:
        begin, self._position = self._position, self._position + len(data)
        if self._position <= self.start:
            return
        data = data[max(0, self.start - begin) :]
        if len(self._first_page) < SHORT_PAGE_HEADER:
            self._first_page += data[: SHORT_PAGE_HEADER - len(self._first_page)]
        content = len(data.rstrip(b"\0"))
        if content:
            self._content_end = self._position - len(data) + content
        if self._error is None:
            try:
                self._scanner.feed(data)
            except WalDecodeError as error:
                self._error = error

    def end(self) -> Lsn:
        """The end of the log. Raises CorruptionError when there is more than complete records."""
        end = self._scanner.record_end_lsn
        if end == self.start and self.start % XLOG_BLCKSZ == 0 and len(self._first_page) == SHORT_PAGE_HEADER:
            # no record begins here, but the end of an older one may be all there is; its checksum covers what is not here
            (remaining,) = _REMAINING_LENGTH.unpack_from(self._first_page, _REMAINING_LENGTH_OFFSET)
            tail_end = continuation_end(self.start, remaining, self._segment_size)
            if self._scanner.position >= tail_end:
                end = tail_end
        if self._content_end > end:
            raise CorruptionError(
                f"the snapshot's WAL is not valid behind {format_lsn(end)} but goes on to {format_lsn(self._content_end)}: "
                f"{self._error or 'its last record is cut'}"
            )
        return end


def continuation_end(page: int, remaining: int, segment_size: int) -> Lsn:
    """Where a record ends that continues on this page with so many bytes; the page's start when there are none."""
    end = page
    while remaining:
        header = page_header_size(page, segment_size)
        taken = min(remaining, XLOG_BLCKSZ - header)
        end, page, remaining = page + header + taken, page + XLOG_BLCKSZ, remaining - taken
    return align_lsn(end)

"""The log of one timeline on this node's disk: positions, appending, flushing, truncation, recovery at boot.

Invariants:

1. ``flush_lsn`` is the end of the last complete record with a valid checksum that is on disk, and never moves back except by
   truncate().
2. Bytes are appended strictly in order. After boot, and after any failure, nothing is appended before truncate() has put
   zeros behind the end of the log: stale bytes there could later look like its continuation.
3. A failed write or sync leaves all positions at flush_lsn; the bytes behind it count as garbage.
4. After a failed sync, which the kernel forgets, what the page cache shows proves nothing, also to the next process: the log
   that recover() finds, and the zeros of the first truncate() after boot or a failure, are written anew and synced.

Hot path: ``write`` only remembers views of the receive buffer, and ``flush`` hands all of them to one
``pwritev(RWF_DSYNC)``. Whoever calls write() must call flush() or write_out() before the views become invalid. Up to
``_plain_end`` nothing but such a write is needed, and the end of the log may be lent to a lane, which does it (append_lane.py)
and tells by ``appended``. Every other operation begins with ``_shut``: ``_plain_end`` is 0 then, and the lane recalled; a flush
that went well sets it anew.
"""

import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from neon_services.ground.disk import REAL_DISK, Disk, write_all
from neon_services.ground.errors import NeonError, ProtocolViolation
from neon_services.ground.lsn import INVALID_LSN, Lsn, format_lsn
from neon_services.safekeeper import metrics
from neon_services.safekeeper.segments import SegmentDirectory
from neon_services.safekeeper.wal_pieces import first_page_headers, split
from neon_services.wal.records import STOP_INVALID, WalDecodeError
from neon_services.wal.scanner import WalScanner

log = logging.getLogger(__name__)

RECOVERY_CHUNK_BYTES = 1024 * 1024
EARLY_BYTES = 256 * 1024
_NO_HINTS = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL, errno.ESPIPE)
_BULK_WRITES = 400  # a segment that so few writes would fill is part of a bulk load (zeros ahead cost more than they save)
_INITIALIZE_FIRST, _INITIALIZE, _TRUNCATE = (
    metrics.WAL_STORAGE_OPERATION_SECONDS.labels(operation)
    for operation in ("initialize_first_segment", "initialize_segment", "truncate_wal")
)


class PlainWrites(NamedTuple):
    """The end of the log, lent: what is written there needs one durable write and nothing else."""

    scanner: int  # the C structure
    descriptor: int
    segment_lsn: Lsn
    end: Lsn


class WalStoreError(NeonError):
    """The log cannot do what was asked: the disk failed or is full, or an election must come first."""


class WalStore:
    """See the module's text. All positions are 0 while the log is empty."""

    def __init__(
        self,
        directory: Path,
        segment_size: int,
        *,
        sync: bool = True,
        disk: Disk = REAL_DISK,
    ) -> None:
        self.segments = SegmentDirectory(directory, segment_size, sync=sync, disk=disk)
        self.disk = disk
        self._segment_size = segment_size
        self._sync = sync
        self._write_lsn = INVALID_LSN
        self._write_record_lsn = INVALID_LSN
        self._flush_lsn = INVALID_LSN
        self._scanner: WalScanner | None = None
        self._pending: list[memoryview | bytes] = []
        self._pending_bytes = 0
        self._must_truncate = True
        self._distrusts_cache = True
        self._descriptor: int | None = None
        self._segment = -1
        self._can_dsync = True  # as far as is known
        self._has_dsynced = False
        self._dirty = False  # the open segment has bytes that were written without being synced
        #: So much of a batch is given to the disk before the rest of it was checked.
        self.early_bytes = EARLY_BYTES
        self._plain_end = INVALID_LSN
        #: Takes the end of the log back from who writes it elsewhere.
        self.recall: Callable[[], None] = lambda: None
        self._segment_bytes = self._segment_writes = 0  # since the segment was opened
        #: Called when a new segment was begun: the disk has less room now.
        self.on_segment: Callable[[], None] = lambda: None
        #: Bytes and seconds since the process started, for the timeline's metrics.
        self.written_bytes = 0
        self.write_seconds = 0.0
        self.flush_seconds = 0.0

    @property
    def write_lsn(self) -> Lsn:
        """End of the bytes handed to write()."""
        return self._write_lsn

    @property
    def write_record_lsn(self) -> Lsn:
        """End of the last complete record in them."""
        return self._write_record_lsn

    @property
    def flush_lsn(self) -> Lsn:
        """End of the last complete record on disk."""
        return self._flush_lsn

    @property
    def file_open(self) -> bool:
        """Whether a segment is open for writing."""
        return self._descriptor is not None

    # -- boot

    def recover(self, commit_lsn: Lsn, *, offloaded_flush_lsn: Lsn | None = None) -> None:
        """Find the end of the log by reading records from the saved commit_lsn on, and make sure of them. Raises OSError.

        The end of a log that is in object storage only is known.
        """
        self.segments.discard_scratch()
        if offloaded_flush_lsn is not None:
            self._move_to(offloaded_flush_lsn)
            return
        if not commit_lsn:
            return
        scanner = WalScanner(commit_lsn, segment_size=self._segment_size)
        try:
            for chunk in self._stored_bytes(commit_lsn):
                scanner.feed(chunk)
        except WalDecodeError as error:
            log.debug("%s: the log ends: %s", self.segments.path, error)
        end_lsn = max(commit_lsn, scanner.record_end_lsn)
        self.segments.write_anew(commit_lsn, end_lsn)
        self._move_to(end_lsn)

    def _stored_bytes(self, lsn: int) -> Iterator[bytes]:
        while (path := self.segments.find(lsn // self._segment_size)) is not None:
            descriptor = self.disk.open(path, os.O_RDONLY)
            try:
                begin, offset = lsn, lsn % self._segment_size
                while chunk := self.disk.pread(descriptor, RECOVERY_CHUNK_BYTES, lsn - begin + offset):
                    lsn += len(chunk)
                    yield chunk
            finally:
                self.disk.close(descriptor)
            if lsn % self._segment_size:
                return

    def _move_to(self, lsn: Lsn) -> None:
        self._write_lsn = self._write_record_lsn = self._flush_lsn = lsn

    # -- the beginning

    def initialize(self, lsn: Lsn, *, pg_version: int, system_id: int) -> None:
        """Begin the empty log at this position, durably; page headers in front of it let tools read the first segment."""
        if self._write_lsn:
            raise WalStoreError(f"{self.segments.path}: the log is not empty: it ends at {format_lsn(self._write_lsn)}")
        with _INITIALIZE_FIRST.time(), self._disk_errors("initializing the log"):
            self._open_segment_at(lsn, pg_version, system_id)
            self._move_to(lsn)

    def _open_segment_at(self, lsn: Lsn, pg_version: int, system_id: int) -> None:
        """Open the segment with this position for writing, if the position lies inside it."""
        offset = lsn % self._segment_size
        if not offset:
            return  # the segment is made when its first byte comes
        segment = lsn // self._segment_size
        descriptor = self.segments.open_partial(segment)
        if descriptor is None:
            descriptor = self._descriptor = self.segments.create(segment)
            for start, header in first_page_headers(lsn, self._segment_size, pg_version, system_id):
                write_all(self.disk, descriptor, [header], start % self._segment_size, 0)
        self._descriptor, self._segment, self._dirty = descriptor, segment, True

    # -- appending

    def write(self, begin_lsn: Lsn, data: memoryview | bytes) -> Lsn:
        """Append bytes; the new write_lsn. Raises WalStoreError, or ProtocolViolation when they are not valid WAL."""
        self._shut()
        if self._must_truncate or self._scanner is None:
            raise WalStoreError("the log accepts no WAL before an election has settled where it ends")
        if begin_lsn != self._write_lsn:
            raise ProtocolViolation(f"WAL at {format_lsn(begin_lsn)} does not follow {format_lsn(self._write_lsn)}")
        try:
            self._scanner.feed(data)
        except BaseException as error:
            self._refuse(begin_lsn, error)
        self._pending.append(data)
        self._pending_bytes += len(data)
        self._write_lsn = Lsn(begin_lsn + len(data))
        self._write_record_lsn = self._scanner.record_end_lsn
        if self._pending_bytes >= self.early_bytes:
            self._write_pending(sync=False, early=True)
        return self._write_lsn

    def _refuse(self, begin_lsn: Lsn, error: BaseException) -> NoReturn:
        """The scanner failed; where it stands is not known then."""
        self._shut()
        self._must_truncate = True
        if not isinstance(error, WalDecodeError):
            raise error
        raise ProtocolViolation(f"the proposer sent bytes at {format_lsn(begin_lsn)} that are not WAL: {error}") from error

    def _shut(self) -> None:
        self._plain_end = INVALID_LSN
        self.recall()

    def plain_writes(self) -> PlainWrites | None:
        """What a lane needs to write the log's end; None while writing takes more than that, or somebody else writes.

        Whoever gets it sets ``recall`` and tells what it did by appended(), or how it failed, before anything else is called.
        """
        scanner, descriptor = self._scanner, self._descriptor
        if self._plain_end <= self._write_lsn or scanner is None or scanner.handle is None or descriptor is None:
            return None
        return PlainWrites(scanner.handle, descriptor, Lsn(self._segment * self._segment_size), self._plain_end)

    def appended(self, write_lsn: Lsn, flush_lsn: Lsn, sizes: Sequence[int], seconds: Sequence[float]) -> None:
        """A lane has written durably up to ``write_lsn``; bytes and seconds of each write."""
        count = write_lsn - self._write_lsn
        self._write_lsn = write_lsn
        self._write_record_lsn = self._flush_lsn = flush_lsn
        self._segment_bytes += count
        self._segment_writes += len(sizes)
        self.written_bytes += count
        self.flush_seconds += sum(seconds)
        metrics.WRITE_WAL_BYTES.observe_all(sizes)
        metrics.FLUSH_WAL_SECONDS.observe_all(seconds)

    def append_failed(self, error: BaseException | None) -> NoReturn:
        """A lane could not write, or (None) was given what is not WAL. Raises what write() and flush() do then."""
        if error is not None:
            self._give_up("writing the log", error)
        assert self._scanner is not None
        self._refuse(self._write_lsn, WalDecodeError(self._scanner.error, STOP_INVALID))

    def flush(self) -> Lsn:
        """Make everything written durable; the new flush_lsn. Raises WalStoreError."""
        self._shut()
        if self._pending:
            self._write_pending(sync=self._sync)
        if self._dirty and self._sync and self._descriptor is not None:
            started = time.perf_counter()
            with self._disk_errors("syncing the log"):
                self._fdatasync()
            self._flushed_in(time.perf_counter() - started)
        self._flush_lsn = self._write_record_lsn
        if self._has_dsynced and self._descriptor is not None and not self._must_truncate:
            self._plain_end = self._end_of_plain_writes()
        return self._flush_lsn

    def _end_of_plain_writes(self) -> Lsn:
        """Up to where the open segment only needs to be written: not its last byte, and not where the next one is prepared."""
        size = self._segment_size
        length = size - 1 if self.segments.prepared else size // 4
        return Lsn(self._segment * size + length)

    def write_out(self) -> None:
        """Give remembered views to the kernel, without making them durable. Raises WalStoreError."""
        if self._pending:
            self._write_pending(sync=False)

    def _write_pending(self, *, sync: bool, early: bool = False) -> None:
        self._shut()
        views, self._pending = self._pending, []
        count, self._pending_bytes = self._pending_bytes, 0
        lsn = self._write_lsn - count
        size = self._segment_size
        dsync = False
        started = time.perf_counter()
        try:
            left = count
            while left:
                offset = lsn % size
                if self._segment != lsn // size or self._descriptor is None:
                    self._switch_segment(lsn // size)
                length = min(left, size - offset)
                part, views = (views, []) if length == left else split(views, length)
                # RWF_DSYNC covers only these bytes, so earlier unsynced ones need a sync of the whole file
                dsync = sync and not self._dirty and self._write_durably(part, offset, length)
                if not dsync:
                    self._write_part(part, offset, length, 0)
                    self._dirty = True
                    if early and self._sync:
                        self._start_writing(offset, length)
                lsn += length
                left -= length
                self._segment_bytes += length
                self._segment_writes += 1
                if offset + length == size:
                    self._complete_segment()
                elif offset + length > size // 4 and not self.segments.prepared:
                    self.segments.prepare(bulk=self.is_bulk(size))
        except BaseException as error:
            self._give_up("writing the log", error)
        self._account(count, time.perf_counter() - started, flushed=dsync)

    def _start_writing(self, offset: int, length: int) -> None:
        """Only a hint: where it is not to be had, batches are written when they are whole."""
        assert self._descriptor is not None
        try:
            self.disk.start_writing(self._descriptor, offset, length)
        except OSError as error:
            if error.errno not in _NO_HINTS:
                raise
            self.early_bytes = sys.maxsize

    def is_bulk(self, size: int) -> bool:
        """Whether WAL comes as in a bulk load; it only decides how the next segment is made."""
        written = self._segment_bytes
        return written >= size // 4 and written * _BULK_WRITES >= self._segment_writes * size

    def _write_part(self, views: list[memoryview | bytes], offset: int, length: int, flags: int) -> None:
        assert self._descriptor is not None
        if len(views) > 1000 or self.disk.pwritev(self._descriptor, views, offset, flags) != length:
            write_all(self.disk, self._descriptor, views, offset, flags)  # once more, from the beginning

    def _write_durably(self, views: list[memoryview | bytes], offset: int, length: int) -> bool:
        """One write that is also the sync; False on a file system that cannot do that."""
        if self._can_dsync:
            try:
                self._write_part(views, offset, length, os.RWF_DSYNC)
                self._has_dsynced = True
                return True
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._can_dsync = False
        return False

    def _account(self, count: int, seconds: float, *, flushed: bool) -> None:
        self.written_bytes += count
        metrics.WRITE_WAL_BYTES.observe(count)
        if flushed:
            self._flushed_in(seconds)
        else:
            self.write_seconds += seconds
            metrics.WRITE_WAL_SECONDS.observe(seconds)

    def _flushed_in(self, seconds: float) -> None:
        self.flush_seconds += seconds
        metrics.FLUSH_WAL_SECONDS.observe(seconds)

    def _switch_segment(self, segment: int) -> None:
        self._close()
        self.segments.complete_before(segment)
        with _INITIALIZE.time():
            self._descriptor, self._segment = self.segments.create(segment), segment
        self.on_segment()

    def _complete_segment(self) -> None:
        if self._dirty and self._sync:
            self._fdatasync()
        self.segments.complete(self._segment)
        self._close()

    def _fdatasync(self) -> None:
        assert self._descriptor is not None
        self.disk.fdatasync(self._descriptor)
        self._dirty = False

    def _close(self) -> None:
        self._shut()
        descriptor, self._descriptor = self._descriptor, None  # even one that could not be closed is gone
        self._segment, self._dirty = -1, False
        self._segment_bytes = self._segment_writes = 0
        if descriptor is not None:
            self.disk.close(descriptor)

    @contextlib.contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._give_up(what, error)

    def _give_up(self, what: str, error: BaseException) -> NoReturn:
        """A failed operation leaves the log as it was at flush_lsn, closed for writing.

        Also after what nobody foresaw: the bytes are not there, and no flush may say they are.
        """
        self._shut()
        self._must_truncate = self._distrusts_cache = True
        self._pending.clear()
        self._pending_bytes = 0
        self._move_to(self._flush_lsn)
        self._close()
        if not isinstance(error, OSError):
            raise error
        metrics.WAL_DISK_IO_ERRORS.inc()
        raise WalStoreError(f"{what} in {self.segments.path} failed: {error.strerror or error}") from error

    # -- cutting

    def truncate(self, lsn: Lsn, *, pg_version: int, system_id: int) -> None:
        """Cut the log: afterwards it ends at this position, durably, and accepts writes there. Raises WalStoreError.

        A failure or a crash midway leaves a valid, shorter log that accepts no writes; doing it again finishes the job.
        """
        self._shut()
        if lsn > self._write_record_lsn:
            raise WalStoreError(
                f"{self.segments.path}: cannot cut the log at {format_lsn(lsn)}: "
                f"it ends at {format_lsn(self._write_record_lsn)}"
            )
        if not self._must_truncate and lsn == self._write_lsn == self._write_record_lsn:
            return
        self.write_out()
        self._must_truncate = True
        with _TRUNCATE.time(), self._disk_errors("cutting the log"):
            self._close()
            self._move_to(lsn)
            segment, offset = divmod(lsn, self._segment_size)
            self.segments.remove_above(segment)
            self._open_segment_at(lsn, pg_version, system_id)
            if self._descriptor is None and self.segments.find(segment) is not None:
                self._descriptor, self._segment = self.segments.open_partial(segment), segment
            if self._descriptor is not None:
                self.segments.clear_from(self._descriptor, offset, anew=self._distrusts_cache)
                self._dirty = False
            self.segments.complete_before(segment)
            self.segments.sync_directory()
        self._scanner = WalScanner(lsn, segment_size=self._segment_size)
        self._must_truncate = self._distrusts_cache = False

    # -- housekeeping

    def remove_below(self, segment: int) -> int:
        """Delete complete segments below this number; how many. Raises WalStoreError."""
        try:
            removed = self.segments.remove_below(segment)
        except OSError as error:
            raise WalStoreError(f"removing WAL in {self.segments.path} failed: {error.strerror or error}") from error
        return len(removed)

    def release(self) -> None:
        """Let go of the file: the log ends at flush_lsn and accepts no writes before truncate()."""
        self._pending.clear()
        self._pending_bytes = 0
        self._move_to(self._flush_lsn)
        self.close()
        self.segments.discard_scratch()

    def close(self) -> None:
        """Let go of the files; written bytes that were not flushed are as good as lost."""
        self._close()
        self._must_truncate = True
        self.segments.settle()

"""WAL segment files of one timeline: names, creation ahead of need, completion, removal, reading.

Invariant: a file with a segment's name always has the segment's full length, and its bytes behind the end of the log are
zero. A segment is made under the scratch name, filled with zeros, synced, and only then renamed. ``<name>.partial`` is a
segment that is not complete; completing is a rename.

Zeros are really written, so that synchronous writes of small appends change no metadata; for bulk, whose writes are large, room
is only allocated: everything would be written twice.
"""

import contextlib
import errno
import logging
import os
from concurrent.futures import Future, wait
from pathlib import Path

from neon_services.ground import failpoints
from neon_services.ground.disk import REAL_DISK, Disk, write_all
from neon_services.ground.lsn import parse_segment_file_name, segment_file_name

log = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
SCRATCH_NAME = "waltmp"
DOWNLOAD_NAME = "remote_partial.tmp"
# Larger writes leave larger folios in the page cache (Linux 6.18, ext4), and each small durable write there costs more then:
# 25 us of a processor instead of 15 with 1 MiB. Smaller ones make the segment itself dearer.
_ZEROS = bytes(128 * 1024)
_ZERO_SEGMENT = failpoints.declare("sk-zero-segment")


class SegmentDirectory:
    """The segment files in a timeline's directory. All methods may raise OSError."""

    def __init__(self, path: Path, segment_size: int, *, sync: bool = True, disk: Disk = REAL_DISK) -> None:
        self.path = path
        self.segment_size = segment_size
        self.sync = sync
        self.disk = disk
        self._prepared: Future[None] | None = None

    def discard_scratch(self) -> None:
        """Remove what an interrupted creation or download left, while none is under way."""
        for name in (SCRATCH_NAME, DOWNLOAD_NAME):
            self.disk.unlink(self.path / name)

    def complete_path(self, segment: int) -> Path:
        """The name of a complete segment."""
        return self.path / segment_file_name(segment, self.segment_size)

    def partial_path(self, segment: int) -> Path:
        """The name of a segment that is not complete."""
        return self.path / (segment_file_name(segment, self.segment_size) + PARTIAL_SUFFIX)

    def find(self, segment: int) -> Path | None:
        """The segment's file under either name."""
        for path in (self.partial_path(segment), self.complete_path(segment)):
            if self.disk.exists(path):
                return path
        return None

    def existing(self) -> dict[int, Path]:
        """Every segment here, by number; the partial name wins when a crash left both."""
        found: dict[int, Path] = {}
        for name in self.disk.names(self.path):
            with contextlib.suppress(ValueError):
                found[parse_segment_file_name(name.removesuffix(PARTIAL_SUFFIX), self.segment_size)] = self.path / name
        return found

    # -- making

    @property
    def prepared(self) -> bool:
        """Whether the next segment file is made, or being made."""
        return self._prepared is not None

    def prepare(self, *, bulk: bool = False) -> None:
        """Start making the next segment file in the background, if that is not under way."""
        if self._prepared is None:
            self._prepared = self.disk.background(lambda: self._make_scratch(bulk=bulk))

    def settle(self) -> None:
        """Stop making the next segment, or wait until it is made: afterwards nothing happens in the directory by itself."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and not prepared.cancel():
            wait([prepared])

    def create(self, segment: int) -> int:
        """A new, empty ``.partial`` file for the segment; its descriptor. Uses the prepared file when there is one."""
        prepared, self._prepared = self._prepared, None
        scratch = self.path / SCRATCH_NAME
        if prepared is not None:
            try:
                prepared.result()
            except OSError as error:
                log.warning("%s: preparing the next segment failed: %s", self.path, error)
        if not self.disk.exists(scratch):
            self._make_scratch()
        descriptor = self.disk.open(scratch, os.O_RDWR)
        try:
            self.disk.rename(scratch, self.partial_path(segment))
            self.sync_directory()
        except BaseException:
            self.disk.close(descriptor)
            raise
        return descriptor

    def _make_scratch(self, *, bulk: bool = False) -> None:
        scratch = self.path / SCRATCH_NAME
        descriptor = self.disk.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            if _ZERO_SEGMENT.hit() is not None:
                raise OSError(errno.EIO, "failpoint: sk-zero-segment")
            if bulk:
                self.disk.allocate(descriptor, self.segment_size)
            else:
                self._fill_with_zeros(descriptor, 0)
            if self.sync:
                self.disk.fsync(descriptor)
        except BaseException:
            self.disk.unlink(scratch)
            raise
        finally:
            self.disk.close(descriptor)

    def _fill_with_zeros(self, descriptor: int, offset: int) -> None:
        while offset < self.segment_size:
            count = min(len(_ZEROS), self.segment_size - offset)
            write_all(self.disk, descriptor, [_ZEROS[:count]], offset, 0)
            offset += count

    def open_partial(self, segment: int) -> int | None:
        """A descriptor of the segment's file for writing, which then has the ``.partial`` name; None when there is none."""
        partial = self.partial_path(segment)
        if not self.disk.exists(partial):
            complete = self.complete_path(segment)
            if not self.disk.exists(complete):
                return None
            self.disk.rename(complete, partial)
            self.sync_directory()
        return self.disk.open(partial, os.O_RDWR)

    def clear_from(self, descriptor: int, offset: int, *, anew: bool = False) -> None:
        """Make everything behind the offset zero and the file full, durably.

        Writes only where the page cache shows something, or, when that is not to be trusted, everywhere (``anew``).
        """
        position = offset
        size = self.disk.size(descriptor)
        while position < size:
            chunk = self.disk.pread(descriptor, min(len(_ZEROS), size - position), position)
            if anew or chunk != _ZEROS[: len(chunk)]:
                write_all(self.disk, descriptor, [_ZEROS[: len(chunk)]], position, 0)
            position += len(chunk)
        if size > self.segment_size:
            self.disk.ftruncate(descriptor, self.segment_size)
        self._fill_with_zeros(descriptor, max(size, offset))
        if self.sync:
            self.disk.fsync(descriptor)

    def write_anew(self, begin: int, end: int) -> None:
        """Write the bytes from one position to another once more and sync them: that they can be read proves nothing."""
        while begin < end and (path := self.find(begin // self.segment_size)) is not None:
            descriptor = self.disk.open(path, os.O_RDWR)
            try:
                upto = min(end, begin - begin % self.segment_size + self.segment_size)
                while begin < upto:
                    offset = begin % self.segment_size
                    chunk = self.disk.pread(descriptor, min(len(_ZEROS), upto - begin), offset)
                    if not chunk:
                        return
                    write_all(self.disk, descriptor, [chunk], offset, 0)
                    begin += len(chunk)
                if self.sync:
                    self.disk.fsync(descriptor)
            finally:
                self.disk.close(descriptor)

    # -- completing and removing

    def complete(self, segment: int) -> None:
        """Give a synced ``.partial`` segment its final name. Needs no directory sync: either name is found at boot."""
        self.disk.rename(self.partial_path(segment), self.complete_path(segment))

    def complete_before(self, segment: int) -> None:
        """Sync and complete every ``.partial`` segment below this one: its rest was skipped by a switch of segments."""
        for number, path in self.existing().items():
            if number < segment and path.name.endswith(PARTIAL_SUFFIX):
                if self.sync:
                    descriptor = self.disk.open(path, os.O_RDWR)
                    try:
                        self.disk.fsync(descriptor)
                    finally:
                        self.disk.close(descriptor)
                self.complete(number)

    def remove_above(self, segment: int) -> None:
        """Delete the segments above this one, from the highest down, durably."""
        numbers = [number for number in sorted(self.existing(), reverse=True) if number > segment]
        for number in numbers:
            self._unlink(number)
        if numbers:
            self.sync_directory()

    def remove_below(self, segment: int) -> list[int]:
        """Delete the complete segments below this one, from the lowest up; their numbers."""
        numbers = [number for number in sorted(self.existing()) if number < segment]
        for number in numbers:
            self._unlink(number)
        return numbers

    def _unlink(self, segment: int) -> None:
        self.disk.unlink(self.partial_path(segment))
        self.disk.unlink(self.complete_path(segment))

    def sync_directory(self) -> None:
        """Make renames durable."""
        if self.sync:
            self.disk.sync_directory(self.path)

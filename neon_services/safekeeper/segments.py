"""WAL segment files of one timeline: names, creation ahead of need, completion, removal, reading.

Invariant: a file with a segment's name always has the segment's full length, and its bytes behind the end of the log are
zero. A segment is made under the scratch name, filled with zeros (really written: later synchronous writes then change no
metadata), synced, and only then renamed. ``<name>.partial`` is a segment that is not complete; completing is a rename.
"""

import contextlib
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from neon_services.ground.durable import sync_directory
from neon_services.ground.lsn import parse_segment_file_name, segment_file_name

log = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
SCRATCH_NAME = "waltmp"
DOWNLOAD_NAME = "remote_partial.tmp"
_ZEROS = bytes(1024 * 1024)
# one thread makes the next segments of all timelines: it is the disk that limits it
_preparer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-segment")


def write_all(descriptor: int, views: list[memoryview | bytes], offset: int, flags: int) -> None:
    """``pwritev`` that does not stop at a short write. Raises OSError."""
    total = sum(len(view) for view in views)
    if len(views) > 1000:  # IOV_MAX is 1024
        views = [b"".join(views)]
    written = os.pwritev(descriptor, views, offset, flags)
    if written != total:
        rest = memoryview(b"".join(views))[written:]
        while rest:
            count = os.pwritev(descriptor, [rest], offset + total - len(rest), flags)
            rest = rest[count:]


class SegmentDirectory:
    """The segment files in a timeline's directory. All methods may raise OSError."""

    def __init__(self, path: Path, segment_size: int, *, sync: bool = True) -> None:
        self.path = path
        self.segment_size = segment_size
        self.sync = sync
        self._prepared: Future[None] | None = None

    def discard_scratch(self) -> None:
        """Remove what an interrupted creation or download left, while none is under way."""
        for name in (SCRATCH_NAME, DOWNLOAD_NAME):
            (self.path / name).unlink(missing_ok=True)

    def complete_path(self, segment: int) -> Path:
        """The name of a complete segment."""
        return self.path / segment_file_name(segment, self.segment_size)

    def partial_path(self, segment: int) -> Path:
        """The name of a segment that is not complete."""
        return self.path / (segment_file_name(segment, self.segment_size) + PARTIAL_SUFFIX)

    def find(self, segment: int) -> Path | None:
        """The segment's file under either name."""
        for path in (self.partial_path(segment), self.complete_path(segment)):
            if path.exists():
                return path
        return None

    def existing(self) -> dict[int, Path]:
        """Every segment here, by number; the partial name wins when a crash left both."""
        found: dict[int, Path] = {}
        for entry in sorted(self.path.iterdir()):
            with contextlib.suppress(ValueError):
                found[parse_segment_file_name(entry.name.removesuffix(PARTIAL_SUFFIX), self.segment_size)] = entry
        return found

    # -- making

    def prepare(self) -> None:
        """Start making the next segment file in the background, if that is not under way."""
        if self._prepared is None:
            self._prepared = _preparer.submit(self._make_scratch)

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
        if not scratch.exists():
            self._make_scratch()
        descriptor = os.open(scratch, os.O_RDWR | os.O_CLOEXEC)
        try:
            scratch.rename(self.partial_path(segment))
            self.sync_directory()
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _make_scratch(self) -> None:
        scratch = self.path / SCRATCH_NAME
        descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self._fill_with_zeros(descriptor, 0)
            if self.sync:
                os.fsync(descriptor)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _fill_with_zeros(self, descriptor: int, offset: int) -> None:
        while offset < self.segment_size:
            count = min(len(_ZEROS), self.segment_size - offset)
            write_all(descriptor, [_ZEROS[:count]], offset, 0)
            offset += count

    def open_partial(self, segment: int) -> int | None:
        """A descriptor of the segment's file for writing, which then has the ``.partial`` name; None when there is none."""
        partial = self.partial_path(segment)
        if not partial.exists():
            complete = self.complete_path(segment)
            if not complete.exists():
                return None
            complete.rename(partial)
            self.sync_directory()
        return os.open(partial, os.O_RDWR | os.O_CLOEXEC)

    def clear_from(self, descriptor: int, offset: int) -> None:
        """Make everything behind the offset zero and the file full, durably. Writes only where there is something."""
        position = offset
        size = os.fstat(descriptor).st_size
        while position < size:
            chunk = os.pread(descriptor, min(len(_ZEROS), size - position), position)
            if chunk != _ZEROS[: len(chunk)]:
                write_all(descriptor, [_ZEROS[: len(chunk)]], position, 0)
            position += len(chunk)
        if size > self.segment_size:
            os.ftruncate(descriptor, self.segment_size)
        self._fill_with_zeros(descriptor, max(size, offset))
        if self.sync:
            os.fsync(descriptor)

    # -- completing and removing

    def complete(self, segment: int) -> None:
        """Give a synced ``.partial`` segment its final name. Needs no directory sync: either name is found at boot."""
        self.partial_path(segment).rename(self.complete_path(segment))

    def complete_before(self, segment: int) -> None:
        """Sync and complete every ``.partial`` segment below this one: its rest was skipped by a switch of segments."""
        for number, path in self.existing().items():
            if number < segment and path.name.endswith(PARTIAL_SUFFIX):
                if self.sync:
                    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
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
        self.partial_path(segment).unlink(missing_ok=True)
        self.complete_path(segment).unlink(missing_ok=True)

    def sync_directory(self) -> None:
        """Make renames durable."""
        if self.sync:
            sync_directory(self.path)

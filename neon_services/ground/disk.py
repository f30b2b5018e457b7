"""The door to the disk: every system call of the safekeeper's storage, so that the simulator can stand behind it.

Invariant: nothing here decides or retries; each method is the system call of its name and raises its OSError. What is durable
when is the caller's to know: file contents by ``fsync``, ``fdatasync`` or ``RWF_DSYNC``, names by ``sync_directory``.
"""

import ctypes
import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

# one thread works ahead for all timelines: it is the disk that limits it
_background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-ahead")

Views = list[memoryview | bytes]

_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2


class Disk:
    """The file system of this machine. The simulated one has the same methods."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """A descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, descriptor: int) -> None:
        """Let go of a descriptor."""
        os.close(descriptor)

    def pwritev(self, descriptor: int, views: Views, offset: int, flags: int) -> int:
        """Write at a place; the number of bytes written, which may be fewer than given."""
        return os.pwritev(descriptor, views, offset, flags)

    def pread(self, descriptor: int, count: int, offset: int) -> bytes:
        """At most ``count`` bytes from a place; none at the end of the file."""
        return os.pread(descriptor, count, offset)

    def size(self, descriptor: int) -> int:
        """Length of the file in bytes."""
        return os.fstat(descriptor).st_size

    def ftruncate(self, descriptor: int, size: int) -> None:
        """Set the length of the file."""
        os.ftruncate(descriptor, size)

    def allocate(self, descriptor: int, size: int) -> None:
        """Make the file so long, with room on the disk for all of it; what was not written reads as zeros."""
        os.posix_fallocate(descriptor, 0, size)

    def start_writing(self, descriptor: int, offset: int, count: int) -> None:
        """Let the device begin with written bytes while we do something else; a sync will be needed all the same."""
        call = getattr(_libc, "sync_file_range", None)
        if call is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def fsync(self, descriptor: int) -> None:
        """Make the file's bytes and length durable."""
        os.fsync(descriptor)

    def fdatasync(self, descriptor: int) -> None:
        """Make the file's bytes durable, and of its metadata what is needed to read them."""
        os.fdatasync(descriptor)

    def exists(self, path: Path) -> bool:
        """Whether there is something of this name."""
        return path.exists()

    def names(self, directory: Path) -> list[str]:
        """What is in a directory, sorted."""
        return sorted(os.listdir(directory))  # noqa: PTH208 - names, not paths

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name; one that had it is replaced."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        """Remove the file, if it is there."""
        path.unlink(missing_ok=True)

    def sync_directory(self, directory: Path) -> None:
        """Make renames, creations and deletions in this directory durable."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def background(self, work: Callable[[], None]) -> "Future[None]":
        """Do something on another thread, one thing at a time."""
        return _background.submit(work)


REAL_DISK = Disk()


def write_all(disk: Disk, descriptor: int, views: Views, offset: int, flags: int) -> None:
    """``pwritev`` that does not stop at a short write. Raises OSError."""
    total = sum(len(view) for view in views)
    if len(views) > 1000:  # IOV_MAX is 1024
        views = [b"".join(views)]
    written = disk.pwritev(descriptor, views, offset, flags)
    if written != total:
        rest = memoryview(b"".join(views))[written:]
        while rest:
            count = disk.pwritev(descriptor, [rest], offset + total - len(rest), flags)
            rest = rest[count:]


def read_file(disk: Disk, path: Path, limit: int) -> bytes:
    """The first ``limit`` bytes of a file. Raises OSError."""
    descriptor = disk.open(path, os.O_RDONLY)
    try:
        parts: list[bytes] = []
        length = 0
        while length < limit and (part := disk.pread(descriptor, min(limit - length, 1 << 20), length)):
            parts.append(part)
            length += len(part)
        return b"".join(parts)
    finally:
        disk.close(descriptor)

"""Reading the WAL of a timeline from its segment files.

The reader knows no limit: whoever reads stays below the position that it may see (flush_lsn or commit_lsn), so the bytes it
gets are never rewritten under it, whatever name their file has by then.
"""

import asyncio
import os
from pathlib import Path

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import format_lsn
from neon_services.safekeeper.segments import SegmentDirectory


class WalNotHere(NeonError):
    """This safekeeper does not have the WAL at that position."""


class WalReader:
    """Keeps the segment it reads open. Use close() at the end."""

    def __init__(self, directory: Path, segment_size: int) -> None:
        self._segments = SegmentDirectory(directory, segment_size)
        self._segment_size = segment_size
        self._segment = -1
        self._descriptor = -1
        self._nowait = True

    def _open(self, lsn: int) -> int:
        segment = lsn // self._segment_size
        if segment != self._segment or self._descriptor < 0:
            self.close()
            path = self._segments.find(segment)
            if path is None:
                raise WalNotHere(f"the WAL at {format_lsn(lsn)} is not on this safekeeper's disk")
            try:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # completed or removed between the two steps
                path = self._segments.complete_path(segment)
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._segment = segment
        return self._descriptor

    async def read(self, lsn: int, count: int) -> bytes:
        """Up to ``count`` bytes, not beyond the segment's end. Raises WalNotHere or OSError.

        Bytes in the page cache are read at once; others by a thread, so that a cold read does not stop the event loop.
        """
        count = min(count, self._segment_size - lsn % self._segment_size)
        descriptor, offset = self._open(lsn), lsn % self._segment_size
        data = b""
        if self._nowait:
            buffer = bytearray(count)
            try:
                got = os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT)
                data = bytes(buffer[:got])
            except BlockingIOError:
                pass
            except OSError:  # a file system without this flag
                self._nowait = False
        if len(data) < count:
            data += await asyncio.to_thread(os.pread, descriptor, count - len(data), offset + len(data))
        if len(data) < count:
            raise WalNotHere(f"the segment file with {format_lsn(lsn)} is shorter than a segment")
        return data

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._segment = self._descriptor = -1

"""Reading the WAL of a timeline from its segment files, and from object storage what is no longer on the disk.

The reader knows no limit: whoever reads stays below the position that it may see (flush_lsn or commit_lsn), so the bytes it
gets are never rewritten under it, whatever name their file has by then.
"""

import asyncio
import os
from pathlib import Path

from neon_services.ground.lsn import INVALID_LSN, format_lsn
from neon_services.safekeeper.remote_wal import RemoteSegmentReader, RemoteWal, WalNotHere
from neon_services.safekeeper.segments import SegmentDirectory

__all__ = ["WalNotHere", "WalReader"]


class WalReader:
    """Keeps the segment it reads open. Use close() at the end.

    Bytes below ``local_start_lsn`` were never on this disk, even when their segment's file is: they come from ``remote``.
    """

    def __init__(
        self, directory: Path, segment_size: int, *, remote: RemoteWal | None = None, local_start_lsn: int = INVALID_LSN
    ) -> None:
        self._segments = SegmentDirectory(directory, segment_size)
        self._segment_size = segment_size
        self._remote = None if remote is None else RemoteSegmentReader(remote, segment_size)
        self._local_start_lsn = local_start_lsn
        self._segment = -1
        self._descriptor = -1
        self._nowait = True

    def _open(self, lsn: int) -> int | None:
        """The descriptor of the segment's file; None when it is not here."""
        segment = lsn // self._segment_size
        if segment != self._segment or self._descriptor < 0:
            self.close()
            # completing renames the file, so between the two steps it may get its other name: then look once more
            for _ in range(2):
                path = self._segments.find(segment)
                if path is None:
                    return None
                try:
                    self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                self._segment = segment
                return self._descriptor
            return None
        return self._descriptor

    async def read(self, lsn: int, count: int) -> bytes:
        """1 to ``count`` bytes, not beyond the segment's end. Raises WalNotHere, OSError, RemoteStorageError, CorruptionError.

        Bytes in the page cache are read at once; others by a thread, so that a cold read does not stop the event loop.
        """
        count = min(count, self._segment_size - lsn % self._segment_size)
        if lsn < self._local_start_lsn and self._remote is not None:
            return await self._remote.read(lsn, min(count, self._local_start_lsn - lsn))
        descriptor, offset = self._open(lsn), lsn % self._segment_size
        if descriptor is None:
            if self._remote is not None:
                return await self._remote.read(lsn, count)
            raise WalNotHere(f"the WAL at {format_lsn(lsn)} is not on this safekeeper's disk")
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

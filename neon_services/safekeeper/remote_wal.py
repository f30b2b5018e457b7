"""A timeline's WAL in object storage: keys, and reading segments that are no longer on the disk.

Layout: ``<tenant>/<timeline>/<segment name>`` is a full segment; it holds committed WAL only, so its bytes never change and
every safekeeper's copy is the same. ``<segment name>_..._sk<id>.partial`` belongs to the safekeeper with that id alone.
"""

import asyncio

from neon_services.ground.errors import CorruptionError, NeonError
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import format_lsn, segment_file_name
from neon_services.ground.remote_storage import ObjectNotFound, RemoteStorage, RemoteStorageError

READ_CHUNK_BYTES = 1024 * 1024
READ_ATTEMPTS = 6
FIRST_BACKOFF_S = 0.05


class WalNotHere(NeonError):
    """This safekeeper does not have the WAL at that position."""


def timeline_prefix(ttid: TenantTimelineId) -> str:
    """What the keys of all objects of a timeline begin with."""
    return f"{ttid.tenant_id}/{ttid.timeline_id}/"


class RemoteWal:
    """The objects of one timeline."""

    def __init__(self, storage: RemoteStorage, ttid: TenantTimelineId) -> None:
        self.storage = storage
        self._prefix = timeline_prefix(ttid)

    def key(self, name: str) -> str:
        """The key of an object by its name in the timeline."""
        return self._prefix + name

    def segment_key(self, segment: int, segment_size: int) -> str:
        """The key of a full segment."""
        return self.key(segment_file_name(segment, segment_size))

    async def has_segment(self, segment: int, segment_size: int) -> bool:
        """Whether the whole segment is there: its last byte can be read. Raises RemoteStorageError."""
        try:
            return len(await self.storage.get(self.segment_key(segment, segment_size), segment_size - 1, segment_size)) == 1
        except ObjectNotFound:
            return False

    async def read(self, key: str, start: int, end: int) -> bytes:
        """The bytes ``[start, end)`` of an object, which must be there.

        What breaks off in the middle goes on from the last byte that came. Raises ObjectNotFound, CorruptionError when the
        object is too short, RemoteStorageError when the store keeps failing; all name the object.
        """
        received = bytearray()
        failures = 0
        while len(received) < end - start:
            try:
                part = await self.storage.get(key, start + len(received), end)
            except RemoteStorageError:
                failures += 1
                if failures == READ_ATTEMPTS:
                    raise
                await asyncio.sleep(FIRST_BACKOFF_S * 2**failures)
                continue
            if not part:
                raise CorruptionError(
                    f"object {key} ends at byte {start + len(received)}, {end} were expected: delete the object, and pull "
                    f"the timeline from a safekeeper that still has the segment"
                )
            received += part
            failures = 0
        return bytes(received)


class RemoteSegmentReader:
    """Reads full segments in chunks; the last chunk is kept for the next call."""

    def __init__(self, remote: RemoteWal, segment_size: int) -> None:
        self._remote = remote
        self._segment_size = segment_size
        self._chunk_lsn = 0
        self._chunk = b""

    async def read(self, lsn: int, count: int) -> bytes:
        """1 to ``count`` bytes. Raises WalNotHere when there is no such object, else as RemoteWal.read()."""
        if not self._chunk_lsn <= lsn < self._chunk_lsn + len(self._chunk):
            segment, offset = divmod(lsn, self._segment_size)
            key = self._remote.segment_key(segment, self._segment_size)
            start = offset - offset % READ_CHUNK_BYTES
            end = min(start + READ_CHUNK_BYTES, self._segment_size)
            try:
                self._chunk = await self._remote.read(key, start, end)
            except ObjectNotFound as error:
                raise WalNotHere(
                    f"the WAL at {format_lsn(lsn)} is neither on this safekeeper's disk nor in object storage: {error}"
                ) from error
            self._chunk_lsn = segment * self._segment_size + start
        begin = lsn - self._chunk_lsn
        return self._chunk[begin : begin + count]

"""A layer file as the timeline knows it: resident on local disk, or only in remote storage until somebody reads it.

Invariant: the bytes under the local name have the size that the index names and passed the checks of ``LayerFile.open``; a
download appears under that name only when whole and synced. Concurrent reads of an absent layer share one download.
A local file that fails a check is replaced from remote storage, if the layer is there; the read goes on.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from neon_services.ground.errors import CorruptionError, NeonError
from neon_services.ground.ids import TimelineId
from neon_services.ground.remote_storage import ObjectNotFound, RemoteStorage, RemoteStorageError
from neon_services.pageserver.layers.block_cache import BlockCache
from neon_services.pageserver.layers.hits import Hits
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.layers.reader import LayerFile
from neon_services.pageserver.remote_layout import layer_key
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.values import U64Array

log = logging.getLogger(__name__)

_DOWNLOAD_ATTEMPTS = 6

T = TypeVar("T")


async def run_to_end(threads: Executor, call: Callable[..., T], *arguments: Any) -> T:
    """Run a blocking call in a thread; a cancellation takes effect only when the call has ended, so that nothing is still
    writing when the caller cleans up.
    """
    future = asyncio.get_running_loop().run_in_executor(threads, call, *arguments)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


@dataclass(slots=True)
class LayerEnvironment:
    """What all layers of the process share."""

    cache: BlockCache
    threads: Executor  #: for reads that wait for the disk
    writers: Executor  #: for writing layer files, which takes long: reads must not stand behind it
    remote: RemoteStorage | None = None
    sync: bool = True
    downloads: int = 0
    downloaded_bytes: int = 0
    damaged: int = 0  #: local files that failed a check and were downloaded again


class Layer:
    """One delta or image layer of a timeline."""

    def __init__(
        self,
        environment: LayerEnvironment,
        directory: Path,
        shard: TenantShardId,
        timeline_id: TimelineId,
        name: LayerName,
        generation: int,
        file_size: int,
        *,
        resident: bool,
    ) -> None:
        self.name = name
        self.generation = generation
        self.shard = shard  #: of the writer
        self.file_size = file_size
        self.resident = resident
        self.uploaded = False  #: an uploaded index names this layer
        self.residence_time = self.access_time = time.time()
        self._environment = environment
        self._timeline_id = timeline_id
        self.path = directory / name.local(generation)
        self._file: LayerFile | None = None
        self._opening: asyncio.Task[LayerFile] | None = None

    @property
    def remote_key(self) -> str:
        """The key of the object."""
        return layer_key(self.shard, self._timeline_id, self.name, self.generation)

    def __str__(self) -> str:
        return str(self.name)

    async def file(self) -> LayerFile:
        """The open file, downloaded if need be. Raises CorruptionError, RemoteStorageError."""
        self.access_time = time.time()
        if self._file is not None:
            return self._file
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
            self._opening.add_done_callback(self._opened)
        return await asyncio.shield(self._opening)

    def _opened(self, task: asyncio.Task[LayerFile]) -> None:
        self._opening = None
        if not task.cancelled() and task.exception() is None:
            self._file = task.result()

    async def _open(self) -> LayerFile:
        if not self.resident:
            await self._download()
        try:
            return await self._open_local()
        except CorruptionError as error:
            self._give_up_local_copy(error)
        await self._download()
        return await self._open_local()

    async def _open_local(self) -> LayerFile:
        environment = self._environment

        def open_file() -> LayerFile:
            return LayerFile.open(self.path, self.name, self._timeline_id, environment.cache)

        return await asyncio.get_running_loop().run_in_executor(environment.threads, open_file)

    def _give_up_local_copy(self, error: CorruptionError) -> None:
        """Set a damaged file aside if remote storage has the layer; otherwise raise the error."""
        if not self.uploaded or self._environment.remote is None:
            raise error
        log.error("%s", error)
        self._environment.damaged += 1
        self.resident = False
        self._file = None
        self.path.unlink(missing_ok=True)

    async def _attempt(self, operation: Callable[[LayerFile], Awaitable[T]]) -> T:
        """Carry out a read; when the local file turns out to be damaged, once more with a fresh copy."""
        file = await self.file()
        try:
            return await operation(file)
        except CorruptionError as error:
            if self._file is file:
                self._give_up_local_copy(error)
        return await operation(await self.file())

    async def _download(self) -> None:
        remote = self._environment.remote
        if remote is None:
            raise CorruptionError(
                f"layer {self} is neither on disk at {self.path} nor is there a remote storage to get it from"
            )
        for attempt in range(_DOWNLOAD_ATTEMPTS):
            try:
                await remote.get_file(self.remote_key, self.path)
                break
            except ObjectNotFound:
                raise CorruptionError(
                    f"layer {self} is listed in the index but its object {self.remote_key} does not exist in remote storage"
                ) from None
            except RemoteStorageError as error:
                if attempt == _DOWNLOAD_ATTEMPTS - 1:
                    raise
                log.warning("download of layer %s failed, trying again: %s", self, error)
                await asyncio.sleep(0.1 * 3**attempt)
            except OSError as error:
                raise NeonError(f"layer {self} cannot be stored at {self.path}: {error.strerror or error}") from error
        size = self.path.stat().st_size
        if size != self.file_size:
            self.path.unlink()
            raise CorruptionError(f"object {self.remote_key} has {size} bytes, the index says {self.file_size}")
        self._environment.downloads += 1
        self._environment.downloaded_bytes += size
        self.resident = True
        self.residence_time = time.time()

    async def download(self) -> bool:
        """Make the layer resident; False when it was already."""
        if self.resident:
            return False
        await self.file()
        return True

    def evict(self) -> bool:
        """Drop the local copy; False when there is none or it is the only one. Readers that have it open go on."""
        if not self.resident or not self.uploaded or self._opening is not None:
            return False
        self.resident = False
        self._file = None
        self.path.unlink(missing_ok=True)
        return True

    # -- reading

    async def find(self, key_hi: U64Array, key_lo: U64Array, floor: U64Array, ceiling: U64Array) -> Hits:
        """Rows of the keys with ``floor <= lsn < ceiling`` (per key), oldest first within a key."""
        return await self._attempt(lambda file: file.find(key_hi, key_lo, floor, ceiling, self._environment.threads))

    async def keys(self, start: tuple[int, int], end: tuple[int, int], floor: int, ceiling: int) -> tuple[U64Array, U64Array]:
        """Keys of a range that have rows in an LSN range; with repetitions."""
        return await self._attempt(lambda file: file.keys(start, end, floor, ceiling, self._environment.threads))

    async def fetch(self, position: U64Array, length: np.ndarray) -> list[bytes]:
        """The bytes of rows that ``find`` named."""
        return await self._attempt(lambda file: file.fetch(position, length, self._environment.threads))

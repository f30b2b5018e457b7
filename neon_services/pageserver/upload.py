"""The upload queue of one timeline.

Invariant: operations take effect as if carried out one after the other in the order in which they were scheduled: a layer is
uploaded before an index that names it, an object is deleted only after an index that does not name it was uploaded, and an
older index never lands after a newer one. Within that, layers are uploaded in parallel and indexes coalesce: each round takes
all that is queued, uploads its layers, then the newest of its indexes, then carries out its deletions.

Failures are retried for ever with back-off: the object store being away stops nothing but the progress of
``remote_consistent_lsn``, which keeps the WAL on the safekeepers.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from neon_services.ground.errors import Cancelled
from neon_services.ground.remote_storage import RemoteStorage, RemoteStorageError
from neon_services.pageserver.index_part import IndexPart
from neon_services.pageserver.lsn_waiters import LsnWaiters

log = logging.getLogger(__name__)

_PARALLEL_UPLOADS = 4
_BACKOFF_MIN_S = 0.1
_BACKOFF_MAX_S = 10.0
_WARN_AFTER = 3


@dataclass(slots=True)
class _Round:
    layers: list[tuple[str, Path]] = field(default_factory=list)
    index: IndexPart | None = None
    deletions: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.layers or self.index is not None or self.deletions)


class UploadQueue:
    """Uploads and deletions of one timeline in one generation."""

    def __init__(
        self,
        remote: RemoteStorage,
        index_object_key: str,
        on_index_uploaded: Callable[[IndexPart], None],
        *,
        name: str,
        may_delete: bool = True,
    ) -> None:
        self._remote = remote
        self._index_key = index_object_key
        self._on_index_uploaded = on_index_uploaded
        self._name = name
        self._may_delete = may_delete
        self._queued = _Round()
        self._held_deletions: list[str] = []
        self._wake = asyncio.Event()
        self._scheduled = 0  # operations so far
        self._done = LsnWaiters(0)  # operations done, in the order in which they were scheduled
        self._task: asyncio.Task[None] | None = None
        self._running = asyncio.Event()
        self._stopped = False
        self.failures = 0  #: consecutive

    def start(self) -> None:
        """Begin or go on to work; without this (attach mode Stale) operations only queue."""
        self._running.set()
        if self._task is None and not self._stopped:
            self._task = asyncio.get_running_loop().create_task(self._work(), name=f"upload {self._name}")

    def allow_deletions(self, allowed: bool) -> None:
        """False in attach mode Multi: deletions wait until Single."""
        self._may_delete = allowed
        self._wake.set()

    def pause(self) -> None:
        """Begin no further operation until ``start``: another node may be the writer now."""
        self._running.clear()

    @property
    def paused(self) -> bool:
        return not self._running.is_set()

    # -- scheduling

    def upload_layer(self, key: str, path: Path) -> None:
        """Upload a layer file."""
        self._queued.layers.append((key, path))
        self._notify()

    def upload_index(self, index: IndexPart) -> None:
        """Upload this index."""
        self._queued.index = index
        self._notify()

    def delete(self, keys: list[str]) -> None:
        """Delete objects that the last scheduled index does not name."""
        if keys:
            self._queued.deletions += keys
            self._notify()

    def _notify(self) -> None:
        self._scheduled += 1
        self._wake.set()

    @property
    def pending(self) -> bool:
        """Whether anything is queued or under way."""
        return self._done.lsn < self._scheduled

    async def wait_done(self, timeout_s: float | None = None) -> None:
        """Return when all that is scheduled by now is done. Raises NeonError after the timeout, Cancelled when stopped."""
        await self._done.wait(self._scheduled, timeout_s, f"the upload queue of {self._name}")

    async def stop(self) -> None:
        """Stop at once; what is not uploaded yet is uploaded again after the next start, from WAL or from local files."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._done.close(Cancelled(f"the upload queue of {self._name} is stopped"))

    # -- working

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queued or (self._held_deletions and self._may_delete):
                current, self._queued = self._queued, _Round()
                scheduled = self._scheduled
                await self._upload_layers(current.layers)
                if current.index is not None:
                    content = current.index.to_json()
                    await self._retry("index", lambda content=content: self._remote.put(self._index_key, content))  # type: ignore[misc]
                    self._on_index_uploaded(current.index)
                self._held_deletions += current.deletions
                if self._held_deletions and self._may_delete:
                    keys, self._held_deletions = self._held_deletions, []
                    await self._retry("deletions", lambda keys=keys: self._remote.delete(keys))  # type: ignore[misc]
                self._done.advance(scheduled)

    async def _upload_layers(self, layers: list[tuple[str, Path]]) -> None:
        slots = asyncio.Semaphore(_PARALLEL_UPLOADS)

        async def upload(key: str, path: Path) -> None:
            async with slots:
                await self._retry(f"layer {path.name}", lambda: self._remote.put_file(key, path))

        async with asyncio.TaskGroup() as group:
            for key, path in layers:
                group.create_task(upload(key, path))

    async def _retry(self, what: str, operation: Callable[[], Awaitable[None]]) -> None:
        delay = _BACKOFF_MIN_S
        for attempt in range(1, 1 << 62):
            await self._running.wait()
            try:
                await operation()
                self.failures = 0
                return
            except (RemoteStorageError, OSError) as error:
                self.failures = attempt
                if attempt >= _WARN_AFTER:
                    log.warning("upload of %s of %s failed %d times, trying again: %s", what, self._name, attempt, error)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _BACKOFF_MAX_S)

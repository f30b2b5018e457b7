"""A timeline: one branch's layers, its LSNs, ingest and reads.

Invariants:
* a value is in exactly one of: the open layer, a frozen layer, a layer file (per LSN), so a read finds it once;
* no in-memory layer boundary falls inside one LSN: a layer is frozen at ``last_record_lsn + 1``;
* ``disk_consistent_lsn`` is only raised when everything at or below it is in synced layer files;
* ``remote_consistent_lsn`` is only raised when an index that covers it has been uploaded.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neon_services.ground.errors import Cancelled, NeonError
from neon_services.ground.ids import TenantId, TimelineId
from neon_services.pageserver.image_creation import create_image_layers
from neon_services.pageserver.index_part import IndexPart, LayerMetadata, naive_now
from neon_services.pageserver.layers.delta import write_level0
from neon_services.pageserver.layers.in_memory import InMemoryLayer
from neon_services.pageserver.layers.layer import Layer, LayerEnvironment, run_to_end
from neon_services.pageserver.layers.layer_map import LayerMap, LayerView
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.leases import LsnLeases
from neon_services.pageserver.location_config import TenantConf
from neon_services.pageserver.lsn_waiters import LsnTimeout, LsnWaiters
from neon_services.pageserver.operations import STORAGE_OPERATIONS
from neon_services.pageserver.read_path import search_timeline
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.remote_layout import index_key
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.upload import UploadQueue
from neon_services.pageserver.values import MissingKey, U64Array, ValueBatch, unique_keys

__all__ = ["LsnTimeout", "MissingKey", "Timeline", "TimelineResources"]

log = logging.getLogger(__name__)

DEFAULT_WAIT_LSN_TIMEOUT_S = 300.0
_FROZEN_LAYERS_MAX = 2  # ingest waits while more are waiting to be written
_FLUSH_RETRY_S = 1.0
_NO_KEYS: U64Array = np.empty(0, np.uint64)


@dataclass(slots=True)
class TimelineResources:
    """What a timeline needs from tenant and process."""

    environment: LayerEnvironment
    reconstructor: Reconstructor
    directory: Path | None  #: of the timeline's layer files; None: never flush (tests)
    generation: int = 1
    conf: TenantConf = field(default_factory=TenantConf)
    needs_validation: bool = False  #: a control plane may have given the tenant to another node


class Timeline:
    """One timeline of one tenant shard on this node."""

    def __init__(
        self,
        *,
        tenant_shard_id: TenantShardId,
        timeline_id: TimelineId,
        pg_version: int,
        initdb_lsn: int,
        disk_consistent_lsn: int,
        resources: TimelineResources,
        prev_record_lsn: int = 0,
        ancestor: "Timeline | None" = None,
        ancestor_lsn: int = 0,
        latest_gc_cutoff_lsn: int | None = None,
    ) -> None:
        self.tenant_shard_id = tenant_shard_id
        self.timeline_id = timeline_id
        self.pg_version = pg_version  #: major
        self.initdb_lsn = initdb_lsn
        self.ancestor = ancestor
        self.ancestor_lsn = ancestor_lsn
        self.prev_record_lsn = prev_record_lsn
        self.latest_gc_cutoff_lsn = initdb_lsn if latest_gc_cutoff_lsn is None else latest_gc_cutoff_lsn
        self.state = "Loading"  #: "Loading", "Active", "Stopping" or "Broken"
        self.broken_reason = ""
        self.deleted_at: str | None = None
        self.index_extra: dict[str, Any] = {}
        self.resources = resources
        self.layer_map = LayerMap()
        self.leases = LsnLeases()
        self.uploads: UploadQueue | None = None
        self._last_record = LsnWaiters(disk_consistent_lsn)
        self._ingest_latest: Callable[[float], Awaitable[None]] | None = None
        self._disk_consistent = LsnWaiters(disk_consistent_lsn)
        self._remote_consistent = LsnWaiters(0)
        self._validated_lsn = 0
        self._open: InMemoryLayer | None = None
        self._frozen: list[tuple[InMemoryLayer, int]] = []  # (layer, prev_record_lsn at its end), oldest first
        self._next_open_lsn = disk_consistent_lsn + 1 if disk_consistent_lsn else initdb_lsn
        self._last_freeze_lsn = disk_consistent_lsn or initdb_lsn
        self._last_freeze_at = time.monotonic()
        self._flushed_prev_record_lsn = prev_record_lsn
        self._flush_wanted = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._flush_task: asyncio.Task[None] | None = None
        self._rewriting = asyncio.Lock()
        self._rewrite_task: asyncio.Task[list[Layer]] | None = None

    # -- identity and positions

    @property
    def tenant_id(self) -> TenantId:
        return self.tenant_shard_id.tenant_id

    @property
    def conf(self) -> TenantConf:
        """The tenant's effective settings."""
        return self.resources.conf

    @property
    def last_record_lsn(self) -> int:
        """The end LSN of the last ingested record: reads up to here see everything."""
        return self._last_record.lsn

    @property
    def disk_consistent_lsn(self) -> int:
        """Everything up to here is in synced local layer files."""
        return self._disk_consistent.lsn

    @property
    def remote_consistent_lsn(self) -> int:
        """Everything up to here is in remote storage and in an uploaded index (Neon's "projected" value)."""
        return self._remote_consistent.lsn

    @property
    def remote_consistent_lsn_visible(self) -> int:
        """What safekeepers may be told: the projected value once our generation is known to be current.

        Without a control plane (``control_plane_emergency_mode``) nobody can have given the tenant a newer generation, so the
        projected value counts as validated.
        """
        return self._validated_lsn if self.resources.needs_validation else self._remote_consistent.lsn

    def validated(self, lsn: int) -> None:
        """The control plane has confirmed our generation after ``remote_consistent_lsn`` was ``lsn``."""
        self._validated_lsn = max(self._validated_lsn, lsn)

    def __str__(self) -> str:
        return f"{self.tenant_shard_id}/{self.timeline_id}"

    # -- life

    def start(self) -> None:
        """Begin to flush; the timeline is Active. Reads and ingest work before, too."""
        self.state = "Active"
        if self._flush_task is None and self.resources.directory is not None:
            self._flush_task = asyncio.get_running_loop().create_task(self._flush_loop(), name=f"flush {self}")

    def attach_uploads(self, *, uploading: bool, may_delete: bool) -> None:
        """Connect to remote storage; ``uploading`` False (attach mode Stale) only queues."""
        remote = self.resources.environment.remote
        if remote is None:
            return
        if self.uploads is None:
            key = index_key(self.tenant_shard_id, self.timeline_id, self.resources.generation)
            self.uploads = UploadQueue(remote, key, self._index_uploaded, name=str(self))
        self.uploads.allow_deletions(may_delete)
        if uploading:
            self.uploads.start()
        else:
            self.uploads.pause()

    def load_index(self, index: IndexPart) -> None:
        """Take over the layers that an index names; whatever lies beyond its ``disk_consistent_lsn`` is left out."""
        directory = self.resources.directory
        assert directory is not None
        layers = []
        for name, metadata in index.layers.items():
            end = name.lsn_start if name.is_image else name.lsn_end - 1
            if end > index.disk_consistent_lsn:
                log.warning("timeline %s: layer %s lies beyond the index's disk_consistent_lsn; dropped", self, name)
                continue
            path = directory / name.local(metadata.generation)
            resident = path.exists() and path.stat().st_size == metadata.file_size
            layer = self._layer(name, metadata.generation, metadata.file_size, resident, metadata.shard)
            layer.uploaded = True
            layers.append(layer)
        self.layer_map = LayerMap(layers)
        self._remote_consistent.advance(index.disk_consistent_lsn)
        self.deleted_at = index.deleted_at
        self.index_extra = index.extra

    def new_layer(self, name: LayerName, size: int) -> Layer:
        """A layer file that this timeline has just written."""
        return self._layer(name, self.resources.generation, size, True)

    async def create_image_layers(self) -> list[Layer]:
        """Flush and write image layers of everything at ``disk_consistent_lsn``; see ``image_creation``."""
        async with self._rewriting:
            self._rewrite_task = asyncio.get_running_loop().create_task(create_image_layers(self), name=f"images {self}")
            return await asyncio.shield(self._rewrite_task)

    def _layer(self, name: LayerName, generation: int, size: int, resident: bool, writer: str | None = None) -> Layer:
        assert self.resources.directory is not None
        shard = self.tenant_shard_id
        if writer is not None:
            shard = TenantShardId(shard.tenant_id, int(writer[:2], 16), int(writer[2:], 16))
        environment, directory = self.resources.environment, self.resources.directory
        return Layer(environment, directory, shard, self.timeline_id, name, generation, size, resident=resident)

    async def shutdown(self, *, flush: bool, upload_timeout_s: float = 5.0) -> None:
        """Stop. With ``flush`` everything is first written to layer files and, if there is time, uploaded."""
        self.state = "Stopping" if self.state != "Broken" else self.state
        if self._rewrite_task is not None:
            self._rewrite_task.cancel()
            await asyncio.gather(self._rewrite_task, return_exceptions=True)
        try:
            if flush and self._flush_task is not None:
                await self.freeze_and_flush()
                if self.uploads is not None and not self.uploads.paused:
                    await self.wait_uploads(upload_timeout_s)
        except (Cancelled, LsnTimeout) as error:
            log.warning("timeline %s: not everything is uploaded at shutdown; it will come from WAL again: %s", self, error)
        finally:
            closed = self._stopped()
            for waiters in (self._last_record, self._disk_consistent, self._remote_consistent):
                waiters.close(closed)
            if self._flush_task is not None:
                self._flush_task.cancel()
                await asyncio.gather(self._flush_task, return_exceptions=True)
                self._flush_task = None
            if self.uploads is not None:
                await self.uploads.stop()

    def _stopped(self) -> Cancelled:
        return Cancelled(f"timeline {self} is shutting down")

    def remove_local_files(self) -> None:
        """Delete the timeline's directory; only after ``shutdown``."""
        if self.resources.directory is not None:
            shutil.rmtree(self.resources.directory, ignore_errors=True)

    # -- ingest

    def ingest(self, batch: ValueBatch, last_record_lsn: int, prev_record_lsn: int) -> None:
        """Add rows and move ``last_record_lsn`` there (both at once: a read sees all of the batch or nothing).

        Synchronous and cheap. Rows must lie above the last frozen layer and not above ``last_record_lsn``. ``prev_record_lsn``
        is the *start* of the last record, as the next record's ``xl_prev`` will name it. An empty batch only moves the LSNs.
        """
        if self.state == "Stopping":
            raise self._stopped()
        if len(batch):
            assert int(batch.lsn.max()) <= last_record_lsn, "a value above the batch's last record"
            if self._open is not None and len(self._open) and self._should_roll(batch, last_record_lsn):
                self.freeze()
            if self._open is None:
                self._open = InMemoryLayer(self._next_open_lsn, time.monotonic())
            self._open.append(batch)
        self.prev_record_lsn = prev_record_lsn
        self._last_record.advance(last_record_lsn)

    def _should_roll(self, batch: ValueBatch, last_record_lsn: int) -> bool:
        """Neon's rule: by WAL distance, by size, or by age; only between two LSNs."""
        assert self._open is not None
        if self.resources.directory is None or int(batch.lsn.min()) <= self.last_record_lsn:
            return False
        limit = self.conf.integer("checkpoint_distance")
        if last_record_lsn - self._last_freeze_lsn >= limit * max(1, self.tenant_shard_id.count):
            return True
        return self._open.size + batch.data_bytes >= limit or self._is_old()

    def _is_old(self) -> bool:
        opened = self._last_freeze_at if self._open is None else self._open.opened_at
        return time.monotonic() - opened >= self.conf.seconds("checkpoint_timeout")

    async def ingest_backpressure(self) -> None:
        """Wait while too much is waiting to be flushed. Call after each ``ingest``."""
        if not self._room.is_set():
            await self._room.wait()
        else:
            await asyncio.sleep(0)

    # -- freeze and flush

    def freeze(self) -> int:
        """Close the open layer at ``last_record_lsn``; the LSN that ``disk_consistent_lsn`` reaches when all is flushed."""
        end = self.last_record_lsn + 1
        if end > self._next_open_lsn and self.resources.directory is not None:
            # without an open layer the WAL since the last one had no values for us: an empty layer carries the LSN forward
            layer = self._open or InMemoryLayer(self._next_open_lsn, time.monotonic())
            layer.freeze(end)
            self._frozen.append((layer, self.prev_record_lsn))
            self._open = None
            self._next_open_lsn = end
            self._last_freeze_lsn = end - 1
            self._last_freeze_at = time.monotonic()
            if len(self._frozen) > _FROZEN_LAYERS_MAX:
                self._room.clear()
            self._flush_wanted.set()
        return self._next_open_lsn - 1

    async def freeze_and_flush(self) -> int:
        """Freeze and wait until everything is in layer files; the new ``disk_consistent_lsn``."""
        target = self.freeze()
        if self.resources.directory is not None and target >= self.initdb_lsn:
            await self._disk_consistent.wait(target, None, f"flush of timeline {self}")
        return target

    async def wait_uploaded(self, lsn: int, timeout_s: float = 3600.0) -> None:
        """Return when ``remote_consistent_lsn >= lsn``."""
        await self._remote_consistent.wait(lsn, timeout_s, f"upload of timeline {self}")

    async def wait_uploads(self, timeout_s: float | None = None) -> None:
        """Return when all layers and indexes that exist by now are in remote storage. Raises NeonError when uploads are off."""
        if self.uploads is not None:
            if self.uploads.paused:
                raise NeonError(f"timeline {self} uploads nothing: its tenant is attached in mode AttachedStale")
            await self.uploads.wait_done(timeout_s)

    def housekeeping(self) -> None:
        """Freeze an idle timeline's layer when it is old enough; called now and then."""
        if self.last_record_lsn >= self._next_open_lsn and self.state == "Active":
            far = self.last_record_lsn - self._last_freeze_lsn >= self.conf.integer("checkpoint_distance")
            if far or self._is_old():
                self.freeze()

    async def _flush_loop(self) -> None:
        while True:
            await self._flush_wanted.wait()
            self._flush_wanted.clear()
            while self._frozen:
                try:
                    await self._flush_oldest()
                except OSError as error:
                    log.error("timeline %s: cannot write a layer file, trying again: %s", self, error)
                    await asyncio.sleep(_FLUSH_RETRY_S)

    async def _flush_oldest(self) -> None:
        frozen, prev_record_lsn = self._frozen[0]
        started = time.monotonic()
        assert frozen.end_lsn is not None
        resources = self.resources
        added: list[Layer] = []
        if len(frozen):
            name, size = await run_to_end(resources.environment.writers, self._write_level0, frozen)
            added.append(self.new_layer(name, size))
            STORAGE_OPERATIONS.labels("layer flush").observe(time.monotonic() - started)
            log.info("timeline %s: wrote %s, %d values in %d bytes", self, name, len(frozen), size)
        # no await from here to the end: readers see the rows in the file or in memory, never in both or in neither
        self.layer_map.replace(add=added)
        self._frozen.pop(0)
        self._flushed_prev_record_lsn = prev_record_lsn
        self._disk_consistent.advance(frozen.end_lsn - 1)
        if len(self._frozen) <= _FROZEN_LAYERS_MAX:
            self._room.set()
        self.schedule_uploads(added)

    def _write_level0(self, frozen: InMemoryLayer) -> tuple[LayerName, int]:
        resources = self.resources
        assert resources.directory is not None
        return write_level0(
            frozen,
            resources.directory,
            resources.generation,
            self.tenant_shard_id,
            self.timeline_id,
            sync=resources.environment.sync,
        )

    # -- remote storage

    def index(self) -> IndexPart:
        """The index of the timeline's present state on disk."""
        writer = {True: None, False: self.tenant_shard_id.shard_slug}[self.tenant_shard_id.is_unsharded]
        return IndexPart(
            disk_consistent_lsn=self.disk_consistent_lsn,
            prev_record_lsn=self._flushed_prev_record_lsn or None,
            ancestor_timeline=None if self.ancestor is None else self.ancestor.timeline_id,
            ancestor_lsn=self.ancestor_lsn,
            latest_gc_cutoff_lsn=self.latest_gc_cutoff_lsn,
            initdb_lsn=self.initdb_lsn,
            pg_version=self.pg_version,
            layers={
                layer.name: LayerMetadata(
                    layer.file_size, layer.generation, writer if layer.shard == self.tenant_shard_id else layer.shard.shard_slug
                )
                for layer in self.layer_map.layers
            },
            deleted_at=self.deleted_at,
            extra=self.index_extra,
        )

    def schedule_uploads(self, layers: Sequence[Layer]) -> None:
        """Upload new layers and then the index that names them."""
        if self.uploads is not None:
            for layer in layers:
                self.uploads.upload_layer(layer.remote_key, layer.path)
            self.uploads.upload_index(self.index())

    async def upload_index_now(self) -> None:
        """Upload the index and wait until it is there (timeline creation, deletion)."""
        if self.uploads is not None:
            self.uploads.upload_index(self.index())
            await self.wait_uploads()

    def _index_uploaded(self, index: IndexPart) -> None:
        for name in index.layers:
            layer = self.layer_map.get(name)
            if layer is not None:
                layer.uploaded = True
        self._remote_consistent.advance(index.disk_consistent_lsn)

    async def mark_deleted(self) -> None:
        """Make the deletion durable: from here on a restart resumes it."""
        self.deleted_at = self.deleted_at or naive_now()
        await self.upload_index_now()

    # -- reads

    async def wait_lsn(self, lsn: int, timeout_s: float = DEFAULT_WAIT_LSN_TIMEOUT_S) -> None:
        """Return when ``last_record_lsn >= lsn``. Raises LsnTimeout, or Cancelled when the timeline shuts down."""
        await self._last_record.wait(lsn, timeout_s, f"timeline {self}")

    @property
    def has_lsn_waiters(self) -> bool:
        """Whether somebody waits for WAL that has not been ingested."""
        return self._last_record.waiting

    async def latest_lsn(self, timeout_s: float) -> int:
        """``last_record_lsn``, once all that the safekeeper has sent or kept back by now is ingested. Raises LsnTimeout."""
        if self._ingest_latest is not None:
            await self._ingest_latest(timeout_s)
        return self.last_record_lsn

    def ingested_by(self, on_wait: Callable[[], None], ingest_latest: Callable[[float], Awaitable[None]]) -> None:
        """From now on this one ingests, and may take its time.

        ``on_wait`` is called when somebody begins to wait for WAL that has not been ingested; ``ingest_latest``, with a
        timeout in seconds, returns when nothing is left of what was there to be had, and raises LsnTimeout.
        """
        self._last_record.on_wait = on_wait
        self._ingest_latest = ingest_latest

    async def get_many(self, key_hi: U64Array | Sequence[int], key_lo: U64Array | Sequence[int], lsn: int) -> list[Any]:
        """The values of keys at an LSN (``lsn <= last_record_lsn`` is the caller's business).

        An item is ``bytes``, or a ``MissingKey`` (also for a tombstone), or a ``RedoFailed``; errors of layers are raised.
        """
        if self.state == "Stopping":
            raise self._stopped()  # whoever still holds a detached timeline must look it up again
        hi, lo = np.asarray(key_hi, np.uint64), np.asarray(key_lo, np.uint64)
        search = await search_timeline(self, hi, lo, lsn)
        return await self.resources.reconstructor.reconstruct(hi.tolist(), lo.tolist(), await search.histories(), lsn)

    async def get(self, key_hi: int, key_lo: int, lsn: int) -> bytes:
        """One value. Raises MissingKey or RedoFailed."""
        (value,) = await self.get_many([key_hi], [key_lo], lsn)
        if isinstance(value, bytes):
            return value
        raise value

    async def scan(self, start_hi: int, start_lo: int, end_hi: int, end_lo: int, lsn: int) -> list[tuple[int, int, bytes]]:
        """All existing values of the keys in ``[start, end)`` in key order; for ranges of metadata keys."""
        hi, lo = await self.keys_in_range((start_hi, start_lo), (end_hi, end_lo), lsn)
        values = await self.get_many(hi, lo, lsn) if len(hi) else []
        rows = []
        for key_hi, key_lo, value in zip(hi.tolist(), lo.tolist(), values, strict=True):
            if isinstance(value, bytes):
                rows.append((key_hi, key_lo, value))
            elif not isinstance(value, MissingKey):
                raise value
        return rows

    async def keys_in_range(self, start: tuple[int, int], end: tuple[int, int], lsn: int) -> tuple[U64Array, U64Array]:
        """A superset of the keys that exist in ``[start, end)`` at the LSN, distinct and sorted."""
        found: list[tuple[U64Array, U64Array]] = []
        level: Timeline | None = self
        while level is not None:
            view = level.layer_map.view
            found += [layer.scan(start, end, 0, lsn + 1) for layer in level.in_memory_layers()]
            found += await view.keys_in_range(start, end, lsn)
            lsn = min(lsn, level.ancestor_lsn)
            if level.ancestor is not None:
                await level.ancestor.wait_lsn(level.ancestor_lsn)
            level = level.ancestor
        if not found:
            return _NO_KEYS, _NO_KEYS
        return unique_keys(np.concatenate([hi for hi, _ in found]), np.concatenate([lo for _, lo in found]))

    # -- what the read path sees

    def in_memory_layers(self) -> list[InMemoryLayer]:
        """Open and frozen layers, newest first."""
        frozen = [layer for layer, _ in reversed(self._frozen)]
        return frozen if self._open is None else [self._open, *frozen]

    def historic_view(self) -> LayerView:
        """A snapshot of the layer files."""
        return self.layer_map.view


def in_memory_timeline(
    pg_version: int, initdb_lsn: int, *, reconstructor: Reconstructor | None = None, **options: Any
) -> Timeline:
    """A timeline without files, directory or remote storage; for tests of what is built on timelines."""
    from concurrent.futures import ThreadPoolExecutor

    from neon_services.pageserver.layers.block_cache import BlockCache

    threads = ThreadPoolExecutor(1)
    environment = LayerEnvironment(BlockCache(1 << 20), threads, threads)
    return Timeline(
        tenant_shard_id=TenantShardId(TenantId.generate()),
        timeline_id=TimelineId.generate(),
        pg_version=pg_version,
        initdb_lsn=initdb_lsn,
        disk_consistent_lsn=options.get("ancestor_lsn", 0),
        resources=TimelineResources(environment, reconstructor or Reconstructor(), None),
        **options,
    )

"""A timeline: one branch's layers, its LSNs, ingest and reads.

Invariants:
* a value is in exactly one of: the open layer, a frozen layer, a layer file (per LSN), so a read finds it once;
* no in-memory layer boundary falls inside one LSN: a layer is frozen at ``last_record_lsn + 1``;
* ``disk_consistent_lsn`` is only raised when everything at or below it is in synced layer files.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from neon_services.ground.errors import Cancelled
from neon_services.ground.ids import TenantId, TimelineId
from neon_services.pageserver.layers.in_memory import InMemoryLayer
from neon_services.pageserver.lsn_waiters import LsnTimeout, LsnWaiters
from neon_services.pageserver.read_path import HistoricView, Search, search_timeline
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.values import MissingKey, U64Array, ValueBatch, unique_keys

__all__ = ["LsnTimeout", "MissingKey", "Timeline"]

log = logging.getLogger(__name__)

DEFAULT_WAIT_LSN_TIMEOUT_S = 300.0
_NO_KEYS: U64Array = np.empty(0, np.uint64)


class _NoFiles:
    async def collect(self, search: Search) -> None:
        return


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
        prev_record_lsn: int = 0,
        ancestor: "Timeline | None" = None,
        ancestor_lsn: int = 0,
        reconstructor: Reconstructor | None = None,
    ) -> None:
        self.tenant_shard_id = tenant_shard_id
        self.timeline_id = timeline_id
        self.pg_version = pg_version  #: major
        self.initdb_lsn = initdb_lsn
        self.ancestor = ancestor
        self.ancestor_lsn = ancestor_lsn
        self.disk_consistent_lsn = disk_consistent_lsn
        self.remote_consistent_lsn = 0
        self.prev_record_lsn = prev_record_lsn
        self.latest_gc_cutoff_lsn = initdb_lsn
        self._last_record = LsnWaiters(disk_consistent_lsn)
        self._reconstructor = reconstructor or Reconstructor()
        self._open: InMemoryLayer | None = None
        self._frozen: list[InMemoryLayer] = []  # oldest first
        self._next_open_lsn = disk_consistent_lsn + 1 if disk_consistent_lsn else initdb_lsn

    # -- identity and positions

    @property
    def tenant_id(self) -> TenantId:
        return self.tenant_shard_id.tenant_id

    @property
    def last_record_lsn(self) -> int:
        """The end LSN of the last ingested record: reads up to here see everything."""
        return self._last_record.lsn

    @property
    def remote_consistent_lsn_visible(self) -> int:
        """What safekeepers may be told."""
        return self.remote_consistent_lsn

    def __str__(self) -> str:
        return f"{self.tenant_shard_id}/{self.timeline_id}"

    # -- ingest

    def ingest(self, batch: ValueBatch, last_record_lsn: int, prev_record_lsn: int) -> None:
        """Add rows and move ``last_record_lsn`` there (both at once: a read sees all of the batch or nothing).

        Synchronous and cheap. Rows must lie above the last frozen layer and not above ``last_record_lsn``. ``prev_record_lsn``
        is the *start* of the last record, as the next record's ``xl_prev`` will name it. An empty batch only moves the LSNs.
        """
        if len(batch):
            assert int(batch.lsn.max()) <= last_record_lsn, "a value above the batch's last record"
            if self._open is None:
                self._open = InMemoryLayer(self._next_open_lsn)
            self._open.append(batch)
        self.prev_record_lsn = prev_record_lsn
        self._last_record.advance(last_record_lsn)

    async def ingest_backpressure(self) -> None:
        """Wait while too much is waiting to be flushed. Call after each ``ingest``."""
        await asyncio.sleep(0)

    # -- reads

    async def wait_lsn(self, lsn: int, timeout_s: float = DEFAULT_WAIT_LSN_TIMEOUT_S) -> None:
        """Return when ``last_record_lsn >= lsn``. Raises LsnTimeout, or Cancelled when the timeline shuts down."""
        await self._last_record.wait(lsn, timeout_s, f"timeline {self}")

    async def get_many(self, key_hi: U64Array | Sequence[int], key_lo: U64Array | Sequence[int], lsn: int) -> list[Any]:
        """The values of keys at an LSN (``lsn <= last_record_lsn`` is the caller's business).

        An item is ``bytes``, or a ``MissingKey`` (also for a tombstone), or a ``RedoFailed``; errors of layers are raised.
        """
        hi, lo = np.asarray(key_hi, np.uint64), np.asarray(key_lo, np.uint64)
        search = await search_timeline(self, hi, lo, lsn)
        return await self._reconstructor.reconstruct(hi.tolist(), lo.tolist(), search.histories(), lsn)

    async def get(self, key_hi: int, key_lo: int, lsn: int) -> bytes:
        """One value. Raises MissingKey or RedoFailed."""
        (value,) = await self.get_many([key_hi], [key_lo], lsn)
        if isinstance(value, bytes):
            return value
        raise value

    async def scan(self, start_hi: int, start_lo: int, end_hi: int, end_lo: int, lsn: int) -> list[tuple[int, int, bytes]]:
        """All existing values of the keys in ``[start, end)`` in key order; for ranges of metadata keys."""
        hi, lo = await self._keys_in_range((start_hi, start_lo), (end_hi, end_lo), lsn)
        values = await self.get_many(hi, lo, lsn)
        rows = []
        for key_hi, key_lo, value in zip(hi.tolist(), lo.tolist(), values, strict=True):
            if isinstance(value, bytes):
                rows.append((key_hi, key_lo, value))
            elif not isinstance(value, MissingKey):
                raise value
        return rows

    async def _keys_in_range(self, start: tuple[int, int], end: tuple[int, int], lsn: int) -> tuple[U64Array, U64Array]:
        """A superset of the keys that exist in the range at the LSN, distinct and sorted."""
        his: list[U64Array] = []
        los: list[U64Array] = []
        level: Timeline | None = self
        while level is not None:
            for layer in level.in_memory_layers():
                hi, lo = layer.scan(start, end, 0, lsn + 1)
                his.append(hi)
                los.append(lo)
            lsn = min(lsn, level.ancestor_lsn)
            level = level.ancestor
        return unique_keys(np.concatenate(his), np.concatenate(los)) if his else (_NO_KEYS, _NO_KEYS)

    # -- what the read path sees

    def in_memory_layers(self) -> list[InMemoryLayer]:
        """Open and frozen layers, newest first."""
        return ([self._open] if self._open is not None else []) + self._frozen[::-1]

    def historic_view(self) -> HistoricView:
        """A snapshot of the layer files."""
        return _NoFiles()

    # -- the end

    async def shutdown(self) -> None:
        """Wake all waiters with Cancelled."""
        self._last_record.close(Cancelled(f"timeline {self} is shutting down"))


def in_memory_timeline(pg_version: int, initdb_lsn: int, **options: Any) -> Timeline:
    """A timeline without files, directory or remote storage; for tests of what is built on timelines."""
    return Timeline(
        tenant_shard_id=TenantShardId(TenantId.generate()),
        timeline_id=TimelineId.generate(),
        pg_version=pg_version,
        initdb_lsn=initdb_lsn,
        disk_consistent_lsn=options.get("ancestor_lsn", 0),
        **options,
    )

"""A storage engine in one process for tests: tenants over a directory, with fake redo and a fake bootstrap."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from neon_services.ground.ids import TenantId, TimelineId
from neon_services.ground.remote_storage import LocalFsStorage, RemoteStorage
from neon_services.pageserver.layers.block_cache import BlockCache
from neon_services.pageserver.layers.layer import LayerEnvironment
from neon_services.pageserver.location_config import LocationConf
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.tenant import NodeResources, Tenant
from neon_services.pageserver.tenant_manager import TenantManager
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.values import IMAGE, ValueBatch
from neon_services.wal.redo import RedoRequest, RedoResult, RedoStatus

INITDB_LSN = 1000


class ConcatenatingRedo:
    """Stands in for the redo helper: a page is its base plus the records."""

    def __init__(self) -> None:
        self.pages = 0

    async def apply(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        self.pages += len(requests)
        return [RedoResult(RedoStatus.OK, (r.base or b"") + r.entries) for r in requests]


def concatenate(page: bytes | None, record: bytes, lsn: int, key: int) -> bytes:
    """Stands in for native records."""
    return (page or b"") + record


class FakeServices:
    """Bootstraps a timeline with one page and a first record."""

    def __init__(self) -> None:
        self.active: set[TimelineId] = set()

    async def bootstrap(
        self, shard: TenantShardId, timeline_id: TimelineId, pg_version: int, make: Callable[[int], Timeline]
    ) -> Timeline:
        timeline = make(INITDB_LSN)
        timeline.ingest(ValueBatch.build([(0, 0, INITDB_LSN, IMAGE, b"initdb")]), INITDB_LSN, 0)
        timeline.ingest(ValueBatch.build([(0, 1, INITDB_LSN + 8, IMAGE, b"checkpoint")]), INITDB_LSN + 8, INITDB_LSN)
        return timeline

    def activated(self, timeline: Timeline) -> None:
        self.active.add(timeline.timeline_id)

    async def stopping(self, timeline: Timeline) -> None:
        self.active.discard(timeline.timeline_id)

    async def timeline_extra(self, timeline: Timeline, query: dict[str, str]) -> dict[str, Any]:
        return {}

    async def keyspace(self, timeline: Timeline, lsn: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        return [(0, 2)], []


class Engine:
    """One pageserver's storage engine; ``restart`` makes another one over the same directories."""

    def __init__(self, base: Path, remote: RemoteStorage | None = None, node_conf: dict[str, Any] | None = None) -> None:
        self.base = base
        self.remote = remote or LocalFsStorage(base / "remote")
        self.services = FakeServices()
        self.redo = ConcatenatingRedo()
        self.environment = LayerEnvironment(
            BlockCache(1 << 20), ThreadPoolExecutor(2), ThreadPoolExecutor(2), self.remote, sync=False
        )
        reconstructor = Reconstructor(self.redo, concatenate)
        self.node = NodeResources(self.environment, lambda _: reconstructor, self.remote, self.services, node_conf or {})
        self.tenants = TenantManager(self.node, base / "tenants")

    async def attach(self, shard: TenantShardId, generation: int = 1, mode: str = "AttachedSingle") -> Tenant:
        await self.tenants.set_location(shard, LocationConf(mode, generation))
        return await self.tenants.active_tenant(shard)

    async def tenant(self, shard: TenantShardId) -> Tenant:
        return await self.tenants.active_tenant(shard)

    async def crash(self) -> None:
        """Stop without flushing or uploading anything more."""
        for tenant in self.tenants.tenants.values():
            await tenant.shutdown(flush=False)


def new_shard() -> TenantShardId:
    """A fresh unsharded tenant."""
    return TenantShardId(TenantId.generate())

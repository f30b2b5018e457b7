"""The pageserver process put together: storage engine, WAL redo, WAL receiving, page service, HTTP API.

Order of the start: remote storage, tenants (loading in the background), HTTP, page service. Order of the stop: page service,
tenants (flushed, uploaded if there is time), HTTP last, so that clients see 503 rather than nothing.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiohttp import web

from neon_services.ground import http
from neon_services.ground.errors import ConfigError
from neon_services.ground.http import ApiError
from neon_services.ground.ids import TenantId, TimelineId
from neon_services.ground.lsn import format_lsn
from neon_services.ground.remote_storage import open_remote_storage
from neon_services.pageserver import keys, native_records
from neon_services.pageserver.bootstrap import bootstrap_timeline
from neon_services.pageserver.http_api import ManagementApi
from neon_services.pageserver.layers.block_cache import BlockCache
from neon_services.pageserver.layers.layer import LayerEnvironment
from neon_services.pageserver.metrics import EngineCollector
from neon_services.pageserver.page_service import PageService
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.relations import Relations
from neon_services.pageserver.settings import Settings
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.tenant import NodeResources
from neon_services.pageserver.tenant_manager import TenantManager
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.values import SPARSE_FIELD1
from neon_services.pageserver.walreceiver import WalReceiver
from neon_services.storage_broker.client import BrokerClient
from neon_services.wal.redo import PAGE_SIZE, RedoPool

log = logging.getLogger(__name__)

_LAYER_THREADS = 4
_REDO_HELPERS = 2  # per Postgres major; started when first needed
_HOUSEKEEPING_INTERVAL_S = 1.0
_PG_MAJORS = range(14, 19)


class PageserverNode:
    """Everything that one pageserver process runs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.remote = open_remote_storage(settings.remote_storage)
        self.broker = BrokerClient(settings.broker_endpoint)
        self.environment = LayerEnvironment(
            BlockCache(settings.page_cache_bytes),
            ThreadPoolExecutor(_LAYER_THREADS, thread_name_prefix="layers"),
            self.remote,
            not settings.no_sync,
        )
        self._redo_pools: list[RedoPool] = []
        self._reconstructors: dict[int, Reconstructor] = {}
        node = NodeResources(self.environment, self._reconstructor, self.remote, self, settings.tenant_config)
        self.tenants = TenantManager(node, settings.tenants_dir)
        self._receivers: dict[Timeline, WalReceiver] = {}
        self._page_service = PageService(self.find_timeline, wait_lsn_timeout_s=settings.wait_lsn_timeout_s)
        self._http: web.AppRunner | None = None
        self._housekeeping: asyncio.Task[None] | None = None

    # -- life

    async def start(self) -> None:
        """Start everything. Raises ConfigError when an address cannot be listened on."""
        self.tenants.start()
        EngineCollector(self.tenants, self.environment, len(self.settings.ignored)).register()
        api = ManagementApi(self.tenants, self, self.settings.node_id, self._default_pg_version())
        host, port = self.settings.listen_http
        try:
            self._http = await http.serve(api.application, host, port)
        except OSError as error:
            raise ConfigError(f"listen_http_addr: cannot listen on {host}:{port}: {error.strerror or error}") from error
        host, port = self.settings.listen_pg
        try:
            await self._page_service.start(host, port)
        except OSError as error:
            raise ConfigError(f"listen_pg_addr: cannot listen on {host}:{port}: {error.strerror or error}") from error
        self._housekeeping = asyncio.get_running_loop().create_task(self._keep_house(), name="housekeeping")
        log.info("pageserver %d: pages on %s:%d, HTTP on %s:%d", self.settings.node_id, host, port, *self.settings.listen_http)

    async def stop(self) -> None:
        """Stop everything; in-memory data is flushed."""
        await self._page_service.stop()
        if self._housekeeping is not None:
            self._housekeeping.cancel()
            await asyncio.gather(self._housekeeping, return_exceptions=True)
        await self.tenants.shutdown()
        await self.broker.close()
        for pool in self._redo_pools:
            await pool.close()
        if self._http is not None:
            await self._http.cleanup()
        await self.remote.close()
        self.environment.threads.shutdown(wait=False)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_INTERVAL_S)
            for timeline in self.tenants.timelines():
                timeline.housekeeping()

    def _pg_bin_dir(self, pg_version: int) -> Path:
        return self.settings.pg_distrib_dir / str(pg_version) / "bin"

    def _default_pg_version(self) -> int:
        """The newest Postgres major installed below ``pg_distrib_dir``."""
        installed = [m for m in _PG_MAJORS if (self._pg_bin_dir(m) / "postgres").exists()]
        if not installed:
            raise ConfigError(f"pg_distrib_dir: no Postgres found in {self.settings.pg_distrib_dir}/<major>/bin")
        return max(installed)

    def _reconstructor(self, pg_version: int) -> Reconstructor:
        found = self._reconstructors.get(pg_version)
        if found is None:
            pool = RedoPool(self._pg_bin_dir(pg_version), pg_version, _REDO_HELPERS, self.settings.wal_redo_timeout_s)
            self._redo_pools.append(pool)
            found = self._reconstructors[pg_version] = Reconstructor(pool, native_records.apply)
        return found

    async def find_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> Timeline:
        """An active timeline of an unsharded tenant. Raises ApiError 404 when it is not here, 503 when it is not active."""
        timeline = (await self.tenants.active_tenant(TenantShardId(tenant_id))).get_timeline(timeline_id)
        if timeline.state != "Active":
            raise ApiError(503, f"timeline {timeline} is not active, it is {timeline.state}: try again")
        return timeline

    # -- what tenants need of the layers above the engine

    async def bootstrap(
        self, shard: TenantShardId, timeline_id: TimelineId, pg_version: int, make: Callable[[int], Timeline]
    ) -> Timeline:
        """Run initdb and import the data directory."""
        return await bootstrap_timeline(
            tenant_id=shard.tenant_id,
            timeline_id=timeline_id,
            pg_version=pg_version,
            pg_bin_dir=self._pg_bin_dir(pg_version),
            work_dir=self.settings.workdir / "initdb",
            remote=self.remote,
            make=make,
        )

    def activated(self, timeline: Timeline) -> None:
        """Start receiving WAL."""
        receiver = WalReceiver(timeline, self.broker, self.settings.node_id, self.settings.availability_zone)
        self._receivers[timeline] = receiver
        receiver.start()

    async def stopping(self, timeline: Timeline) -> None:
        """Stop receiving WAL."""
        receiver = self._receivers.pop(timeline, None)
        if receiver is not None:
            await receiver.stop()

    # -- what the API needs of them

    async def timeline_extra(self, timeline: Timeline, query: dict[str, str]) -> dict[str, Any]:
        """Fields of TimelineInfo about WAL receiving and logical size."""
        relations, receiver = Relations.of(timeline), self._receivers.get(timeline)
        extra: dict[str, Any] = {}
        if receiver is not None:
            received = receiver.last_received_msg_lsn
            extra = {
                "walreceiver_status": receiver.status,
                "wal_source_connstr": receiver.wal_source_connstr,
                "last_received_msg_lsn": None if received is None else format_lsn(received),
                "last_received_msg_ts": receiver.last_received_msg_ts,
            }
        if query.get("force-await-initial-logical-size") == "true":
            await relations.compute_logical_size()
        if relations.logical_size is not None:
            extra |= {"current_logical_size": relations.logical_size, "current_logical_size_is_accurate": True}
        if query.get("include-non-incremental-logical-size") == "true":
            sizes = await relations.relation_sizes(timeline.last_record_lsn)
            extra["current_logical_size_non_incremental"] = PAGE_SIZE * sum(sizes.values())
        return extra

    async def keyspace(self, timeline: Timeline, lsn: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Key ranges that exist at an LSN: the relations' blocks and sizes; and the sparse range."""
        dense: list[tuple[int, int]] = []
        for tag, blocks in sorted((await Relations.of(timeline).relation_sizes(lsn)).items()):
            first, size = _join(keys.relation_block(tag, 0)), _join(keys.relation_size(tag))
            if blocks:
                dense.append((first, first + blocks))
            dense.append((size, size + 1))
        return dense, [(SPARSE_FIELD1 << 120, 0x7F << 120)]


def _join(halves: tuple[int, int]) -> int:
    return halves[0] << 64 | halves[1]

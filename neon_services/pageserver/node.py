"""The pageserver process put together: storage engine, WAL redo, WAL receiving, page service, HTTP API.

Order of the start: remote storage, tenants (loading in the background), HTTP, page service. Order of the stop: page service,
tenants (flushed, uploaded if there is time), HTTP last, so that clients see 503 rather than nothing.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
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
from neon_services.pageserver.upcalls import ControlPlane, UpcallError
from neon_services.pageserver.values import SPARSE_FIELD1
from neon_services.pageserver.walreceiver import WalReceiver
from neon_services.storage_broker.client import BrokerClient
from neon_services.wal.redo import PAGE_SIZE, RedoPool

log = logging.getLogger(__name__)

_LAYER_THREADS = 4
_WRITER_THREADS = 2
_REDO_HELPERS = 2  # per Postgres major; started when first needed
_HOUSEKEEPING_INTERVAL_S = 1.0
_VALIDATION_INTERVAL_S = 2.0
_PG_MAJORS = range(14, 19)


class PageserverNode:
    """Everything that one pageserver process runs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.remote = open_remote_storage(settings.remote_storage)
        self.broker = BrokerClient(settings.broker_endpoint, ca_file=settings.ssl_ca_file)
        self.environment = LayerEnvironment(
            BlockCache(settings.page_cache_bytes),
            ThreadPoolExecutor(_LAYER_THREADS, thread_name_prefix="layers"),
            ThreadPoolExecutor(_WRITER_THREADS, thread_name_prefix="layer-writers"),
            self.remote,
            not settings.no_sync,
        )
        self._redo_pools: list[RedoPool] = []
        self._reconstructors: dict[int, Reconstructor] = {}
        self._control_plane: ControlPlane | None = None
        if settings.control_plane_api is not None and not settings.control_plane_emergency_mode:
            self._control_plane = ControlPlane(settings.control_plane_api, settings.control_plane_api_token)
        node = NodeResources(
            self.environment,
            self._reconstructor,
            self.remote,
            self,
            settings.tenant_config,
            needs_validation=self._control_plane is not None,
        )
        self.tenants = TenantManager(node, settings.tenants_dir)
        self.tenants.starting = True
        self._receivers: dict[Timeline, WalReceiver] = {}
        self._page_service = PageService(self.find_timeline, wait_lsn_timeout_s=settings.wait_lsn_timeout_s)
        self._http: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # -- life

    async def start(self) -> None:
        """Start everything. Raises ConfigError when an address cannot be listened on."""
        if self._control_plane is None:
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
        self._background(self._keep_house(), "housekeeping")
        if self._control_plane is not None:
            self._background(self._follow(self._control_plane), "control plane")
        log.info("pageserver %d: pages on %s:%d, HTTP on %s:%d", self.settings.node_id, host, port, *self.settings.listen_http)

    async def stop(self) -> None:
        """Stop everything; in-memory data is flushed."""
        await self._page_service.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.tenants.shutdown()
        await self.broker.close()
        for pool in self._redo_pools:
            await pool.close()
        if self._http is not None:
            await self._http.cleanup()
        await self.remote.close()
        self.environment.threads.shutdown(wait=False)
        self.environment.writers.shutdown(wait=False)

    def _background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception:
                log.exception("%s has stopped", name)

        self._tasks.append(asyncio.get_running_loop().create_task(guarded(), name=name))

    async def _follow(self, control_plane: ControlPlane) -> None:
        """Ask which tenants are ours, attach them; then have progress confirmed now and then."""
        self.tenants.start(await control_plane.re_attach(self.settings.node_id, registration(self.settings)))
        while True:
            await asyncio.sleep(_VALIDATION_INTERVAL_S)
            try:
                await self._validate(control_plane)
            except UpcallError as error:
                log.warning("%s; safekeepers keep their WAL meanwhile", error)

    async def _validate(self, control_plane: ControlPlane) -> None:
        """Let ``remote_consistent_lsn_visible`` follow where our generation is still the newest."""
        claims = {t: t.remote_consistent_lsn for t in self.tenants.timelines()}
        claims = {t: lsn for t, lsn in claims.items() if lsn > t.remote_consistent_lsn_visible}
        if not claims:
            return
        valid = await control_plane.validate({t.tenant_shard_id: t.resources.generation for t in claims})
        for timeline, lsn in claims.items():
            if timeline.tenant_shard_id in valid:
                timeline.validated(lsn)

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
        settings = self.settings
        receiver = WalReceiver(timeline, self.broker, settings.node_id, settings.availability_zone, tls=settings.safekeeper_tls)
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


def registration(settings: Settings) -> dict[str, Any] | None:
    """What the control plane is told about this node, from ``metadata.json`` beside the settings; None without that file."""
    path = settings.workdir / "metadata.json"
    try:
        metadata = json.loads(path.read_text())
        return {
            "node_id": settings.node_id,
            "listen_pg_addr": metadata["host"],
            "listen_pg_port": metadata["port"],
            "listen_http_addr": metadata["http_host"],
            "listen_http_port": metadata["http_port"],
            "availability_zone_id": settings.availability_zone or metadata["availability_zone_id"],
        }
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not valid: {type(error).__name__} {error}") from error

"""The management API over HTTP: Neon's paths, JSON and status codes."""

import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiohttp import web

from neon_services.ground.http import (
    ApiError,
    json_response,
    make_application,
    optional_field,
    read_json_object,
    require_field,
)
from neon_services.ground.ids import TenantId, TimelineId
from neon_services.ground.lsn import parse_lsn
from neon_services.pageserver.layers.names import parse_layer_name
from neon_services.pageserver.location_config import LocationConf, check_tenant_conf
from neon_services.pageserver.lsn_waiters import LsnTimeout
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.tenant import Tenant
from neon_services.pageserver.tenant_manager import TenantManager
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.timeline_info import layer_map_info, tenant_info, timeline_info
from neon_services.pageserver.values import MissingKey, format_key, parse_key, split_key

READ_WAIT_LSN_TIMEOUT_S = 10.0


class ApiServices(Protocol):
    """What the API needs from the layers above the engine."""

    async def timeline_extra(self, timeline: Timeline, query: dict[str, str]) -> dict[str, Any]:
        """Fields of TimelineInfo about WAL receiving and logical size."""

    async def keyspace(self, timeline: Timeline, lsn: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Key ranges ``[start, end)`` that exist at an LSN: (dense, sparse)."""


class ManagementApi:
    """Handlers; ``application`` is what the server serves."""

    def __init__(self, tenants: TenantManager, services: ApiServices, node_id: int, default_pg_version: int) -> None:
        self._tenants = tenants
        self._services = services
        self._node_id = node_id
        self._default_pg_version = default_pg_version
        self.application = make_application()
        self._launched = str(int(time.time()))
        self.application.on_response_prepare.append(self._stamp)
        self._route()

    async def _stamp(self, _: web.Request, response: web.StreamResponse) -> None:
        response.headers["PAGESERVER_LAUNCH_TIMESTAMP"] = self._launched

    def _route(self) -> None:
        timeline = "/v1/tenant/{shard}/timeline/{timeline}"
        routes: list[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]] = [
            ("GET", "/v1/status", self.status),
            ("GET", "/v1/location_config", self.list_locations),
            ("GET", "/v1/location_config/{shard}", self.get_location),
            ("PUT", "/v1/tenant/{shard}/location_config", self.put_location),
            ("GET", "/v1/tenant", self.list_tenants),
            ("PUT", "/v1/tenant/config", self.put_tenant_config),
            ("PATCH", "/v1/tenant/config", self.patch_tenant_config),
            ("GET", "/v1/tenant/{shard}", self.get_tenant),
            ("DELETE", "/v1/tenant/{shard}", self.delete_tenant),
            ("GET", "/v1/tenant/{shard}/config", self.get_tenant_config),
            ("POST", "/v1/tenant/{shard}/timeline", self.create_timeline),
            ("GET", "/v1/tenant/{shard}/timeline", self.list_timelines),
            ("GET", "/v1/tenant/{shard}/timeline_and_offloaded", self.list_timelines_and_offloaded),
            ("GET", timeline, self.get_timeline),
            ("DELETE", timeline, self.delete_timeline),
            ("PUT", timeline + "/checkpoint", self.checkpoint),
            ("GET", timeline + "/layer", self.list_layers),
            ("GET", timeline + "/layer/{layer}", self.download_layer),
            ("DELETE", timeline + "/layer/{layer}", self.evict_layer),
            ("GET", timeline + "/keyspace", self.keyspace),
            ("GET", timeline + "/getpage", self.getpage),
        ]
        for method, path, handler in routes:
            self.application.router.add_route(method, path, handler)

    # -- the request's subject

    async def _tenant(self, request: web.Request) -> Tenant:
        return await self._tenants.active_tenant(_shard(request))

    async def _timeline(self, request: web.Request) -> Timeline:
        timeline = (await self._tenant(request)).get_timeline(TimelineId.parse(request.match_info["timeline"]))
        if timeline.state != "Active":
            raise ApiError(503 if timeline.state == "Loading" else 404, f"timeline {timeline} is {timeline.state}")
        return timeline

    async def _info(self, timeline: Timeline, request: web.Request) -> dict[str, Any]:
        return timeline_info(timeline, await self._services.timeline_extra(timeline, dict(request.query)))

    # -- node

    async def status(self, _: web.Request) -> web.Response:
        return json_response({"id": self._node_id})

    # -- tenants

    async def list_locations(self, _: web.Request) -> web.Response:
        rows = [[str(shard), tenant.conf.to_response()] for shard, tenant in self._tenants.tenants.items()]
        rows += [[str(shard), conf.to_response()] for shard, conf in self._tenants.secondaries.items()]
        return json_response({"tenant_shards": sorted(rows, key=lambda row: row[0])})  # type: ignore[arg-type,return-value]

    async def get_location(self, request: web.Request) -> web.Response:
        shard = _shard(request)
        secondary = self._tenants.secondaries.get(shard)
        return json_response((secondary or self._tenants.tenant_here(shard).conf).to_response())

    async def put_location(self, request: web.Request) -> web.Response:
        shard = _shard(request)
        body = await read_json_object(request)
        conf = LocationConf.from_request(body)
        flush_ms = _query_int(request, "flush_ms")
        await self._tenants.set_location(shard, conf, flush_ms=flush_ms)
        if conf is None:
            return json_response(None)
        return json_response({"shards": [{"shard_id": str(shard), "node_id": self._node_id}], "stripe_size": None})

    async def list_tenants(self, _: web.Request) -> web.Response:
        return json_response([tenant_info(tenant) for _, tenant in sorted(self._tenants.tenants.items())])

    async def get_tenant(self, request: web.Request) -> web.Response:
        tenant = self._tenants.tenant_here(_shard(request))
        return json_response(tenant_info(tenant) | {"walredo": None, "timelines": [str(t) for t in sorted(tenant.timelines)]})

    async def delete_tenant(self, request: web.Request) -> web.Response:
        await self._tenants.delete_tenant(_shard(request))
        return json_response(None)

    async def put_tenant_config(self, request: web.Request) -> web.Response:
        body = await read_json_object(request)
        tenant_id = TenantId.parse(require_field(body, "tenant_id", str))
        overrides = check_tenant_conf({k: v for k, v in body.items() if k != "tenant_id"}, "tenant config")
        await self._set_overrides(tenant_id, lambda _: overrides)
        return json_response(None)

    async def patch_tenant_config(self, request: web.Request) -> web.Response:
        body = await read_json_object(request)
        tenant_id = TenantId.parse(require_field(body, "tenant_id", str))
        changes = {k: v for k, v in body.items() if k != "tenant_id"}
        check_tenant_conf(changes, "tenant config")

        def patched(current: dict[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in (current | changes).items() if v is not None}

        await self._set_overrides(tenant_id, patched)
        return json_response(None)

    async def _set_overrides(self, tenant_id: TenantId, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        tenants = self._tenants.shards_of(tenant_id)
        if not tenants:
            raise ApiError(404, f"tenant {tenant_id} was not found on this pageserver")
        for tenant in tenants:
            await self._tenants.set_overrides(tenant.shard, change(tenant.conf.tenant_conf))

    async def get_tenant_config(self, request: web.Request) -> web.Response:
        tenant = self._tenants.tenant_here(_shard(request))
        return json_response(
            {"tenant_specific_overrides": tenant.conf.tenant_conf, "effective_config": tenant.effective.values}
        )

    # -- timelines

    async def create_timeline(self, request: web.Request) -> web.Response:
        tenant = await self._tenant(request)
        body = await read_json_object(request)
        timeline_id = TimelineId.parse(require_field(body, "new_timeline_id", str))
        for unsupported in ("import_pgdata", "existing_initdb_timeline_id"):
            if body.get(unsupported) is not None:
                raise ApiError(400, f"field {unsupported!r} is not supported")
        ancestor = optional_field(body, "ancestor_timeline_id", str)
        start_lsn = optional_field(body, "ancestor_start_lsn", str)
        pg_version = optional_field(body, "pg_version", int, self._default_pg_version)
        pg_version = pg_version // 10000 if pg_version >= 10000 else pg_version
        timeline = await tenant.create_timeline(
            timeline_id,
            pg_version=pg_version,
            ancestor=None if ancestor is None else TimelineId.parse(ancestor),
            start_lsn=None if start_lsn is None else parse_lsn(start_lsn),
        )
        return json_response(await self._info(timeline, request), 201)

    async def list_timelines(self, request: web.Request) -> web.Response:
        return json_response(await self._timeline_infos(request))

    async def list_timelines_and_offloaded(self, request: web.Request) -> web.Response:
        return json_response({"timelines": await self._timeline_infos(request), "offloaded": []})

    async def _timeline_infos(self, request: web.Request) -> list[dict[str, Any]]:
        tenant = await self._tenant(request)
        return [await self._info(timeline, request) for _, timeline in sorted(tenant.timelines.items())]

    async def get_timeline(self, request: web.Request) -> web.Response:
        tenant = await self._tenant(request)
        timeline = tenant.get_timeline(TimelineId.parse(request.match_info["timeline"]))
        return json_response(await self._info(timeline, request))

    async def delete_timeline(self, request: web.Request) -> web.Response:
        shard = _shard(request)
        if shard not in self._tenants.tenants:
            raise ApiError(412, f"tenant {shard} is not attached to this pageserver")
        tenant = await self._tenant(request)
        await tenant.delete_timeline(TimelineId.parse(request.match_info["timeline"]))
        return json_response(None, 202)

    async def checkpoint(self, request: web.Request) -> web.Response:
        timeline = await self._timeline(request)
        if _query_flag(request, "wait_until_flushed", True):
            await timeline.freeze_and_flush()
        else:
            timeline.freeze()
        if _query_flag(request, "force_image_layer_creation", False):
            await timeline.create_image_layers()
        if _query_flag(request, "wait_until_uploaded", False):
            await timeline.wait_uploads()
        return json_response(None)

    # -- layers and keys

    async def list_layers(self, request: web.Request) -> web.Response:
        return json_response(layer_map_info(await self._timeline(request)))

    async def download_layer(self, request: web.Request) -> web.Response:
        layer = await self._layer(request)
        return json_response(None, 200 if await layer.download() else 304)

    async def evict_layer(self, request: web.Request) -> web.Response:
        timeline = await self._timeline(request)
        layer = await self._layer(request)
        await timeline.wait_uploads()  # what is only here must not be dropped
        return json_response(None, 200 if layer.evict() else 304)

    async def _layer(self, request: web.Request) -> Any:
        timeline = await self._timeline(request)
        name, _ = parse_layer_name(request.match_info["layer"])
        layer = timeline.layer_map.get(name)
        if layer is None:
            raise ApiError(400, f"timeline {timeline} has no layer {name}")
        return layer

    async def keyspace(self, request: web.Request) -> web.Response:
        timeline = await self._timeline(request)
        lsn = await _read_lsn(timeline, request.query.get("at_lsn"))
        dense, sparse = await self._services.keyspace(timeline, lsn)

        def ranges(items: list[tuple[int, int]]) -> list[list[str]]:
            return [[format_key(start), format_key(end)] for start, end in items]

        return json_response(
            {"keys": ranges(dense), "sparse_keys": ranges(sparse), "at_lsn": f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"}
        )

    async def getpage(self, request: web.Request) -> web.Response:
        timeline = await self._timeline(request)
        if "key" not in request.query:
            raise ApiError(400, "query parameter 'key' is missing")
        hi, lo = split_key(parse_key(request.query["key"]))
        lsn = await _read_lsn(timeline, request.query.get("lsn"))
        try:
            value = await timeline.get(hi, lo, lsn)
        except MissingKey as error:
            raise ApiError(404, str(error)) from error
        return web.Response(body=value, content_type="application/octet-stream")


async def _read_lsn(timeline: Timeline, text: str | None) -> int:
    """The tip, at once; or the LSN that was asked for, when the timeline has reached it."""
    if text is None:
        return timeline.last_record_lsn
    lsn = parse_lsn(text)
    try:
        await timeline.wait_lsn(lsn, READ_WAIT_LSN_TIMEOUT_S)
    except LsnTimeout as error:
        raise ApiError(503, str(error)) from None
    return lsn


def _shard(request: web.Request) -> TenantShardId:
    return TenantShardId.parse(request.match_info["shard"])


def _query_flag(request: web.Request, name: str, default: bool) -> bool:
    text = request.query.get(name)
    if text is None:
        return default
    if text not in ("true", "false"):
        raise ApiError(400, f"query parameter {name!r} must be true or false, not {text!r}")
    return text == "true"


def _query_int(request: web.Request, name: str) -> int | None:
    text = request.query.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ApiError(400, f"query parameter {name!r} must be a number, not {text!r}")
    return int(text)

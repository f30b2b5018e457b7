"""The HTTP API of a safekeeper (port 7676), with Neon's paths, bodies and statuses."""

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from neon_services.consensus.acceptor import AcceptorState, PeerInfo
from neon_services.ground.debug_http import DebugApi
from neon_services.ground.errors import Cancelled, StaleGeneration
from neon_services.ground.http import ApiError, json_response, make_application, optional_field, read_json_object, require_field
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import INVALID_LSN, WAL_SEGMENT_SIZE, Lsn, format_lsn
from neon_services.ground.metrics_cache import MetricsCache
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP
from neon_services.safekeeper.admin_api import AdminApi
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.http_access import HttpAccess
from neon_services.safekeeper.http_fields import (
    TIMELINE_PATH,
    flag_parameter,
    mconf_field,
    number_field,
    parse_id,
    parse_lsn_field,
    ttid_field,
    ttid_of,
)
from neon_services.safekeeper.membership_api import MembershipApi
from neon_services.safekeeper.openapi import document
from neon_services.safekeeper.partial_backup import reset_partial_backup
from neon_services.safekeeper.pull_timeline import NotMember, PullFailed
from neon_services.safekeeper.remote_deletion import RemoteDeletion
from neon_services.safekeeper.snapshot import SnapshotAborted, SnapshotRefused
from neon_services.safekeeper.status import config_dump, disk_content, memory_dump, now_text, timeline_status, wal_last_modified
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import TimelineAwaited, TimelineBroken, TimelineDeleted, TimelineNotFound, Timelines
from neon_services.safekeeper.wal_reader import WalNotHere

DIGEST_CHUNK_BYTES = 1024 * 1024
Endpoint = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _status_of_errors(request: web.Request, handler: Endpoint) -> web.StreamResponse:
    """Errors of the safekeeper become the statuses that Neon's clients expect."""
    try:
        return await handler(request)
    except (TimelineNotFound, WalNotHere) as error:
        raise ApiError(404, str(error)) from error
    except NotMember as error:
        raise ApiError(403, str(error)) from error
    except (TimelineDeleted, StaleGeneration) as error:
        raise ApiError(409, str(error)) from error
    except (PullFailed, SnapshotRefused, SnapshotAborted, TimelineAwaited) as error:
        raise ApiError(412, str(error)) from error
    except TimelineBroken as error:
        raise ApiError(500, str(error)) from error
    except Cancelled as error:
        raise ApiError(503, str(error)) from error


class HttpApi:
    """The endpoints."""

    def __init__(self, config: SafekeeperConfig, timelines: Timelines, remote_deletion: RemoteDeletion | None = None) -> None:
        self._config = config
        self._timelines = timelines
        self._membership = MembershipApi(config, timelines)
        self._admin = AdminApi(config, timelines)
        self._remote_deletion = remote_deletion
        self.metrics = MetricsCache(collect_on_scrape=config.force_metric_collection_on_scrape)

    def application(self, access: HttpAccess | None = None) -> web.Application:
        """The aiohttp application; without ``access`` everybody is trusted."""
        application = make_application(self.metrics.metrics)
        if access is not None:
            application.middlewares.append(access.middleware())
        application.middlewares.append(_status_of_errors)
        router = application.router
        router.add_get("/v1/openapi.json", self.openapi)
        router.add_get("/v1/status", self.status)
        router.add_get("/v1/utilization", self.utilization)
        router.add_get("/v1/debug/filesystem_usage", self.filesystem_usage)
        router.add_get("/v1/debug_dump", self.debug_dump)
        router.add_post("/v1/tenant/timeline", self.create_timeline)
        router.add_get("/v1/tenant/timeline", self.list_timelines)
        router.add_delete("/v1/tenant/{tenant_id}", self.delete_tenant)
        router.add_get(TIMELINE_PATH, self.timeline_status)
        router.add_delete(TIMELINE_PATH, self.delete_timeline)
        self._membership.add_routes(router)
        self._admin.add_routes(router)
        DebugApi().add_routes(router)
        router.add_post(TIMELINE_PATH + "/checkpoint", self.checkpoint)
        router.add_get(TIMELINE_PATH + "/digest", self.digest)
        router.add_post(TIMELINE_PATH + "/backup_partial_reset", self.backup_partial_reset)
        router.add_post("/v1/record_safekeeper_info/{tenant_id}/{timeline_id}", self.record_safekeeper_info)
        return application

    # -- the process

    async def openapi(self, _: web.Request) -> web.Response:
        """GET /v1/openapi.json."""
        return json_response(document())

    async def status(self, _: web.Request) -> web.Response:
        """GET /v1/status."""
        return json_response({"id": self._config.node_id, "wal_refused": self._timelines.disk_refusal})

    async def utilization(self, _: web.Request) -> web.Response:
        """GET /v1/utilization."""
        return json_response({"timeline_count": len(self._timelines.all())})

    async def filesystem_usage(self, _: web.Request) -> web.Response:
        """GET /v1/debug/filesystem_usage."""
        found = os.statvfs(self._config.datadir)
        capacity = found.f_blocks * found.f_frsize
        usage = capacity - found.f_bavail * found.f_frsize
        return json_response({"data_dir": str(self._config.datadir), "capacity_bytes": capacity, "usage_bytes": usage})

    async def debug_dump(self, request: web.Request) -> web.Response:
        """GET /v1/debug_dump."""
        query = _DumpQuery(request.query)
        started = now_text()
        found = [t for t in self._timelines.all() if query.wants(t.ttid)]
        timelines = []
        for timeline in found:
            entry: dict[str, Any] = {
                "tenant_id": str(timeline.ttid.tenant_id),
                "timeline_id": str(timeline.ttid.timeline_id),
            }
            if query.control_file:
                entry["control_file"] = timeline.control.to_json()
                if not query.term_history:
                    entry["control_file"]["acceptor_state"]["term_history"] = []
            if query.memory:
                entry["memory"] = memory_dump(timeline)
            if query.disk_content:
                entry["disk_content"] = await asyncio.to_thread(disk_content, timeline.directory)
            if query.wal_last_modified:
                entry["wal_last_modified"] = await asyncio.to_thread(wal_last_modified, timeline.directory)
            timelines.append(entry)
        return json_response(
            {
                "start_time": started,
                "finish_time": now_text(),
                "timelines": timelines,
                "timelines_count": len(self._timelines.all()),
                "config": config_dump(self._config),
            }
        )

    # -- timelines

    async def create_timeline(self, request: web.Request) -> web.Response:
        """POST /v1/tenant/timeline; an existing timeline is fine."""
        body = await read_json_object(request)
        ttid = ttid_field(body)
        mconf = mconf_field(body["mconf"], "mconf") if body.get("mconf") is not None else NO_MEMBERSHIP
        if mconf.generation and not mconf.contains(self._config.node_id):
            raise ApiError(403, f"mconf: safekeeper {self._config.node_id} is not a member of it")
        start_lsn = parse_lsn_field(require_field(body, "start_lsn", str), "start_lsn")
        commit = optional_field(body, "commit_lsn", str)
        commit_lsn = start_lsn if commit is None else parse_lsn_field(commit, "commit_lsn")
        if start_lsn == INVALID_LSN:
            raise ApiError(400, "start_lsn: a timeline cannot begin at 0/0")
        if commit_lsn < start_lsn:
            raise ApiError(400, f"commit_lsn: {format_lsn(commit_lsn)} is before start_lsn {format_lsn(start_lsn)}")
        segment_size = number_field(body, "wal_seg_size", 32, WAL_SEGMENT_SIZE)
        if not 1 << 20 <= segment_size <= 1 << 30 or segment_size & (segment_size - 1):
            raise ApiError(400, f"wal_seg_size: {segment_size} is not a power of two between 1 MiB and 1 GiB")
        state = AcceptorState.create(
            mconf,
            pg_version=number_field(body, "pg_version", 32),
            system_id=number_field(body, "system_id", 64, 0),
            wal_seg_size=segment_size,
            start_lsn=start_lsn,
            commit_lsn=commit_lsn,
        )
        self._timelines.create(ttid, state)
        return json_response(None)

    async def list_timelines(self, _: web.Request) -> web.Response:
        """GET /v1/tenant/timeline."""
        ttids = sorted(timeline.ttid for timeline in self._timelines.all())
        return json_response([{"tenant_id": str(t.tenant_id), "timeline_id": str(t.timeline_id)} for t in ttids])

    async def timeline_status(self, request: web.Request) -> web.Response:
        """GET one timeline."""
        return json_response(timeline_status(self._timelines.get(ttid_of(request)), self._config.heartbeat_timeout_s))

    async def delete_timeline(self, request: web.Request) -> web.Response:
        """DELETE one timeline, and unless ``only_local`` its objects, in the background."""
        only_local = flag_parameter(request.query, "only_local")
        ttid = ttid_of(request)
        timeline = self._timelines.find(ttid)
        existed = self._timelines.delete(ttid)
        if not only_local:
            self._delete_objects(timeline)
        return json_response({"dir_existed": existed})

    def _delete_objects(self, timeline: Timeline | None) -> None:
        # who never had the timeline, was excluded from it, or only clears a broken copy, must not delete what all members share
        if timeline is not None and self._remote_deletion is not None:
            self._remote_deletion.schedule(timeline.ttid, timeline)

    async def delete_tenant(self, request: web.Request) -> web.Response:
        """DELETE all timelines of a tenant, and unless ``only_local`` their objects, in the background."""
        only_local = flag_parameter(request.query, "only_local")
        tenant_id = parse_id(TenantId, request.match_info["tenant_id"], "tenant_id")
        timelines = [timeline for timeline in self._timelines.all() if timeline.ttid.tenant_id == tenant_id]
        removed = self._timelines.delete_tenant(tenant_id)
        if not only_local:
            for timeline in timelines:
                self._delete_objects(timeline)
        return json_response({str(timeline_id): {"dir_existed": existed} for timeline_id, existed in removed.items()})

    # -- one timeline's state

    async def checkpoint(self, request: web.Request) -> web.Response:
        """POST checkpoint: save the control file."""
        timeline = self._timelines.get(ttid_of(request))
        timeline.run(timeline.acceptor.persist_volatile())
        return json_response(None)

    async def digest(self, request: web.Request) -> web.Response:
        """GET digest: SHA-256 of the WAL bytes of a range."""
        timeline = self._timelines.get(ttid_of(request))
        lsns = []
        for name in ("from_lsn", "until_lsn"):
            if name not in request.query:
                raise ApiError(400, f"query parameter {name!r} is missing")
            lsns.append(parse_lsn_field(request.query[name], name))
        from_lsn, until_lsn = lsns
        if from_lsn > until_lsn:
            raise ApiError(400, f"from_lsn {format_lsn(from_lsn)} is after until_lsn {format_lsn(until_lsn)}")
        if until_lsn > timeline.acceptor.flush_lsn:
            raise ApiError(
                400, f"until_lsn {format_lsn(until_lsn)} is after flush_lsn {format_lsn(timeline.acceptor.flush_lsn)}"
            )
        digest = hashlib.sha256()
        async with timeline.residence():
            reader = timeline.reader()
            try:
                position = from_lsn
                while position < until_lsn:
                    data = await reader.read(position, min(DIGEST_CHUNK_BYTES, until_lsn - position))
                    await asyncio.to_thread(digest.update, data)
                    position = Lsn(position + len(data))
            finally:
                reader.close()
        return json_response({"sha256": digest.hexdigest()})

    async def backup_partial_reset(self, request: web.Request) -> web.Response:
        """POST backup_partial_reset: delete this safekeeper's partial segments from object storage; their names."""
        timeline = self._timelines.get(ttid_of(request))
        if timeline.remote is None:
            raise ApiError(412, "this safekeeper has no --remote-storage")
        async with timeline.residence():
            return json_response(await timeline.unbroken(reset_partial_backup(timeline)))

    async def record_safekeeper_info(self, request: web.Request) -> web.Response:
        """POST record_safekeeper_info: what a peer would say through the broker (for tests)."""
        body = await read_json_object(request)

        def lsn(name: str) -> Lsn:
            return parse_lsn_field(require_field(body, name, str), name)

        self._timelines.get(ttid_of(request)).learn(
            PeerInfo(
                last_log_term=number_field(body, "last_log_term", 64, 0),
                commit_lsn=lsn("commit_lsn"),
                backup_lsn=lsn("backup_lsn"),
                remote_consistent_lsn=lsn("remote_consistent_lsn"),
                peer_horizon_lsn=lsn("peer_horizon_lsn"),
            )
        )
        return json_response(None)


class _DumpQuery:
    """What a debug dump is to contain."""

    def __init__(self, query: Any) -> None:
        everything = flag_parameter(query, "dump_all")
        self.control_file = flag_parameter(query, "dump_control_file", everything)
        self.memory = flag_parameter(query, "dump_memory", everything)
        self.disk_content = flag_parameter(query, "dump_disk_content", everything)
        self.term_history = flag_parameter(query, "dump_term_history", True)
        self.wal_last_modified = flag_parameter(query, "dump_wal_last_modified", everything)
        self._tenant_id = parse_id(TenantId, query["tenant_id"], "tenant_id") if "tenant_id" in query else None
        self._timeline_id = parse_id(TimelineId, query["timeline_id"], "timeline_id") if "timeline_id" in query else None

    def wants(self, ttid: TenantTimelineId) -> bool:
        """Whether the timeline belongs into the dump."""
        return self._tenant_id in (None, ttid.tenant_id) and self._timeline_id in (None, ttid.timeline_id)

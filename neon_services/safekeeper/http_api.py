"""The HTTP API of a safekeeper (port 7676), with Neon's paths, bodies and statuses."""

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from aiohttp import web

from neon_services.consensus.acceptor import AcceptorState, PeerInfo
from neon_services.ground.errors import Cancelled, StaleGeneration
from neon_services.ground.http import ApiError, json_response, make_application, optional_field, read_json_object, require_field
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import INVALID_LSN, WAL_SEGMENT_SIZE, Lsn, format_lsn, parse_lsn
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP, MembershipConfiguration
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.partial_backup import reset_partial_backup
from neon_services.safekeeper.remote_deletion import RemoteDeletion
from neon_services.safekeeper.status import disk_content, memory_dump, now_text, timeline_status, wal_last_modified
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import TimelineBroken, TimelineDeleted, TimelineNotFound, Timelines
from neon_services.safekeeper.wal_reader import WalNotHere

DIGEST_CHUNK_BYTES = 1024 * 1024
_TIMELINE = "/v1/tenant/{tenant_id}/timeline/{timeline_id}"
Endpoint = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _status_of_errors(request: web.Request, handler: Endpoint) -> web.StreamResponse:
    """Errors of the safekeeper become the statuses that Neon's clients expect."""
    try:
        return await handler(request)
    except (TimelineNotFound, WalNotHere) as error:
        raise ApiError(404, str(error)) from error
    except (TimelineDeleted, StaleGeneration) as error:
        raise ApiError(409, str(error)) from error
    except TimelineBroken as error:
        raise ApiError(500, str(error)) from error
    except Cancelled as error:
        raise ApiError(503, str(error)) from error


def _id(kind: Any, text: str, field: str) -> Any:
    try:
        return kind.parse(text)
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}") from error


def _lsn(text: str, field: str) -> Lsn:
    try:
        return parse_lsn(text)
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}") from error


def _number(body: dict[str, Any], name: str, bits: int, default: int | None = None) -> int:
    value = require_field(body, name, int) if default is None else optional_field(body, name, int, default)
    if not 0 <= value < 1 << bits:
        raise ApiError(400, f"field {name!r} must be between 0 and {(1 << bits) - 1}, not {value}")
    return value


def _mconf(value: Any, field: str) -> MembershipConfiguration:
    try:
        return MembershipConfiguration.from_json(value)
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}") from error


class HttpApi:
    """The endpoints."""

    def __init__(self, config: SafekeeperConfig, timelines: Timelines, remote_deletion: RemoteDeletion | None = None) -> None:
        self._config = config
        self._timelines = timelines
        self._remote_deletion = remote_deletion

    def application(self) -> web.Application:
        """The aiohttp application."""
        application = make_application()
        application.middlewares.append(_status_of_errors)
        router = application.router
        router.add_get("/v1/status", self.status)
        router.add_get("/v1/utilization", self.utilization)
        router.add_get("/v1/debug/filesystem_usage", self.filesystem_usage)
        router.add_get("/v1/debug_dump", self.debug_dump)
        router.add_post("/v1/tenant/timeline", self.create_timeline)
        router.add_get("/v1/tenant/timeline", self.list_timelines)
        router.add_delete("/v1/tenant/{tenant_id}", self.delete_tenant)
        router.add_get(_TIMELINE, self.timeline_status)
        router.add_delete(_TIMELINE, self.delete_timeline)
        router.add_put(_TIMELINE + "/membership", self.membership)
        router.add_post(_TIMELINE + "/term_bump", self.term_bump)
        router.add_post(_TIMELINE + "/checkpoint", self.checkpoint)
        router.add_get(_TIMELINE + "/digest", self.digest)
        router.add_post(_TIMELINE + "/backup_partial_reset", self.backup_partial_reset)
        router.add_post("/v1/record_safekeeper_info/{tenant_id}/{timeline_id}", self.record_safekeeper_info)
        return application

    def _ttid(self, request: web.Request) -> TenantTimelineId:
        return TenantTimelineId(
            _id(TenantId, request.match_info["tenant_id"], "tenant_id"),
            _id(TimelineId, request.match_info["timeline_id"], "timeline_id"),
        )

    def _timeline(self, request: web.Request) -> Timeline:
        return self._timelines.get(self._ttid(request))

    # -- the process

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
        config = {name: value if isinstance(value, int | float) else str(value) for name, value in asdict(self._config).items()}
        return json_response(
            {
                "start_time": started,
                "finish_time": now_text(),
                "timelines": timelines,
                "timelines_count": len(self._timelines.all()),
                "config": config,
            }
        )

    # -- timelines

    async def create_timeline(self, request: web.Request) -> web.Response:
        """POST /v1/tenant/timeline; an existing timeline is fine."""
        body = await read_json_object(request)
        ttid = TenantTimelineId(
            _id(TenantId, require_field(body, "tenant_id", str), "tenant_id"),
            _id(TimelineId, require_field(body, "timeline_id", str), "timeline_id"),
        )
        mconf = _mconf(body["mconf"], "mconf") if body.get("mconf") is not None else NO_MEMBERSHIP
        if mconf.generation and not mconf.contains(self._config.node_id):
            raise ApiError(403, f"mconf: safekeeper {self._config.node_id} is not a member of it")
        start_lsn = _lsn(require_field(body, "start_lsn", str), "start_lsn")
        commit = optional_field(body, "commit_lsn", str)
        commit_lsn = start_lsn if commit is None else _lsn(commit, "commit_lsn")
        if start_lsn == INVALID_LSN:
            raise ApiError(400, "start_lsn: a timeline cannot begin at 0/0")
        if commit_lsn < start_lsn:
            raise ApiError(400, f"commit_lsn: {format_lsn(commit_lsn)} is before start_lsn {format_lsn(start_lsn)}")
        segment_size = _number(body, "wal_seg_size", 32, WAL_SEGMENT_SIZE)
        if not 1 << 20 <= segment_size <= 1 << 30 or segment_size & (segment_size - 1):
            raise ApiError(400, f"wal_seg_size: {segment_size} is not a power of two between 1 MiB and 1 GiB")
        state = AcceptorState.create(
            mconf,
            pg_version=_number(body, "pg_version", 32),
            system_id=_number(body, "system_id", 64, 0),
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
        return json_response(timeline_status(self._timeline(request), self._config.heartbeat_timeout_s))

    async def delete_timeline(self, request: web.Request) -> web.Response:
        """DELETE one timeline, and unless ``only_local`` its objects, in the background."""
        only_local = _flag(request.query, "only_local")
        ttid = self._ttid(request)
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
        only_local = _flag(request.query, "only_local")
        tenant_id = _id(TenantId, request.match_info["tenant_id"], "tenant_id")
        timelines = [timeline for timeline in self._timelines.all() if timeline.ttid.tenant_id == tenant_id]
        removed = self._timelines.delete_tenant(tenant_id)
        if not only_local:
            for timeline in timelines:
                self._delete_objects(timeline)
        return json_response({str(timeline_id): {"dir_existed": existed} for timeline_id, existed in removed.items()})

    # -- one timeline's state

    async def membership(self, request: web.Request) -> web.Response:
        """PUT membership: follow a newer configuration."""
        mconf = _mconf(await read_json_object(request), "configuration")
        timeline = self._timeline(request)
        if not mconf.contains(self._config.node_id):
            raise ApiError(403, f"safekeeper {self._config.node_id} is not a member of generation {mconf.generation}")
        acceptor = timeline.acceptor
        previous = timeline.run(acceptor.membership_switch(mconf))
        return json_response(
            {
                "previous_conf": previous.to_json(),
                "current_conf": acceptor.state.mconf.to_json(),
                "last_log_term": acceptor.last_log_term,
                "flush_lsn": format_lsn(acceptor.flush_lsn),
            }
        )

    async def term_bump(self, request: web.Request) -> web.Response:
        """POST term_bump: depose whoever leads."""
        body = await read_json_object(request) if request.can_read_body else {}
        term = _number(body, "term", 64) if body.get("term") is not None else None
        timeline = self._timeline(request)
        previous, current = timeline.run(timeline.acceptor.term_bump(term))
        return json_response({"previous_term": previous, "current_term": current})

    async def checkpoint(self, request: web.Request) -> web.Response:
        """POST checkpoint: save the control file."""
        timeline = self._timeline(request)
        timeline.run(timeline.acceptor.persist_volatile())
        return json_response(None)

    async def digest(self, request: web.Request) -> web.Response:
        """GET digest: SHA-256 of the WAL bytes of a range."""
        timeline = self._timeline(request)
        lsns = []
        for name in ("from_lsn", "until_lsn"):
            if name not in request.query:
                raise ApiError(400, f"query parameter {name!r} is missing")
            lsns.append(_lsn(request.query[name], name))
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
        timeline = self._timeline(request)
        if timeline.remote is None:
            raise ApiError(412, "this safekeeper has no --remote-storage")
        async with timeline.residence():
            return json_response(await timeline.unbroken(reset_partial_backup(timeline)))

    async def record_safekeeper_info(self, request: web.Request) -> web.Response:
        """POST record_safekeeper_info: what a peer would say through the broker (for tests)."""
        body = await read_json_object(request)

        def lsn(name: str) -> Lsn:
            return _lsn(require_field(body, name, str), name)

        self._timeline(request).learn(
            PeerInfo(
                last_log_term=_number(body, "last_log_term", 64, 0),
                commit_lsn=lsn("commit_lsn"),
                backup_lsn=lsn("backup_lsn"),
                remote_consistent_lsn=lsn("remote_consistent_lsn"),
                peer_horizon_lsn=lsn("peer_horizon_lsn"),
            )
        )
        return json_response(None)


def _flag(query: Any, name: str, default: bool = False) -> bool:
    value = query.get(name)
    if value is None:
        return default
    if value not in ("true", "false"):
        raise ApiError(400, f"query parameter {name!r} must be true or false, not {value!r}")
    return value == "true"


class _DumpQuery:
    """What a debug dump is to contain."""

    def __init__(self, query: Any) -> None:
        everything = _flag(query, "dump_all")
        self.control_file = _flag(query, "dump_control_file", everything)
        self.memory = _flag(query, "dump_memory", everything)
        self.disk_content = _flag(query, "dump_disk_content", everything)
        self.term_history = _flag(query, "dump_term_history", True)
        self.wal_last_modified = _flag(query, "dump_wal_last_modified", everything)
        self._tenant_id = _id(TenantId, query["tenant_id"], "tenant_id") if "tenant_id" in query else None
        self._timeline_id = _id(TimelineId, query["timeline_id"], "timeline_id") if "timeline_id" in query else None

    def wants(self, ttid: TenantTimelineId) -> bool:
        """Whether the timeline belongs into the dump."""
        return self._tenant_id in (None, ttid.tenant_id) and self._timeline_id in (None, ttid.timeline_id)

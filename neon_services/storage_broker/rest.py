"""The broker's news as JSON, on the same port: for people and scripts. Services use gRPC.

``GET /v1/timelines`` answers with a list, one entry for each timeline heard of within a minute:
``{"tenant_id", "timeline_id", "safekeepers": [{"safekeeper_id", "heard_ms_ago", "term", "last_log_term", "flush_lsn",
"commit_lsn", "backup_lsn", "remote_consistent_lsn", "peer_horizon_lsn", "local_start_lsn", "standby_horizon",
"safekeeper_connstr", "http_connstr", "https_connstr", "availability_zone"}]}``; LSNs are ``X/X``, what is not set is null.

``GET /v1/timelines/subscribe`` streams news as they come, one JSON object on a line (``application/x-ndjson``):
``{"type": "SAFEKEEPER_TIMELINE_INFO" | "SAFEKEEPER_DISCOVERY_REQUEST" | "SAFEKEEPER_DISCOVERY_RESPONSE", "tenant_id",
"timeline_id", ...}`` with the message's fields as above. Who reads too slowly loses the oldest news and is told so by a line
``{"lost": n}``; after five quiet seconds comes an empty line.

Both take ``?tenant_id=`` and ``?timeline_id=``; with both, one timeline is meant.
"""

import asyncio
import json
from typing import Any

from aiohttp import web

from neon_services.ground.http import ApiError, json_response
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import format_lsn
from neon_services.protocols import broker_messages as bm
from neon_services.storage_broker.service import BrokerService

QUIET_S = 5.0
MAX_STREAMS = 256
_NAMES = {
    bm.SAFEKEEPER_TIMELINE_INFO: ("SAFEKEEPER_TIMELINE_INFO", bm.SafekeeperTimelineInfo),
    bm.SAFEKEEPER_DISCOVERY_REQUEST: ("SAFEKEEPER_DISCOVERY_REQUEST", bm.SafekeeperDiscoveryRequest),
    bm.SAFEKEEPER_DISCOVERY_RESPONSE: ("SAFEKEEPER_DISCOVERY_RESPONSE", bm.SafekeeperDiscoveryResponse),
}


def fields_of(message: Any) -> dict[str, Any]:
    """A message's fields without its timeline, as JSON values."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.name == "tenant_timeline_id":
            continue
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            value = None
        elif field.name.endswith(("_lsn", "_horizon")):
            value = format_lsn(value)
        found[field.name] = value
    return found


def _ids(ttid: TenantTimelineId) -> dict[str, str]:
    return {"tenant_id": str(ttid.tenant_id), "timeline_id": str(ttid.timeline_id)}


class _Wanted:
    """Which timelines a request is about. Raises ApiError 400."""

    def __init__(self, query: Any) -> None:
        try:
            self._tenant_id = TenantId.parse(query["tenant_id"]) if "tenant_id" in query else None
            self._timeline_id = TimelineId.parse(query["timeline_id"]) if "timeline_id" in query else None
        except ValueError as error:
            raise ApiError(400, f"query parameters tenant_id, timeline_id: {error}") from error

    @property
    def ttid(self) -> TenantTimelineId | None:
        """The one timeline, if one is meant."""
        if self._tenant_id is None or self._timeline_id is None:
            return None
        return TenantTimelineId(self._tenant_id, self._timeline_id)

    def includes(self, ttid: TenantTimelineId | None) -> bool:
        """Whether the timeline is meant."""
        if ttid is None:
            return self._tenant_id is None and self._timeline_id is None
        return self._tenant_id in (None, ttid.tenant_id) and self._timeline_id in (None, ttid.timeline_id)


class RestApi:
    """The endpoints."""

    def __init__(self, service: BrokerService) -> None:
        self._service = service
        self._streams = 0

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Register everything."""
        router.add_get("/v1/timelines", self.timelines)
        router.add_get("/v1/timelines/subscribe", self.subscribe, allow_head=False)

    async def timelines(self, request: web.Request) -> web.Response:
        """GET /v1/timelines."""
        wanted = _Wanted(request.query)
        found: dict[TenantTimelineId, list[dict[str, Any]]] = {}
        for ttid, age_s, payload in self._service.latest.all():
            if wanted.includes(ttid):
                info = fields_of(bm.SafekeeperTimelineInfo.FromString(payload))
                found.setdefault(ttid, []).append({**info, "heard_ms_ago": round(age_s * 1000)})
        return json_response(
            [
                {**_ids(ttid), "safekeepers": sorted(infos, key=lambda info: info["safekeeper_id"])}
                for ttid, infos in sorted(found.items())
            ]
        )

    async def subscribe(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/timelines/subscribe."""
        wanted = _Wanted(request.query)
        if self._streams >= MAX_STREAMS:
            raise ApiError(503, f"there are {MAX_STREAMS} subscriptions already: end one of them, or subscribe by gRPC")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        self._streams += 1
        try:
            with self._service.subscribed(wanted.ttid, frozenset(_NAMES)) as (receiver, ready):
                await response.prepare(request)
                while not self._service.stopped and request.transport is not None:
                    ready.clear()
                    while (message := receiver.take()) is not None:
                        if lost := self._service.take_lost(wanted.ttid, receiver):
                            await response.write(json.dumps({"lost": lost}).encode() + b"\n")
                        if wanted.includes(message.ttid):
                            await response.write(_line(message))
                    try:
                        async with asyncio.timeout(QUIET_S):
                            await ready.wait()
                    except TimeoutError:
                        await response.write(b"\n")  # finds out whether anybody still listens
        except ConnectionError:
            pass  # the subscriber has gone
        finally:
            self._streams -= 1
        return response


def _line(message: Any) -> bytes:
    name, kind = _NAMES[message.type]
    ids = {} if message.ttid is None else _ids(message.ttid)
    return json.dumps({"type": name, **ids, **fields_of(kind.FromString(message.payload))}).encode() + b"\n"

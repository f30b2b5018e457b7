"""The part of the HTTP API by which timelines move between safekeepers: membership, exclude, term_bump, snapshot, pull."""

import asyncio
import contextlib
import logging
import time

from aiohttp import web

from neon_services.ground.errors import NeonError
from neon_services.ground.http import ApiError, json_response, optional_field, read_json_object, require_field
from neon_services.ground.lsn import format_lsn
from neon_services.ground.net import parse_endpoint
from neon_services.safekeeper import metrics
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.http_fields import TIMELINE_PATH, mconf_field, number_field, ttid_field, ttid_of
from neon_services.safekeeper.pull_timeline import MAX_HOSTS, PullRequest, TimelinePuller
from neon_services.safekeeper.snapshot import Snapshot
from neon_services.safekeeper.timelines import Timelines

log = logging.getLogger(__name__)

STALL_TIMEOUT_S = 60.0


class MembershipApi:
    """The endpoints."""

    def __init__(self, config: SafekeeperConfig, timelines: Timelines) -> None:
        self._config = config
        self._timelines = timelines
        self._puller = TimelinePuller(timelines, config.node_id, sync=config.sync, access=config.access.peers())

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Register everything."""
        router.add_put(TIMELINE_PATH + "/membership", self.membership)
        router.add_put(TIMELINE_PATH + "/exclude", self.exclude)
        router.add_post(TIMELINE_PATH + "/term_bump", self.term_bump)
        router.add_get(TIMELINE_PATH + "/snapshot/{destination_id}", self.snapshot, allow_head=False)
        router.add_post("/v1/pull_timeline", self.pull_timeline)

    async def membership(self, request: web.Request) -> web.Response:
        """PUT membership: follow a newer configuration."""
        mconf = mconf_field(await read_json_object(request), "configuration")
        timeline = self._timelines.get(ttid_of(request))
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

    async def exclude(self, request: web.Request) -> web.Response:
        """PUT exclude: this node is not in the given configuration: forget the timeline, on this disk only."""
        mconf = mconf_field(await read_json_object(request), "configuration")
        if not mconf.generation:
            raise ApiError(400, "configuration: an exclusion needs a membership generation above 0")
        if mconf.contains(self._config.node_id):
            raise ApiError(403, f"safekeeper {self._config.node_id} is still a member of generation {mconf.generation}")
        return json_response({"dir_existed": self._timelines.exclude(ttid_of(request), mconf)})

    async def term_bump(self, request: web.Request) -> web.Response:
        """POST term_bump: depose whoever leads."""
        body = await read_json_object(request) if request.can_read_body else {}
        term = number_field(body, "term", 64) if body.get("term") is not None else None
        timeline = self._timelines.get(ttid_of(request))
        if term is None and timeline.acceptor.term == (1 << 64) - 1:
            raise ApiError(412, f"term {timeline.acceptor.term} is the highest possible")
        previous, current = timeline.run(timeline.acceptor.term_bump(term))
        return json_response({"previous_term": previous, "current_term": current})

    async def pull_timeline(self, request: web.Request) -> web.Response:
        """POST pull_timeline: become a copy of the best of the given members."""
        body = await read_json_object(request)
        hosts = require_field(body, "http_hosts", list)
        if not 1 <= len(hosts) <= MAX_HOSTS or not all(isinstance(host, str) for host in hosts):
            raise ApiError(
                400, f"field 'http_hosts' must be a list of 1 to {MAX_HOSTS} strings like http://HOST:PORT or https://HOST:PORT"
            )
        if len(set(hosts)) != len(hosts):
            raise ApiError(400, "field 'http_hosts' names a host twice")
        for host in hosts:
            parse_endpoint(host, what="field 'http_hosts'")
        mconf = mconf_field(body["mconf"], "mconf") if body.get("mconf") is not None else None
        everybody = optional_field(body, "require_all_hosts", bool, False)
        donor = await self._puller.pull(PullRequest(ttid_field(body), tuple(hosts), mconf, everybody))
        return json_response({"safekeeper_host": donor})

    async def snapshot(self, request: web.Request) -> web.StreamResponse:
        """GET snapshot: the timeline as a tar stream, for the safekeeper with the given id."""
        destination = request.match_info["destination_id"]
        if not (destination.isascii() and destination.isdecimal() and len(destination) <= 20 and int(destination) < 1 << 64):
            raise ApiError(400, f"destination_id: {destination[:80]!r} is not the id of a safekeeper")
        timeline = self._timelines.get(ttid_of(request))
        started = time.perf_counter()
        async with timeline.residence():
            with timeline.hold_removal():
                archive = Snapshot.of(timeline)
                response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
                await response.prepare(request)
                try:
                    async with contextlib.aclosing(archive.stream()) as pieces:
                        async for piece in pieces:
                            async with asyncio.timeout(STALL_TIMEOUT_S):  # WAL is not kept for ever for who does not read
                                await response.write(piece)
                    await response.write_eof()
                except (NeonError, OSError) as error:
                    # the status is out already: only a torn connection says that the copy is not whole
                    log.warning("snapshot of timeline %s for safekeeper %s ended early: %r", timeline.ttid, destination, error)
                    if request.transport is not None:
                        request.transport.abort()
        metrics.MISC_OPERATION_SECONDS.labels("snapshot").observe(time.perf_counter() - started)
        return response

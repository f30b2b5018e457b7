"""The part of the HTTP API for surgery by operators: patching a control file, and copying a timeline up to a position."""

import asyncio
import contextlib
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web

from neon_services.consensus import term_history
from neon_services.ground.errors import CorruptionError
from neon_services.ground.http import ApiError, json_response, read_json_object, require_field
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import INVALID_LSN, Lsn, format_lsn
from neon_services.safekeeper import metrics
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.control_patch import patched
from neon_services.safekeeper.http_fields import TIMELINE_PATH, parse_id, parse_lsn_field, ttid_of
from neon_services.safekeeper.snapshot import Snapshot
from neon_services.safekeeper.snapshot_unpack import SnapshotUnpacker
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import TimelineAwaited, Timelines

log = logging.getLogger(__name__)


def control_of_copy(source: ControlFile, target: TenantTimelineId, until_lsn: Lsn) -> ControlFile:
    """The control file of a copy that ends, committed, at ``until_lsn``: nothing of it is in object storage yet."""
    state = source.acceptor
    history = term_history.up_to(state.term_history, until_lsn)
    copied = replace(
        state,
        term=history[-1].term if history else 0,
        term_history=history,
        commit_lsn=until_lsn,
        backup_lsn=state.local_start_lsn,
        peer_horizon_lsn=state.local_start_lsn,
        remote_consistent_lsn=INVALID_LSN,
    )
    return ControlFile(target, copied)


class AdminApi:
    """The endpoints."""

    def __init__(self, config: SafekeeperConfig, timelines: Timelines) -> None:
        self._config = config
        self._timelines = timelines

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Register everything."""
        router.add_patch(TIMELINE_PATH + "/control_file", self.patch_control_file)
        router.add_post("/v1/tenant/{tenant_id}/timeline/{source_timeline_id}/copy", self.copy)

    async def patch_control_file(self, request: web.Request) -> web.Response:
        """PATCH control_file: change fields; the timeline is opened anew and its connections end."""
        body = await read_json_object(request)
        updates = require_field(body, "updates", dict)
        names = require_field(body, "apply_fields", list)
        if not all(isinstance(name, str) for name in names):
            raise ApiError(400, "field 'apply_fields' must be a list of names")
        timeline = self._timelines.get(ttid_of(request))
        async with timeline.residence(), timeline.partial_backup_lock:  # nobody else writes the control file meanwhile
            return self._patch(timeline, updates, names)

    def _patch(self, timeline: Timeline, updates: dict[str, Any], names: list[str]) -> web.Response:
        timeline.run(timeline.acceptor.persist_volatile())
        old = timeline.control
        new = patched(old, updates, names)  # ValueError becomes status 400
        if new.acceptor.commit_lsn > timeline.acceptor.flush_lsn:
            raise ApiError(
                400,
                f"updates.commit_lsn: {format_lsn(new.acceptor.commit_lsn)} is beyond the WAL on this disk, "
                f"which ends at {format_lsn(timeline.acceptor.flush_lsn)}",
            )
        if new != old:
            log.warning("timeline %s: an operator replaces %s in the control file", timeline.ttid, ", ".join(names))
            self._timelines.replace_control(timeline.ttid, new)
        return json_response({"old_control_file": old.to_json(), "new_control_file": new.to_json()})

    async def copy(self, request: web.Request) -> web.Response:
        """POST copy: another timeline of the same tenant with the WAL up to a position; an existing one is left as it is."""
        tenant_id = parse_id(TenantId, request.match_info["tenant_id"], "tenant_id")
        source = parse_id(TimelineId, request.match_info["source_timeline_id"], "source_timeline_id")
        body = await read_json_object(request)
        target = parse_id(TimelineId, require_field(body, "target_timeline_id", str), "target_timeline_id")
        until_lsn = parse_lsn_field(require_field(body, "until_lsn", str), "until_lsn")
        timeline = self._timelines.get(TenantTimelineId(tenant_id, source))
        state = timeline.acceptor.state
        if not max(state.local_start_lsn, 1) <= until_lsn <= timeline.acceptor.commit_lsn:
            raise ApiError(
                400,
                f"until_lsn: {format_lsn(until_lsn)} is not between the beginning {format_lsn(state.local_start_lsn)} and "
                f"commit_lsn {format_lsn(timeline.acceptor.commit_lsn)}",
            )
        control = control_of_copy(timeline.control, TenantTimelineId(tenant_id, target), until_lsn)
        started = time.perf_counter()
        if self._timelines.find_or_admit(control.ttid, control.acceptor.mconf.generation) is None:
            if (reason := self._timelines.why_not_new(control.ttid)) is not None:
                raise TimelineAwaited(reason)
            await self._copy(timeline, control, until_lsn)
        metrics.MISC_OPERATION_SECONDS.labels("copy").observe(time.perf_counter() - started)
        return json_response(None)

    async def _copy(self, timeline: Timeline, control: ControlFile, until_lsn: Lsn) -> None:
        staged = self._timelines.stage(control.ttid)
        try:
            await self._fill(timeline, control, until_lsn, staged)
            self._timelines.publish(control.ttid, staged, control.acceptor.mconf.generation)
        finally:
            await asyncio.to_thread(shutil.rmtree, staged, True)

    async def _fill(self, timeline: Timeline, control: ControlFile, until_lsn: Lsn, staged: Path) -> None:
        """Copy through the same checks that a copy from another safekeeper passes."""
        unpacker = SnapshotUnpacker(staged, control.ttid, sync=self._config.sync)
        try:
            async with timeline.residence():
                with timeline.hold_removal():
                    archive = Snapshot(timeline, control, control.acceptor.local_start_lsn, until_lsn)
                    async with contextlib.aclosing(archive.stream()) as pieces:
                        async for piece in pieces:
                            await asyncio.to_thread(unpacker.feed, piece)
            await asyncio.to_thread(unpacker.finish, None)
        except CorruptionError as error:
            raise ApiError(400, f"until_lsn: {format_lsn(until_lsn)} is not the end of a record: {error}") from error
        finally:
            unpacker.close()

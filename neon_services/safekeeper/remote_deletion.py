"""A deleted timeline's objects leave the bucket in the background.

Invariants: only what was deleted here is deleted there, after the local files are gone and nothing of the timeline is on its
way to the bucket any more. A file in ``deleting/`` remembers the work until it is done, so a restart goes on with it. A
timeline that exists here again keeps its objects.
"""

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from neon_services.ground import failpoints
from neon_services.ground.durable import replace_durably, sync_directory
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.remote_storage import RemoteStorage, RemoteStorageError
from neon_services.safekeeper.remote_wal import timeline_prefix
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines

log = logging.getLogger(__name__)

DIRECTORY = "deleting"
BATCH = 1000
FIRST_RETRY_S, MAX_RETRY_S = 0.1, 60.0
_BEFORE_DELETION = failpoints.declare("sk-delete-timeline-remote-pause", can_wait=True)
_DELETION = failpoints.declare("sk-delete-timeline-remote")


class RemoteDeletion:
    """Remembers and carries out deletions."""

    def __init__(self, timelines: Timelines, storage: RemoteStorage, datadir: Path, *, sync: bool = True) -> None:
        self._timelines = timelines
        self._storage = storage
        self._directory = datadir / DIRECTORY
        self._sync = sync
        self._tasks: set[asyncio.Task[None]] = set()

    def resume(self) -> None:
        """Go on with what an earlier process did not finish. Called when the timelines are loaded. Raises OSError."""
        if not self._directory.exists():
            return
        for marker in sorted(self._directory.iterdir()):
            tenant, _, timeline = marker.name.partition("_")
            try:
                ttid = TenantTimelineId(TenantId.parse(tenant), TimelineId.parse(timeline))
            except ValueError:
                continue  # a marker that was being written
            self._begin(self._delete(ttid, None))

    def schedule(self, ttid: TenantTimelineId, timeline: Timeline | None) -> None:
        """The timeline was just deleted here; ``timeline`` is what was closed. Raises OSError."""
        self._directory.mkdir(exist_ok=True)
        replace_durably(self._marker(ttid), b"", sync=self._sync)
        if self._sync:
            sync_directory(self._directory.parent)
        self._begin(self._delete(ttid, timeline))

    def _marker(self, ttid: TenantTimelineId) -> Path:
        return self._directory / f"{ttid.tenant_id}_{ttid.timeline_id}"

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _delete(self, ttid: TenantTimelineId, timeline: Timeline | None) -> None:
        if timeline is not None:
            await timeline.bucket_is_quiet()
        delay = FIRST_RETRY_S
        while True:
            try:
                if await self._delete_objects(ttid):
                    log.info("timeline %s: its objects are deleted", ttid)
                else:
                    log.warning("timeline %s exists again: its objects stay", ttid)
                self._marker(ttid).unlink(missing_ok=True)
                return
            except (RemoteStorageError, OSError) as error:
                log.log(
                    logging.WARNING if delay == FIRST_RETRY_S else logging.DEBUG,
                    "timeline %s: deleting its objects failed, trying again: %s",
                    ttid,
                    error,
                )
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RETRY_S)

    async def _delete_objects(self, ttid: TenantTimelineId) -> bool:
        await _BEFORE_DELETION.reach()
        if _DELETION.hit() is not None:
            raise RemoteStorageError("failpoint: sk-delete-timeline-remote")
        keys = await self._storage.list_keys(timeline_prefix(ttid))
        for first in range(0, len(keys), BATCH):
            if self._timelines.find(ttid) is not None:
                return False
            await self._storage.delete(keys[first : first + BATCH])
        return True

    async def stop(self) -> None:
        """Leave the rest to the next process."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

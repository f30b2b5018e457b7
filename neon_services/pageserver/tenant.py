"""A tenant shard attached to this node: its timelines, how they are loaded, made and deleted.

Invariants: a timeline exists exactly when its index is in remote storage, so creation returns only after the index is there,
and whatever a crash leaves without an index is removed at the next start; of the local files only those that the index names
with the right size are kept; ancestors are loaded before their branches.
"""

import asyncio
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from neon_services.ground.durable import sync_directory
from neon_services.ground.errors import CorruptionError, NeonError
from neon_services.ground.http import ApiError
from neon_services.ground.ids import TimelineId
from neon_services.ground.lsn import align_lsn, format_lsn
from neon_services.ground.remote_storage import RemoteStorage, RemoteStorageError
from neon_services.pageserver.index_part import IndexPart, find_index
from neon_services.pageserver.layers.layer import LayerEnvironment
from neon_services.pageserver.location_config import LocationConf, TenantConf
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.remote_layout import INDEX_NAME, timeline_prefix, timelines_prefix
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.timeline import Timeline, TimelineResources

log = logging.getLogger(__name__)

_PARALLEL_LOADS = 8
BRANCH_WAIT_LSN_TIMEOUT_S = 60.0

#: Makes the timeline object once the LSN at which initdb ended is known.
TimelineFactory = Callable[[int], Timeline]


class TimelineServices(Protocol):
    """What the layers above the storage engine do for a timeline."""

    async def bootstrap(
        self, shard: TenantShardId, timeline_id: TimelineId, pg_version: int, make: TimelineFactory
    ) -> Timeline:
        """Run initdb, call ``make(initdb_lsn)`` and import the data directory into the timeline."""

    def activated(self, timeline: Timeline) -> None:
        """The timeline serves: start receiving WAL."""

    async def stopping(self, timeline: Timeline) -> None:
        """The timeline is about to stop: stop receiving WAL."""


@dataclass(slots=True)
class NodeResources:
    """What all tenants of the process share."""

    environment: LayerEnvironment
    reconstructor: Callable[[int], Reconstructor]  #: by Postgres major
    remote: RemoteStorage
    services: TimelineServices
    node_conf: dict[str, Any] = field(default_factory=dict)
    needs_validation: bool = False  #: there is a control plane that may give a tenant to another node


class Tenant:
    """One attached tenant shard in one generation."""

    def __init__(self, node: NodeResources, shard: TenantShardId, conf: LocationConf, directory: Path) -> None:
        assert conf.generation is not None
        self.shard = shard
        self.conf = conf
        self.directory = directory
        self.state = "Attaching"  #: "Attaching", "Active", "Stopping" or "Broken"
        self.broken_reason = ""
        self.timelines: dict[TimelineId, Timeline] = {}
        self.ready = asyncio.Event()  #: set when loading has ended, well or not
        self._node = node
        self._creating: dict[TimelineId, tuple[asyncio.Task[Timeline], TimelineId | None]] = {}  # and of which ancestor
        self._deleting: dict[TimelineId, asyncio.Task[None]] = {}
        self._load_task: asyncio.Task[None] | None = None
        self.effective = TenantConf(conf.tenant_conf, node.node_conf)

    @property
    def generation(self) -> int:
        assert self.conf.generation is not None
        return self.conf.generation

    def start(self) -> None:
        """Load in the background."""
        self._load_task = asyncio.get_running_loop().create_task(self._load_until_done(), name=f"load {self.shard}")

    # -- loading

    async def _load_until_done(self) -> None:
        delay = 0.2
        while True:
            try:
                await self._load()
                self.state = "Active"
                log.info(
                    "tenant %s is attached with generation %d: %d timelines", self.shard, self.generation, len(self.timelines)
                )
            except RemoteStorageError as error:
                log.warning("tenant %s: remote storage does not answer, trying again: %s", self.shard, error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, 10.0)
                continue
            except (NeonError, OSError) as error:
                log.error("tenant %s is broken: %s", self.shard, error)
                self.state, self.broken_reason = "Broken", str(error)
            except Exception as error:
                log.exception("tenant %s is broken", self.shard)
                self.state, self.broken_reason = "Broken", f"internal error: {error!r}"
            self.ready.set()
            return

    async def _load(self) -> None:
        remote = self._node.remote
        names = await remote.list_directories(timelines_prefix(self.shard))
        slots = asyncio.Semaphore(_PARALLEL_LOADS)

        async def load(name: str) -> tuple[TimelineId, IndexPart] | None:
            timeline_id = TimelineId.parse(name)
            async with slots:
                found = await find_index(remote, self.shard, timeline_id, self.generation)
            if found is None:
                log.warning(
                    "tenant %s: timeline %s has objects but no index: its creation was never finished", self.shard, name
                )
                return None
            return timeline_id, found[0]

        loaded = await asyncio.gather(*(load(name) for name in names if len(name) == 32))
        indexes = dict(item for item in loaded if item is not None)
        self._remove_unknown_timelines(set(indexes))
        for timeline_id in _ancestors_first(indexes, self.shard):
            timeline = self._make_timeline(timeline_id, indexes[timeline_id])
            self.timelines[timeline_id] = timeline
            if timeline.deleted_at is not None:
                timeline.state = "Stopping"
                self._delete_in_background(timeline)
            else:
                self._activate(timeline)

    def _remove_unknown_timelines(self, known: set[TimelineId]) -> None:
        parent = self.directory / "timelines"
        for path in parent.iterdir() if parent.is_dir() else ():
            if path.name not in {str(t) for t in known}:
                log.info(
                    "tenant %s: removing local timeline directory %s, which remote storage does not know", self.shard, path.name
                )
                shutil.rmtree(path)

    def _make_timeline(self, timeline_id: TimelineId, index: IndexPart) -> Timeline:
        ancestor = None if index.ancestor_timeline is None else self.timelines[index.ancestor_timeline]
        timeline = Timeline(
            tenant_shard_id=self.shard,
            timeline_id=timeline_id,
            pg_version=index.pg_version,
            initdb_lsn=index.initdb_lsn,
            disk_consistent_lsn=index.disk_consistent_lsn,
            prev_record_lsn=index.prev_record_lsn or 0,
            ancestor=ancestor,
            ancestor_lsn=index.ancestor_lsn,
            latest_gc_cutoff_lsn=index.latest_gc_cutoff_lsn,
            resources=self._timeline_resources(timeline_id, index.pg_version),
        )
        directory = self._make_directory(timeline_id)
        wanted = {name.local(metadata.generation): metadata.file_size for name, metadata in index.layers.items()}
        for path in directory.iterdir():
            if wanted.get(path.name) != path.stat().st_size:
                log.info(
                    "timeline %s: removing local file %s, which its index does not name with this size", timeline, path.name
                )
                path.unlink()
        timeline.load_index(index)
        return timeline

    def _timeline_resources(self, timeline_id: TimelineId, pg_version: int) -> TimelineResources:
        node = self._node
        return TimelineResources(
            environment=node.environment,
            reconstructor=node.reconstructor(pg_version),
            directory=self._timeline_dir(timeline_id),
            generation=self.generation,
            conf=self.effective,
            needs_validation=node.needs_validation,
        )

    def _timeline_dir(self, timeline_id: TimelineId) -> Path:
        return self.directory / "timelines" / str(timeline_id)

    def _make_directory(self, timeline_id: TimelineId) -> Path:
        directory = self._timeline_dir(timeline_id)
        if not directory.is_dir():
            directory.mkdir(parents=True)
            if self._node.environment.sync:
                sync_directory(directory.parent)
                sync_directory(self.directory)
        return directory

    def _activate(self, timeline: Timeline) -> None:
        self._apply_mode(timeline)
        timeline.start()
        self._node.services.activated(timeline)  # in mode AttachedStale, too: computes read here until they are told otherwise

    def _apply_mode(self, timeline: Timeline) -> None:
        timeline.attach_uploads(uploading=self.conf.mode != "AttachedStale", may_delete=self.conf.mode == "AttachedSingle")

    # -- settings

    def reconfigure(self, conf: LocationConf) -> None:
        """Take over another attach mode or other settings within the same generation."""
        assert conf.generation == self.conf.generation
        self.conf = conf
        self.effective = TenantConf(conf.tenant_conf, self._node.node_conf)
        for timeline in self.timelines.values():
            timeline.resources.conf = self.effective
            if timeline.state == "Active":
                self._apply_mode(timeline)

    # -- timelines

    def get_timeline(self, timeline_id: TimelineId) -> Timeline:
        """A timeline that is here. Raises ApiError 404."""
        timeline = self.timelines.get(timeline_id)
        if timeline is None:
            raise ApiError(404, f"timeline {self.shard}/{timeline_id} was not found")
        return timeline

    async def create_timeline(
        self, timeline_id: TimelineId, *, pg_version: int, ancestor: TimelineId | None = None, start_lsn: int | None = None
    ) -> Timeline:
        """Bootstrap a timeline, or branch one; the same request again gives the existing one. Raises ApiError."""
        existing = self.timelines.get(timeline_id)
        if existing is not None:
            self._check_same(existing, pg_version, ancestor, start_lsn)
            return existing
        if timeline_id in self._creating:
            raise ApiError(429, f"timeline {timeline_id} is being created")
        if self.conf.mode == "AttachedStale":
            raise ApiError(409, f"tenant {self.shard} is attached in mode AttachedStale: timelines are created elsewhere")
        # a task of its own: a client that goes away does not interrupt it, a detach does
        task = asyncio.get_running_loop().create_task(
            self._create(timeline_id, pg_version, ancestor, start_lsn), name=f"create {self.shard}/{timeline_id}"
        )
        self._creating[timeline_id] = task, ancestor
        task.add_done_callback(lambda _: self._creating.pop(timeline_id, None))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise ApiError(503, f"tenant {self.shard} is being detached or stopped: try again") from None
            raise

    async def _create(
        self, timeline_id: TimelineId, pg_version: int, ancestor: TimelineId | None, start_lsn: int | None
    ) -> Timeline:
        try:
            if ancestor is None:
                timeline = await self._bootstrap(timeline_id, pg_version)
            else:
                timeline = await self._branch(timeline_id, self.get_timeline(ancestor), start_lsn)
        except BaseException:
            shutil.rmtree(self._timeline_dir(timeline_id), ignore_errors=True)
            raise
        self.timelines[timeline_id] = timeline
        self._node.services.activated(timeline)
        return timeline

    def _check_same(self, existing: Timeline, pg_version: int, ancestor: TimelineId | None, start_lsn: int | None) -> None:
        has = None if existing.ancestor is None else existing.ancestor.timeline_id
        same = has == ancestor and (ancestor is not None or existing.pg_version == pg_version)
        if start_lsn is not None and align_lsn(start_lsn) != existing.ancestor_lsn:
            same = False
        if existing.state == "Stopping" or not same:
            raise ApiError(409, f"timeline {existing.timeline_id} already exists with other parameters, or is being deleted")

    async def _bootstrap(self, timeline_id: TimelineId, pg_version: int) -> Timeline:
        made: list[Timeline] = []

        def make(initdb_lsn: int) -> Timeline:
            timeline = Timeline(
                tenant_shard_id=self.shard,
                timeline_id=timeline_id,
                pg_version=pg_version,
                initdb_lsn=initdb_lsn,
                disk_consistent_lsn=0,
                resources=self._timeline_resources(timeline_id, pg_version),
            )
            self._make_directory(timeline_id)
            timeline.start()  # uploads come later: an index of half an import must never exist
            timeline.state = "Loading"
            made.append(timeline)
            return timeline

        try:
            timeline = await self._node.services.bootstrap(self.shard, timeline_id, pg_version, make)
            await timeline.create_image_layers()  # every compute's first reads, and every branch's, go there
            self._apply_mode(timeline)
            timeline.schedule_uploads(timeline.layer_map.layers)
            await timeline.upload_index_now()
        except BaseException:
            for unfinished in made:
                await unfinished.shutdown(flush=False)
            raise
        timeline.state = "Active"
        return timeline

    async def _branch(self, timeline_id: TimelineId, ancestor: Timeline, start_lsn: int | None) -> Timeline:
        if ancestor.state != "Active":
            raise ApiError(503, f"ancestor timeline {ancestor.timeline_id} is not active (it is {ancestor.state})")
        lsn = await ancestor.latest_lsn(BRANCH_WAIT_LSN_TIMEOUT_S) if start_lsn is None else align_lsn(start_lsn)
        if lsn < ancestor.ancestor_lsn:
            raise ApiError(
                406,
                f"invalid start lsn {format_lsn(lsn)} for ancestor timeline {ancestor.timeline_id}: "
                f"less than timeline ancestor lsn {format_lsn(ancestor.ancestor_lsn)}",
            )
        if lsn < ancestor.latest_gc_cutoff_lsn:
            cutoff = format_lsn(ancestor.latest_gc_cutoff_lsn)
            raise ApiError(406, f"invalid branch start lsn: less than latest GC cutoff {cutoff}")
        await ancestor.wait_lsn(lsn, BRANCH_WAIT_LSN_TIMEOUT_S)
        timeline = Timeline(
            tenant_shard_id=self.shard,
            timeline_id=timeline_id,
            pg_version=ancestor.pg_version,
            initdb_lsn=ancestor.initdb_lsn,
            disk_consistent_lsn=lsn,
            prev_record_lsn=ancestor.prev_record_lsn if lsn == ancestor.last_record_lsn else 0,
            ancestor=ancestor,
            ancestor_lsn=lsn,
            latest_gc_cutoff_lsn=ancestor.latest_gc_cutoff_lsn,
            resources=self._timeline_resources(timeline_id, ancestor.pg_version),
        )
        self._make_directory(timeline_id)
        self._apply_mode(timeline)
        timeline.start()
        try:
            await timeline.upload_index_now()
        except BaseException:
            await timeline.shutdown(flush=False)
            raise
        return timeline

    # -- deletion

    async def delete_timeline(self, timeline_id: TimelineId) -> None:
        """Make the deletion durable and carry it out in the background. Raises ApiError 404, 409, 412."""
        timeline = self.get_timeline(timeline_id)
        if timeline_id in self._deleting:
            raise ApiError(409, f"deletion of timeline {timeline_id} is already in progress")
        children = [str(t.timeline_id) for t in self.timelines.values() if t.ancestor is timeline]
        children += [f"{child} (being created)" for child, (_, ancestor) in self._creating.items() if ancestor == timeline_id]
        if children:
            raise ApiError(412, f"cannot delete timeline {timeline_id}: it has child timelines {', '.join(children)}")
        timeline.state = "Stopping"
        await self._node.services.stopping(timeline)
        await timeline.mark_deleted()
        self._delete_in_background(timeline)

    async def deletion_done(self, timeline_id: TimelineId) -> None:
        """Return when a deletion that is under way has finished."""
        if timeline_id in self._deleting:
            await asyncio.shield(self._deleting[timeline_id])

    def _delete_in_background(self, timeline: Timeline) -> None:
        task = asyncio.get_running_loop().create_task(self._delete(timeline), name=f"delete {timeline}")
        self._deleting[timeline.timeline_id] = task
        task.add_done_callback(lambda _: self._deleting.pop(timeline.timeline_id, None))

    async def _delete(self, timeline: Timeline) -> None:
        await timeline.shutdown(flush=False)
        await asyncio.to_thread(timeline.remove_local_files)
        prefix = timeline_prefix(self.shard, timeline.timeline_id)
        delay = 0.2
        while True:
            try:
                keys = await self._node.remote.list_keys(prefix)
                # the index goes last: as long as it exists a restart resumes the deletion
                indexes = [key for key in keys if key.removeprefix(prefix).startswith(INDEX_NAME)]
                await self._node.remote.delete([key for key in keys if key not in set(indexes)])
                await self._node.remote.delete(indexes)
                break
            except RemoteStorageError as error:
                log.warning("deletion of timeline %s: %s; trying again", timeline, error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, 10.0)
        self.timelines.pop(timeline.timeline_id, None)
        log.info("timeline %s is deleted", timeline)

    # -- the end

    async def shutdown(self, *, flush: bool, upload_timeout_s: float = 5.0) -> None:
        """Stop all timelines; with ``flush`` in-memory data is written and, if there is time, uploaded."""
        if self.state != "Broken":
            self.state = "Stopping"
        tasks: list[asyncio.Task[Any]] = [*self._deleting.values(), *(task for task, _ in self._creating.values())]
        if self._load_task is not None:
            tasks.append(self._load_task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.ready.set()

        async def stop(timeline: Timeline) -> None:
            await self._node.services.stopping(timeline)
            may_flush = flush and timeline.state == "Active"
            await timeline.shutdown(flush=may_flush, upload_timeout_s=upload_timeout_s)

        await asyncio.gather(*(stop(timeline) for timeline in self.timelines.values()))


def _ancestors_first(indexes: dict[TimelineId, IndexPart], shard: TenantShardId) -> list[TimelineId]:
    """An order in which every ancestor comes before its branches. Raises CorruptionError when an ancestor is missing."""
    order: list[TimelineId] = []
    done: set[TimelineId] = set()
    for timeline_id in sorted(indexes):
        path: list[TimelineId] = []
        current: TimelineId | None = timeline_id
        while current is not None and current not in done:
            if current not in indexes or current in path:
                raise CorruptionError(
                    f"tenant {shard}: timeline {path[-1]} branched from {current}, which has no index in remote storage"
                )
            path.append(current)
            current = indexes[current].ancestor_timeline
        order += reversed(path)
        done |= set(path)
    return order


async def remove_directory_durably(path: Path) -> None:
    """Take a tenant's directory away in one step and then delete it."""
    if not path.exists():
        return
    doomed = path.with_name(f"{path.name}.{os.urandom(4).hex()}.___temp")
    path.rename(doomed)
    sync_directory(path.parent)
    await asyncio.to_thread(shutil.rmtree, doomed, ignore_errors=True)

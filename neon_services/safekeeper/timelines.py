"""All timelines of this safekeeper: loading, creating, finding, deleting.

Invariant: a timeline's directory appears under its name only when it is complete and durable (made in tmp/, published by
rename), and a deleted timeline does not come back by a late message: a tombstone forbids it for a day.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neon_services.consensus.acceptor import AcceptorState
from neon_services.ground.durable import sync_directory
from neon_services.ground.errors import CorruptionError, NeonError
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.remote_storage import RemoteStorage
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.remote_wal import RemoteWal
from neon_services.safekeeper.timeline import Timeline

log = logging.getLogger(__name__)

TEMPORARY_DIRECTORY = "tmp"
TOMBSTONE_LIFE_S = 24 * 3600.0


class TimelineNotFound(NeonError):
    """This safekeeper does not have the timeline."""


class TimelineDeleted(NeonError):
    """The timeline was deleted here not long ago and must not come back by itself."""


class TimelineBroken(NeonError):
    """The timeline's files are unusable."""


@dataclass(frozen=True, slots=True)
class _Tombstone:
    generation: int | None  # None blocks every generation
    until: float


class Timelines:
    """The timelines of one data directory."""

    def __init__(self, datadir: Path, node_id: int, *, sync: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._datadir = datadir
        self._node_id = node_id
        self._sync = sync
        self._clock = clock
        self._timelines: dict[TenantTimelineId, Timeline] = {}
        self.broken: dict[TenantTimelineId, str] = {}
        self._tombstones: dict[TenantTimelineId | TenantId, _Tombstone] = {}
        self.on_change: Callable[[Timeline], None] = lambda _: None
        #: Called when any timeline begins a segment.
        self.on_segment: Callable[[], None] = lambda: None
        #: Where WAL is offloaded to; set before load().
        self.storage: RemoteStorage | None = None
        #: Why no timeline accepts WAL at the moment; None when the disk has room.
        self.disk_refusal: str | None = None

    def load(self) -> None:
        """Open everything in the data directory; a broken timeline is logged and kept apart. Raises OSError."""
        temporary = self._datadir / TEMPORARY_DIRECTORY
        if temporary.exists():
            shutil.rmtree(temporary)
        for tenant_directory in sorted(self._datadir.iterdir()):
            try:
                tenant_id = TenantId.parse(tenant_directory.name)
            except ValueError:
                continue
            for directory in sorted(tenant_directory.iterdir()):
                try:
                    ttid = TenantTimelineId(tenant_id, TimelineId.parse(directory.name))
                except ValueError:
                    continue
                self._load_one(ttid, directory)

    def _load_one(self, ttid: TenantTimelineId, directory: Path) -> None:
        try:
            timeline = Timeline.open(self._node_id, directory, sync=self._sync)
            if timeline.ttid != ttid:
                raise CorruptionError(f"{directory}: the control file is of timeline {timeline.ttid}")
        except (OSError, NeonError) as error:
            log.error("timeline %s is broken: %s", ttid, error)
            self.broken[ttid] = str(error)
            return
        self._register(timeline)

    def _register(self, timeline: Timeline) -> None:
        """An opened timeline becomes one of ours."""
        timeline.on_change = self._changed
        timeline.store.on_segment = self._segment_begun
        if self.storage is not None:
            timeline.remote = RemoteWal(self.storage, timeline.ttid)
        self._timelines[timeline.ttid] = timeline

    def _segment_begun(self) -> None:
        self.on_segment()

    def _changed(self, timeline: Timeline) -> None:
        self.on_change(timeline)

    # -- finding

    def get(self, ttid: TenantTimelineId) -> Timeline:
        """The timeline. Raises TimelineNotFound or TimelineBroken."""
        timeline = self._timelines.get(ttid)
        if timeline is None:
            if ttid in self.broken:
                raise TimelineBroken(f"timeline {ttid} is broken: {self.broken[ttid]}")
            raise TimelineNotFound(f"timeline {ttid} was not found on this safekeeper")
        return timeline

    def find(self, ttid: TenantTimelineId) -> Timeline | None:
        """The timeline, if it is here and usable."""
        return self._timelines.get(ttid)

    def all(self) -> list[Timeline]:
        """All usable timelines."""
        return list(self._timelines.values())

    # -- creating

    def create(self, ttid: TenantTimelineId, state: AcceptorState) -> Timeline:
        """The timeline; a new one with this state when it is absent. Raises TimelineDeleted, TimelineBroken, OSError."""
        existing = self._timelines.get(ttid)
        if existing is not None:
            return existing
        if ttid in self.broken:
            return self.get(ttid)
        self._check_tombstones(ttid, state.mconf.generation)
        staged = self._datadir / TEMPORARY_DIRECTORY / f"{ttid.tenant_id}_{ttid.timeline_id}_{os.urandom(4).hex()}_temptli"
        staged.mkdir(parents=True)
        try:
            ControlFile(ttid, state).save(staged, sync=self._sync)
            directory = self.directory_of(ttid)
            directory.parent.mkdir(exist_ok=True)
            staged.rename(directory)
        except OSError:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        if self._sync:
            sync_directory(directory.parent)
            sync_directory(self._datadir)
        timeline = Timeline.open(self._node_id, directory, sync=self._sync)
        self._register(timeline)
        self._tombstones.pop(ttid, None)
        log.info("created timeline %s", ttid)
        return timeline

    def directory_of(self, ttid: TenantTimelineId) -> Path:
        """Where the timeline's files are."""
        return self._datadir / str(ttid.tenant_id) / str(ttid.timeline_id)

    def _check_tombstones(self, ttid: TenantTimelineId, generation: int) -> None:
        for key in (ttid, ttid.tenant_id):
            tombstone = self._tombstones.get(key)
            if tombstone is None:
                continue
            if tombstone.until <= self._clock():
                del self._tombstones[key]
            elif tombstone.generation is None or generation <= tombstone.generation:
                raise TimelineDeleted(f"timeline {ttid} was deleted from this safekeeper and cannot be created again yet")

    # -- deleting

    def delete(self, ttid: TenantTimelineId) -> bool:
        """Remove the timeline and remember it. Whether there was anything to remove. Raises OSError."""
        self._bury(ttid)
        timeline = self._timelines.pop(ttid, None)
        if timeline is not None:
            try:
                timeline.close(f"timeline {ttid} was deleted")
            except NeonError as error:
                log.warning("timeline %s, while it is deleted: %s", ttid, error)
        self.broken.pop(ttid, None)
        directory = self.directory_of(ttid)
        if not directory.exists():
            return False
        # out of sight first: a crash in the middle must not leave half a timeline
        grave = self._datadir / TEMPORARY_DIRECTORY / f"{ttid.tenant_id}_{ttid.timeline_id}_{os.urandom(4).hex()}_deleted"
        grave.parent.mkdir(exist_ok=True)
        directory.rename(grave)
        if self._sync:
            sync_directory(directory.parent)
        shutil.rmtree(grave)
        log.info("deleted timeline %s", ttid)
        return True

    def delete_tenant(self, tenant_id: TenantId) -> dict[TimelineId, bool]:
        """Remove all timelines of a tenant; for each, whether there was anything to remove."""
        self._bury(tenant_id)
        ttids = {ttid for ttid in (*self._timelines, *self.broken) if ttid.tenant_id == tenant_id}
        removed = {ttid.timeline_id: self.delete(ttid) for ttid in sorted(ttids)}
        directory = self._datadir / str(tenant_id)
        if directory.exists() and not any(directory.iterdir()):
            directory.rmdir()
        return removed

    def _bury(self, key: TenantTimelineId | TenantId) -> None:
        self._tombstones[key] = _Tombstone(None, self._clock() + TOMBSTONE_LIFE_S)

    def close(self) -> None:
        """Save what is known and end everything; called once at shutdown."""
        for timeline in self._timelines.values():
            try:
                # a crash may lose commit_lsn, but an orderly restart need not wait for a compute to learn it again
                timeline.run(timeline.acceptor.persist_volatile())
                timeline.close("the safekeeper is shutting down")
            except NeonError as error:
                log.error("timeline %s, at shutdown: %s", timeline.ttid, error)

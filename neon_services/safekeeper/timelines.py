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
from neon_services.ground.errors import CorruptionError, NeonError, StaleGeneration
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.remote_storage import RemoteStorage
from neon_services.protocols.safekeeper_messages import MembershipConfiguration
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


class TimelineAwaited(NeonError):
    """The timeline should be here and is not yet: it must not begin anew."""


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
        #: Deletes the files of a timeline that is out of sight already; thousands of segments take their time.
        self.discard: Callable[[Path], object] = shutil.rmtree
        #: Called when any timeline begins a segment.
        self.on_segment: Callable[[], None] = lambda: None
        #: Where WAL is offloaded to; set before load().
        self.storage: RemoteStorage | None = None
        #: Why no timeline accepts WAL at the moment; None when the disk has room.
        self.disk_refusal: str | None = None
        #: Why a timeline that is not here must not be made as a new one; None when it may be.
        self.why_not_new: Callable[[TenantTimelineId], str | None] = lambda _: None

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
        """The timeline; a new one with this state when it is absent.

        Raises TimelineDeleted, TimelineAwaited, TimelineBroken, OSError.
        """
        existing = self.find_or_admit(ttid, state.mconf.generation)
        if existing is not None:
            return existing
        if (reason := self.why_not_new(ttid)) is not None:
            raise TimelineAwaited(reason)
        staged = self.stage(ttid)
        try:
            ControlFile(ttid, state).save(staged, sync=self._sync)
            return self.publish(ttid, staged, state.mconf.generation)
        except OSError:
            shutil.rmtree(staged, ignore_errors=True)
            raise

    def find_or_admit(self, ttid: TenantTimelineId, generation: int) -> Timeline | None:
        """The timeline, or None when one of this generation may be made. Raises TimelineDeleted or TimelineBroken."""
        existing = self._timelines.get(ttid)
        if existing is not None:
            return existing
        if ttid in self.broken:
            return self.get(ttid)
        self._check_tombstones(ttid, generation)
        return None

    def stage(self, ttid: TenantTimelineId) -> Path:
        """A new directory in tmp/ for the timeline's files; what is left there goes at the next start. Raises OSError."""
        staged = self._datadir / TEMPORARY_DIRECTORY / f"{ttid.tenant_id}_{ttid.timeline_id}_{os.urandom(4).hex()}_temptli"
        staged.mkdir(parents=True)
        return staged

    def publish(self, ttid: TenantTimelineId, staged: Path, generation: int) -> Timeline:
        """Make a staged directory, whole and synced, the timeline. One that came first wins: then the staged one stays.

        Raises TimelineDeleted, TimelineBroken, OSError, CorruptionError.
        """
        existing = self.find_or_admit(ttid, generation)
        if existing is not None:
            return existing
        directory = self.directory_of(ttid)
        directory.parent.mkdir(exist_ok=True)
        staged.rename(directory)
        try:
            if self._sync:
                sync_directory(directory.parent)
                sync_directory(self._datadir)
        except OSError:
            directory.rename(staged)  # not durable, so not there: whoever tries again must not find it in the way
            raise
        try:
            timeline = Timeline.open(self._node_id, directory, sync=self._sync)
        except (OSError, NeonError) as error:
            self.broken[ttid] = str(error)
            raise
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

    def replace_control(self, ttid: TenantTimelineId, control: ControlFile) -> None:
        """Give the timeline another control file and open it anew; its connections end. Raises NeonError, OSError."""
        timeline = self.get(ttid)
        del self._timelines[ttid]
        directory = self.directory_of(ttid)
        try:
            timeline.close(f"the control file of timeline {ttid} is replaced")
            control.save(directory, sync=self._sync)
        finally:
            self._load_one(ttid, directory)
        self.get(ttid)

    # -- deleting

    def delete(self, ttid: TenantTimelineId) -> bool:
        """Remove the timeline and remember it. Whether there was anything to remove. Raises OSError."""
        self._bury(ttid, None)
        return self._remove(ttid)

    def exclude(self, ttid: TenantTimelineId, mconf: MembershipConfiguration) -> bool:
        """Remove the local copy of a timeline in whose configuration this node is not, and remember the generation.

        Whether there was anything to remove. Raises StaleGeneration when this node knows a newer configuration, TimelineBroken
        when it cannot tell, OSError.
        """
        if ttid in self.broken:
            self.get(ttid)
        timeline = self._timelines.get(ttid)
        if timeline is not None:
            known = timeline.acceptor.state.mconf
            if known.generation > mconf.generation:
                raise StaleGeneration(
                    f"timeline {ttid} follows membership generation {known.generation} here, "
                    f"which is newer than {mconf.generation}: not excluded"
                )
            if known.generation == mconf.generation and known.contains(self._node_id):
                raise StaleGeneration(
                    f"timeline {ttid}: safekeeper {self._node_id} is a member in the generation {known.generation} known here; "
                    f"two configurations claim that generation: not excluded"
                )
        self._bury(ttid, mconf.generation)
        return self._remove(ttid)

    def _remove(self, ttid: TenantTimelineId) -> bool:
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
        self.discard(grave)
        log.info("deleted timeline %s", ttid)
        return True

    def delete_tenant(self, tenant_id: TenantId) -> dict[TimelineId, bool]:
        """Remove all timelines of a tenant; for each, whether there was anything to remove."""
        self._bury(tenant_id, None)
        ttids = {ttid for ttid in (*self._timelines, *self.broken) if ttid.tenant_id == tenant_id}
        removed = {ttid.timeline_id: self.delete(ttid) for ttid in sorted(ttids)}
        directory = self._datadir / str(tenant_id)
        if directory.exists() and not any(directory.iterdir()):
            directory.rmdir()
        return removed

    def _bury(self, key: TenantTimelineId | TenantId, generation: int | None) -> None:
        """Leave a tombstone; the stronger of two stays, for its own time."""
        known = self._tombstones.get(key)
        if known is not None and generation is not None and known.until > self._clock():
            if known.generation is None:
                return
            generation = max(generation, known.generation)
        self._tombstones[key] = _Tombstone(generation, self._clock() + TOMBSTONE_LIFE_S)

    def close(self) -> None:
        """Save what is known and end everything; called once at shutdown."""
        for timeline in self._timelines.values():
            try:
                # a crash may lose commit_lsn, but an orderly restart need not wait for a compute to learn it again
                timeline.run(timeline.acceptor.persist_volatile())
                timeline.close("the safekeeper is shutting down")
            except NeonError as error:
                log.error("timeline %s, at shutdown: %s", timeline.ttid, error)

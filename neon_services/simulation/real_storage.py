"""The storage of one simulated safekeeper that is the production's, byte for byte, on a simulated disk.

What a loss of power may leave is judged from outside, on the disk's durable content, without asking the code under test.
"""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from neon_services.consensus.acceptor import AcceptorState, Effect
from neon_services.ground.disk import write_all
from neon_services.ground.errors import NeonError
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import INVALID_LSN, Lsn, parse_segment_file_name, segment_file_name
from neon_services.safekeeper.control_file import FILE_NAME, ControlFile
from neon_services.safekeeper.segments import PARTIAL_SUFFIX
from neon_services.safekeeper.timeline_storage import TimelineStorage
from neon_services.simulation.disk import SimulatedDisk
from neon_services.simulation.platters import SECTOR, DiskWeather, Platters, SimulatedDirectory, SimulatedFile

TIMELINE = Path("timeline")
STAGED = Path("tmp")
#: Losses of power are much likelier around the rare operations that a promise hangs on.
POWER_LOSS_WEIGHT = {
    "rename": 6.0,
    "sync_directory": 6.0,
    "unlink": 6.0,
    "create": 4.0,
    "ftruncate": 6.0,
    "pwritev": 2.0,
    "sync": 3.0,
}

_segment_name = functools.cache(segment_file_name)


class RealStorage:
    """See the module's text. ``state``, ``wal`` and ``perform`` are of the process that is running now."""

    #: What runs on the disk, and the disk; the tests put broken ones here.
    storage_kind: type[TimelineStorage] = TimelineStorage
    disk_kind: type[SimulatedDisk] = SimulatedDisk

    def __init__(
        self,
        ttid: TenantTimelineId,
        state: AcceptorState | None,
        weather: DiskWeather,
        later: Callable[["SimulatedDisk", Callable[[], None]], None],
    ) -> None:
        self.ttid = ttid
        self.weather = weather
        self.platters = Platters()
        self._later = later
        self.process: TimelineStorage | None = None
        self._boots = 0
        #: WAL below was removed.
        self.first_lsn = INVALID_LSN
        self.disk = self._mount()
        if state is not None:
            self.disk.mkdir(TIMELINE)
            ControlFile(ttid, state, creation_ts_ns=0).save(TIMELINE, disk=self.disk)
            self.platters.sync_filesystem()
        weather.weight = POWER_LOSS_WEIGHT

    def _mount(self) -> SimulatedDisk:
        disk = self.disk_kind(self.platters, self.weather, lambda work: self._later(disk, work))
        return disk

    # -- the process

    def boot(self) -> None:
        """Start as the safekeeper's main does. Raises PowerLost, OSError, CorruptionError."""
        self.process = None
        self.disk = self._mount()
        self.sync_filesystem()
        for name in self.disk.names(Path()):
            if name != TIMELINE.name:
                self.disk.remove_tree(Path(name))
        if self.disk.exists(TIMELINE):
            self.process = self.storage_kind.load(TIMELINE, disk=self.disk)
            self._boots += 1
            bulk = self._boots % 2 == 0  # schedules have little WAL: every other process makes its segments as bulk loads do
            self.process.store.is_bulk = lambda size: bulk  # type: ignore[method-assign]
            if self._boots % 3 == 0:  # and every third has batches that are too large to be written at once
                self.process.store.early_bytes = 400

    def sync_filesystem(self) -> None:
        """First of all: what is readable counts as flushed."""
        self.platters.sync_filesystem()

    def crash(self, *, power: bool) -> None:
        """The process is gone; with ``power``, so is some of what was not synced."""
        self.disk.dead = True
        if power:
            self.platters.lose_power(self.weather)

    @property
    def present(self) -> bool:
        """Whether this node has the timeline."""
        return self.process is not None

    @property
    def state(self) -> AcceptorState:
        """The state that the process holds to be saved."""
        return self._running.control.acceptor

    @property
    def wal(self) -> Any:
        """The log."""
        return self._running.store

    @property
    def _running(self) -> TimelineStorage:
        assert self.process is not None
        return self.process

    def perform(self, effect: Effect) -> Any:
        """Carry out one effect. Raises PowerLost and what the production raises."""
        return self._running.perform(effect)

    def remove_below(self, segment: int, segment_size: int) -> int:
        """Remove WAL; the number of segments."""
        removed = self._running.store.remove_below(segment)
        self.first_lsn = max(self.first_lsn, Lsn(segment * segment_size))
        return removed

    # -- what is on the disk

    def read(self, begin: Lsn, end: Lsn) -> bytes:
        """Bytes of the log as a reader would find them. Raises NeonError when they are not there."""
        data = self._bytes(begin, end, durable=False, read=SimulatedFile.read)
        if len(data) != end - begin:
            raise NeonError(f"WAL [{begin}, {end}) is not there: it ends at {begin + len(data)}")
        return data

    def sure_bytes(self, begin: Lsn, end: Lsn) -> bytes:
        """Of these bytes those that no loss of power takes away, up to the first gap."""
        before = self._bytes(begin, end, durable=True, read=SimulatedFile.read_durable)
        directory = self.platters.root.durable.get(TIMELINE.name)
        if isinstance(directory, SimulatedDirectory) and not directory.pending and not self.platters.root.pending:
            return before
        return min(before, self._bytes(begin, end, durable=False, read=SimulatedFile.read_durable), key=len)

    def _bytes(self, begin: int, end: int, *, durable: bool, read: Callable[[SimulatedFile, int, int], bytes]) -> bytes:
        parts: list[bytes] = []
        size = self._running.segment_size if self.process else 1 << 20
        root = self.platters.root
        directory = (root.durable if durable else root.entries).get(TIMELINE.name)
        if not isinstance(directory, SimulatedDirectory):
            return b""
        entries = directory.durable if durable else directory.entries
        while begin < end:
            name = _segment_name(begin // size, size)
            file = entries.get(name + PARTIAL_SUFFIX) or entries.get(name)
            if not isinstance(file, SimulatedFile):
                break
            count = min(end - begin, size - begin % size)
            part = read(file, begin % size, count)
            parts.append(part)
            begin += len(part)
            if len(part) < count:
                break
        return b"".join(parts)

    def stale_bytes_behind(self, lsn: Lsn) -> int | None:
        """The position of a byte behind the end of the log that is not zero after a loss of power; None when there is none."""
        size = self._running.segment_size
        for durable in (True, False):
            directory = self.platters.find(TIMELINE, durable=durable)
            assert isinstance(directory, SimulatedDirectory)
            for name, file in (directory.durable if durable else directory.entries).items():
                if name.startswith("0000") and isinstance(file, SimulatedFile):
                    base = parse_segment_file_name(name.removesuffix(PARTIAL_SUFFIX), size) * size
                    for sector, content in file.durable.items():
                        tail = content[max(0, lsn - base - sector * SECTOR) :]
                        if base + (sector + 1) * SECTOR > lsn and tail.count(0) != len(tail):
                            return base + sector * SECTOR
        return None

    def sure_states(self) -> list[AcceptorState]:
        """The states of which one is found after a loss of power now. Raises CorruptionError when one is unreadable."""
        directory = self.platters.find(TIMELINE, durable=True)
        if not isinstance(directory, SimulatedDirectory):
            return []
        files = [directory.durable.get(FILE_NAME), *(c[FILE_NAME] for c in directory.pending if FILE_NAME in c)]
        states = []
        for file in files:
            content = file.read_durable(0, file.durable_size) if isinstance(file, SimulatedFile) else b""
            states.append(ControlFile.decode(content).acceptor)
        return states

    # -- coming and going

    def install(self, begin: Lsn, chunks: Iterator[bytes], state: AcceptorState) -> Iterator[None]:
        """Become a copy of another node's timeline: made in a directory of its own, synced, published by a rename."""
        disk, size = self.disk, state.wal_seg_size
        for left in (STAGED, TIMELINE):  # by a copy that was given up, or failed in the very last step
            if disk.exists(left):
                disk.remove_tree(left)
        disk.mkdir(STAGED)
        lsn = begin
        descriptors: dict[int, int] = {}
        for chunk in chunks:
            while chunk:
                segment, offset = divmod(lsn, size)
                if segment not in descriptors:
                    path = STAGED / (segment_file_name(segment, size) + PARTIAL_SUFFIX)
                    descriptors[segment] = disk.open(path, os.O_RDWR | os.O_CREAT)
                    write_all(disk, descriptors[segment], [bytes(size)], 0, 0)
                part = chunk[: size - offset]
                write_all(disk, descriptors[segment], [part], offset, 0)
                lsn, chunk = Lsn(lsn + len(part)), chunk[len(part) :]
            yield
        yield from self._sync_copies(list(descriptors.values()))
        ControlFile(self.ttid, state, creation_ts_ns=0).save(STAGED, disk=disk)
        yield
        disk.rename(STAGED, TIMELINE)
        disk.sync_directory(Path())
        self.first_lsn = begin
        self.process = self.storage_kind.load(TIMELINE, disk=disk)

    def _sync_copies(self, descriptors: list[int]) -> Iterator[None]:
        for descriptor in descriptors:
            self.disk.fsync(descriptor)
            self.disk.close(descriptor)
            yield

    def remove(self) -> None:
        """Delete the timeline: out of sight first. Raises OSError."""
        self._running.store.close()
        self.process = None
        self.disk.remove_tree(TIMELINE)
        self.disk.sync_directory(Path())
        self.first_lsn = INVALID_LSN

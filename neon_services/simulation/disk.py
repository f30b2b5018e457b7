"""A disk of the simulation: what a file system keeps of the system calls when the power goes.

Model, harsher than any one file system:

* A file has a page cache and durable sectors of 512 bytes. ``fsync`` and ``fdatasync`` make all dirty sectors and the length
  durable, a write with ``RWF_DSYNC`` the sectors that it touches. When the power goes, any subset of the dirty sectors
  survives, and the length is the durable one or the latest.
* A directory has entries in memory and durable ones. Creations, renames and deletions become durable by ``sync_directory``.
  When the power goes, any subset of the others survives that leaves out what builds on a lost one; a rename is kept or lost as
  a whole.
* A sync may fail with EIO. Then the kernel forgets that the sectors were dirty: each is durable by chance, a later sync
  succeeds without writing them, and the cache still shows them.
* A full disk refuses to make files longer, after a part or at once; what is there can be overwritten. Writes may be short.
* The power may go, or the process be killed, before any operation that changes something, and in the middle of a write.

``Platters`` outlive processes. ``SimulatedDisk`` is what one process sees: after a loss of power it is of no more use, whatever
``finally`` clauses of the code under test still try.
"""

import errno
import functools
import os
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neon_services.ground.disk import Disk, Views

SECTOR = 512
_ZERO_SECTOR = bytes(SECTOR)


@functools.lru_cache(maxsize=32)
def _zeros(count: int) -> bytes:
    return bytes(count)


class PowerLost(BaseException):
    """The process ended in the middle of something: the power went, or with ``power`` false it was killed.

    After a kill, what the kernel was given is still there. No handler of ordinary errors sees this exception.
    """

    def __init__(self, *, power: bool = True) -> None:
        super().__init__()
        self.power = power


@dataclass(slots=True)
class DiskWeather:
    """How often what goes wrong. One per node; changed while the schedule runs."""

    rng: random.Random
    power_loss: float = 0.0
    #: Factor on power_loss, by operation; 1 when absent.
    weight: dict[str, float] = field(default_factory=dict)
    sync_failure: float = 0.0
    short_write: float = 0.0
    full: bool = False
    operations: int = 0
    failures: int = 0
    refusals: int = 0
    power_losses: int = 0
    #: Losses of power after which a part, but not all, of some file's dirty sectors survived.
    torn: int = 0

    def calm(self) -> None:
        """Nothing goes wrong any more."""
        self.power_loss = self.sync_failure = self.short_write = 0.0
        self.full = False


class SimulatedFile:
    """An inode. Sectors that are absent are zeros."""

    __slots__ = ("cache", "dirty", "durable", "durable_size", "forgotten", "size")

    def __init__(self) -> None:
        self.cache: dict[int, bytes] = {}
        self.durable: dict[int, bytes] = {}
        self.dirty: set[int] = set()
        self.forgotten: set[int] = set()  # clean for the kernel, and yet not on the disk
        self.size = self.durable_size = 0

    def read(self, offset: int, count: int) -> bytes:
        """From the cache."""
        count = min(count, self.size - offset)
        return _read(self.cache, offset, count) if count > 0 else b""

    def read_durable(self, offset: int, count: int) -> bytes:
        """What is surely there after a loss of power, up to the first byte that may be another then."""
        if count <= 0:
            return b""
        durable = _read(self.durable, offset, count)
        sectors = range(offset // SECTOR, (offset + count - 1) // SECTOR + 1)
        if not self.dirty.isdisjoint(sectors) or not self.forgotten.isdisjoint(sectors):
            cached = _read(self.cache, offset, count)
            if durable != cached:
                durable = durable[: next(i for i in range(count) if durable[i] != cached[i])]
        return durable[: max(0, min(self.durable_size, self.size) - offset)]

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Into the cache."""
        end = offset + len(data)
        first, last = offset // SECTOR, (end - 1) // SECTOR
        if len(data) > 4096 and not data[0] and not data[-1] and data == _zeros(len(data)):
            self._clear(first, last, offset, end)
        else:
            cache, position = self.cache, 0
            for sector in range(first, last + 1):
                start = sector * SECTOR
                low, high = max(offset, start), min(end, start + SECTOR)
                part = bytes(data[position : position + high - low])
                position += high - low
                if high - low < SECTOR:
                    old = cache.get(sector, _ZERO_SECTOR)
                    part = old[: low - start] + part + old[high - start :]
                cache[sector] = part
                self.dirty.add(sector)
        self.size = max(self.size, end)

    def _clear(self, first: int, last: int, offset: int, end: int) -> None:
        """Zeros over many sectors: only those that are something matter."""
        for sector in [s for s in {*self.cache, *self.durable} if first <= s <= last]:
            start = sector * SECTOR
            old = self.cache.get(sector, _ZERO_SECTOR)
            head, tail = max(offset - start, 0), max(start + SECTOR - end, 0)
            kept = old[:head] + bytes(SECTOR - head - tail) + old[SECTOR - tail :] if head or tail else _ZERO_SECTOR
            self.cache[sector] = kept
            self.dirty.add(sector)

    def truncate(self, size: int) -> None:
        """Set the length; a cut is durable with the next sync."""
        if size < self.size:
            self._clear(size // SECTOR, self.size // SECTOR, size, self.size)
        self.size = size

    def sync(self, first: int | None = None, last: int | None = None) -> None:
        """Make dirty sectors durable: all, or those of a range."""
        chosen = self.dirty if first is None or last is None else {s for s in self.dirty if first <= s <= last}
        for sector in chosen:
            self.durable[sector] = self.cache.get(sector, _ZERO_SECTOR)
        self.forgotten -= chosen
        self.dirty = set() if chosen is self.dirty else self.dirty - chosen
        self.durable_size = self.size

    def fail_sync(self, rng: random.Random) -> None:
        """The device failed: the kernel forgets what was dirty."""
        for sector in sorted(self.dirty):
            if rng.random() < 0.5:
                self.durable[sector] = self.cache.get(sector, _ZERO_SECTOR)
                self.forgotten.discard(sector)
            else:
                self.forgotten.add(sector)
        self.dirty.clear()
        if rng.random() < 0.5:
            self.durable_size = self.size

    def lose_power(self, rng: random.Random) -> bool:
        """Keep a subset of what was dirty. True when it was neither all nor nothing."""
        kept = 0
        mode = rng.random()
        for sector in sorted(self.dirty):
            if mode < 0.2 or (mode < 0.8 and rng.random() < 0.5):
                self.durable[sector] = self.cache.get(sector, _ZERO_SECTOR)
                kept += 1
        torn = 0 < kept < len(self.dirty)
        self.dirty.clear()
        self.forgotten.clear()
        if self.durable_size != self.size and rng.random() < 0.5:
            self.durable_size = self.size
        self.size = self.durable_size
        self.durable = {s: content for s, content in self.durable.items() if s * SECTOR < self.size}
        self.cache = dict(self.durable)
        return torn


def _read(sectors: dict[int, bytes], offset: int, count: int) -> bytes:
    end = offset + count
    first, last = offset // SECTOR, (end - 1) // SECTOR
    if last - first > len(sectors):
        found = sorted(s for s in sectors if first <= s <= last)
        if not found:
            return _zeros(count)
        buffer = bytearray(count)
        for sector in found:
            start = sector * SECTOR
            low, high = max(start, offset), min(start + SECTOR, end)
            buffer[low - offset : high - offset] = sectors[sector][low - start : high - start]
        return bytes(buffer)
    whole = b"".join([sectors.get(sector, _ZERO_SECTOR) for sector in range(first, last + 1)])
    return whole[offset - first * SECTOR : end - first * SECTOR]


#: One change of a directory: the entries that it sets (None: removes) together.
_Change = dict[str, Any]


class SimulatedDirectory:
    """Names; the entries are files and directories."""

    __slots__ = ("durable", "entries", "pending")

    def __init__(self) -> None:
        self.entries: dict[str, SimulatedFile | SimulatedDirectory] = {}
        self.durable: dict[str, SimulatedFile | SimulatedDirectory] = {}
        self.pending: list[_Change] = []

    def change(self, change: _Change) -> None:
        """Change entries, not durably."""
        self.pending.append(change)
        _apply(self.entries, change)

    def sync(self) -> None:
        """Make all changes durable."""
        self.durable = dict(self.entries)
        self.pending.clear()

    def lose_power(self, rng: random.Random) -> bool:
        """Keep some changes; one that builds on a lost one is lost too."""
        lost_names: set[str] = set()
        mode = rng.random()
        for change in self.pending:
            kept = mode < 0.2 or (mode < 0.8 and rng.random() < 0.5)
            if kept and lost_names.isdisjoint(change):
                _apply(self.durable, change)
            else:
                lost_names.update(change)
        self.pending.clear()
        self.entries = dict(self.durable)
        torn = [entry.lose_power(rng) for _, entry in sorted(self.entries.items())]
        return any(torn)


def _apply(entries: dict[str, Any], change: _Change) -> None:
    for name, inode in change.items():
        if inode is None:
            entries.pop(name, None)
        else:
            entries[name] = inode


class Platters:
    """What outlives a process: the tree of directories and files."""

    def __init__(self) -> None:
        self.root = SimulatedDirectory()

    def lose_power(self, weather: DiskWeather) -> None:
        """Of what was not synced, keep some."""
        weather.torn += self.root.lose_power(weather.rng)

    def sync_filesystem(self) -> None:
        """``syncfs``: everything readable is durable, except what an earlier failure made the kernel forget."""
        pending = [self.root]
        while pending:
            directory = pending.pop()
            directory.sync()
            for entry in directory.entries.values():
                if isinstance(entry, SimulatedDirectory):
                    pending.append(entry)
                else:
                    entry.sync()

    def find(self, path: Path, *, durable: bool = False) -> SimulatedFile | SimulatedDirectory | None:
        """What is at a path, now or with none of the changes that are not durable."""
        found: SimulatedFile | SimulatedDirectory | None = self.root
        for part in path.parts:
            if not isinstance(found, SimulatedDirectory):
                return None
            found = (found.durable if durable else found.entries).get(part)
        return found


class _Job(Future[None]):
    """Work ahead: done by itself some time later, or when somebody waits for it."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__()
        self._work = work

    def carry_out(self) -> None:
        """Do it, unless it was done or cancelled."""
        if not self.done() and self.set_running_or_notify_cancel():
            try:
                self._work()
            except OSError as error:
                self.set_exception(error)
            else:
                self.set_result(None)

    def result(self, timeout: float | None = None) -> None:
        """Do it if nobody has."""
        if not self.done():
            self.carry_out()
        return super().result(0)


class SimulatedDisk(Disk):
    """The door for one process. ``later`` runs work ahead at some later time; it is given the work."""

    def __init__(self, platters: Platters, weather: DiskWeather, later: Callable[[Callable[[], None]], None]) -> None:
        self.platters = platters
        self.weather = weather
        self.dead = False
        self._later = later
        self._open: dict[int, SimulatedFile] = {}
        self._next = 3
        self._directories: dict[Path, SimulatedDirectory] = {}

    def _before(self, operation: str) -> None:
        """Before anything changes: the power may go."""
        weather = self.weather
        if self.dead:
            raise PowerLost
        weather.operations += 1
        if weather.power_loss and weather.rng.random() < weather.power_loss * weather.weight.get(operation, 1.0):
            self._go_down()

    def _go_down(self) -> None:
        self.dead = True
        power = self.weather.rng.random() < 0.75
        self.weather.power_losses += power
        raise PowerLost(power=power)

    def _directory(self, path: Path) -> SimulatedDirectory:
        found = self._directories.get(path)
        if found is None:
            entry = self.platters.find(path)
            if not isinstance(entry, SimulatedDirectory):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            found = self._directories[path] = entry
        return found

    # -- files

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        directory = self._directory(path.parent)
        entry = directory.entries.get(path.name)
        if entry is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            self._before("create")
            self._refuse_when_full()
            entry = SimulatedFile()
            directory.change({path.name: entry})
        elif self.dead:
            raise PowerLost
        assert isinstance(entry, SimulatedFile)
        if flags & os.O_TRUNC and entry.size:
            self._before("ftruncate")
            entry.truncate(0)
        self._next += 1
        self._open[self._next] = entry
        return self._next

    def close(self, descriptor: int) -> None:
        if not self.dead:
            del self._open[descriptor]

    def _refuse_when_full(self) -> None:
        if self.weather.full:
            self.weather.refusals += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pwritev(self, descriptor: int, views: Views, offset: int, flags: int) -> int:
        weather = self.weather
        if self.dead:
            raise PowerLost
        file = self._open[descriptor]
        data: bytes | memoryview = views[0] if len(views) == 1 else b"".join(views)
        weather.operations += 1
        roll = weather.rng.random()
        if roll < weather.power_loss * weather.weight.get("pwritev", 1.0):
            # the kernel had taken a part of it, and may have begun to write that
            part = weather.rng.randint(0, len(data))
            if part:
                file.write(data[:part], offset)
            self._go_down()
        if offset + len(data) > file.size and weather.full:
            room = file.size - offset
            if room <= 0 or roll < 0.5:
                self._refuse_when_full()
            data = data[:room]
        if weather.short_write and len(data) > 1 and weather.rng.random() < weather.short_write:
            data = data[: weather.rng.randint(1, len(data) - 1)]
        file.write(data, offset)
        if flags & os.RWF_DSYNC:
            self._sync(file, offset // SECTOR, (offset + len(data) - 1) // SECTOR)
        return len(data)

    def _sync(self, file: SimulatedFile, first: int | None = None, last: int | None = None) -> None:
        self._before("sync")
        weather = self.weather
        if weather.sync_failure and weather.rng.random() < weather.sync_failure:
            weather.failures += 1
            file.fail_sync(weather.rng)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        file.sync(first, last)

    def pread(self, descriptor: int, count: int, offset: int) -> bytes:
        if self.dead:
            raise PowerLost
        return self._open[descriptor].read(offset, count)

    def size(self, descriptor: int) -> int:
        return self._open[descriptor].size

    def ftruncate(self, descriptor: int, size: int) -> None:
        self._before("ftruncate")
        self._open[descriptor].truncate(size)

    def fsync(self, descriptor: int) -> None:
        if self.dead:
            raise PowerLost
        self._sync(self._open[descriptor])

    def fdatasync(self, descriptor: int) -> None:
        self.fsync(descriptor)

    # -- names

    def exists(self, path: Path) -> bool:
        return path.name in self._directory(path.parent).entries

    def names(self, directory: Path) -> list[str]:
        return sorted(self._directory(directory).entries)

    def rename(self, source: Path, target: Path) -> None:
        self._before("rename")
        directory = self._directory(source.parent)
        assert source.parent == target.parent, "renames into another directory are not simulated"
        entry = directory.entries.get(source.name)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
        directory.change({source.name: None, target.name: entry})
        self._directories.clear()

    def unlink(self, path: Path) -> None:
        if self.dead:
            raise PowerLost
        directory = self._directory(path.parent)
        if path.name in directory.entries:
            self._before("unlink")
            directory.change({path.name: None})

    def sync_directory(self, directory: Path) -> None:
        self._before("sync_directory")
        weather = self.weather
        if weather.sync_failure and weather.rng.random() < weather.sync_failure:
            weather.failures += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._directory(directory).sync()

    def mkdir(self, path: Path) -> None:
        """A directory."""
        self._before("create")
        self._refuse_when_full()
        self._directory(path.parent).change({path.name: SimulatedDirectory()})

    def remove_tree(self, path: Path) -> None:
        """A directory and all that is in it."""
        self._before("unlink")
        self._directory(path.parent).change({path.name: None})
        self._directories.clear()

    # -- work ahead

    def background(self, work: Callable[[], None]) -> "Future[None]":
        job = _Job(work)
        self._later(job.carry_out)
        return job

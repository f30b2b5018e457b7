"""The door to a disk of the simulation: the system calls of one process, each of which may fail or be the last.

``Platters`` (see there for what they keep) outlive processes. ``SimulatedDisk`` is what one process sees: after it was killed
or the power went it is of no more use, whatever ``finally`` clauses of the code under test still try.
"""

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from neon_services.ground.disk import Disk, Views
from neon_services.simulation.platters import SECTOR, DiskWeather, Platters, SimulatedDirectory, SimulatedFile


class PowerLost(BaseException):
    """The process ended in the middle of something: the power went, or with ``power`` false it was killed.

    After a kill, what the kernel was given is still there. No handler of ordinary errors sees this exception.
    """

    def __init__(self, *, power: bool = True) -> None:
        super().__init__()
        self.power = power


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

    def start_writing(self, descriptor: int, offset: int, count: int) -> None:
        self._before("start_writing")  # what was not synced may reach the platters, or not, in any case

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

    def allocate(self, descriptor: int, size: int) -> None:
        self._before("ftruncate")
        file = self._open[descriptor]
        if size > file.size:
            self._refuse_when_full()
            file.truncate(size)

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

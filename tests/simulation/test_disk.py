"""The simulated disk keeps what a disk must keep, and loses what one may lose."""

import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neon_services.ground.disk import write_all
from neon_services.ground.durable import replace_durably
from neon_services.simulation.disk import PowerLost, SimulatedDisk
from neon_services.simulation.platters import SECTOR, DiskWeather, Platters, SimulatedFile

FILE = Path("file")
SEEDS = range(200)


class Rig:
    def __init__(self, seed: int) -> None:
        self.weather = DiskWeather(random.Random(seed))
        self.platters = Platters()
        self.work: list[Callable[[], None]] = []
        self.disk = SimulatedDisk(self.platters, self.weather, self.work.append)

    def make(self, content: bytes) -> int:
        descriptor = self.disk.open(FILE, os.O_RDWR | os.O_CREAT)
        write_all(self.disk, descriptor, [content], 0, 0)
        self.disk.fsync(descriptor)
        self.disk.sync_directory(Path())
        return descriptor

    def after_power_loss(self) -> bytes | None:
        self.platters.lose_power(self.weather)
        found = self.platters.find(FILE)
        return found.read(0, 1 << 20) if isinstance(found, SimulatedFile) else None


def rigs() -> Iterator[Rig]:
    return (Rig(seed) for seed in SEEDS)


def test_synced_bytes_survive_and_any_subset_of_the_other_sectors() -> None:
    old, new = b"o" * SECTOR, b"n" * SECTOR
    seen: Counter[bytes] = Counter()
    for rig in rigs():
        descriptor = rig.make(old * 4)
        rig.disk.pwritev(descriptor, [new * 3], SECTOR, 0)
        content = rig.after_power_loss()
        assert content is not None and content[:SECTOR] == old and len(content) == 4 * SECTOR
        assert all(content[i * SECTOR : (i + 1) * SECTOR] in (old, new) for i in range(4))
        seen[bytes(content[i * SECTOR] for i in range(4))] += 1
    assert len(seen) == 8, "every subset of three sectors"


def test_a_synchronous_write_makes_its_own_sectors_durable_only() -> None:
    lost = 0
    for rig in rigs():
        descriptor = rig.make(b"o" * SECTOR * 2)
        rig.disk.pwritev(descriptor, [b"a" * SECTOR], 0, 0)
        rig.disk.pwritev(descriptor, [b"b" * SECTOR], SECTOR, os.RWF_DSYNC)
        content = rig.after_power_loss()
        assert content is not None and content[SECTOR:] == b"b" * SECTOR
        lost += content[:1] == b"o"
    assert 0 < lost < len(SEEDS)


def test_names_need_a_sync_of_their_directory() -> None:
    found: Counter[bytes | None] = Counter()
    for rig in rigs():
        descriptor = rig.disk.open(FILE, os.O_RDWR | os.O_CREAT)
        rig.disk.pwritev(descriptor, [b"new"], 0, 0)
        rig.disk.fsync(descriptor)
        found[rig.after_power_loss()] += 1
    assert set(found) == {None, b"new"}


def test_replacing_durably_is_atomic_at_every_operation() -> None:
    outcomes: Counter[tuple[bool, bytes]] = Counter()
    for rig in rigs():
        rig.make(b"old" * 400)
        rig.weather.power_loss = 0.15
        try:
            replace_durably(FILE, b"new" * 400, disk=rig.disk)
            done = True
        except PowerLost:
            done = False
        content = rig.after_power_loss()
        assert content in (b"old" * 400, b"new" * 400)
        outcomes[done, content[:3]] += 1
    assert outcomes[True, b"new"] and outcomes[False, b"old"] and outcomes[False, b"new"]
    assert not outcomes[True, b"old"], "what was reported as replaced is replaced"


def test_a_failed_sync_is_forgotten() -> None:
    lost = 0
    for rig in rigs():
        descriptor = rig.make(b"old")
        rig.disk.pwritev(descriptor, [b"new"], 0, 0)
        rig.weather.sync_failure = 1.0
        with pytest.raises(OSError, match="Input/output") as failure:
            rig.disk.fdatasync(descriptor)
        assert failure.value.errno == errno.EIO
        rig.weather.sync_failure = 0.0
        rig.disk.fdatasync(descriptor)
        assert rig.disk.pread(descriptor, 3, 0) == b"new"
        file = rig.platters.find(FILE)
        assert isinstance(file, SimulatedFile)
        sure = file.read_durable(0, 3)
        content = rig.after_power_loss()
        assert sure in (b"new", b"") and (content == b"new" or sure == b"")
        lost += content == b"old"
    assert 0 < lost < len(SEEDS)


def test_a_full_disk_takes_what_fits_and_can_be_overwritten() -> None:
    rig = Rig(1)
    descriptor = rig.make(b"old")
    rig.weather.full = True
    assert rig.disk.pwritev(descriptor, [b"new"], 0, 0) == 3
    with pytest.raises(OSError, match="No space left"):
        write_all(rig.disk, descriptor, [b"longer than that"], 0, 0)
    with pytest.raises(OSError, match="No space left"):
        rig.disk.open(Path("another"), os.O_RDWR | os.O_CREAT)
    rig.weather.full = False
    write_all(rig.disk, descriptor, [b"longer than that"], 0, 0)
    assert rig.disk.pread(descriptor, 100, 0) == b"longer than that"


def test_short_writes_are_continued() -> None:
    for rig in rigs():
        rig.weather.short_write = 0.5
        descriptor = rig.disk.open(FILE, os.O_RDWR | os.O_CREAT)
        write_all(rig.disk, descriptor, [b"some", b"thing"], 2, os.RWF_DSYNC)
        assert rig.disk.pread(descriptor, 100, 0) == b"\0\0something"


def test_nothing_works_after_the_power_went() -> None:
    rig = Rig(1)
    descriptor = rig.make(b"old")
    rig.weather.power_loss = 1.0
    with pytest.raises(PowerLost):
        rig.disk.pwritev(descriptor, [b"new"], 0, 0)
    rig.weather.power_loss = 0.0
    for operation in (
        lambda: rig.disk.fsync(descriptor),
        lambda: rig.disk.pread(descriptor, 1, 0),
        lambda: rig.disk.unlink(FILE),
        lambda: rig.disk.open(FILE, os.O_RDWR),
        lambda: rig.disk.rename(FILE, Path("other")),
    ):
        with pytest.raises(PowerLost):
            operation()
    rig.disk.close(descriptor)  # a finally clause may still do that


def test_work_ahead_is_done_later_or_when_it_is_waited_for() -> None:
    rig = Rig(1)
    done: list[int] = []
    first = rig.disk.background(lambda: done.append(1))
    second = rig.disk.background(lambda: done.append(2))
    third = rig.disk.background(lambda: done.append(3))
    assert not done and len(rig.work) == 3
    second.result()
    assert third.cancel()
    for work in rig.work:
        work()
    first.result()
    assert done == [2, 1]

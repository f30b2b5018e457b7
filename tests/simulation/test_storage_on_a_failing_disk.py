"""The production storage on a simulated disk whose syncs fail: the page cache shows what the disk does not hold."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from neon_services.ground.lsn import Lsn
from neon_services.safekeeper.wal_store import WalStore, WalStoreError
from neon_services.simulation.disk import SimulatedDisk
from neon_services.simulation.platters import DiskWeather, Platters, SimulatedFile
from neon_services.simulation.records import SEGMENT_SIZE, WalWriter

START = Lsn(2 * SEGMENT_SIZE + 4096)
DIRECTORY = Path("timeline")


class Machine:
    """A disk, and one process after another."""

    def __init__(self) -> None:
        self.weather = DiskWeather(random.Random(1))
        self.platters = Platters()
        self.mount().mkdir(DIRECTORY)
        self.platters.sync_filesystem()

    def mount(self) -> SimulatedDisk:
        def later(work: Callable[[], None]) -> None:
            """Only when somebody waits for it."""

        return SimulatedDisk(self.platters, self.weather, later)

    def start(self, commit_lsn: int = 0) -> WalStore:
        self.platters.sync_filesystem()
        store = WalStore(DIRECTORY, SEGMENT_SIZE, disk=self.mount())
        store.recover(Lsn(commit_lsn))
        return store


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    def lose_everything(self: SimulatedFile, _: random.Random) -> None:
        self.forgotten |= self.dirty
        self.dirty.clear()

    monkeypatch.setattr(SimulatedFile, "fail_sync", lose_everything)
    return Machine()


def log(count: int) -> bytes:
    writer = WalWriter(random.Random(1))
    made = b""
    while count:
        made += writer.record(Lsn(START + len(made)), 1)
        count -= 1
    return made


def cut(store: WalStore, lsn: int) -> None:
    store.truncate(Lsn(lsn), pg_version=150000, system_id=1)


def test_what_a_restart_finds_survives_a_loss_of_power(machine: Machine) -> None:
    wal = log(40)
    store = machine.start()
    store.initialize(START, pg_version=150000, system_id=1)
    cut(store, START)
    store.write(START, wal)
    machine.weather.sync_failure = 1.0
    with pytest.raises(WalStoreError, match="Input/output error"):
        store.flush()
    machine.weather.sync_failure = 0.0
    found = machine.start(START).flush_lsn  # the process was killed, not the machine
    machine.platters.lose_power(machine.weather)
    assert machine.start(START).flush_lsn >= found, "a flush_lsn that a vote may have told is lost"


@pytest.mark.parametrize("restart", [False, True])
def test_a_cut_that_is_done_again_leaves_nothing_behind(machine: Machine, restart: bool) -> None:
    wal = log(40)
    store = machine.start()
    store.initialize(START, pg_version=150000, system_id=1)
    cut(store, START)
    store.write(START, wal)
    assert store.flush() == START + len(wal)
    machine.weather.sync_failure = 1.0
    with pytest.raises(WalStoreError, match="Input/output error"):
        cut(store, START)
    machine.weather.sync_failure = 0.0
    if restart:
        store = machine.start(START)
    cut(store, START)
    machine.platters.lose_power(machine.weather)
    assert machine.start(START).flush_lsn == START, "WAL that was cut is back"

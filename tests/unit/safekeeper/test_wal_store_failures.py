"""The WAL store on failing disks, and after a crash after every single step."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground.failpoints import FailpointPanic
from neon_services.safekeeper import segments
from neon_services.safekeeper.segments import SCRATCH_NAME
from neon_services.safekeeper.wal_store import WalStoreError
from tests.unit.safekeeper.wal_store_support import SEGMENT, START, append, begin, cut, new_store, stored
from tests.unit.safekeeper.walmaker import WalMaker

# -- a failing disk


class FailingDisk:
    """Makes one of the system calls fail until ``heal``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken = ""
        for name in ("pwritev", "fdatasync", "fsync"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self.broken == name:
                if name == "pwritev" and len(arguments[1][0]) > 10:
                    real(arguments[0], [bytes(arguments[1][0])[:10]], arguments[2])  # a torn write
                raise OSError(28, "No space left on device")
            return real(*arguments)

        return call


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_a_failed_write_is_an_error_and_an_election_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    wal = WalMaker(START, SEGMENT).until(START + SEGMENT)
    disk = FailingDisk(monkeypatch)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.record_ends[10])
    flushed = store.flush_lsn
    append(store, wal, flushed + 4, flush=False)  # so that the flush needs fdatasync
    disk.broken = call
    with pytest.raises(WalStoreError, match="No space left on device"):
        append(store, wal, wal.record_ends[20])
    assert store.flush_lsn == store.write_lsn == flushed
    with pytest.raises(WalStoreError, match="election"):
        store.write(flushed, wal.slice(flushed, wal.end))
    with pytest.raises(WalStoreError):  # still full
        disk.broken = "fsync"
        cut(store, flushed)
    disk.broken = ""
    cut(store, flushed)
    append(store, wal, wal.end)
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)


def test_a_full_disk_at_the_next_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT)
    store = begin(new_store(tmp_path))
    store.is_bulk = lambda size: False  # type: ignore[method-assign]
    append(store, wal, wal.last_record_end(START + SEGMENT // 8))
    room = False
    real = segments.SegmentDirectory._fill_with_zeros

    def fill(self: segments.SegmentDirectory, descriptor: int, offset: int) -> None:
        if not room:
            raise OSError(28, "No space left on device")
        real(self, descriptor, offset)

    monkeypatch.setattr(segments.SegmentDirectory, "_fill_with_zeros", fill)
    with pytest.raises(WalStoreError, match="No space left"):
        append(store, wal, wal.end)
    flushed = store.flush_lsn
    assert flushed < 2 * SEGMENT
    assert not (tmp_path / SCRATCH_NAME).exists()
    room = True
    cut(store, flushed)
    append(store, wal, wal.end)
    assert new_store(tmp_path, START).flush_lsn == wal.end


def test_only_bulk_loads_get_segments_that_are_not_written(tmp_path: Path, preparation_in_line: list[bool]) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 3 * SEGMENT)
    store = begin(new_store(tmp_path))
    while store.write_lsn < START + SEGMENT:
        append(store, wal, store.write_lsn + 2000)
    assert preparation_in_line == [False]
    while store.write_lsn < START + 2 * SEGMENT + SEGMENT // 8:
        append(store, wal, store.write_lsn + 50_000)
    assert preparation_in_line == [False, True]
    store.close()
    (tmp_path / SCRATCH_NAME).unlink(missing_ok=True)
    store = new_store(tmp_path, START)  # nobody knows how the first part of this segment came
    cut(store, store.flush_lsn)
    append(store, wal, store.write_lsn + SEGMENT // 5, chunk=SEGMENT)
    assert preparation_in_line == [False, True, False]
    append(store, wal, wal.end)
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)
    assert new_store(tmp_path, START).flush_lsn == wal.end


def test_a_full_disk_in_a_bulk_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preparation_in_line: list[bool]) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT)
    store = begin(new_store(tmp_path))

    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(WalStoreError, match="No space left"):
            while store.write_lsn < wal.end:
                append(store, wal, min(wal.end, store.write_lsn + 100_000))
    flushed = store.flush_lsn
    assert START < flushed < START + SEGMENT and not (tmp_path / SCRATCH_NAME).exists()
    cut(store, flushed)
    while store.write_lsn < wal.end:
        append(store, wal, min(wal.end, store.write_lsn + 100_000))
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)
    assert new_store(tmp_path, START).flush_lsn == wal.end


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), FailpointPanic("panic")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["pwritev", "rename"])
def test_an_unforeseen_error_in_mid_write_acknowledges_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    """Whatever ends a write, the bytes that it was to write are not there, and no flush may say that they are."""
    wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.record_ends[10])
    flushed = store.flush_lsn

    def fail(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(*{"pwritev": (os, "pwritev"), "rename": (Path, "rename")}[where], fail)
        with pytest.raises(type(error)):
            append(store, wal, wal.end)
    durable = len(stored(tmp_path, START, flushed)) + START
    assert store.flush() == store.write_lsn == store.flush_lsn <= max(durable, flushed), (
        "a vote would promise what is not there"
    )
    with pytest.raises(WalStoreError, match="election"):
        store.write(store.write_lsn, wal.slice(store.write_lsn, wal.end))
    cut(store, store.flush_lsn)
    append(store, wal, wal.end)
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)
    assert new_store(tmp_path, START).flush_lsn == wal.end


def test_an_unforeseen_error_of_the_scanner_closes_the_log(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 200_000)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.record_ends[10])
    scanner = store._scanner
    assert scanner is not None
    real = scanner.feed

    def fail(data: Any) -> None:
        real(data)
        raise MemoryError

    scanner.feed = fail  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        append(store, wal, wal.end)
    flushed = wal.record_ends[10]
    assert store.flush() == store.flush_lsn == store.write_lsn == flushed
    cut(store, flushed)
    append(store, wal, wal.end)
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)


# -- a crash after every step


class Snapshots:
    """Copies the directory before every system call that changes it: each copy is what a crash there leaves."""

    def __init__(self, directory: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._target = target
        self.taken: list[tuple[str, int, Path]] = []
        self.promised = 0  # what was reported durable so far
        for name in ("pwritev", "ftruncate", "fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))
        for name in ("rename", "unlink"):
            monkeypatch.setattr(Path, name, self._wrap(name, getattr(Path, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.take(name)
            return real(*arguments, **options)

        return call

    def take(self, name: str) -> None:
        copy = self._target / f"{len(self.taken):04}"
        shutil.copytree(self._directory, copy)
        self.taken.append((name, self.promised, copy))

    def __iter__(self) -> Iterator[tuple[str, int, Path]]:
        return iter(self.taken)


def check_goes_on(directory: Path, wal: WalMaker, promised: int) -> None:
    """After a crash: nothing promised is lost, what is there is right, and the log can be continued to its end."""
    store = new_store(directory, START)
    assert promised <= store.flush_lsn <= wal.end
    assert store.flush_lsn == wal.last_record_end(store.flush_lsn)
    assert stored(directory, START, store.flush_lsn) == wal.slice(START, store.flush_lsn)
    cut(store, store.flush_lsn)
    append(store, wal, wal.end)
    assert stored(directory, START, wal.end) == bytes(wal.data)
    assert new_store(directory, START).flush_lsn == wal.end
    store.close()


def crash_while_appending(directory: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Append more than two segments; after a crash at any step of that nothing is lost."""
    wal = WalMaker(START, SEGMENT, seed=seed).until(START + 2 * SEGMENT + 20_000, 30_000)
    store = begin(new_store(directory / "sk"))
    snapshots = Snapshots(directory / "sk", directory, monkeypatch)
    while store.write_lsn < wal.end:
        append(store, wal, min(wal.end, store.write_lsn + 150_000), chunk=60_000)
        snapshots.promised = store.flush_lsn
    monkeypatch.undo()
    assert {name for name, _, _ in snapshots} >= {"pwritev", "rename", "fsync"}
    for _, promised, copy in snapshots:
        check_goes_on(copy, wal, promised)
        shutil.rmtree(copy)


@pytest.mark.usefixtures("without_preparation")
def test_a_crash_at_any_step_of_appending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_while_appending(tmp_path, monkeypatch, seed=11)


def test_a_crash_at_any_step_of_a_bulk_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preparation_in_line: list[bool]
) -> None:
    crash_while_appending(tmp_path, monkeypatch, seed=12)
    assert preparation_in_line == [True, True]


@pytest.mark.usefixtures("without_preparation")
def test_a_crash_at_any_step_of_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wal = WalMaker(START, SEGMENT).records(5)
    store = new_store(tmp_path / "sk")
    snapshots = Snapshots(tmp_path / "sk", tmp_path, monkeypatch)
    begin(store)
    monkeypatch.undo()
    assert len(snapshots.taken) > 3
    for _, _, copy in snapshots:
        again = new_store(copy)  # the control file does not know a position yet
        assert again.write_lsn == 0
        begin(again)
        append(again, wal, wal.end)
        assert new_store(copy, START).flush_lsn == wal.end
        assert stored(copy, START, wal.end) == bytes(wal.data)


@pytest.mark.usefixtures("without_preparation")
@pytest.mark.parametrize("where", ["same segment", "segment start", "two segments back"])
def test_a_crash_at_any_step_of_truncation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Old bytes may survive a crash in the middle as a valid log; after the repeated truncation nothing of them is left."""
    wal = WalMaker(START, SEGMENT, seed=12).until(START + SEGMENT // 2, 20_000)
    if where == "segment start":
        wal.switch()
    common = wal.end
    wal.until(common + (60_000 if where == "same segment" else 2 * SEGMENT), 20_000)
    store = begin(new_store(tmp_path / "sk"))
    append(store, wal, wal.end)
    snapshots = Snapshots(tmp_path / "sk", tmp_path, monkeypatch)
    cut(store, common)
    monkeypatch.undo()
    other = WalMaker(common, SEGMENT, seed=13).until(common + SEGMENT, 20_000)
    assert len(snapshots.taken) > 2
    for _, _, copy in snapshots:
        again = new_store(copy, START)
        assert again.flush_lsn >= common
        assert stored(copy, START, common) == wal.slice(START, common)
        assert again.flush_lsn == wal.last_record_end(again.flush_lsn)
        cut(again, common)
        append(again, other, other.end)
        assert new_store(copy, START).flush_lsn == other.end
        assert stored(copy, START, other.end) == wal.slice(START, common) + bytes(other.data)
        again.close()
        shutil.rmtree(copy)

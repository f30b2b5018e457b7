"""The WAL store: positions, segments, recovery, truncation, failing disks; and a crash after every single step."""

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.failpoints import FailpointPanic
from neon_services.ground.lsn import Lsn, parse_segment_file_name
from neon_services.safekeeper import segments, wal_store
from neon_services.safekeeper.segments import PARTIAL_SUFFIX, SCRATCH_NAME
from neon_services.safekeeper.wal_store import WalStore, WalStoreError
from neon_services.wal.framing import record_end, record_start
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)


def new_store(directory: Path, commit_lsn: int = 0) -> WalStore:
    directory.mkdir(exist_ok=True)
    store = WalStore(directory, SEGMENT)
    store.recover(Lsn(commit_lsn))
    return store


def begin(store: WalStore, lsn: int = START) -> WalStore:
    """What an election does to an empty store."""
    store.initialize(Lsn(lsn), pg_version=PG_VERSION, system_id=SYSTEM_ID)
    cut(store, lsn)
    return store


def cut(store: WalStore, lsn: int) -> None:
    store.truncate(Lsn(lsn), pg_version=PG_VERSION, system_id=SYSTEM_ID)


def append(store: WalStore, wal: WalMaker, until: int, chunk: int = 50_000, flush: bool = True) -> None:
    """Feed the store in chunks up to a position."""
    while store.write_lsn < until:
        end = min(store.write_lsn + chunk, until)
        store.write(store.write_lsn, wal.slice(store.write_lsn, end))
    if flush:
        store.flush()
    else:
        store.write_out()


def stored(directory: Path, begin_lsn: int, end_lsn: int) -> bytes:
    """What the segment files hold."""
    content = bytearray()
    for path in sorted(directory.iterdir(), key=lambda p: p.name):
        if path.name in (SCRATCH_NAME, "safekeeper.control"):
            continue
        number = parse_segment_file_name(path.name.removesuffix(PARTIAL_SUFFIX), SEGMENT)
        data = path.read_bytes()
        assert len(data) == SEGMENT, f"{path.name} has {len(data)} bytes"
        low, high = max(begin_lsn, number * SEGMENT), min(end_lsn, (number + 1) * SEGMENT)
        if low < high:
            assert low == begin_lsn + len(content), "a segment is missing"
            content += data[low - number * SEGMENT : high - number * SEGMENT]
    return bytes(content)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name != SCRATCH_NAME)


def test_appending_over_segments(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT + 5000)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.end)
    assert store.flush_lsn == store.write_record_lsn == store.write_lsn == wal.end
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)
    assert names(tmp_path) == [
        "000000010000000000000001",
        "000000010000000000000002",
        "000000010000000000000003.partial",
    ]


def test_only_record_ends_are_reported(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT, seed=3).records(60, 3000)
    store = begin(new_store(tmp_path))
    generator = random.Random(5)
    while store.write_lsn < wal.end:
        append(store, wal, min(wal.end, store.write_lsn + generator.randrange(1, 2500)))
        assert store.flush_lsn == wal.last_record_end(store.write_lsn)


def test_flush_is_one_durable_write_per_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    real = os.pwritev

    def pwritev(descriptor: int, views: Any, offset: int, flags: int = 0) -> int:
        calls.append(("pwritev", flags))
        return real(descriptor, views, offset, flags)

    wal = WalMaker(START, SEGMENT).records(20, 500)
    store = begin(new_store(tmp_path))
    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "fdatasync", lambda _: calls.append(("fdatasync", 0)))
    for end in wal.record_ends:
        store.write(store.write_lsn, wal.slice(store.write_lsn, end))
    store.flush()
    assert calls == [("pwritev", os.RWF_DSYNC)]
    assert store.flush_lsn == wal.end


def test_bytes_written_without_sync_are_synced_by_the_next_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fdatasync
    wal = WalMaker(START, SEGMENT).record(5000).record(100)
    store = begin(new_store(tmp_path))
    append(store, wal, START + 1000, flush=False)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (synced.append(descriptor), real(descriptor)))
    append(store, wal, wal.end)
    assert synced, "the first 1000 bytes were never made durable"


def test_a_gap_and_an_overlap_are_refused(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(3)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.record_ends[0])
    for position in (wal.record_ends[0] - 8, wal.record_ends[0] + 8):
        with pytest.raises(ProtocolViolation, match="does not follow"):
            store.write(Lsn(position), b"12345678")
    append(store, wal, wal.end)


def test_bytes_that_are_not_wal_close_the_log_until_an_election(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(5)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.record_ends[1])
    broken = bytearray(wal.slice(wal.record_ends[1], wal.end))
    broken[40] ^= 1
    with pytest.raises(ProtocolViolation, match="not WAL"):
        store.write(store.write_lsn, bytes(broken))
    store.write_out()
    with pytest.raises(WalStoreError, match="election"):
        store.write(store.write_lsn, wal.slice(store.write_lsn, wal.end))
    assert store.flush_lsn == wal.record_ends[1]
    cut(store, wal.record_ends[1])
    append(store, wal, wal.end)
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)


# -- recovery


def test_recovery_finds_the_last_record_from_an_old_commit_lsn(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.end - 20)
    for commit_lsn in (START, wal.record_ends[3], wal.record_ends[-2]):
        again = new_store(tmp_path, commit_lsn)
        assert again.flush_lsn == again.write_lsn == wal.record_ends[-2]


def test_recovery_without_a_saved_commit_lsn_is_an_empty_store(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    assert (store.write_lsn, store.write_record_lsn, store.flush_lsn) == (0, 0, 0)


def test_recovery_of_a_timeline_that_has_no_wal_yet(tmp_path: Path) -> None:
    store = new_store(tmp_path, START)
    assert store.flush_lsn == START
    wal = WalMaker(START, SEGMENT).records(5)
    cut(store, START)
    append(store, wal, wal.end)
    assert new_store(tmp_path, START).flush_lsn == wal.end


def test_nothing_is_written_after_boot_before_garbage_is_gone(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(10)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.end - 20)  # the last record is torn
    again = new_store(tmp_path, START)
    end = wal.record_ends[-2]
    assert again.flush_lsn == end
    with pytest.raises(WalStoreError, match="election"):
        again.write(end, wal.slice(end, wal.end))
    cut(again, end)
    assert not any(stored(tmp_path, end, 2 * SEGMENT)), "garbage behind the end of the log"
    append(again, wal, wal.end)
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)


@pytest.mark.parametrize("tail", [0, 1, 8000, SEGMENT // 2])
def test_a_switched_segment(tmp_path: Path, tail: int) -> None:
    """Whatever part of the zero tail arrived, the log goes on at the next segment, and the old one is completed."""
    wal = WalMaker(START, SEGMENT).records(3).switch()
    switch_record_end = wal.end - len(wal.data) + len(bytes(wal.data).rstrip(b"\0"))
    store = begin(new_store(tmp_path))
    append(store, wal, min(switch_record_end + 100 + tail, wal.end))
    again = new_store(tmp_path, START)
    assert again.flush_lsn == wal.end == 2 * SEGMENT
    cut(again, wal.end)
    assert names(tmp_path) == ["000000010000000000000001"]
    wal.records(4)
    append(again, wal, wal.end)
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)
    assert new_store(tmp_path, START).flush_lsn == wal.end


@pytest.mark.parametrize("distance", [0, 8, 24, 32, 8192 - 24])
def test_records_that_end_near_a_segments_end(tmp_path: Path, distance: int) -> None:
    """Also when the last record exactly fills the segment: the next one starts behind the next page header."""
    wal = WalMaker(START, SEGMENT).until(2 * SEGMENT - 60_000, 1000)
    while 2 * SEGMENT - distance - wal.end > 20_000:
        wal.record(3000)
    begin_lsn = record_start(wal.end, SEGMENT)
    sizes = range(256, 20_000)  # the payload that makes the record end exactly there; headers of 24 + 5 bytes
    size = next(n for n in sizes if record_end(begin_lsn, 29 + n, SEGMENT) >= 2 * SEGMENT - distance)
    wal.record(size)
    assert wal.end == max(2 * SEGMENT - distance, record_end(begin_lsn, 29 + size, SEGMENT))
    store = begin(new_store(tmp_path))
    append(store, wal, wal.end)
    assert new_store(tmp_path, START).flush_lsn == wal.end
    again = new_store(tmp_path, START)
    cut(again, wal.end)
    wal.records(3)
    append(again, wal, wal.end)
    assert new_store(tmp_path, START).flush_lsn == wal.end
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)


# -- truncation


def test_truncation_into_an_earlier_segment(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 3 * SEGMENT)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.end)
    target = wal.last_record_end(START + SEGMENT // 2)
    cut(store, target)
    assert store.flush_lsn == store.write_lsn == target
    assert names(tmp_path) == ["000000010000000000000001.partial"]
    assert not any(stored(tmp_path, target, 2 * SEGMENT))
    other = WalMaker(Lsn(target), SEGMENT, seed=9).until(target + 2 * SEGMENT)
    append(store, other, other.end)
    assert new_store(tmp_path, START).flush_lsn == other.end
    assert stored(tmp_path, START, other.end) == wal.slice(START, target) + bytes(other.data)


def test_truncation_at_a_segments_start_keeps_the_one_before(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(3).switch().records(50)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.end)
    cut(store, 2 * SEGMENT)
    assert "000000010000000000000001" in names(tmp_path)
    append(store, wal, wal.end)
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)


def test_truncation_beyond_the_end_is_refused(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(3)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.end)
    with pytest.raises(WalStoreError, match="cannot cut"):
        cut(store, wal.end + 8)


def test_truncation_with_nothing_beyond_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wal = WalMaker(START, SEGMENT).records(3)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.end)
    monkeypatch.setattr(wal_store, "WalScanner", None)  # would be called by a real truncation
    cut(store, wal.end)


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


# -- housekeeping


def test_removing_old_segments(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 3 * SEGMENT)
    store = begin(new_store(tmp_path))
    append(store, wal, wal.end)
    assert store.remove_below(3) == 2
    assert names(tmp_path)[0] == "000000010000000000000003"
    assert store.remove_below(3) == 0
    assert new_store(tmp_path, wal.last_record_end(3 * SEGMENT + 9000)).flush_lsn == wal.end


def test_the_first_segment_is_readable_by_tools(tmp_path: Path) -> None:
    store = begin(new_store(tmp_path), SEGMENT + 3 * 8192 + 512)
    data = (tmp_path / "000000010000000000000001.partial").read_bytes()
    assert data[:2] == b"\x10\xd1"
    assert int.from_bytes(data[24:32], "little") == SYSTEM_ID
    assert int.from_bytes(data[3 * 8192 + 8 : 3 * 8192 + 16], "little") == SEGMENT + 3 * 8192
    assert not any(data[40 : 3 * 8192])
    store.close()


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


@pytest.fixture
def without_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are made in line, so that the steps are the same in each run."""
    monkeypatch.setattr(segments.SegmentDirectory, "prepare", lambda self, bulk=False: None)


@pytest.fixture
def preparation_in_line(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Segments are made at once when they would be made in the background; for each whether its room was only allocated."""
    made: list[bool] = []

    def prepare(self: segments.SegmentDirectory, *, bulk: bool = False) -> None:
        if not self.disk.exists(self.path / SCRATCH_NAME):
            self._make_scratch(bulk=bulk)
            made.append(bulk)

    monkeypatch.setattr(segments.SegmentDirectory, "prepare", prepare)
    return made


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


@pytest.mark.usefixtures("without_preparation")
def test_a_large_batch_is_written_while_it_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the disk in parts, of which nothing is reported before one sync has made all of them durable."""
    wal = WalMaker(START, SEGMENT).until(START + SEGMENT + 900_000)
    store = begin(new_store(tmp_path / "wal"))
    calls: list[str] = []
    for name in ("pwritev", "start_writing", "fdatasync"):
        real = getattr(store.disk, name)

        def count(*arguments: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            durable = " durable" if name == "pwritev" and arguments[3] else ""
            calls.append(name + durable)
            return real(*arguments)

        monkeypatch.setattr(store.disk, name, count)
    append(store, wal, START + 255_000, flush=False)
    del calls[:]
    for begin_lsn in range(store.write_lsn, START + 900_000, 100_000):
        end = min(begin_lsn + 100_000, START + 900_000)
        store.write(Lsn(begin_lsn), wal.slice(begin_lsn, end))
    assert store.flush_lsn == START, "nothing was synced yet"
    assert calls == ["pwritev", "start_writing"] * 2
    store.flush()
    assert calls[4:] == ["pwritev durable", "fdatasync"] or calls[4:] == ["pwritev", "fdatasync"]
    assert store.flush_lsn == wal.last_record_end(START + 900_000)
    append(store, wal, wal.end, chunk=70_000)
    store.close()
    assert stored(tmp_path / "wal", START, wal.end) == bytes(wal.data)


@pytest.mark.usefixtures("without_preparation")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_where_nothing_can_be_hinted_large_batches_are_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 900_000)
    store = begin(new_store(tmp_path))
    hints: list[int] = []

    def refuse(*_: Any) -> None:
        hints.append(number)
        raise OSError(number, "no")

    monkeypatch.setattr(store.disk, "start_writing", refuse)
    append(store, wal, wal.end)
    assert (store.flush_lsn, len(hints)) == (wal.end, 1)
    assert stored(tmp_path, START, wal.end) == bytes(wal.data)


def test_every_sync_of_a_large_batch_is_measured(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 900_000)
    store = begin(new_store(tmp_path))
    before = store.flush_seconds
    append(store, wal, wal.end)
    assert store.flush_seconds > before
    assert store.written_bytes == len(wal.data)

"""The WAL store: positions, segments, recovery, truncation, large batches."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.lsn import Lsn
from neon_services.safekeeper import wal_store
from neon_services.safekeeper.wal_store import WalStoreError
from neon_services.wal.framing import record_end, record_start
from tests.unit.safekeeper.wal_store_support import SEGMENT, START, append, begin, cut, names, new_store, stored
from tests.unit.safekeeper.walmaker import SYSTEM_ID, WalMaker


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


# -- large batches


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

"""Who sends full segments, which ones, that only good bytes are sent, and that they leave the disk only when they arrived."""

import asyncio
import itertools
from pathlib import Path

import pytest

from neon_services.ground.errors import CorruptionError
from neon_services.ground.ids import TimelineId
from neon_services.ground.lsn import Lsn, segment_file_name
from neon_services.ground.remote_storage import RemoteStorageError
from neon_services.safekeeper import wal_backup
from neon_services.safekeeper.removal import remove_wal
from neon_services.safekeeper.segment_check import read_segment
from neon_services.safekeeper.wal_backup import Candidate, UploadWindow, WalBackup, backup_required, elect_offloader
from tests.unit.safekeeper.offload_support import SEGMENT, START, World, failing


def timeline_id(number: int) -> TimelineId:
    return TimelineId(number.to_bytes(16, "big"))


def candidates(*triples: tuple[int, int, int]) -> list[Candidate]:
    return [Candidate(node_id, Lsn(start), Lsn(commit)) for node_id, start, commit in triples]


@pytest.mark.parametrize(
    ("number", "known", "backup", "lag", "chosen"),
    [
        (0, [], 10, 100, None),
        (0, [(1, 0, 50)], 10, 100, 1),
        (0, [(3, 0, 50), (1, 0, 50), (2, 0, 50)], 10, 100, 1),  # by id, whatever the order they were heard in
        (1, [(3, 0, 50), (1, 0, 50), (2, 0, 50)], 10, 100, 2),
        (2, [(3, 0, 50), (1, 0, 50), (2, 0, 50)], 10, 100, 3),
        (3, [(3, 0, 50), (1, 0, 50), (2, 0, 50)], 10, 100, 1),
        (0, [(1, 11, 50), (2, 0, 50)], 10, 100, 2),  # 1 joined later and lacks WAL at 10
        (0, [(1, 10, 50), (2, 0, 50)], 10, 100, 1),
        (0, [(1, 11, 50)], 10, 100, None),
        (0, [(1, 0, 50), (2, 0, 151)], 10, 100, 2),  # 1 is too far behind
        (0, [(1, 0, 50), (2, 0, 150)], 10, 100, 1),
        (0, [(1, 0, 49), (2, 0, 50)], 10, 0, 2),
    ],
)
def test_who_sends(number: int, known: list[tuple[int, int, int]], backup: int, lag: int, chosen: int | None) -> None:
    for order in itertools.permutations(candidates(*known)):
        assert elect_offloader(timeline_id(number), order, Lsn(backup), max_offloader_lag=lag) == chosen


@pytest.mark.parametrize(
    ("known", "limit", "chosen"),
    [
        ([(1, 0, 50), (2, 0, 50), (3, 0, 50)], 0, 1),
        ([(1, 0, 50), (2, 0, 50), (3, 0, 50)], 41, 1),
        ([(1, 0, 50), (2, 0, 50), (3, 0, 50)], 40, 2),
        ([(1, 0, 50)], 40, 1),  # nobody else is there
    ],
)
def test_another_member_takes_over_a_backlog(known: list[tuple[int, int, int]], limit: int, chosen: int) -> None:
    found = elect_offloader(
        timeline_id(0), candidates(*known), Lsn(10), max_offloader_lag=100, max_reelect_lag=limit
    )  # fmt: skip
    assert found == chosen


@pytest.mark.parametrize(
    ("computes", "commit", "backup", "required"),
    [
        (0, SEGMENT + 5, SEGMENT + 5, False),
        (1, SEGMENT + 5, SEGMENT + 5, True),
        (0, 2 * SEGMENT - 1, SEGMENT, False),
        (0, 2 * SEGMENT, SEGMENT, True),  # as after XLOG_SWITCH: nothing follows
        (0, 2 * SEGMENT, 2 * SEGMENT, False),
    ],
)
def test_when_sending_is_needed(computes: int, commit: int, backup: int, required: bool) -> None:
    assert backup_required(computes, Lsn(commit), Lsn(backup), SEGMENT) is required


def test_the_window_starts_only_full_segments() -> None:
    window = UploadWindow(10, 3)
    assert window.next(Lsn(15), Lsn(19)) == []
    assert window.next(Lsn(15), Lsn(20)) == [1]
    assert window.next(Lsn(15), Lsn(99)) == [2, 3]
    assert window.next(Lsn(15), Lsn(99)) == []


def test_completions_are_counted_in_order() -> None:
    for order in itertools.permutations((1, 2, 3)):
        window = UploadWindow(10, 3)
        assert window.next(Lsn(15), Lsn(40)) == [1, 2, 3]
        backup, done = Lsn(15), set()
        for segment in order:
            backup = window.finished(segment, backup)
            done.add(segment)
            in_order = next(number for number in itertools.count(1) if number not in done)
            assert backup == (15 if in_order == 1 else 10 * in_order)
            assert all(number >= 4 for number in window.next(backup, Lsn(60)) if number not in (1, 2, 3))
        assert backup == 40


def test_a_window_that_others_overtook() -> None:
    window = UploadWindow(10, 2)
    assert window.next(Lsn(10), Lsn(90)) == [1, 2]
    assert window.finished(1, Lsn(50)) == 50
    assert window.next(Lsn(50), Lsn(90)) == [5]  # 2 is still under way
    assert window.finished(2, Lsn(50)) == 50
    assert window.next(Lsn(50), Lsn(90)) == [6]


async def back_up(world: World, upto: int) -> None:
    """Send until backup_lsn is there."""
    task = asyncio.create_task(WalBackup(world.timeline, asyncio.Semaphore(5), 5).run())
    arrived = asyncio.Event()
    world.timeline.on_change = lambda timeline: arrived.set() if timeline.acceptor.backup_lsn >= upto else None
    try:
        async with asyncio.timeout(20):
            await arrived.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_all_full_segments_arrive_although_the_store_fails(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.bucket.before = failing(7, "put")
    await back_up(world, 5 * SEGMENT)
    assert world.timeline.acceptor.backup_lsn == 5 * SEGMENT
    local = {segment_file_name(n, SEGMENT): world.timeline.store.segments.find(n).read_bytes() for n in (1, 2, 3, 4)}  # type: ignore[union-attr]
    assert world.bucket.objects() == local


async def test_a_segment_that_is_short_or_damaged_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal_backup, "MAX_BACKOFF_S", 0.01)
    world = World(tmp_path)
    path = world.timeline.store.segments.complete_path(3)
    good = path.read_bytes()
    for bad in (good[:-1], b"", good[:500_000] + bytes([good[500_000] ^ 1]) + good[500_001:], bytes(SEGMENT)):
        path.write_bytes(bad)
        with pytest.raises(CorruptionError, match=path.name):
            read_segment(world.timeline.directory, 3, SEGMENT, START, 4 * SEGMENT)
    path.unlink()
    with pytest.raises(CorruptionError, match=f"{path.name} is missing"):
        read_segment(world.timeline.directory, 3, SEGMENT, START, 4 * SEGMENT)
    await back_up(world, 3 * SEGMENT)
    assert world.timeline.acceptor.backup_lsn == 3 * SEGMENT
    assert path.name not in world.bucket.objects()


def test_the_first_segment_and_one_that_ends_with_a_switch_are_good(tmp_path: Path) -> None:
    world = World(tmp_path, segments=1)
    before = len(world.wal.data)
    world.wal.switch()
    world.append(world.wal.end - 8192)  # the zeros at the end are still missing, as when the compute died
    world.timeline.store.write_out()
    end = world.wal.end
    assert end % SEGMENT == 0 and len(world.wal.data) > before
    timeline = world.reboot()
    assert timeline.acceptor.flush_lsn == end, "what was written after the switch is zero, and so is what was not"
    for segment in range(START // SEGMENT, end // SEGMENT):
        content = read_segment(timeline.directory, segment, SEGMENT, START, (segment + 1) * SEGMENT)
        begin = max(segment * SEGMENT, START)
        assert content[begin - segment * SEGMENT :] == world.wal.slice(begin, (segment + 1) * SEGMENT)


async def test_wal_is_removed_only_when_it_was_seen_in_the_bucket(tmp_path: Path) -> None:
    world = World(tmp_path)
    timeline = world.timeline
    await back_up(world, 5 * SEGMENT)
    names = {n: segment_file_name(n, SEGMENT) for n in range(1, 5)}
    objects = {path.name: path for path in world.bucket.root.rglob("0*") if path.is_file()}
    good = objects[names[2]].read_bytes()
    objects[names[2]].unlink()
    objects[names[3]].write_bytes(good[:-1])
    world.bucket.puts.clear()
    with pytest.raises(CorruptionError, match=f"{names[2]} is missing or short"):
        await remove_wal(timeline, 4, send_missing=False)
    world.bucket.before = failing(1, "put")
    with pytest.raises(RemoteStorageError):
        await remove_wal(timeline, 4)
    assert world.segments() == [1, 2, 3, 4, 5]
    with timeline.hold_removal():
        await remove_wal(timeline, 4)
        assert world.segments() == [1, 2, 3, 4, 5]
    await remove_wal(timeline, 4)
    assert world.segments() == [4, 5]
    assert [key.rsplit("/", 1)[1] for key in world.bucket.puts] == [names[2], names[3]]
    assert world.bucket.objects()[names[2]] == good
    assert timeline.removed_segment == 3
    assert timeline.disk_usage_bytes == 2 * SEGMENT
    world.save()
    assert world.reboot().removed_segment == 3, "a restart finds out what was removed"
    assert world.timeline.disk_usage_bytes == 2 * SEGMENT


async def test_without_a_bucket_nothing_is_removed(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.timeline.remote = None
    await remove_wal(world.timeline, 4)
    assert world.segments() == [1, 2, 3, 4, 5]

"""When a timeline is evicted, that nothing is lost by it, and that it comes back when somebody needs it."""

import asyncio
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import Lsn
from neon_services.ground.remote_storage import RemoteStorageError
from neon_services.safekeeper import remote_wal
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.eviction import EvictionView, evict, look, may_evict
from neon_services.safekeeper.partial_backup import back_up_partial, uploaded
from neon_services.safekeeper.removal import remove_wal
from neon_services.safekeeper.status import memory_dump, timeline_status
from neon_services.safekeeper.wal_backup import upload_segment
from tests.unit.safekeeper.offload_support import SEGMENT, START, World, failing
from tests.unit.safekeeper.test_wal_backup import back_up

IDLE = EvictionView(
    offloaded=False,
    broker_active=False,
    guards=0,
    computes=0,
    senders=0,
    sends_wal=False,
    removal_held=False,
    unsaved=False,
    partial_uploaded=True,
    only_last_segment=True,
    resident_s=60.0,
)


def test_the_condition() -> None:
    assert may_evict(IDLE, 60.0)
    assert not may_evict(IDLE, 60.1)
    for field in fields(EvictionView):
        if field.name != "resident_s":
            value = getattr(IDLE, field.name)
            other = 1 if value == 0 and not isinstance(value, bool) else not value
            assert not may_evict(replace(IDLE, **{field.name: other}), 60.0), field.name


async def idle_world(base: Path) -> World:
    """Everything is in the bucket, and the last segment also on the disk."""
    world = World(base)
    world.wal.records(30)
    world.append(world.wal.end)
    await back_up(world, 5 * SEGMENT)
    world.timeline.acceptor.remote_consistent_lsn = world.timeline.acceptor.commit_lsn
    world.save()
    await remove_wal(world.timeline, 5)
    await back_up_partial(world.timeline)
    return world


async def evicted(world: World, *, delete_file: bool = True) -> bool:
    return await evict(world.timeline, min_resident_s=0.0, delete_file=delete_file, clock=lambda: 1e18)


async def test_eviction_and_return(tmp_path: Path) -> None:
    world = await idle_world(tmp_path)
    assert may_evict(look(world.timeline, 1e18), 0.0)
    status = timeline_status(world.timeline, 1.0)
    assert await evicted(world)
    for timeline in (world.timeline, world.reboot()):
        assert timeline.offloaded and world.segments() == []
        assert timeline_status(timeline, 1.0) == status, "what is said about it stays the same"
        assert memory_dump(timeline)["mgr_status"] == "Evicted"
        assert timeline.disk_usage_bytes == 0
        assert timeline.removed_segment == 4
    async with timeline.residence():
        assert not timeline.offloaded and world.segments() == [5]
        assert ControlFile.load(timeline.directory / "safekeeper.control").offloaded_flush_lsn is None
        assert await timeline.reader().read(5 * SEGMENT, 1 << 20) == world.wal.slice(5 * SEGMENT, world.wal.end) + bytes(
            6 * SEGMENT - world.wal.end
        )
        assert not may_evict(look(timeline, 1e18), 0.0), "it is in use"
    # and goes on as if nothing had been
    world.lead(5)
    world.wal.records(50)
    world.append(world.wal.end)
    assert timeline.acceptor.flush_lsn == world.wal.end
    assert world.reboot().acceptor.flush_lsn == world.wal.end


async def test_half_a_record_behind_the_end_is_dropped(tmp_path: Path) -> None:
    world = await idle_world(tmp_path)
    end = world.timeline.acceptor.flush_lsn
    world.wal.record(1000)
    world.append(end + 500)
    world.timeline.store.write_out()
    assert world.timeline.store.write_lsn == end + 500 and world.timeline.store.flush_lsn == end
    assert await evicted(world)
    async with world.timeline.residence():
        assert world.timeline.store.write_lsn == end
        world.lead(5)
        world.append(world.wal.end)
    assert world.reboot().acceptor.flush_lsn == world.wal.end


async def test_what_is_flushed_but_not_committed_survives(tmp_path: Path) -> None:
    world = await idle_world(tmp_path)
    committed = world.timeline.acceptor.commit_lsn
    world.wal.records(20)
    world.leader.append(world.wal, world.wal.end, committed)
    await back_up_partial(world.timeline)
    assert await evicted(world)
    timeline = world.reboot()
    assert (timeline.acceptor.flush_lsn, timeline.acceptor.commit_lsn) == (world.wal.end, committed)
    async with timeline.residence():
        pass
    timeline = world.reboot()
    assert (timeline.acceptor.flush_lsn, timeline.acceptor.commit_lsn) == (world.wal.end, committed)


async def test_a_damaged_object_does_not_come_back(tmp_path: Path) -> None:
    world = await idle_world(tmp_path)
    assert await evicted(world)
    part = uploaded(world.timeline.control.partial_backup)
    assert part is not None
    (path,) = world.bucket.root.rglob(part.name)
    good = path.read_bytes()
    for bad in (good[:-1], good[:-100] + bytes([good[-100] ^ 1]) + good[-99:], bytes(len(good))):
        path.write_bytes(bad)
        with pytest.raises(CorruptionError, match=part.name):
            async with world.timeline.residence():
                pass
        assert world.timeline.offloaded and world.segments() == []
    path.write_bytes(good)
    async with world.timeline.residence():
        assert world.segments() == [5]


async def test_no_wal_is_accepted_while_it_is_away(tmp_path: Path) -> None:
    world = await idle_world(tmp_path)
    assert await evicted(world)
    with pytest.raises(Exception, match="no WAL before an election"):
        world.wal.records(1)
        world.append(world.wal.end)


@pytest.mark.parametrize("delete_file", [False, True])
async def test_a_crash_around_the_deletion(tmp_path: Path, delete_file: bool) -> None:
    world = await idle_world(tmp_path)
    end = world.timeline.acceptor.flush_lsn
    world.timeline.save_eviction(end)  # saved, and then the process died
    timeline = world.reboot()
    assert timeline.offloaded and world.segments() == [5]
    if delete_file:
        timeline.store.segments.remove_above(4)
    (timeline.directory / "remote_partial.tmp").write_bytes(b"half")
    timeline = world.reboot()
    async with timeline.residence():
        assert world.segments() == [5] and timeline.acceptor.flush_lsn == end
    assert not (timeline.directory / "remote_partial.tmp").exists()


async def test_whoever_comes_meanwhile_stops_it(tmp_path: Path) -> None:
    world = await idle_world(tmp_path)

    def compute_comes(world: World) -> None:
        world.lead(3)
        world.wal.records(2)
        world.append(world.wal.end)

    comers: list[Callable[[World], object]] = [
        lambda world: setattr(world.timeline, "guards", 1),
        lambda world: setattr(world.timeline, "active", True),
        compute_comes,
    ]
    for comes in comers:
        world.bucket.before = lambda operation, key, comes=comes: comes(world) if operation == "get" else None  # type: ignore[misc]
        assert not await evicted(world)
        assert not world.timeline.offloaded and world.segments() == [5]
        world.timeline.guards, world.timeline.active = 0, False


async def test_a_different_object_is_sent_again(tmp_path: Path) -> None:
    world = await idle_world(tmp_path)
    part = uploaded(world.timeline.control.partial_backup)
    assert part is not None
    (path,) = world.bucket.root.rglob(part.name)
    good = path.read_bytes()
    for bad in (good[:-1], good[:100] + b"x" + good[101:], None):
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(CorruptionError, match=f"{part.name} is not what was sent"):
            await evicted(world)
        assert not world.timeline.offloaded and world.segments() == [5]
        await back_up_partial(world.timeline)
        assert path.read_bytes() == good
    assert await evicted(world)


async def test_a_bucket_that_is_down_delays_the_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_wal, "FIRST_BACKOFF_S", 0.001)
    world = await idle_world(tmp_path)
    assert await evicted(world)
    world.bucket.before = failing(remote_wal.READ_ATTEMPTS, "get")
    with pytest.raises(RemoteStorageError):
        async with world.timeline.residence():
            pass
    assert world.timeline.offloaded and world.timeline.guards == 0
    # several who need it at once: it is fetched once
    gets = []
    world.bucket.before = lambda operation, key: gets.append(key)

    async def use() -> None:
        async with world.timeline.residence():
            assert world.segments() == [5]

    await asyncio.gather(*(use() for _ in range(5)))
    assert len(gets) == 1
    # an object that is gone is named
    assert await evicted(world)
    part = uploaded(world.timeline.control.partial_backup)
    assert part is not None
    (path,) = world.bucket.root.rglob(part.name)
    path.unlink()
    with pytest.raises(CorruptionError, match=part.name):
        async with world.timeline.residence():
            pass


async def test_a_log_that_ends_with_its_segment_is_not_evicted(tmp_path: Path) -> None:
    world = World(tmp_path, segments=1)
    world.wal.switch()
    world.append(world.wal.end)
    for segment in range(START // SEGMENT, world.wal.end // SEGMENT):
        await upload_segment(world.timeline, segment)
    world.timeline.acceptor.backup_lsn = world.timeline.acceptor.remote_consistent_lsn = Lsn(world.wal.end)
    world.save()
    await back_up_partial(world.timeline)
    assert not [name for name in world.bucket.objects() if name.endswith(".partial")]
    assert not may_evict(look(world.timeline, 1e18), 0.0)

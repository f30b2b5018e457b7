"""When work with the bucket begins and ends, as time passes and members come and go."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from neon_services.consensus.acceptor import PeerInfo
from neon_services.ground.lsn import Lsn
from neon_services.safekeeper.config import OffloadConfig
from neon_services.safekeeper.connections import Peer
from neon_services.safekeeper.offload import Offload
from tests.unit.safekeeper.offload_support import SEGMENT, World, failing
from tests.unit.safekeeper.test_timelines import Clock

CONFIG = OffloadConfig(partial_backup_timeout_s=100, eviction=True, delete_offloaded_wal=True, eviction_min_resident_s=1000)


class Scene:
    """One timeline, and a clock that only the test moves."""

    def __init__(self, base: Path) -> None:
        self.world = World(base)
        self.timeline = self.world.timeline
        self.clock = Clock()
        self.timeline.resident_since = self.clock.now
        self.offload = Offload(CONFIG, 1, clock=self.clock)

    def heard(self, node_id: int) -> None:
        """The broker tells about a member now."""
        lsns = (self.timeline.acceptor.commit_lsn, Lsn(0), Lsn(0), Lsn(0))
        peer = Peer(node_id, 1, lsns[0], Lsn(0), PeerInfo(1, *lsns), "", "", None, self.clock.now)
        self.timeline.peers[node_id] = peer

    def tend(self) -> None:
        self.offload.tend(self.timeline)

    async def idle(self) -> None:
        """Until all work that was begun has ended."""
        async with asyncio.timeout(20):
            while tasks := [t for t in asyncio.all_tasks() if t.get_name().endswith(f"of {self.timeline.ttid}")]:
                await asyncio.wait(tasks)

    async def backed_up(self) -> None:
        """Until backup_lsn has reached the last full segment."""
        moved = asyncio.Event()
        acceptor = self.timeline.acceptor
        end = acceptor.commit_lsn - acceptor.commit_lsn % SEGMENT
        self.timeline.on_change = lambda _: moved.set() if acceptor.backup_lsn >= end else None
        async with asyncio.timeout(20):
            await moved.wait()

    def uploads(self) -> list[str]:
        return sorted(self.world.bucket.objects())


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    made = Scene(tmp_path)
    yield made
    await made.offload.stop()


async def test_the_chosen_one_sends_and_stops_when_another_is_chosen(scene: Scene) -> None:
    scene.tend()
    assert not scene.timeline.offloading, "nobody was heard, not even we"
    scene.heard(1)
    scene.tend()
    assert scene.timeline.offloading
    scene.clock.now += CONFIG.heartbeat_timeout_s + 1
    scene.tend()
    assert not scene.timeline.offloading, "we were not heard for long"
    scene.heard(1)
    scene.tend()
    assert scene.timeline.offloading
    await scene.backed_up()
    scene.tend()
    assert not scene.timeline.offloading, "all is done and nobody writes"
    number = int.from_bytes(scene.timeline.ttid.timeline_id.raw, "big") % 2
    scene.timeline.acceptor.backup_lsn = Lsn(2 * SEGMENT)
    scene.heard(2)
    scene.tend()
    assert scene.timeline.offloading == (number == 0)


async def test_a_deleted_timeline_is_left_alone(scene: Scene) -> None:
    scene.heard(1)
    scene.world.bucket.before = failing(10**9, "put")
    scene.tend()
    assert scene.timeline.offloading
    scene.timeline.close("deleted")
    scene.offload.prune(set())
    assert not scene.timeline.offloading
    async with asyncio.timeout(20):
        while [t for t in asyncio.all_tasks() if t.get_name().startswith("WAL backup")]:
            await asyncio.wait([t for t in asyncio.all_tasks() if t.get_name().startswith("WAL backup")])


async def test_the_last_segment_is_sent_when_its_time_has_come_and_then_the_timeline_goes(scene: Scene) -> None:
    world, timeline, clock = scene.world, scene.timeline, scene.clock
    scene.tend()
    await scene.idle()
    clock.now += CONFIG.partial_backup_timeout_s
    scene.tend()
    await scene.idle()
    assert len(scene.uploads()) == 1, "after a start it is not later than the timeout"
    world.wal.records(10)
    world.append(world.wal.end)
    for seconds, count in ((0, 1), (99, 1), (1, 2)):
        clock.now += seconds
        world.bucket.puts.clear()
        scene.tend()
        await scene.idle()
        assert len(world.bucket.puts) == count - 1
    assert len(scene.uploads()) == 1, "the older one is gone"
    # full segments, and everything at the pageserver
    scene.heard(1)
    scene.tend()
    await scene.backed_up()
    scene.tend()
    timeline.acceptor.remote_consistent_lsn = timeline.acceptor.commit_lsn
    scene.offload.remove_below(timeline, timeline.acceptor.commit_lsn // SEGMENT)
    await scene.idle()
    assert world.segments() == [5]
    scene.tend()
    await scene.idle()
    assert not timeline.offloaded, "it must have been here for a while"
    clock.now += 1.5 * CONFIG.eviction_min_resident_s
    with timeline.hold_removal():
        scene.tend()
        await scene.idle()
        assert not timeline.offloaded
    scene.tend()
    await scene.idle()
    assert timeline.offloaded and world.segments() == []


async def test_failing_work_is_begun_again_later(scene: Scene) -> None:
    scene.world.bucket.before = failing(1, "put")
    scene.clock.now += CONFIG.partial_backup_timeout_s
    scene.tend()
    scene.clock.now += CONFIG.partial_backup_timeout_s
    scene.tend()
    await scene.idle()
    scene.tend()
    await scene.idle()
    assert scene.uploads() == [], "not at once"
    scene.clock.now += 60
    scene.tend()
    await scene.idle()
    assert len(scene.uploads()) == 1

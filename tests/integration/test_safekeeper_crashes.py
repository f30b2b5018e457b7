"""Safekeepers are killed, stopped, left behind and led astray: no acknowledged byte is lost, and logs become one again."""

import asyncio
import contextlib
import random
from collections.abc import Iterator

import pytest

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, format_lsn, parse_lsn
from tests.integration.safekeeper_support import Fleet, dead, new_ttid, read_stream, running_fleet
from tests.integration.scripted_wal import START, proposer
from tests.unit.safekeeper.walmaker import WalMaker

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet"), 3, "--heartbeat-timeout", "3s") as fleet:
        yield fleet


async def test_a_killed_safekeeper_recovers_its_flush_lsn(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).until(START + WAL_SEGMENT_SIZE + 300_000, 40_000)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    before = [node.status(leader.ttid) for node in fleet.nodes]
    leader.leave()
    for node in fleet.nodes:
        node.kill()
        node.start()
    for node, old in zip(fleet.nodes, before, strict=True):
        new = node.status(leader.ttid)
        for name in ("flush_lsn", "acceptor_state", "pg_info", "timeline_start_lsn", "local_start_lsn", "mconf"):
            assert new[name] == old[name]
        assert parse_lsn(new["commit_lsn"]) <= parse_lsn(old["commit_lsn"])


async def test_an_orderly_restart_keeps_commit_lsn_too(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(20)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    node = fleet.nodes[0]
    assert node.stop() == 0
    assert "shutting down" in await dead(leader.members[0].client)
    node.start()
    status = node.status(leader.ttid)
    assert status["commit_lsn"] == status["flush_lsn"] == format_lsn(wal.end)
    leader.leave()


async def test_kill_loop_keeps_every_acknowledged_byte(fleet: Fleet) -> None:
    """Kill -9 of random members while WAL streams; each time a new leader goes on. In the end all three are equal."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    wal = WalMaker(START, WAL_SEGMENT_SIZE, seed=seed).until(START + 8_000_000, 30_000)
    ttid, acknowledged, rounds = new_ttid(), START, 0
    while acknowledged < wal.end:
        rounds += 1
        leader = proposer(wal, ttid=ttid)
        if rounds % 2:
            up, victim = fleet.nodes, generator.choice(fleet.nodes)
        else:  # one member is down from the start, and lags from now on
            down = generator.choice(fleet.nodes)
            down.kill()
            up = [node for node in fleet.nodes if node is not down]
            victim = generator.choice(up)
        await leader.elect(up)
        assert leader.term_start >= acknowledged, "an acknowledged record was lost by an election"
        end = wal.last_record_end(min(wal.end, leader.term_start + generator.randrange(200_000, 900_000)))
        await leader.stream(max(end, leader.term_start), chunk=generator.randrange(500, 131_072))
        acknowledged = max(acknowledged, leader.commit)
        for member in leader.members:
            leader.send(member, min(wal.end, member.sent + 1_000_000), generator.randrange(500, 131_072))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(generator.random() * 0.05):  # die somewhere in the middle of it
                while True:
                    await leader.answer(leader.members[0])
        victim.kill()
        leader.leave()
        for node in fleet.nodes:
            if node.popen is None or node.popen.poll() is not None:
                node.start()
    leader = proposer(wal, ttid=ttid)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    assert rounds > 3
    assert len({node.digest(ttid, START, wal.end) for node in fleet.nodes}) == 1
    reader = await fleet.nodes[2].connect(ttid)
    assert await read_stream(reader, START, wal.end) == bytes(wal.data)
    reader.abort()
    leader.leave()


async def test_a_diverged_tail_is_cut(fleet: Fleet) -> None:
    """A leader's last WAL reached one member only; the next leader, elected without it, writes something else."""
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(10)
    first = proposer(wal)
    await first.elect(fleet.nodes)
    await first.stream(wal.end)
    common = wal.end
    lost = WalMaker(common, WAL_SEGMENT_SIZE, seed=77).until(common + WAL_SEGMENT_SIZE + 1000, 50_000)
    first.wal = bytes(wal.data) + bytes(lost.data)
    await first.stream(lost.end, members=first.members[:1])
    first.leave()
    wal.until(common + 500_000, 20_000)
    second = proposer(wal, ttid=first.ttid)
    await second.elect(fleet.nodes[1:])
    assert second.term_start == common
    await second.stream(wal.end)
    second.leave()
    third = proposer(wal, ttid=first.ttid)
    await third.elect(fleet.nodes)
    assert third.members[0].sent == common, "the diverged member is to be cut back to the common point"
    await third.stream(wal.end)
    assert len({node.digest(first.ttid, START, wal.end) for node in fleet.nodes}) == 1
    names = [path.name for path in (fleet.nodes[0].directory / str(first.ttid.tenant_id)).glob("*/0*")]
    assert names == ["000000010000000000000001.partial"]
    third.leave()


async def test_a_new_leader_deposes_the_old_one(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(10)
    old = proposer(wal)
    await old.elect(fleet.nodes)
    await old.stream(wal.record_ends[4])
    new = proposer(wal, ttid=old.ttid)
    await new.elect(fleet.nodes)
    old.send(old.members[0], wal.end)
    with pytest.raises(AssertionError, match="deposed by term 2"):
        await old.answer(old.members[0])
    assert fleet.nodes[0].lsn(old.ttid, "flush_lsn") == wal.record_ends[4]
    await new.stream(wal.end)
    old.leave()
    new.leave()

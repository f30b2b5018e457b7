"""The walproposer process against a stock Postgres and safekeepers made of the real acceptor."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn, format_lsn, parse_lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.safekeeper_messages import HotStandbyFeedback, MembershipConfiguration, SafekeeperId
from tests.integration.walproposer_support import MemorySafekeeper, PlainPostgres, WalProposerProcess
from tests.waiting import eventually

pytestmark = pytest.mark.postgres
PG_MAJOR = max((int(p.name) for p in Path("/usr/lib/postgresql").glob("*") if (p / "bin" / "postgres").exists()), default=0)


class World:
    """Three safekeepers, one Postgres, one walproposer."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.postgres = PlainPostgres(base / "pg", PG_MAJOR)
        self.start_lsn = self.postgres.end_of_wal()
        self.ttid = TenantTimelineId(TenantId.generate(), TimelineId.generate())
        self.safekeepers: list[MemorySafekeeper] = []
        mconf = MembershipConfiguration(1, tuple(SafekeeperId(i, f"sk{i}", 5454) for i in (1, 2, 3)))
        for node_id in (1, 2, 3):
            self.safekeepers.append(MemorySafekeeper(node_id, self.ttid, mconf, PG_MAJOR * 10000, self.start_lsn))
        self.proposers: list[WalProposerProcess] = []

    def proposer(self, *options: str, **settings: Any) -> WalProposerProcess:
        config = {
            "tenant_id": str(self.ttid.tenant_id),
            "timeline_id": str(self.ttid.timeline_id),
            "safekeepers": [f"127.0.0.1:{s.port}" for s in self.safekeepers],
            "generation": 1,
            "pg_version": PG_MAJOR * 10000,
            "system_id": None,
            "reconnect_timeout_ms": 200,
            "connect_timeout_ms": 3000,
            **settings,
        }
        made = WalProposerProcess(config, self.base / f"wp{len(self.proposers)}", *options)
        self.proposers.append(made)
        return made

    async def attached(self, **settings: Any) -> WalProposerProcess:
        """Postgres running on an elected walproposer."""
        proposer = self.proposer(**settings)
        await proposer.start()
        ready = await proposer.event("ready")
        assert parse_lsn(ready["lsn"]) == self.start_lsn
        await asyncio.to_thread(self.postgres.start)
        self.attach(proposer, self.start_lsn)
        await proposer.event("attached")
        return proposer

    def attach(self, proposer: WalProposerProcess, start_lsn: Lsn) -> None:
        host = str(self.postgres.base)
        start = format_lsn(start_lsn)
        proposer.command(command="attach", host=host, port=self.postgres.port, user="cloud_admin", start_lsn=start)

    async def execute(self, *statements: str) -> None:
        """Each statement is a transaction of its own."""
        async with await psycopg.AsyncConnection.connect(self.postgres.dsn, autocommit=True) as connection:
            for statement in statements:
                await connection.execute(statement)

    async def shutdown_postgres(self) -> None:
        """Fast shutdown; it ends only when the walproposer has confirmed everything."""
        assert await asyncio.to_thread(self.postgres.process.stop, 20) == 0

    def check_logs(self) -> Lsn:
        """All running safekeepers hold the same bytes as pg_wal; returns the common end."""
        ends = {s.acceptor.flush_lsn for s in self.safekeepers if s.running}
        assert len(ends) == 1, ends
        (end,) = ends
        expected = self.postgres.wal_bytes(self.start_lsn, end)
        for safekeeper in self.safekeepers:
            if safekeeper.running:
                assert safekeeper.disk.wal.read(self.start_lsn, end) == expected
        return end

    async def close(self) -> None:
        for proposer in self.proposers:
            if hasattr(proposer, "process"):
                await proposer.close()
        self.postgres.process.kill()
        for safekeeper in self.safekeepers:
            if safekeeper.running:
                await safekeeper.stop()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    base = Path(tempfile.mkdtemp(prefix="walproposer-"))
    base.chmod(0o755)
    made = World(base)
    try:
        for safekeeper in made.safekeepers:
            await safekeeper.start()
        yield made
    except BaseException:
        for log in base.glob("**/*.log"):
            print(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}")
        raise
    finally:
        await made.close()
        shutil.rmtree(base, ignore_errors=True)


async def test_commits_travel_and_shutdown_confirms_everything(world: World) -> None:
    proposer = await world.attached()
    elected = await proposer.event("elected")
    assert elected["term"] == 1
    await world.execute("create table t (a int)", *[f"insert into t values ({i})" for i in range(50)])
    await world.execute("insert into t select generate_series(1, 200000)")
    proposer.command(command="stop", timeout_s=20)
    await world.shutdown_postgres()
    stopped = await proposer.event("stopped")
    assert await proposer.process.wait() == 0
    end = world.check_logs()
    assert parse_lsn(stopped["lsn"]) == end
    assert [s.acceptor.commit_lsn for s in world.safekeepers] == [end] * 3


async def test_commits_survive_the_loss_of_one_and_wait_without_two(world: World) -> None:
    await world.attached()
    await world.execute("create table t (a int)")
    await world.safekeepers[0].stop()
    await asyncio.wait_for(world.execute(*[f"insert into t values ({i})" for i in range(20)]), 20)
    await world.safekeepers[1].stop()
    left = world.safekeepers[2].acceptor
    before = left.flush_lsn
    waiting = asyncio.create_task(world.execute("insert into t values (1000)"))
    await eventually(lambda: left.flush_lsn > before, "the commit to reach the one that is left")
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done, "a commit was acknowledged without a quorum"
    await world.safekeepers[1].start()
    await asyncio.wait_for(waiting, 20)
    await world.safekeepers[0].start()
    sks = world.safekeepers
    await eventually(lambda: sks[0].acceptor.flush_lsn == sks[1].acceptor.flush_lsn == sks[2].acceptor.flush_lsn, "catching up")
    world.check_logs()


async def test_a_long_lost_safekeeper_catches_up_from_another(world: World) -> None:
    proposer = await world.attached(ring_mb=8)
    lost = world.safekeepers[2]
    await lost.stop()
    await world.execute("create table t (a int, b text)")
    for _ in range(4):
        await world.execute("insert into t select i, repeat('x', 100) from generate_series(1, 50000) i")
    behind = world.safekeepers[0].acceptor.flush_lsn - lost.acceptor.flush_lsn
    assert behind > 16 << 20, "the ring still holds everything: nothing is tested"
    await lost.start()
    load = asyncio.create_task(world.execute(*[f"insert into t values ({i})" for i in range(200)]))
    await load
    await eventually(lambda: lost.acceptor.flush_lsn == world.safekeepers[0].acceptor.flush_lsn, "catching up from a donor", 40)
    assert sum(s.recovery_reads for s in world.safekeepers[:2]) > 0
    proposer.command(command="stop", timeout_s=20)
    await world.shutdown_postgres()
    await proposer.event("stopped")
    world.check_logs()


async def test_a_deposed_proposer_says_so_and_commits_nothing_more(world: World) -> None:
    first = await world.attached()
    await world.execute("create table t (a int)")
    second = world.proposer()
    await second.start()
    elected = await second.event("elected")
    assert elected["term"] == 2 and elected["donor_term"] == 1
    fatal = await first.event("fatal")
    assert fatal["retry"] is False and "term 2" in fatal["reason"]
    assert await first.process.wait() == 1
    waiting = asyncio.create_task(world.execute("insert into t values (1)"))
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done, "a commit was acknowledged by a deposed leader"
    # the same Postgres on a new proposer: its WAL continues where the old term's was cut, or behind it
    ready = await second.event("ready")
    world.attach(second, parse_lsn(ready["lsn"]))
    await second.event("attached")
    await asyncio.wait_for(waiting, 20)


async def test_synchronisation_prints_the_end_of_committed_wal(world: World) -> None:
    proposer = await world.attached()
    await world.execute("create table t (a int)")
    await world.safekeepers[1].stop()
    await world.execute("insert into t select generate_series(1, 1000)")
    proposer.command(command="stop", timeout_s=20)
    await world.shutdown_postgres()
    end = parse_lsn((await proposer.event("stopped"))["lsn"])
    await world.safekeepers[1].start()
    for _ in range(2):  # the second run finds all aligned
        sync = world.proposer("--sync-safekeepers")
        await sync.start()
        out, _ = await asyncio.wait_for(sync.process.communicate(), 20)
        assert out.decode() == f"{format_lsn(end)}\n"
        assert [s.disk.state.commit_lsn for s in world.safekeepers] == [end] * 3
    world.check_logs()


async def test_a_record_larger_than_the_buffer_passes(world: World) -> None:
    await world.attached(ring_mb=8)
    await world.execute("select pg_logical_emit_message(true, 'big', repeat('x', 20000000))")
    await eventually(lambda: len({s.acceptor.flush_lsn for s in world.safekeepers}) == 1, "all three")
    world.check_logs()


async def test_end_of_stdin_ends_the_process(world: World) -> None:
    proposer = world.proposer()
    await proposer.start()
    await proposer.event("ready")
    assert proposer.process.stdin
    proposer.process.stdin.close()
    assert await asyncio.wait_for(proposer.process.wait(), 10) == 0


async def test_wrong_commands_are_fatal_and_named(world: World) -> None:
    proposer = world.proposer()
    await proposer.start()
    proposer.command(command="dance")
    fatal = await proposer.event("fatal")
    assert "dance" in fatal["reason"] and not fatal["retry"]
    assert await proposer.process.wait() == 1


async def test_wal_beyond_the_buffer_waits_in_postgres_while_there_is_no_quorum(world: World) -> None:
    await world.attached(ring_mb=8)
    await world.execute("create table t (a int, b text)")
    for safekeeper in world.safekeepers[:2]:
        await safekeeper.stop()
    async with await psycopg.AsyncConnection.connect(world.postgres.dsn, autocommit=True) as connection:
        await connection.execute("set synchronous_commit = off")
        await asyncio.wait_for(
            connection.execute("insert into t select i, repeat('x', 200) from generate_series(1, 80000) i"), 30
        )
        position = await (await connection.execute("select pg_current_wal_lsn()::text")).fetchone()
    assert position is not None
    end = parse_lsn(position[0])
    assert end - world.start_lsn > 10 << 20
    survivor = world.safekeepers[2]
    assert survivor.acceptor.commit_lsn < end
    for safekeeper in world.safekeepers[:2]:
        await safekeeper.start()
    await asyncio.wait_for(world.execute("insert into t values (0, '')"), 30)
    await eventually(lambda: all(s.acceptor.flush_lsn > end for s in world.safekeepers), "all three to catch up")
    await eventually(lambda: len({s.acceptor.flush_lsn for s in world.safekeepers}) == 1, "the same end")
    world.check_logs()


async def test_feedback_of_pageservers_and_replicas_reaches_postgres(world: World) -> None:
    await world.attached()
    await world.execute("create table t (a int)")
    applied = Lsn(world.start_lsn + 8)
    feedback = PageserverFeedback(last_received_lsn=applied, disk_consistent_lsn=world.start_lsn)
    for safekeeper in world.safekeepers:
        safekeeper.acceptor.standby_feedback = HotStandbyFeedback(1, 700, 0)
        safekeeper.give_feedback(feedback)
    await world.execute("insert into t values (1)")
    sql = "select flush_lsn::text, replay_lsn::text, backend_xmin::text, sync_state from pg_stat_replication"
    seen: list[Any] = []

    async def look() -> bool:
        async with await psycopg.AsyncConnection.connect(world.postgres.dsn, autocommit=True) as connection:
            seen[:] = await (await connection.execute(sql)).fetchone() or ()
            (xmin,) = await (await connection.execute("select xmin::text from pg_replication_slots")).fetchone() or (None,)
        return parse_lsn(seen[1]) == applied and "700" in (xmin, seen[2])

    await eventually(look, "the feedback in Postgres's views", 20, interval=0.05)
    assert parse_lsn(seen[0]) > applied and seen[3] == "sync"

"""The walproposer against real safekeeper processes and a stock Postgres."""

import asyncio
import contextlib
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from neon_services.ground.ids import TenantId, TimelineId
from neon_services.ground.lsn import Lsn, format_lsn, parse_lsn
from tests.integration.cluster import SCRIPTS, Process, Safekeeper, free_port, http, wait_until
from tests.integration.walproposer_support import PlainPostgres, WalProposerProcess

pytestmark = [pytest.mark.postgres, pytest.mark.cluster]
PG_MAJOR = max((int(p.name) for p in Path("/usr/lib/postgresql").glob("*") if (p / "bin" / "postgres").exists()), default=0)


class World:
    """A broker, three safekeepers, one Postgres."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.tenant, self.timeline = TenantId.generate(), TimelineId.generate()
        self.postgres = PlainPostgres(base / "pg", PG_MAJOR)
        self.start_lsn = self.postgres.end_of_wal()
        broker_port = free_port()
        self.broker = Process(
            "broker", [str(SCRIPTS / "storage_broker"), "--listen-addr", f"127.0.0.1:{broker_port}"], base / "broker"
        )
        self.safekeepers: list[Safekeeper] = []
        for node_id in (1, 2, 3):
            pg_port, http_port = free_port(), free_port()
            directory = base / f"safekeeper{node_id}"
            argv = [str(SCRIPTS / "safekeeper"), "-D", str(directory), "--id", str(node_id)]
            argv += ["--listen-pg", f"127.0.0.1:{pg_port}", "--listen-http", f"127.0.0.1:{http_port}"]
            argv += ["--broker-endpoint", f"http://127.0.0.1:{broker_port}"]
            self.safekeepers.append(Safekeeper(node_id, pg_port, http_port, Process(f"safekeeper{node_id}", argv, directory)))
        self.proposers: list[WalProposerProcess] = []

    def start(self) -> None:
        self.broker.start()
        for safekeeper in self.safekeepers:
            safekeeper.process.start()
        members = [{"id": s.id, "host": "127.0.0.1", "pg_port": s.pg_port} for s in self.safekeepers]
        for safekeeper in self.safekeepers:
            self.wait_up(safekeeper)
            body = {
                "tenant_id": str(self.tenant),
                "timeline_id": str(self.timeline),
                "mconf": {"generation": 1, "members": members, "new_members": None},
                "pg_version": PG_MAJOR * 10000,
                "start_lsn": format_lsn(self.start_lsn),
                "commit_lsn": format_lsn(self.start_lsn),
            }
            http("POST", f"http://127.0.0.1:{safekeeper.http_port}/v1/tenant/timeline", body)

    def wait_up(self, safekeeper: Safekeeper) -> None:
        def answers() -> bool:
            assert safekeeper.process.running, safekeeper.process.tail()
            return http("GET", f"http://127.0.0.1:{safekeeper.http_port}/v1/status") is not None

        wait_until(answers, f"safekeeper {safekeeper.id}", 30)

    def proposer(self, *options: str, **settings: Any) -> WalProposerProcess:
        config = {
            "tenant_id": str(self.tenant),
            "timeline_id": str(self.timeline),
            "safekeepers": [f"127.0.0.1:{s.pg_port}" for s in self.safekeepers],
            "generation": 1,
            "pg_version": PG_MAJOR * 10000,
            "system_id": None,
            **settings,
        }
        made = WalProposerProcess(config, self.base / f"wp{len(self.proposers)}", *options)
        self.proposers.append(made)
        return made

    async def attached(self, **settings: Any) -> WalProposerProcess:
        proposer = self.proposer(**settings)
        await proposer.start()
        ready = await proposer.event("ready")
        await asyncio.to_thread(self.postgres.start)
        host, start = str(self.postgres.base), ready["lsn"]
        proposer.command(command="attach", host=host, port=self.postgres.port, user="cloud_admin", start_lsn=start)
        await proposer.event("attached")
        return proposer

    def flush_lsn(self, safekeeper: Safekeeper) -> Lsn:
        return parse_lsn(safekeeper.status(self.tenant, self.timeline)["flush_lsn"])

    def digests(self, end: Lsn) -> set[str]:
        return {s.digest(self.tenant, self.timeline, format_lsn(self.start_lsn), format_lsn(end)) for s in self.safekeepers}

    async def close(self) -> None:
        for proposer in self.proposers:
            if hasattr(proposer, "process"):
                await proposer.close()
        for process in (self.postgres.process, *(s.process for s in self.safekeepers), self.broker):
            process.kill()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    base = Path(tempfile.mkdtemp(prefix="walproposer-"))
    base.chmod(0o755)
    made = World(base)
    try:
        await asyncio.to_thread(made.start)
        yield made
    except BaseException:
        for log in base.glob("**/*.log"):
            print(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}")
        raise
    finally:
        await made.close()
        shutil.rmtree(base, ignore_errors=True)


async def test_kills_of_safekeepers_lose_nothing(world: World) -> None:
    """Each safekeeper in turn is killed under load; every acknowledged row is in the WAL of all in the end."""
    proposer = await world.attached(ring_mb=8)
    acknowledged = 0
    done = False

    async def load() -> None:
        nonlocal acknowledged
        async with await psycopg.AsyncConnection.connect(world.postgres.dsn, autocommit=True) as connection:
            await connection.execute("create table t (a int, b text)")
            while not done:
                await connection.execute(
                    "insert into t select %s, repeat('x', 200) from generate_series(1, 20)", (acknowledged,)
                )
                acknowledged += 1

    running = asyncio.create_task(load())
    for safekeeper in world.safekeepers:
        before = acknowledged
        safekeeper.process.kill()
        await asyncio.to_thread(wait_until, lambda before=before: acknowledged > before + 50, "commits without one", 30)
        safekeeper.process.start()
        await asyncio.to_thread(world.wait_up, safekeeper)
        mark = world.flush_lsn(max(world.safekeepers, key=world.flush_lsn))
        await asyncio.to_thread(wait_until, lambda s=safekeeper, m=mark: world.flush_lsn(s) >= m, "catching up", 30)
    # without two, commits wait and nothing fails
    for safekeeper in world.safekeepers[:2]:
        safekeeper.process.signal(signal.SIGKILL)
        assert safekeeper.process.popen
        safekeeper.process.popen.wait(10)
    await asyncio.sleep(0.3)
    before = acknowledged
    await asyncio.sleep(0.5)
    assert acknowledged == before and not running.done()
    for safekeeper in world.safekeepers[:2]:
        safekeeper.process.start()
    await asyncio.to_thread(wait_until, lambda: acknowledged > before + 50, "commits again", 30)
    done = True
    await running
    # a stop waits for the quorum only, so those who were away must have caught up before
    level = lambda: len({world.flush_lsn(s) for s in world.safekeepers}) == 1  # noqa: E731
    await asyncio.to_thread(wait_until, level, "those who were away to catch up", 60)
    proposer.command(command="stop", timeout_s=20)
    assert await asyncio.to_thread(world.postgres.process.stop, 30) == 0
    end = parse_lsn((await proposer.event("stopped"))["lsn"])
    await asyncio.to_thread(wait_until, lambda: {world.flush_lsn(s) for s in world.safekeepers} == {end}, "all at the end", 30)
    assert len(world.digests(end)) == 1
    sync = world.proposer("--sync-safekeepers")
    await sync.start()
    out, _ = await asyncio.wait_for(sync.process.communicate(), 20)
    assert out.decode() == f"{format_lsn(end)}\n"


async def test_a_second_proposer_takes_over(world: World) -> None:
    first = await world.attached()
    async with await psycopg.AsyncConnection.connect(world.postgres.dsn, autocommit=True) as connection:
        await connection.execute("create table t (a int)")
    second = world.proposer()
    await second.start()
    ready = await second.event("ready")
    assert (await first.event("fatal"))["retry"] is False
    assert await first.process.wait() == 1
    with contextlib.suppress(psycopg.Error):
        async with await psycopg.AsyncConnection.connect(world.postgres.dsn, autocommit=True) as connection:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(connection.execute("insert into t values (1)"), 1)
    assert parse_lsn(ready["lsn"]) > world.start_lsn


async def test_a_long_lost_safekeeper_catches_up_from_another(world: World) -> None:
    proposer = await world.attached(ring_mb=8)
    lost = world.safekeepers[0]
    lost.process.kill()
    async with await psycopg.AsyncConnection.connect(world.postgres.dsn, autocommit=True) as connection:
        await connection.execute("create table t (a int, b text)")
        for _ in range(3):
            await connection.execute("insert into t select i, repeat('x', 200) from generate_series(1, 40000) i")
    assert world.flush_lsn(world.safekeepers[1]) - world.start_lsn > 24 << 20, "the ring still holds everything"
    lost.process.start()
    await asyncio.to_thread(world.wait_up, lost)
    mark = world.flush_lsn(world.safekeepers[1])
    await asyncio.to_thread(wait_until, lambda: world.flush_lsn(lost) >= mark, "catching up from a donor", 60)
    proposer.command(command="stop", timeout_s=20)
    assert await asyncio.to_thread(world.postgres.process.stop, 30) == 0
    end = parse_lsn((await proposer.event("stopped"))["lsn"])
    await asyncio.to_thread(wait_until, lambda: {world.flush_lsn(s) for s in world.safekeepers} == {end}, "all at the end", 30)
    assert len(world.digests(end)) == 1


async def test_a_safekeeper_that_hangs_does_not_hold_commits_up(world: World) -> None:
    """Each in turn is stopped in its tracks, its sockets open: the others take its part at once."""
    await world.attached(connect_timeout_ms=2000, lazy_ms=10)
    async with await psycopg.AsyncConnection.connect(world.postgres.dsn, autocommit=True) as connection:
        await connection.execute("create table t (a int)")
        for safekeeper in world.safekeepers:
            safekeeper.process.signal(signal.SIGSTOP)
            try:
                for value in range(30):
                    await asyncio.wait_for(connection.execute(f"insert into t values ({value})"), 5)
            finally:
                safekeeper.process.signal(signal.SIGCONT)
            mark = world.flush_lsn(max(world.safekeepers, key=world.flush_lsn))
            await asyncio.to_thread(wait_until, lambda s=safekeeper, m=mark: world.flush_lsn(s) >= m, "catching up", 30)

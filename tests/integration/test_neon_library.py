"""The library in a real Postgres: lazy pages are right, failures are clean, and the directory is useless without it."""

import hashlib
import os
import random
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, XLOG_BLCKSZ, format_lsn
from tests.integration.cluster import LIBRARIES, REPOSITORY, wait_until
from tests.integration.compute_fixture import Database, SourceServer, build_compute, compute_ground, run
from tests.unit.compute.source_server import Source

pytestmark = pytest.mark.postgres

Ground = tuple[Path, Database, SourceServer]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    base = Path(f"/tmp/neon-library-{os.getpid()}")
    with compute_ground(base) as made:
        yield made
    subprocess.run(["rm", "-rf", str(base)], check=True)


@pytest.fixture
def compute(ground: Ground, request: pytest.FixtureRequest) -> Iterator[Database]:
    base, source, server = ground
    if not server.process.running:
        server.start()
    made = build_compute(base, request.node.name.split("[")[0], source, server)
    yield made
    made.kill()
    subprocess.run(["rm", "-rf", str(made.pgdata)], check=True)


def test_everything_is_served(ground: Ground, compute: Database) -> None:
    """Dumps are equal to the source's, amcheck is clean, unlogged relations are empty and work."""
    _, source, _ = ground
    compute.start()
    assert compute.query("select count(*) from unlogged_one") == [(0,)]
    compute.query("insert into unlogged_one values (7)")
    assert compute.query("select * from unlogged_one where id = 7") == [(7,)]
    dumps = {name: compute.dump(name) for name in ("postgres", "other", "template1")}
    compute.program("pg_amcheck", "--heapallindexed", "-d", "postgres")
    wait_until(lambda: "made the files of" in compute.log_text(), "the files of all relations")
    size = compute.query("select pg_relation_size('big'), pg_database_size('other') > 1000000")
    compute.stop()
    source.start()
    try:
        assert source.query("select pg_relation_size('big'), true") == size
        for name, dump in dumps.items():
            assert dump == source.dump(name), f"the dump of {name} differs"
    finally:
        source.stop()
    assert source.pgdata.exists()


def test_writes_survive_a_crash_of_everything(compute: Database) -> None:
    """What is local stays right over kill -9 and recovery, also for relations that were partly absent."""
    compute.start()
    compute.query("update changing set value = id where id % 7 = 0")
    compute.query("delete from big where id > 15000")
    compute.query("vacuum (truncate on) big")
    compute.query("insert into big select g, 'new' from generate_series(15001, 16000) g")
    compute.query("create table made_here as select generate_series(1, 1000) g")
    compute.query("checkpoint")
    compute.query("update changing set value = -1 where id = 1")
    before = compute.query("select sum(value), count(*) from changing") + compute.query("select count(*), max(id) from big")
    compute.kill()
    compute.start()
    assert "redo starts" in compute.log_text()
    after = compute.query("select sum(value), count(*) from changing") + compute.query("select count(*), max(id) from big")
    assert after == before
    assert compute.query("select count(*) from made_here") == [(1000,)]
    compute.program("pg_amcheck", "--heapallindexed", "-d", "postgres")


def test_cold_relations_can_be_rewritten_and_dropped(compute: Database) -> None:
    compute.start()
    compute.query("create database copied template other")
    assert compute.query("select count(*), sum(g) from only_there", "copied") == [(3000, 4501500)]
    compute.query("drop database other")
    compute.query("reindex system postgres")
    compute.query("vacuum full pg_class")
    compute.query("vacuum full small")
    compute.query("cluster big using big_id_idx")
    compute.query("truncate changing")
    compute.query("drop table small")
    assert compute.query("select count(*) from big") == [(20000,)]
    assert compute.query("select count(*) from changing") == [(0,)]
    wait_until(lambda: "made the files of" in compute.log_text(), "the files of all relations")
    compute.program("pg_amcheck", "--heapallindexed", "-d", "postgres")


@pytest.mark.parametrize("sql", [
    "create database no strategy file_copy",
    "alter database other set tablespace pg_default",
    "create tablespace elsewhere location '/tmp'",
])  # fmt: skip
def test_statements_behind_the_storage_manager_are_refused(compute: Database, sql: str) -> None:
    compute.start()
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="is not supported by this compute"):
        compute.query(sql)


# -- the pageserver is away


def test_pageserver_away_cancel_timeout_error_and_recovery(ground: Ground, compute: Database) -> None:
    _, _, server = ground
    compute.start()
    assert compute.query("select count(*) from small") == [(1000,)]
    server.stop()
    assert compute.query("select count(*) from small") == [(1000,)], "local pages need no pageserver"

    with compute.connect() as session:
        session.execute("set statement_timeout = '300ms'")
        started = time.monotonic()
        with pytest.raises(psycopg.errors.QueryCanceled, match="statement timeout"):
            session.execute("select count(*) from big")
        assert time.monotonic() - started < 3
        session.execute("set statement_timeout = 0")
        timer = threading.Timer(0.3, session.cancel)
        timer.start()
        with pytest.raises(psycopg.errors.QueryCanceled, match="user request"):
            session.execute("select count(*) from big")
        timer.join()

        session.execute("set neon.pageserver_retry_timeout = '500ms'")
        with pytest.raises(psycopg.errors.ConnectionFailure) as failure:
            session.execute("select count(*) from big")
        message = failure.value.diag.message_primary or ""
        assert "could not read block 0 of relation 1663/" in message and f"127.0.0.1:{server.port}" in message
        assert "refused" in (failure.value.diag.message_detail or "").lower()

        # a statement that waits goes on by itself when the server is back
        session.execute("reset neon.pageserver_retry_timeout")
        threading.Timer(0.5, server.start).start()
        assert session.execute("select count(*) from big").fetchone() == (20000,)


def test_terminate_while_waiting(ground: Ground, compute: Database) -> None:
    _, _, server = ground
    compute.start()
    session, monitor = compute.connect(), compute.connect()
    pid = session.info.backend_pid
    waits = f"select wait_event_type from pg_stat_activity where pid = {pid}"
    for warm in (session, monitor):  # catalogs that the statements need
        warm.execute("select count(*) from small")
        warm.execute(waits)  # type: ignore[call-overload]
    server.stop()
    errors: list[Exception] = []

    def wait() -> None:
        try:
            session.execute("select count(*) from big")
        except psycopg.Error as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: monitor.execute(waits).fetchall() == [("Extension",)], "the backend to wait for a page", 20)  # type: ignore[call-overload]
    os.kill(pid, signal.SIGTERM)  # what pg_terminate_backend does
    thread.join(5)
    assert isinstance(errors[0], psycopg.errors.AdminShutdown)


def test_a_moved_pageserver_is_followed_by_a_waiting_backend(ground: Ground, compute: Database) -> None:
    base, source, server = ground
    compute.start()
    with compute.connect() as session:
        session.execute("select count(*) from small")
        session.execute("set neon.pageserver_retry_timeout = '60s'")
        server.stop()
        other = SourceServer(source, base / "server2")
        other.start()
        try:

            def move() -> None:
                with (compute.pgdata / "postgresql.conf").open("a") as conf:
                    conf.write(f"neon.pageserver_connstring = '{other.connstring}'\n")
                os.kill(compute.postmaster_pid or 0, signal.SIGHUP)

            threading.Timer(0.3, move).start()
            assert session.execute("select count(*) from big").fetchone() == (20000,)
        finally:
            other.stop()


# -- the guard


def refusal(compute: Database, *options: str) -> str:
    """Start in vain; the log."""
    control = (compute.pgdata / "global/pg_control").read_bytes()
    assert compute.start(*options, check=False).returncode != 0, "the server started"
    assert (compute.pgdata / "global/pg_control").read_bytes() == control, "a refused start has written"
    return compute.log_text()


@pytest.mark.parametrize("state", ["fresh", "crashed", "stopped"])
def test_useless_without_the_library(compute: Database, state: str) -> None:
    """In every state: Postgres without the library stops before it writes, and so do the tools."""
    if state != "fresh":
        compute.start()
        compute.query("create table t as select generate_series(1, 10) g")
        compute.stop() if state == "stopped" else compute.kill()
    assert 'required WAL directory "pg_wal" does not exist' in refusal(compute, "-c shared_preload_libraries=''")
    control = (compute.pgdata / "global/pg_control").read_bytes()
    for argv in (["pg_resetwal", "-f", "-D"], ["pg_checksums", "--check", "-D"]):
        done = run(compute.bin / argv[0], *argv[1:], compute.pgdata, check=False)
        assert done.returncode != 0, f"{argv[0]} worked: {done.stdout}"
    single = run(
        compute.bin / "postgres", "--single", "-D", compute.pgdata, "-c", "shared_preload_libraries=", "postgres", check=False
    )
    assert 'required WAL directory "pg_wal" does not exist' in single.stderr
    assert (compute.pgdata / "global/pg_control").read_bytes() == control
    compute.start()
    expected = [(0,)] if state == "fresh" else [(10,)]
    assert compute.query(f"select count(*) from {'unlogged_one' if state == 'fresh' else 't'}") == expected


def test_no_base_backup_of_holes(ground: Ground, compute: Database) -> None:
    base, _, _ = ground
    compute.start()
    done = compute.program("pg_basebackup", "-D", str(base / "copy"), "-c", "fast", check=False)
    assert done.returncode != 0
    assert "neon.no_basebackup" in compute.log_text()
    assert not (base / "copy" / "PG_VERSION").exists()


def _break(name: str, compute: Database) -> str:
    """Damage the directory; what the log must say."""
    pgdata = compute.pgdata
    if name == "no map":
        (pgdata / "neon.map").unlink()
        return 'could not open "neon.map"'
    if name == "map header":
        with (pgdata / "neon.map").open("r+b") as file:
            file.seek(24)
            file.write(b"\xff")
        return "Its header fails its checksum"
    if name == "map cut":
        os.truncate(pgdata / "neon.map", 8192)
        return "Its size does not agree with its header"
    if name == "other timeline":
        with (pgdata / "postgresql.conf").open("a") as conf:
            conf.write(f"neon.timeline_id = '{'33' * 16}'\n")
        return "the directory was made for another one"
    if name == "real pg_wal":
        (pgdata / "pg_wal").unlink()
        (pgdata / "pg_wal.neon").rename(pgdata / "pg_wal")
        return '"pg_wal" is not a link'
    if name == "backup guard":
        (pgdata / "neon.no_basebackup").unlink()
        return '"neon.no_basebackup" with mode 0000 is missing'
    if name == "other system":
        with (pgdata / "neon.map").open("r+b") as file:
            other = Source.map_with_other_system(file.read(4096))
            file.seek(0)
            file.write(other)
        return "It is for system identifier"
    raise AssertionError(name)


@pytest.mark.parametrize(
    "damage", ["no map", "map header", "map cut", "other timeline", "real pg_wal", "backup guard", "other system"]
)
def test_a_damaged_directory_is_refused(compute: Database, damage: str) -> None:
    expected = _break(damage, compute)
    log = refusal(compute)
    assert "FATAL" in log and expected in log, log


def test_the_library_refuses_an_ordinary_directory(ground: Ground) -> None:
    _, source, _ = ground
    log = refusal(source, f"-c shared_preload_libraries='{LIBRARIES}/pg{source.major}/neon.so'")
    assert "FATAL" in log and "neon.no_basebackup" in log


def test_the_self_test_finds_a_bypassed_function(ground: Ground, compute: Database) -> None:
    """A build with one function that is not overridden must stop the server."""
    base, _, _ = ground
    out = base / "faulty"
    subprocess.run(["install", "-d", "-m", "755", str(out)], check=True)
    subprocess.run(
        ["make", "-s", "-C", str(REPOSITORY / "postgres_ext/neon"), f"OUT={out}",
         f"PG_CONFIG={compute.bin}/pg_config", 'NEON_EXTRA_CFLAGS=-DNEON_TEST_SKIP_OVERRIDE=\\"mdprefetch\\"'],
        check=True, capture_output=True,
    )  # fmt: skip
    compute.start(f"-c shared_preload_libraries={out}/neon.so", check=False)
    wait_until(lambda: "mdprefetch() was called without the library" in compute.log_text(), "the self-test to fail", 20)
    wait_until(lambda: compute.postmaster_pid is None, "the server to stop", 20)


def test_another_build_of_the_server_is_refused(ground: Ground, compute: Database) -> None:
    """A library of another minor release does not run: signatures inside the server may differ."""
    base, _, _ = ground
    content = (LIBRARIES / f"pg{compute.major}" / "neon.so").read_bytes()
    version = compute.program("postgres", "--version").stdout.split()[2].encode()
    assert content.count(b"PostgreSQL " + version) >= 1
    other = base / "other_build.so"
    other.write_bytes(content.replace(b"PostgreSQL " + version, b"PostgreSQL " + version[:-1] + b"X"))
    other.chmod(0o755)
    log = refusal(compute, f"-c shared_preload_libraries={other}")
    assert 'library "neon" was built for another build of the server' in log


# -- many processes at once


def test_concurrent_hydration_and_writes(compute: Database) -> None:
    """Sessions that read, write, prewarm and rewrite cold relations at once see no stale and no lost page."""
    seed = int(time.time())
    print("seed", seed)
    compute.start("-c shared_buffers=2MB", "-c checkpoint_timeout=30s", "-c max_wal_size=64MB")
    compute.query("create extension pg_prewarm")
    failures: list[BaseException] = []

    def session(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        try:
            with compute.connect() as connection:
                connection.execute("set enable_indexscan = off; set enable_indexonlyscan = off" if number % 2 else "select 1")
                for _ in range(60):
                    at = rng.randrange(20000)
                    choice = rng.randrange(5)
                    if choice == 0:
                        connection.execute("select count(*) from big where id between %s and %s", (at, at + 500))
                    elif choice == 1:
                        connection.execute("select pg_prewarm('big', %s)", (rng.choice(["read", "prefetch", "buffer"]),))
                    elif choice == 2:
                        connection.execute("select sum(length(filler)) from big")
                    else:
                        connection.execute("update changing set value = value + 1 where id = %s", (at % 5000 + 1,))
                        connection.execute("insert into done values (%s)", (number,))
        except BaseException as error:
            failures.append(error)

    compute.query("create table done (who int)")
    threads = [threading.Thread(target=session, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures, failures
    assert compute.query("select sum(value) from changing") == compute.query("select count(*) from done")
    digest = "select count(*), md5(string_agg(filler, '' order by id)) from big"
    expected = hashlib.md5("".join(hashlib.md5(str(g).encode()).hexdigest() * 4 for g in range(1, 20001)).encode()).hexdigest()
    assert compute.query(digest) == [(20000, expected)]
    compute.program("pg_amcheck", "--heapallindexed", "-d", "postgres")
    compute.kill()
    compute.start()
    assert compute.query(digest) == [(20000, expected)]
    assert compute.query("select sum(value) from changing") == compute.query("select count(*) from done")


def map_counters(compute: Database) -> dict[str, int]:
    """pages fetched, pages installed, writes that installed them, reads that waited, reconnects."""
    with (compute.pgdata / "neon.map").open("rb") as file:
        values = struct.unpack_from("<5Q", file.read(256), 104)
    return dict(zip(("fetched", "installed", "installs", "waited", "reconnects"), values, strict=True))


def test_sequential_reads_are_batched(compute: Database) -> None:
    """A cold scan asks ahead: far fewer waits and writes than pages, and every page is fetched once."""
    compute.start("-c max_parallel_workers_per_gather=0", "-c neon.fill_delay=-1")
    compute.query("select count(*) from small")
    before = map_counters(compute)
    assert compute.query("select count(*) from big") == [(20000,)]
    blocks = compute.query("select pg_relation_size('big') / 8192")[0][0]
    used = {name: value - before[name] for name, value in map_counters(compute).items()}
    assert used["installed"] >= blocks > 300
    assert used["fetched"] <= blocks + 200, used
    assert used["waited"] < blocks / 2 and used["installs"] < blocks / 2, used


# -- the first checkpoint at every kind of position


def test_first_checkpoint_at_page_and_segment_boundaries(ground: Ground) -> None:
    """19 positions of the start LSN: start, write, kill -9, recovery from the record, and pg_waldump reads from it."""
    base, source, server = ground
    if not server.process.running:
        server.start()
    end = Source(source.pgdata).end_lsn
    page = [0, 8184, 8176, 8168, 8160, 8144, 8112, 8104, 8080, 8072, 8064, 8056]
    segment = [0, 8192, *(WAL_SEGMENT_SIZE - distance for distance in (8, 40, 104, 120, 128))]
    targets = [(XLOG_BLCKSZ, offset) for offset in page] + [(WAL_SEGMENT_SIZE, offset) for offset in segment]
    for modulus, offset in targets:
        gap = (offset - end) % modulus
        where = format_lsn(end + gap)
        compute = build_compute(base, "boundary", source, server, gap=gap)
        try:
            compute.start()
            compute.query("create table w as select generate_series(1, 1000) g")
            start = compute.query("select checkpoint_lsn::text from pg_control_checkpoint()")[0][0]
            compute.kill()
            dump = run(compute.bin / "pg_waldump", "-p", compute.pgdata / "pg_wal.neon", "-s", start, "-n", "2", check=False)
            assert "CHECKPOINT_SHUTDOWN redo" in dump.stdout.split("\n")[0], (where, dump.stdout, dump.stderr)
            compute.start()
            assert "redo starts" in compute.log_text(), where
            assert compute.query("select count(*) from w") == [(1000,)], where
        finally:
            compute.kill()
            subprocess.run(["rm", "-rf", str(compute.pgdata)], check=True)

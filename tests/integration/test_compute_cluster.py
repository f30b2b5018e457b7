"""Computes on real safekeepers and a real pageserver: rebuilt anywhere, fenced by the newer one, branched."""

import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from neon_services.ground.ids import TimelineId
from neon_services.ground.lsn import XLOG_BLCKSZ, parse_lsn
from tests.integration.cluster import Cluster, Compute, http, running_cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.postgres]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    base = Path(f"/tmp/neon-compute-cluster-{os.getpid()}")
    with running_cluster(base) as running:
        yield running
    subprocess.run(["rm", "-rf", str(base)], check=True)


def branch(cluster: Cluster, name: str, lsn: str | None = None) -> Compute:
    """A compute on a new branch of the main timeline, so that tests do not disturb each other."""
    timeline = TimelineId.generate()
    cluster.create_timeline(timeline, ancestor=cluster.timeline, lsn=lsn)
    return cluster.make_compute(name, timeline)


def end(compute: Compute) -> None:
    compute.kill_everything()
    compute.wipe()


def check_indexes(compute: Compute) -> None:
    """Every btree agrees with its table."""
    compute.query("create extension if not exists amcheck")
    compute.query(
        "select bt_index_check(i.indexrelid, true) from pg_index i join pg_class c on c.oid = i.indexrelid "
        "join pg_am a on a.oid = c.relam where a.amname = 'btree' and c.relpersistence = 'p' and i.indisvalid"
    )


def test_acknowledged_transactions_survive_the_loss_of_the_compute(cluster: Cluster) -> None:
    """kill -9 of everything under load, disk gone, three times: what was acknowledged is there, nothing is half there."""
    compute = branch(cluster, "lost")
    compute.start()
    compute.query("create table ledger (who int, n int, amount int, primary key (who, n))")
    acknowledged = [0] * 4
    for _ in range(3):
        stop = threading.Event()

        def work(who: int, stop: threading.Event = stop) -> None:
            try:
                with compute.connect() as session:
                    while not stop.is_set():
                        n = acknowledged[who] + 1
                        with session.transaction():
                            session.execute("insert into ledger values (%s, %s, 1) on conflict do nothing", (who, n))
                        acknowledged[who] = n
            except psycopg.OperationalError:
                return

        threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        target = sum(acknowledged) + 200
        wait_until(lambda target=target: sum(acknowledged) >= target, "200 commits", 60)
        compute.kill_everything()
        stop.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        compute.wipe()
        compute.start()
        for who, count, top in compute.query("select who, count(*), max(n) from ledger group by 1"):
            assert count == top, "a gap in what one session wrote"
            assert acknowledged[who] <= top <= acknowledged[who] + 1, "a lost or an invented commit"
    check_indexes(compute)
    end(compute)


def test_the_newer_compute_wins(cluster: Cluster) -> None:
    """The older one stops and says why, and what it had not acknowledged is not visible anywhere."""
    older = branch(cluster, "older")
    older.start()
    older.query("create table t (i int)")
    older.query("insert into t values (1)")
    newer = cluster.make_compute("newer", older.timeline)
    newer.start()
    assert older.process.popen is not None
    assert older.process.popen.wait(30) == 1
    assert "has promised term" in older.process.tail()
    assert newer.query("select * from t") == [(1,)]
    newer.query("insert into t values (2)")
    end(newer)
    older.wipe()
    # and back again: the first one, started anew, sees what the second has written
    older.start()
    assert older.query("select array_agg(i order by i) from t") == [([1, 2],)]
    end(older)


def test_start_at_many_ends_of_wal(cluster: Cluster) -> None:
    """Each start continues the log where the last one was cut off: page ends, page starts and in between."""
    seed = int(time.time())
    print("seed", seed)
    rng = random.Random(seed)
    compute = branch(cluster, "many")
    compute.start()
    compute.query("create table t (i int primary key)")
    offsets = set()
    for round_number in range(4):
        compute.query(f"insert into t values ({round_number})")
        # fill the page so far that the next start's record is near its end
        at = parse_lsn(compute.query("select pg_current_wal_insert_lsn()::text")[0][0])
        room = (-at - rng.choice([0, 8, 24, 64, 100, 120, 136])) % XLOG_BLCKSZ
        if room > 200:
            compute.query(f"select pg_logical_emit_message(true, 'fill', repeat('x', {room - 160}))")
        compute.kill_everything()
        compute.start()
        assert compute.query("select count(*) from t") == [(round_number + 1,)]
        offsets.add(parse_lsn(compute.query("select redo_lsn::text from pg_control_checkpoint()")[0][0]) % XLOG_BLCKSZ)
    assert len(offsets) > 1
    check_indexes(compute)
    end(compute)


def test_a_branch_in_the_past_and_a_clean_stop(cluster: Cluster) -> None:
    main = cluster.make_compute("main")
    main.start()
    main.query("create table history (i int)")
    main.query("insert into history select generate_series(1, 1000)")
    lsn = main.query("select pg_current_wal_flush_lsn()::text")[0][0]
    main.query("truncate history")
    past = branch(cluster, "past", lsn)
    past.start()
    assert past.query("select count(*) from history") == [(1000,)]
    assert main.query("select count(*) from history") == [(0,)]
    past.query("delete from history where i > 10")
    body = http("POST", f"http://127.0.0.1:{past.http_port}/terminate")
    flushed = cluster.flush_lsns(past.timeline)
    assert max(flushed) == parse_lsn(body["lsn"]), "the answer is the end of committed WAL"
    past.process.stop()
    past.start()
    assert past.query("select count(*) from history") == [(10,)]
    end(past)
    assert main.process.stop() == 0


def test_commits_wait_for_the_quorum_and_resume(cluster: Cluster) -> None:
    compute = branch(cluster, "waiting")
    compute.start()
    compute.query("create table t (i int)")
    for safekeeper in cluster.safekeepers[:2]:
        safekeeper.process.kill()
    try:
        assert compute.query("select count(*) from t") == [(0,)], "reads need no quorum"
        answer = threading.Thread(target=lambda: compute.query("insert into t values (1)"))
        answer.start()
        answer.join(1.5)
        assert answer.is_alive(), "a commit was acknowledged without a quorum"
    finally:
        for safekeeper in cluster.safekeepers[:2]:
            safekeeper.process.start()
    answer.join(30)
    assert not answer.is_alive(), "the commit did not resume by itself"
    assert compute.query("select * from t") == [(1,)]
    end(compute)

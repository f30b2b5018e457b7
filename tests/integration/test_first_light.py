"""The whole system on loopback: SQL through a compute, and every process of it killed in turn."""

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from neon_services.ground.ids import TimelineId
from neon_services.ground.lsn import parse_lsn
from tests.integration.cluster import Cluster, Compute, http, temporary_cluster, wait_until
from tests.integration.workload import AcknowledgedWriter, check_pgbench_invariants

pytestmark = [pytest.mark.cluster, pytest.mark.postgres]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with temporary_cluster("neon-first-light-") as running:
        yield running


class Load:
    """pgbench in a thread; its result or its failure."""

    def __init__(self, compute: Compute, seconds: int, clients: int = 8) -> None:
        self.output = ""
        self.failure: BaseException | None = None
        arguments = ("-n", "-c", str(clients), "-j", "2", "-T", str(seconds))
        self._thread = threading.Thread(target=self._run, args=(compute, arguments, seconds + 180), daemon=True)
        self._thread.start()

    def _run(self, compute: Compute, arguments: tuple[str, ...], timeout: float) -> None:
        try:
            self.output = compute.pgbench(*arguments, timeout=timeout)
        except BaseException as error:
            self.failure = error

    def finish(self, timeout: float = 240.0) -> str:
        """Wait for the end; raises what pgbench failed with."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "pgbench did not end"
        if self.failure is not None:
            raise self.failure
        return self.output


def dump(compute: Compute) -> str:
    """pg_dumpall of a compute, without the lines that differ from run to run."""
    command = [compute.cluster.binary("pg_dumpall"), "-h", "127.0.0.1", "-p", str(compute.port), "-U", "cloud_admin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env={"PGPASSWORD": "cloud_admin"})
    return "\n".join(line for line in done.stdout.splitlines() if not line.startswith(("\\restrict", "\\unrestrict")))


def amcheck(compute: Compute) -> None:
    """pg_amcheck over all databases, every heap tuple looked up in its indexes."""
    compute.query("create extension if not exists amcheck")
    command = [compute.cluster.binary("pg_amcheck"), "-h", "127.0.0.1", "-p", str(compute.port), "-U", "cloud_admin"]
    command += ["-d", "postgres", "--heapallindexed", "--install-missing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={"PGPASSWORD": "cloud_admin"})
    assert done.returncode == 0 and not done.stdout.strip(), f"pg_amcheck: {done.stdout}\n{done.stderr}"


def test_every_acknowledged_transaction_survives_the_loss_of_the_compute(cluster: Cluster) -> None:
    compute = cluster.make_compute()
    compute.start()
    compute.pgbench("-i", "-q", "-s", "10")
    writer = AcknowledgedWriter(compute)
    writer.prepare()
    writer.start()
    load = Load(compute, seconds=60)
    load.finish()
    wait_until(lambda: len(writer.acknowledged) > 50, "the writer to have written", 30)
    compute.kill_everything()  # in the middle of the writer's stream of commits
    writer.join_after_crash()
    compute.wipe()

    compute.start()
    counted = check_pgbench_invariants(compute)
    assert counted["accounts"] == 1_000_000
    assert counted["transactions"] > 0
    assert writer.lost() == []
    amcheck(compute)


def test_commits_go_on_without_one_safekeeper_and_wait_without_two(cluster: Cluster) -> None:
    compute = cluster.make_compute()
    compute.start()
    compute.pgbench("-i", "-q", "-s", "2")
    writer = AcknowledgedWriter(compute)
    writer.prepare()
    writer.start()
    load = Load(compute, seconds=20, clients=4)
    first, second, _ = cluster.safekeepers
    wait_until(lambda: len(writer.acknowledged) > 20, "the writer to have written", 30)
    first.process.kill()
    seen = len(writer.acknowledged)
    wait_until(lambda: len(writer.acknowledged) > seen + 20, "commits with two of three safekeepers", 30)

    second.process.kill()
    seen = len(writer.acknowledged)
    quiet = time.monotonic()
    # Without a quorum nothing may be acknowledged: at most the one commit that was already on its way.
    wait_until(lambda: time.monotonic() - quiet > 3, "three seconds without a quorum", 10)
    assert len(writer.acknowledged) <= seen + 1, "a commit was acknowledged without a quorum"
    assert not writer.errors
    assert cluster.computes[0].query("select 1") == [(1,)], "reads go on without a quorum"

    second.process.start()
    seen = len(writer.acknowledged)
    wait_until(lambda: len(writer.acknowledged) > seen + 20, "commits after the quorum is back", 60)
    first.process.start()
    load.finish()
    writer.stop()
    assert writer.errors == []
    assert writer.lost() == []
    check_pgbench_invariants(compute)
    cluster.wait_same_wal()


def test_pageserver_killed_and_its_disk_lost(cluster: Cluster) -> None:
    compute = cluster.make_compute(shared_buffers="16MB")
    compute.start()
    compute.pgbench("-i", "-q", "-s", "5")
    load = Load(compute, seconds=15, clients=4)
    cluster.pageserver.kill()
    wait_until(lambda: not cluster.pageserver.running, "the pageserver to be gone")
    cluster.pageserver.start()
    cluster.wait_services()
    load.finish()
    check_pgbench_invariants(compute)
    expected = dump(compute)
    http("PUT", f"{cluster.pageserver_api}/v1/tenant/{cluster.tenant}/timeline/{cluster.timeline}/checkpoint?compact=false")
    assert compute.process.stop() is not None

    # the disk of the pageserver is lost: the bucket and the safekeepers are enough
    cluster.pageserver.kill()
    shutil.rmtree(cluster.pageserver.directory)
    cluster.write_pageserver_config()
    cluster.pageserver.start()
    cluster.wait_services()
    cluster.attach_tenant(generation=2)
    compute.wipe()
    compute.start()
    assert dump(compute) == expected
    check_pgbench_invariants(compute)
    amcheck(compute)


def test_a_branch_in_the_past_sees_exactly_that_moment(cluster: Cluster) -> None:
    main = cluster.make_compute("main")
    main.start()
    main.query("create table history (n int primary key, note text)")
    main.query("insert into history select g, 'old' from generate_series(1, 1000) g")
    ((moment,),) = main.query("select pg_current_wal_flush_lsn()::text")
    main.query("update history set note = 'new' where n % 2 = 0")
    main.query("insert into history select g, 'later' from generate_series(1001, 2000) g")
    main.query("create table afterwards (n int)")
    wait_until(
        lambda: parse_lsn(cluster.timeline_detail()["last_record_lsn"]) >= parse_lsn(moment),
        "the pageserver to reach the moment",
    )

    branch_id = TimelineId.generate()
    cluster.create_timeline(branch_id, ancestor=cluster.timeline, lsn=moment)
    branch = cluster.make_compute("branch", branch_id)
    branch.start()
    assert branch.query("select count(*), min(note), max(note) from history") == [(1000, "old", "old")]
    assert branch.query("select to_regclass('afterwards')") == [(None,)]

    branch.query("insert into history values (5000, 'branch')")
    main.query("insert into history values (5000, 'main')")
    for compute in (branch, main):
        compute.kill_everything()
        compute.wipe()
        compute.start()
    assert branch.query("select note from history where n = 5000") == [("branch",)]
    assert main.query("select note from history where n = 5000") == [("main",)]
    assert branch.query("select count(*) from history") == [(1001,)]
    assert main.query("select count(*) from history") == [(2001,)]


def test_reads_wait_for_the_pageserver_and_can_be_cancelled(cluster: Cluster) -> None:
    compute = cluster.make_compute()
    compute.start()
    compute.query("create table cold as select g, repeat('y', 500) filler from generate_series(1, 20000) g")
    compute.kill_everything()
    compute.wipe()
    compute.start()
    compute.query("select 1")
    cluster.pageserver.kill()
    with contextlib.closing(compute.connect()) as connection:
        connection.execute("set statement_timeout = '2s'")
        with pytest.raises(Exception, match="statement timeout"):
            connection.execute("select sum(length(filler)) from cold")
        connection.execute("set statement_timeout = 0")
        cluster.pageserver.start()
        assert connection.execute("select sum(length(filler)) from cold").fetchall() == [(10_000_000,)]

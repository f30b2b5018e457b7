"""Postgres's own WAL, with switched segments, goes to the bucket and reads the same from there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, parse_lsn
from tests.integration.cluster import Cluster, Safekeeper, http, temporary_cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.postgres]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with temporary_cluster("neon-offload-") as running:
        yield running


def local_segments(cluster: Cluster, safekeeper: Safekeeper) -> list[Path]:
    directory = safekeeper.process.directory / str(cluster.tenant) / str(cluster.timeline)
    return sorted(path for path in directory.iterdir() if path.name.startswith("0000"))


def test_wal_of_postgres_with_switched_segments(cluster: Cluster) -> None:
    compute = cluster.make_compute()
    compute.start()
    compute.query("create table t (id int, text text)")
    compute.query("insert into t select g, repeat(md5(g::text), 20) from generate_series(1, 30000) g")
    for _ in range(2):
        compute.query("select pg_switch_wal()")
        compute.query("insert into t values (0, 'after a switch')")
    compute.query("select pg_switch_wal()")
    compute.kill_everything()  # perhaps before the zeros behind the last switch arrived everywhere

    def status(safekeeper: Safekeeper) -> dict[str, str]:
        return safekeeper.status(cluster.tenant, cluster.timeline)

    start = status(cluster.safekeepers[0])["timeline_start_lsn"]
    commit = max(parse_lsn(status(s)["commit_lsn"]) for s in cluster.safekeepers)
    end = commit - commit % WAL_SEGMENT_SIZE
    end_text = f"{end >> 32:X}/{end & 0xFFFFFFFF:X}"
    full = range(parse_lsn(start) // WAL_SEGMENT_SIZE, end // WAL_SEGMENT_SIZE)
    assert len(full) >= 3
    wait_until(lambda: all(parse_lsn(status(s)["backup_lsn"]) >= end for s in cluster.safekeepers), "WAL in the bucket", 60)
    before = {s.digest(cluster.tenant, cluster.timeline, start, end_text) for s in cluster.safekeepers}
    assert len(before) == 1
    bucket = cluster.base / "remote-wal" / str(cluster.tenant) / str(cluster.timeline)
    for safekeeper in cluster.safekeepers:
        complete = [path for path in local_segments(cluster, safekeeper) if not path.name.endswith(".partial")]
        for path in complete:
            assert (bucket / path.name).read_bytes() == path.read_bytes()
    # the pageserver's layers in the bucket free the safekeepers' disks
    api = f"{cluster.pageserver_api}/v1/tenant/{cluster.tenant}/timeline/{cluster.timeline}"

    def freed() -> bool:
        http("PUT", f"{api}/checkpoint?compact=false")
        return all(len(local_segments(cluster, s)) <= 2 for s in cluster.safekeepers)

    wait_until(freed, "the WAL to leave the disks", 60)
    assert {s.digest(cluster.tenant, cluster.timeline, start, end_text) for s in cluster.safekeepers} == before
    # a compute starts and writes as if all of it were there
    compute.wipe()
    compute.start()
    assert compute.query("select count(*), sum(id) from t") == [(30002, 30000 * 30001 // 2)]
    compute.query("insert into t values (1, 'new')")

"""The storage engine under a real Postgres: small layers, kill -9 again and again, eviction, images; all is there."""

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground.ids import TimelineId
from neon_services.ground.lsn import parse_lsn
from tests.integration.cluster import Cluster, http, running_cluster, wait_until
from tests.integration.test_first_light import Load, amcheck, dump
from tests.integration.workload import AcknowledgedWriter, check_pgbench_invariants

pytestmark = [pytest.mark.cluster, pytest.mark.postgres]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("cluster")
    for parent in (base, *base.parents):
        if parent == Path("/tmp"):
            break
        parent.chmod(0o755)
    shutil.chown(base, "postgres", "postgres")
    with running_cluster(base / "c") as running:
        yield running
    shutil.rmtree(base, ignore_errors=True)


def test_killed_again_and_again_with_small_layers(cluster: Cluster) -> None:
    seed = time.time_ns() % 1000
    print(f"seed {seed}")
    rng = random.Random(seed)
    timeline = f"{cluster.pageserver_api}/v1/tenant/{cluster.tenant}/timeline/{cluster.timeline}"
    conf = {"tenant_id": str(cluster.tenant), "checkpoint_distance": 3 << 20, "compaction_target_size": 4 << 20}
    http("PUT", f"{cluster.pageserver_api}/v1/tenant/config", conf)
    compute = cluster.make_compute(shared_buffers="16MB")
    compute.start()
    compute.pgbench("-i", "-q", "-s", "2")
    writer = AcknowledgedWriter(compute)
    writer.prepare()
    writer.start()
    load, load_ends = Load(compute, seconds=15, clients=4), time.monotonic() + 15
    for number in range(3):
        target = parse_lsn(cluster.timeline_detail()["disk_consistent_lsn"]) + (rng.randrange(1, 5) << 20)

        def flushed(target: int = target) -> bool:
            reached = parse_lsn(cluster.timeline_detail()["disk_consistent_lsn"]) >= target
            return reached or time.monotonic() > load_ends

        wait_until(flushed, "some layers to be written", 60)
        if number == 1:
            http("PUT", timeline + "/checkpoint?force_image_layer_creation=true&wait_until_uploaded=true")
        cluster.pageserver.kill()
        cluster.pageserver.start()
        cluster.wait_services()
    load.finish()
    writer.stop()
    assert not writer.errors and not writer.lost()
    check_pgbench_invariants(compute)
    expected = dump(compute)
    compute.process.stop()

    # the compute's last WAL included: the checkpoint below must find nothing on its way
    end = max(parse_lsn(member.status(cluster.tenant, cluster.timeline)["flush_lsn"]) for member in cluster.safekeepers)
    wait_until(lambda: parse_lsn(cluster.timeline_detail()["last_record_lsn"]) >= end, "the pageserver to follow", 60)
    http("PUT", timeline + "/checkpoint?wait_until_uploaded=true")
    detail = cluster.timeline_detail()
    assert detail["remote_consistent_lsn"] == detail["disk_consistent_lsn"] == detail["last_record_lsn"]
    layers: list[dict[str, Any]] = http("GET", timeline + "/layer")["historic_layers"]
    kinds = [layer["kind"] for layer in layers]
    assert kinds.count("Delta") > 5 and kinds.count("Image") > 3, kinds
    for layer in layers:
        http("DELETE", f"{timeline}/layer/{layer['layer_file_name']}")
    assert all(layer["remote"] for layer in http("GET", timeline + "/layer")["historic_layers"])

    # a branch at the very end reads everything through its ancestor's layers, which come from the bucket
    branch = TimelineId.generate()
    cluster.create_timeline(branch, ancestor=cluster.timeline)
    fresh = cluster.make_compute("fresh", branch)
    fresh.start()
    assert dump(fresh) == expected
    check_pgbench_invariants(fresh)
    amcheck(fresh)

"""The metrics of running services have Neon's names and labels: what dashboards and alerts are made of."""

import asyncio
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from prometheus_client.parser import text_string_to_metric_families

from neon_services.ground.lsn import Lsn
from neon_services.ground.metrics_cache import MetricsCache
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, ScriptedProposer, new_ttid, read_stream, running_fleet
from tests.integration.test_pull_timeline import create, refusal
from tests.integration.test_safekeeper_offload import options, pageserver_has_everything, proposer
from tests.unit.safekeeper.walmaker import WalMaker
from tests.waiting import eventually, until, wait_until

pytestmark = pytest.mark.cluster
SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)
TIMELINE = frozenset({"tenant_id", "timeline_id"})

# by the names that a scrape shows; histograms without _bucket, _count and _sum
_OF_TIMELINES = """
    commit_lsn backup_lsn flush_lsn epoch_start_lsn peer_horizon_lsn remote_consistent_lsn ps_last_received_lsn
    feedback_last_time_seconds ps_feedback_count_total ps_corruption_detected timeline_active wal_backup_active
    connected_computes disk_usage_bytes acceptor_term written_wal_bytes_total written_wal_seconds_total
    flushed_wal_seconds_total
"""
_OF_THE_BROKER = """
    active_publishers per_timeline_active_subscribers all_keys_active_subscribers processed_messages_total
    broadcasted_messages_total broadcast_dropped_messages_total published_oneoff_messages_total
"""
OF_TIMELINES = {f"safekeeper_{name}" for name in _OF_TIMELINES.split()}
OF_THE_BROKER = {f"storage_broker_{name}" for name in _OF_THE_BROKER.split()}
OF_THE_PROCESS = {
    f"safekeeper_{name}": frozenset(labels.split())
    for name, _, labels in (line.strip().partition(": ") for line in """
    timelines
    active_timelines
    evicted_timelines
    write_wal_bytes
    write_wal_seconds
    flush_wal_seconds
    persist_control_file_seconds
    wal_storage_operation_seconds: operation
    misc_operation_seconds: operation
    pg_io_bytes_total: client_az sk_az app_name dir same_az
    broker_pushed_updates_total
    broker_pulled_updates_total: result
    broker_push_update_seconds
    broker_iteration_timelines
    pg_queries_received_total: query
    pg_queries_finished_total: query
    removed_wal_segments_total
    backed_up_segments_total
    backup_errors_total
    backup_reelect_leader_total
    received_ps_feedbacks_total
    partial_backup_uploads_total: result
    partial_backup_uploaded_bytes_total
    manager_iterations_total
    manager_active_changes_total
    wal_backup_tasks_started_total
    wal_backup_tasks_finished_total
    wal_receivers
    wal_readers: kind target
    eviction_events_started_total: kind
    eviction_events_completed_total: kind
    proposer_acceptor_messages_total: outcome
    wal_disk_io_errors
    wal_storage_limit_errors
    recovery_pull_timeline_errors
    recovery_pull_timeline_oks
    recovery_pull_timeline_seconds
    global_disk_utilization_check_seconds
    collect_timeline_metrics_seconds
    """.strip().splitlines())
}  # fmt: skip
NOT_HERE = {
    "safekeeper_wal_receiver_queue_depth": "there is no queue: messages are handled as they are read",
    "safekeeper_interpreted_wal_reader_tasks": "it counts tasks that share the decoding of WAL",
}


def scrape(url: str) -> dict[str, list[Any]]:
    """Samples by the names in the tables above; a metric that has none yet is there with an empty list."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        if family.type == "histogram":
            found[family.name] = [sample for sample in family.samples if sample.name.endswith("_count")]
            continue
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
        if not family.samples:
            found[family.name + ("_total" if family.type == "counter" else "")] = []
    return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    base = tmp_path_factory.mktemp("metrics")
    more = ["--partial-backup-timeout", "300ms", "--enable-offload", "--eviction-min-resident", "300ms"]
    with running_fleet(base, 2, *options(base / "bucket", *more, "--availability-zone", "here")) as fleet:
        yield fleet


async def used(fleet: Fleet) -> tuple[ScriptedProposer, WalMaker]:
    """A timeline whose WAL was written, read, sent to the bucket and removed."""
    wal = WalMaker(START, SEGMENT).until(START + 3 * SEGMENT, 60_000)
    leader = proposer(wal, new_ttid())
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    reader = await fleet.nodes[0].connect(leader.ttid, "standby-7", options=ids(leader, "availability_zone=there"))
    assert await read_stream(reader, START, wal.end) == bytes(wal.data)
    reader.abort()
    await pageserver_has_everything(fleet.nodes[0], leader.ttid, wal.end)
    return leader, wal


def ids(leader: ScriptedProposer, *more: str) -> str:
    return " ".join((f"-c tenant_id={leader.ttid.tenant_id} timeline_id={leader.ttid.timeline_id}", *more))


async def test_every_metric_of_neons_has_its_name_and_labels(fleet: Fleet) -> None:
    idle, _ = await used(fleet)
    idle.leave()  # it is evicted, and brought back by a reader
    node = fleet.nodes[0]
    await until(lambda: scrape(node.url("/metrics"))["safekeeper_evicted_timelines"][0].value == 1, "the eviction", 30)
    assert len(node.digest(idle.ttid, START, START + 1)) == 64
    await until(lambda: http("POST", node.timeline_url(idle.ttid, "/copy"), copy_of(idle)) is None, "a copy")
    leader, wal = await used(fleet)
    url = node.url("/metrics")
    await until(lambda: scrape(url).get("safekeeper_commit_lsn"), "the timeline's metrics")
    found = scrape(url)
    for name in sorted(OF_TIMELINES):
        assert {frozenset(sample.labels) for sample in found.get(name, [])} == {TIMELINE}, name
    for name, labels in sorted(OF_THE_PROCESS.items()):
        assert name in found, name
        assert {frozenset(sample.labels) for sample in found[name]} == {labels}, name
    for name, reason in NOT_HERE.items():
        assert reason and name not in OF_THE_PROCESS, name

    def of(name: str, **labels: str) -> float:
        return sum(sample.value for sample in found[f"safekeeper_{name}"] if labels.items() <= sample.labels.items())

    assert of("timelines") >= 3
    mine = {"tenant_id": str(leader.ttid.tenant_id), "timeline_id": str(leader.ttid.timeline_id)}
    assert of("flush_lsn", **mine) == of("ps_last_received_lsn", **mine) == wal.end
    assert of("acceptor_term", **mine) == of("connected_computes", **mine) == of("ps_feedback_count_total", **mine) == 1
    assert of("written_wal_bytes_total", **mine) == len(wal.data)
    assert of("wal_receivers") == 1
    assert of("proposer_acceptor_messages_total", outcome="success") > 2 * len(wal.data) / 100_000
    assert of("pg_io_bytes_total", app_name="walproposer", dir="read", same_az="unknown") > 2 * len(wal.data)
    there = {"client_az": "there", "sk_az": "here", "app_name": "standby-7", "same_az": "false"}
    assert 2 * len(wal.data) < of("pg_io_bytes_total", **there, dir="write") < 2.1 * len(wal.data)
    assert 0 < of("pg_io_bytes_total", **there, dir="read") < 2000
    assert of("wal_storage_operation_seconds", operation="initialize_segment") >= 4
    assert of("broker_pulled_updates_total", result="ok") > 0
    assert of("pg_queries_received_total", query="START_WAL_PUSH") == 1 + of(
        "pg_queries_finished_total", query="START_WAL_PUSH"
    )
    assert of("eviction_events_completed_total", kind="restore") >= 1
    assert of("write_wal_bytes") > 2
    leader.leave()


def copy_of(leader: ScriptedProposer) -> dict[str, str]:
    return {"target_timeline_id": "c" * 32, "until_lsn": f"0/{leader.term_start:X}"}


async def test_a_connection_counts_while_it_is_open_and_afterwards(fleet: Fleet) -> None:
    node = fleet.nodes[1]
    leader, wal = await used(fleet)

    def sent() -> float:
        samples = scrape(node.url("/metrics"))["safekeeper_pg_io_bytes_total"]
        return sum(s.value for s in samples if (s.labels["app_name"], s.labels["dir"]) == ("counted", "write"))

    reader = await node.connect(leader.ttid, "counted", options=ids(leader, "availability_zone=here"))
    await read_stream(reader, START, wal.end)
    while_open = sent()
    assert while_open > len(wal.data)
    reader.abort()
    await until(lambda: http("GET", node.timeline_url(leader.ttid))["walsenders"] == [], "the reader to be gone")
    assert while_open <= sent() < while_open + 10_000
    leader.leave()


def test_the_brokers_metrics(tmp_path: Path) -> None:
    with running_fleet(tmp_path, 1) as fleet:
        url = f"http://127.0.0.1:{fleet.broker_port}/metrics"

        def found() -> bool:
            samples = scrape(url)
            assert samples.keys() >= OF_THE_BROKER
            assert all(not sample.labels for name in OF_THE_BROKER for sample in samples[name])
            return samples["storage_broker_all_keys_active_subscribers"][0].value == 2

        wait_until(found, "the safekeeper's two subscriptions")


def test_metrics_are_collected_now_and_then_if_so_wanted(tmp_path: Path) -> None:
    with running_fleet(tmp_path, 1, "--force-metric-collection-on-scrape", "false") as fleet:
        (node,) = fleet.nodes

        def looks(query: str = "") -> float:
            return scrape(node.url("/metrics" + query))["safekeeper_manager_iterations_total"][0].value

        create(new_ttid(), NO_MEMBERSHIP, fleet.nodes)
        wait_until(lambda: looks("?use_latest=true") > 0, "the manager to look at the timeline")
        assert looks() == looks("?use_latest=false") == 0, "nothing had happened at the start"
        code, said = refusal(lambda: scrape(node.url("/metrics?use_latest=1")))
        assert code == 400, said


async def test_the_collection_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(b"123456789")
    monkeypatch.setattr("prometheus_client.generate_latest", lambda: bytes([next(texts)]))

    async def get(cache: MetricsCache, path: str = "/metrics") -> bytes:
        return (await cache.metrics(make_mocked_request("GET", path))).body  # type: ignore[return-value]

    cache = MetricsCache(collect_on_scrape=False)
    assert await get(cache) == b"1", "who asks before the first collection does not get nothing"
    running = asyncio.create_task(cache.run(0.02))
    await eventually(lambda: cache._last == b"4", "the third collection")
    running.cancel()
    assert await get(cache) == b"4"
    assert await get(cache, "/metrics?use_latest=true") == b"5"
    assert await get(cache) == b"4"
    assert await get(MetricsCache()) == b"6"

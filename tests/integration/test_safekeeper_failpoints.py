"""Failures and delays at chosen places of real safekeepers, set through PUT /v1/failpoints."""

import asyncio
import contextlib
import urllib.error
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground.errors import NeonError
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.replication_stream import Keepalive, XLogData, parse_sender_message
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, Node, ScriptedProposer, dead, new_ttid, read_stream, running_fleet
from tests.integration.test_pull_timeline import present, pull, refusal
from tests.integration.test_safekeeper_offload import (
    local_segments,
    metric,
    objects,
    options,
    pageserver_has_everything,
    proposer,
    wait_for_backup,
)
from tests.unit.safekeeper.walmaker import WalMaker
from tests.waiting import until

pytestmark = pytest.mark.cluster
SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)
OPEN = {"FAILPOINTS": ""}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    base = tmp_path_factory.mktemp("failpoints")
    limit = ["--max-global-disk-usage-ratio", "0.99", "--global-disk-check-interval", "100ms"]
    with running_fleet(base, 3, *options(base / "bucket", *limit), environment=OPEN) as fleet:
        yield fleet


def bucket(fleet: Fleet) -> Path:
    return fleet.base / "bucket"


def configure(node: Node, **actions: str) -> None:
    """Set failpoints; their names with underscores."""
    body = [{"name": name.replace("_", "-"), "actions": text} for name, text in actions.items()]
    assert http("PUT", node.url("/v1/failpoints"), body) is None


@contextlib.contextmanager
def failpoint(node: Node, **actions: str) -> Iterator[None]:
    """Set for a while."""
    configure(node, **actions)
    try:
        yield
    finally:
        if node.popen is not None and node.popen.poll() is None:
            configure(node, **dict.fromkeys(actions, "off"))


async def reached(node: Node, name: str, skip: int = 0) -> None:
    """The node stands at the failpoint (``skip``: how often it stood there before)."""
    await until(lambda: node.log.read_text().count(f"at failpoint {name}: ") > skip, f"{node.name} to reach {name}")


async def led(fleet: Fleet, segments: int = 4) -> tuple[ScriptedProposer, WalMaker]:
    """A timeline on all nodes with so many segments of committed WAL, and its leader."""
    wal = WalMaker(START, SEGMENT).until(START + segments * SEGMENT, 60_000)
    leader = proposer(wal, new_ttid())
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    return leader, wal


def in_background(call: Any) -> "asyncio.Future[Any]":
    return asyncio.ensure_future(asyncio.to_thread(call))


# -- the endpoint


def test_processes_that_were_not_started_for_tests_have_none(tmp_path: Path) -> None:
    with running_fleet(tmp_path, 1) as fleet:
        body = [{"name": "sk-pause-send", "actions": "return"}]
        code, message = refusal(lambda: http("PUT", fleet.nodes[0].url("/v1/failpoints"), body))
        assert (code, "FAILPOINTS" in message) == (400, True)


def test_a_safekeeper_can_be_started_with_a_failpoint_but_not_with_a_wrong_one(tmp_path: Path) -> None:
    with running_fleet(tmp_path, 1, environment={"FAILPOINTS": "sk-zero-segment=panic;sk-pause-send=return"}) as fleet:
        (node,) = fleet.nodes
        node.kill()
        node.environment = {"FAILPOINTS": "sk-nothing=return"}
        with pytest.raises(AssertionError, match="there is no failpoint 'sk-nothing' in this process: it has"):
            node.start()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([{"name": "sk-nothing", "actions": "off"}], "sk-snapshot-after-list-pausable"),
        ([{"name": "sk-pause-send", "actions": "explode"}], "explode"),
        ([{"name": "sk-zero-segment", "actions": "pause"}], "cannot pause"),
        ([{"name": "sk-pause-send"}], "actions"),
        (["sk-pause-send"], "an object"),
        ({"name": "sk-pause-send", "actions": "off"}, "list"),
    ],
)
def test_wrong_failpoints_are_refused(fleet: Fleet, body: Any, said: str) -> None:
    code, message = refusal(lambda: http("PUT", fleet.nodes[0].url("/v1/failpoints"), body))
    assert (code, said in message) == (400, True), message


async def test_exit_ends_the_process_where_it_stands(fleet: Fleet) -> None:
    node = fleet.nodes[2]
    leader, wal = await led(fleet, 1)
    configure(node, sk_pause_send="1*exit")
    reader = await node.connect(leader.ttid, "standby")
    with contextlib.suppress(NeonError, OSError):
        await reader.start_copy_both(f"START_REPLICATION PHYSICAL 0/{START:X}")
    assert node.popen is not None
    assert await asyncio.to_thread(node.popen.wait, 10) == 1
    leader.leave()
    await asyncio.to_thread(node.start)
    assert node.lsn(leader.ttid, "flush_lsn") == wal.end


# -- segments


@pytest.mark.parametrize("action", ["return", "panic"])  # a disk's error, and one that nobody foresaw
async def test_a_segment_that_cannot_be_made_leaves_nothing_behind(fleet: Fleet, action: str) -> None:
    node = fleet.nodes[0]
    wal = WalMaker(START, SEGMENT).until(START + 100_000, 20_000)
    leader = proposer(wal, new_ttid())
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    acknowledged = wal.end
    wal.until(START + 3 * SEGMENT, 20_000)
    with failpoint(node, sk_zero_segment=action):
        leader.send(leader.members[0], wal.end)
        with contextlib.suppress(OSError):  # what is unread may swallow the error
            await dead(leader.members[0].client)
        said = {"return": "failpoint: sk-zero-segment", "panic": "failpoint sk-zero-segment panic"}[action]
        assert said in node.log.read_text()
        await leader.stream(wal.end, members=leader.members[1:])  # the others are a quorum
        (name,) = local_segments(node, leader.ttid)
        assert name.removesuffix(".partial") == "000000010000000000000001"
        directory = node.directory / str(leader.ttid.tenant_id) / str(leader.ttid.timeline_id)
        assert not (directory / "waltmp").exists()
        flushed = node.lsn(leader.ttid, "flush_lsn")
        assert acknowledged <= flushed <= 2 * SEGMENT
        node.kill()
    await asyncio.to_thread(node.start)
    assert node.lsn(leader.ttid, "flush_lsn") >= flushed
    leader.leave()
    successor = proposer(wal, leader.ttid)
    await successor.elect(fleet.nodes)
    assert successor.term_start == wal.end
    wal.until(wal.end + SEGMENT, 20_000)
    await successor.stream(wal.end)
    assert len({member.digest(leader.ttid, START, wal.end) for member in fleet.nodes}) == 1
    successor.leave()


# -- snapshots


async def while_a_snapshot_waits(
    fleet: Fleet, donor: Node, ttid: TenantTimelineId, joiner: Node, meanwhile: Awaitable[None]
) -> "asyncio.Future[Any]":
    """Pull from the donor, which holds its snapshot until ``meanwhile`` is over; the pull, perhaps still under way."""
    before = donor.log.read_text().count("at failpoint sk-snapshot-after-list-pausable: ")
    with failpoint(donor, sk_snapshot_after_list_pausable="1*pause->off"):
        pulling = in_background(lambda: pull(joiner, ttid, [donor.url("")]))
        await reached(donor, "sk-snapshot-after-list-pausable", before)
        await meanwhile
        assert not pulling.done()
    return pulling


async def test_no_wal_is_removed_while_a_snapshot_is_sent(tmp_path: Path) -> None:
    with running_fleet(tmp_path, 3, *options(tmp_path / "bucket"), environment=OPEN) as fleet:
        donor, peer, joiner = fleet.nodes
        wal = WalMaker(START, SEGMENT).until(START + 5 * SEGMENT, 60_000)
        leader = proposer(wal, new_ttid())
        await leader.elect([donor, peer])
        await leader.stream(wal.end)
        fleet.nodes.pop()
        await wait_for_backup(fleet, leader.ttid, wal.end)
        full = len(local_segments(donor, leader.ttid))
        assert full >= 5

        async def the_peer_removes_its_wal() -> None:
            await pageserver_has_everything(donor, leader.ttid, wal.end)
            await until(lambda: len(local_segments(peer, leader.ttid)) == 1, "the peer's WAL to be removed")
            # the donor knows the same and has thought about it, too
            looked = metric(donor, "safekeeper_manager_iterations_total")
            await until(lambda: metric(donor, "safekeeper_manager_iterations_total") > looked + 3, "the donor's manager")
            assert len(local_segments(donor, leader.ttid)) == full

        assert await (await while_a_snapshot_waits(fleet, donor, leader.ttid, joiner, the_peer_removes_its_wal())) is not None
        assert joiner.digest(leader.ttid, START, wal.end) == peer.digest(leader.ttid, START, wal.end)
        await until(lambda: len(local_segments(donor, leader.ttid)) == 1, "the donor's WAL to be removed afterwards")
        leader.leave()
        joiner.kill()


async def test_a_snapshot_is_given_up_when_another_leader_writes(tmp_path: Path) -> None:
    with running_fleet(tmp_path, 3, environment=OPEN) as fleet:
        donor, peer, joiner = fleet.nodes
        wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT, 60_000)
        leader = proposer(wal, new_ttid())
        await leader.elect([donor, peer])
        await leader.stream(wal.end)
        leader.leave()

        async def another_leader() -> None:
            successor = proposer(wal, leader.ttid)
            await successor.elect([donor, peer])
            wal.until(wal.end + 100_000, 20_000)
            await successor.stream(wal.end)
            successor.leave()

        pulling = await while_a_snapshot_waits(fleet, donor, leader.ttid, joiner, another_leader())
        with pytest.raises(urllib.error.HTTPError) as failure:
            await pulling
        assert failure.value.code == 412
        assert "went from term 1 to 2 while it was copied" in donor.log.read_text()
        assert not present(joiner, leader.ttid)
        assert list((joiner.directory / "tmp").glob("*")) == []
        assert await asyncio.to_thread(pull, joiner, leader.ttid, [donor.url("")]) == donor.url("")
        assert joiner.digest(leader.ttid, START, wal.end) == donor.digest(leader.ttid, START, wal.end)


# -- object storage


async def test_offloading_waits_and_goes_on(fleet: Fleet) -> None:
    with contextlib.ExitStack() as held:
        for node in fleet.nodes:
            held.enter_context(failpoint(node, backup_lsn_range_pausable="pause"))
        leader, wal = await led(fleet)
        await until(lambda: any("at failpoint backup-lsn-range-pausable" in n.log.read_text() for n in fleet.nodes), "a pause")
        assert objects(bucket(fleet), leader.ttid) == {}
        assert {node.lsn(leader.ttid, "backup_lsn") for node in fleet.nodes} == {START}
    await wait_for_backup(fleet, leader.ttid, wal.end)
    leader.leave()


@pytest.mark.parametrize("name", ["sk-delete-timeline-remote", "sk-delete-timeline-remote-pause"])
async def test_a_deletion_does_not_wait_for_the_bucket_and_is_not_forgotten(fleet: Fleet, name: str) -> None:
    node = fleet.nodes[0]
    leader, wal = await led(fleet)
    await wait_for_backup(fleet, leader.ttid, wal.end)
    leader.leave()
    ttid, key = leader.ttid, name.replace("-", "_")
    for other in fleet.nodes[1:]:
        http("DELETE", other.timeline_url(ttid, "?only_local=true"))
    configure(node, **{key: "pause" if name.endswith("pause") else "return"})
    assert await asyncio.to_thread(http, "DELETE", node.timeline_url(ttid)) == {"dir_existed": True}
    await reached(node, name)
    assert len(objects(bucket(fleet), ttid)) >= 3
    assert not present(node, ttid)
    # a restart forgets the failpoint, not the deletion; it does not wait for the pause either
    assert await asyncio.to_thread(node.stop) == 0
    assert len(objects(bucket(fleet), ttid)) >= 3
    await asyncio.to_thread(node.start)
    await until(lambda: objects(bucket(fleet), ttid) == {}, "the objects to be deleted")


async def test_a_deletion_goes_on_when_the_bucket_works_again(fleet: Fleet) -> None:
    node = fleet.nodes[0]
    leader, wal = await led(fleet)
    await wait_for_backup(fleet, leader.ttid, wal.end)
    leader.leave()
    for other in fleet.nodes[1:]:
        http("DELETE", other.timeline_url(leader.ttid, "?only_local=true"))
    with failpoint(node, sk_delete_timeline_remote="return"):
        http("DELETE", node.timeline_url(leader.ttid))
        await reached(
            node, "sk-delete-timeline-remote", node.log.read_text().count("at failpoint sk-delete-timeline-remote: ") + 1
        )
        assert len(objects(bucket(fleet), leader.ttid)) >= 3
    await until(lambda: objects(bucket(fleet), leader.ttid) == {}, "the objects to be deleted")


# -- the disk


async def test_a_disk_that_seems_full_refuses_wal_until_it_is_not(fleet: Fleet) -> None:
    node = fleet.nodes[0]
    leader, wal = await led(fleet, 1)
    capacity = http("GET", node.url("/v1/debug/filesystem_usage"))["capacity_bytes"]

    def refused() -> Any:
        return http("GET", node.url("/v1/status"))["wal_refused"]

    assert refused() is None
    wal.records(20)
    with failpoint(node, sk_global_disk_usage=f"return({capacity * 995 // 1000})"):
        await until(lambda: "Global disk usage exceeded limit" in (refused() or ""), "WAL to be refused")
        leader.send(leader.members[0], wal.end)
        assert "Global disk usage exceeded limit" in await dead(leader.members[0].client)
        await leader.stream(wal.end, members=leader.members[1:])
    await until(lambda: refused() is None, "WAL to be accepted again")
    leader.leave()
    successor = proposer(wal, leader.ttid)
    await successor.elect(fleet.nodes)
    await successor.stream(successor.term_start)
    assert node.lsn(leader.ttid, "flush_lsn") == wal.end
    successor.leave()


# -- readers


async def test_everybody_but_pageservers_is_held_back(fleet: Fleet) -> None:
    node = fleet.nodes[0]
    leader, wal = await led(fleet, 1)
    with failpoint(node, sk_pause_send="return"):
        pageserver = await node.connect(leader.ttid, "pageserver-1")
        assert await read_stream(pageserver, START, wal.end) == bytes(wal.data)
        reader = await node.connect(leader.ttid, "replica")
        await reader.start_copy_both(f"START_REPLICATION PHYSICAL 0/{START:X}")
        for _ in range(2):
            message = parse_sender_message(await asyncio.wait_for(reader.next_copy_data(), 10) or b"")
            assert isinstance(message, Keepalive)
    received = bytearray()
    while len(received) < len(wal.data):
        message = parse_sender_message(await asyncio.wait_for(reader.next_copy_data(), 10) or b"")
        if isinstance(message, XLogData):
            received += message.data
    assert received == wal.data
    pageserver.abort()
    reader.abort()
    leader.leave()


async def test_replicas_alone_are_slowed_down(fleet: Fleet) -> None:
    node = fleet.nodes[0]
    leader, wal = await led(fleet, 1)
    with failpoint(node, sk_send_wal_replica_sleep="return(100)"):
        taken = {}
        for name in ("standby", "replica"):
            reader = await node.connect(leader.ttid, name)
            started = asyncio.get_running_loop().time()
            assert await read_stream(reader, START, wal.end) == bytes(wal.data)
            taken[name] = asyncio.get_running_loop().time() - started
            reader.abort()
    messages = -(-len(wal.data) // 131072)
    assert messages > 7
    assert taken["replica"] >= 0.1 * (messages - 1) > taken["standby"]
    leader.leave()

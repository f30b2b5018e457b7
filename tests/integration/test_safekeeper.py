"""Real safekeepers and a broker on loopback, driven by a scripted proposer with synthetic WAL."""

import asyncio
import contextlib
import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn, format_lsn, parse_lsn
from neon_services.protocols import broker_messages as bm
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.pgwire import ServerError
from neon_services.protocols.replication_stream import (
    Keepalive,
    StandbyStatus,
    XLogData,
    pack_hot_standby_feedback,
    pack_pageserver_feedback,
    parse_sender_message,
)
from neon_services.protocols.safekeeper_messages import (
    HotStandbyFeedback,
    MembershipConfiguration,
    ProposerGreeting,
    SafekeeperId,
    VoteRequest,
)
from neon_services.storage_broker.client import BrokerClient, BrokerError
from tests.integration.cluster import http
from tests.integration.safekeeper_support import (
    Fleet,
    ScriptedProposer,
    dead,
    new_ttid,
    read_stream,
    running_fleet,
    until,
)
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

pytestmark = pytest.mark.cluster
START = Lsn(0x1002028)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet"), 3, "--heartbeat-timeout", "3s") as fleet:
        yield fleet


def proposer(wal: WalMaker, **options: Any) -> ScriptedProposer:
    return ScriptedProposer(
        ttid=options.pop("ttid", None) or new_ttid(),
        start=wal.start,
        wal=wal.data,
        pg_version=PG_VERSION,
        system_id=SYSTEM_ID,
        **options,
    )


def error_of(method: str, url: str, body: Any = None) -> tuple[int, str]:
    """Status and message of a request that must fail."""
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method)
    with pytest.raises(urllib.error.HTTPError) as failure:
        urllib.request.urlopen(request, timeout=10)
    return failure.value.code, json.loads(failure.value.read())["msg"]


async def test_wal_is_elected_streamed_committed_and_read_back(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).until(START + 2 * WAL_SEGMENT_SIZE + 5000, 60_000)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    digests = {node.digest(leader.ttid, START, wal.end) for node in fleet.nodes}
    assert len(digests) == 1
    for node in fleet.nodes:
        status = node.status(leader.ttid)
        assert status["flush_lsn"] == status["commit_lsn"] == format_lsn(wal.end)
        assert status["acceptor_state"]["term"] == status["acceptor_state"]["epoch"] == 1
        assert status["walreceivers"][0]["status"] == "Streaming"
    reader = await fleet.nodes[1].connect(leader.ttid, "pageserver-1")
    assert await reader.query("IDENTIFY_SYSTEM") == [[str(SYSTEM_ID), "1", format_lsn(wal.end), None]]
    assert await read_stream(reader, START, wal.end) == bytes(wal.data)
    reader.abort()
    leader.leave()


async def test_chunks_of_the_stream_end_at_pages_or_at_the_end(fleet: Fleet) -> None:
    wal = WalMaker(Lsn(2 * WAL_SEGMENT_SIZE - 300_000), WAL_SEGMENT_SIZE).until(2 * WAL_SEGMENT_SIZE + 200_000)
    leader = proposer(wal)
    await leader.elect(fleet.nodes[:1])
    await leader.stream(wal.end)
    reader = await fleet.nodes[0].connect(leader.ttid, "standby")
    begin = wal.record_ends[0]  # in the middle of a page
    await reader.start_copy_both(f'START_REPLICATION SLOT "x y" PHYSICAL {format_lsn(begin)}')
    position = begin
    while position < wal.end:
        message = parse_sender_message(await asyncio.wait_for(reader.next_copy_data(), 10) or b"")
        assert isinstance(message, XLogData)
        assert message.start_lsn == position
        assert message.wal_end_lsn == wal.end
        end = position + len(message.data)
        assert len(message.data) <= 131072
        assert end % 8192 == 0 or end == wal.end
        assert position // WAL_SEGMENT_SIZE == (end - 1) // WAL_SEGMENT_SIZE
        position = end
    keepalive = parse_sender_message(await asyncio.wait_for(reader.next_copy_data(), 10) or b"")
    assert isinstance(keepalive, Keepalive)
    assert (keepalive.wal_end_lsn, keepalive.reply_requested) == (wal.end, True)
    reader.abort()
    leader.leave()


async def test_readers_get_only_committed_wal_and_wake_at_once(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(40)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    first, second = wal.record_ends[9], wal.end
    await leader.stream(first)
    node = fleet.nodes[0]
    reader = await node.connect(leader.ttid, "standby")
    uncommitted = await node.connect(leader.ttid, "safekeeper_2")
    assert await read_stream(reader, START, first) == wal.slice(START, first)
    member = leader.members[0]
    leader.send(member, second)  # one member of three: flushed there, committed nowhere
    while member.flushed < second:
        await leader.answer(member)
    assert await uncommitted.query("IDENTIFY_SYSTEM") == [[str(SYSTEM_ID), "1", format_lsn(second), None]]
    term_mode = f"START_REPLICATION PHYSICAL {format_lsn(START)} (term='1')"
    assert await read_stream(uncommitted, START, second, term_mode) == wal.slice(START, second)
    for _ in range(2):
        message = parse_sender_message(await asyncio.wait_for(reader.next_copy_data(), 10) or b"")
        assert message == Keepalive(first, message.send_time_us, True), "uncommitted WAL got out"
    await leader.stream(second)
    message = parse_sender_message(await asyncio.wait_for(reader.next_copy_data(), 10) or b"")
    assert isinstance(message, XLogData)
    assert bytes(message.data) == wal.slice(first, second)
    reader.abort()
    uncommitted.abort()
    leader.leave()


async def test_term_mode_is_refused_in_another_term_and_ended_by_a_new_one(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(5)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    node = fleet.nodes[0]
    reader = await node.connect(leader.ttid, "wal_proposer_recovery")
    with pytest.raises(ServerError, match="failed to acquire term 3, current term 1"):
        await reader.start_copy_both(f"START_REPLICATION PHYSICAL {format_lsn(START)} (term='3')")
    reader = await node.connect(leader.ttid, "wal_proposer_recovery")
    await read_stream(reader, START, wal.end, f"START_REPLICATION PHYSICAL {format_lsn(START)} (term='1')")
    assert http("POST", node.timeline_url(leader.ttid, "/term_bump"), {"term": 7}) == {"previous_term": 1, "current_term": 7}
    assert "failed to acquire term 1, current term 7" in await dead(reader)
    leader.leave()


async def test_wal_below_the_first_segment_is_refused(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(5)
    leader = proposer(wal)
    await leader.elect(fleet.nodes[:1])
    await leader.stream(wal.end)
    reader = await fleet.nodes[0].connect(leader.ttid)
    with pytest.raises(ServerError, match=r"WAL at 0/FFFFF8 is not here"):
        await reader.start_copy_both("START_REPLICATION PHYSICAL 0/FFFFF8")
    leader.leave()


# -- feedback


async def test_feedback_of_a_pageserver_reaches_the_compute_and_ends_idle_streams(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(5)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    node = fleet.nodes[0]
    reader = await node.connect(leader.ttid, "pageserver-7")
    await read_stream(reader, START, wal.end)
    feedback = PageserverFeedback(123456, wal.end, wal.end, wal.record_ends[2], 42)
    reader.send_copy_data(pack_pageserver_feedback(feedback))
    answer = await leader.answer(leader.members[0])
    assert answer.pageserver_feedback == feedback
    assert (answer.flush_lsn, answer.term) == (wal.end, 1)
    status = node.status(leader.ttid)
    assert status["remote_consistent_lsn"] == format_lsn(wal.record_ends[2])
    (sender,) = (s["Vanilla"] for s in status["walsenders"])
    assert sender["appname"] == "pageserver-7"
    assert sender["feedback"]["Pageserver"]["last_received_lsn"] == format_lsn(wal.end)
    # caught up, but a compute is connected: the stream goes on
    reader.send_copy_data(pack_pageserver_feedback(PageserverFeedback(1, wal.end, wal.end, wal.end, 43)))
    await leader.answer(leader.members[0])
    for _ in range(2):
        assert isinstance(parse_sender_message(await asyncio.wait_for(reader.next_copy_data(), 10) or b""), Keepalive)
    leader.leave()
    with pytest.raises(ServerError) as ended:
        while await asyncio.wait_for(reader.next_copy_data(), 10) is not None:
            pass
    assert ended.value.sqlstate == "00000"
    assert f'ending streaming to Some("pageserver-7") at {format_lsn(wal.end)}' in str(ended.value)


async def test_feedback_of_standbys_is_aggregated(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(5)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    readers = []
    for xmin, applied in ((1 << 32 | 700, wal.record_ends[1]), (1 << 32 | 650, wal.record_ends[3])):
        reader = await fleet.nodes[0].connect(leader.ttid, "standby")
        await read_stream(reader, START, wal.end)
        reader.send_copy_data(StandbyStatus(wal.end, wal.end, applied, 5).pack())
        reader.send_copy_data(pack_hot_standby_feedback(HotStandbyFeedback(xmin, xmin, 0)))
        readers.append(reader)
    member = leader.members[0]

    async def feedback() -> HotStandbyFeedback:
        leader.send(member, member.sent)
        return (await leader.answer(member)).hs_feedback

    async with asyncio.timeout(10):
        while (await feedback()).xmin != 1 << 32 | 650:
            pass
    assert (await feedback()).catalog_xmin == 0
    client = BrokerClient(f"http://127.0.0.1:{fleet.broker_port}")
    async for info in client.subscribe_all():
        if bm.ttid_of(info) == leader.ttid and info.safekeeper_id == 1 and info.standby_horizon:
            assert info.standby_horizon == wal.record_ends[1]
            break
    await client.close()
    readers[1].abort()
    async with asyncio.timeout(10):
        while (await feedback()).xmin != 1 << 32 | 700:
            pass
    readers[0].abort()
    leader.leave()


# -- gossip


async def test_commit_travels_to_an_idle_peer_by_the_broker_only(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(20)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.record_ends[9])
    for member in leader.members:
        leader.send(member, wal.end)
    for member in leader.members:
        while member.flushed < wal.end:
            await leader.answer(member)
    leader.commit = wal.end
    quiet, *others = leader.members
    for member in others:
        leader.send(member, member.sent)
        await leader.answer(member)
    await until(lambda: quiet.node.lsn(leader.ttid, "commit_lsn") == wal.end, "commit_lsn by gossip")
    await until(lambda: {p["sk_id"] for p in quiet.node.status(leader.ttid)["peers"]} == {1, 2, 3}, "all peers")
    leader.leave()


async def test_inactive_timelines_are_silent_and_found_by_discovery(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(5)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    leader.leave()
    reader = await fleet.nodes[0].connect(leader.ttid, "pageserver-1")
    await read_stream(reader, START, wal.end)
    reader.send_copy_data(pack_pageserver_feedback(PageserverFeedback(1, wal.end, wal.end, wal.end, 43)))
    await dead(reader)
    await until(lambda: all(n.status(leader.ttid)["peers"] == [] for n in fleet.nodes), "the peers to fall silent", 20)
    client = BrokerClient(f"http://127.0.0.1:{fleet.broker_port}")
    responses: dict[int, Any] = {}

    async def listen() -> None:
        async for message in client.subscribe(leader.ttid, {bm.SAFEKEEPER_DISCOVERY_RESPONSE}):
            response = message.safekeeper_discovery_response
            responses[response.safekeeper_id] = response

    listening = asyncio.create_task(listen())
    async with asyncio.timeout(10):
        while len(responses) < 3:
            await client.publish_one(bm.SafekeeperDiscoveryRequest(tenant_timeline_id=bm.encode_ttid(leader.ttid)))
            await asyncio.sleep(0.05)
    assert {r.commit_lsn for r in responses.values()} == {wal.end}
    assert responses[2].safekeeper_connstr == f"127.0.0.1:{fleet.nodes[1].pg_port}"
    listening.cancel()
    await client.close()


# -- life and death


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


async def test_a_broker_that_is_away_and_back_changes_nothing(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(30)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.record_ends[9])
    fleet.broker.kill()
    await leader.stream(wal.record_ends[19])
    fleet.broker.start()
    await leader.stream(wal.end)
    await until(lambda: len(fleet.nodes[0].status(leader.ttid)["peers"]) == 3, "gossip to resume")
    leader.leave()


# -- wrong input


async def test_protocol_violations_end_the_connection_only(fleet: Fleet) -> None:
    node, ttid = fleet.nodes[0], new_ttid()
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(5)
    leader = proposer(wal, ttid=ttid)
    await leader.elect([node])
    await leader.stream(wal.end)
    greeting = ProposerGreeting(ttid, leader.mconf, PG_VERSION, SYSTEM_ID, WAL_SEGMENT_SIZE)
    wrong_version = ProposerGreeting(ttid, leader.mconf, 170000, SYSTEM_ID, WAL_SEGMENT_SIZE)
    for messages, expected in (
        ([b""], "empty message"),
        ([b"x123"], "unknown message"),
        ([VoteRequest(0, 9).pack()], "greet first"),
        ([greeting.pack()[:-1]], "cut off"),
        ([wrong_version.pack()], "of Postgres 15"),
        ([ProposerGreeting(new_ttid(), leader.mconf, PG_VERSION, 0, WAL_SEGMENT_SIZE).pack()], "greets timeline"),
        ([greeting.pack(), VoteRequest(3, 9).pack()], "generation 3"),
    ):
        client = await node.connect(ttid)
        await client.start_copy_both("START_WAL_PUSH (proto_version '3')")
        for message in messages:
            client.send_copy_data(message)
        assert expected in await dead(client)
    leader.send(leader.members[0], leader.members[0].sent)
    await leader.answer(leader.members[0])
    leader.leave()


async def test_commands_that_cannot_be_served(fleet: Fleet) -> None:
    node, ttid = fleet.nodes[0], new_ttid()
    client = await node.connect(ttid)
    for command, expected in (
        ("SELECT 1", "unknown command"),
        ("start_wal_push", "unknown command"),
        ("START_WAL_PUSH (proto_version '1')", "unsupported protocol version 1"),
        ("START_WAL_PUSH (proto_version '4')", "unsupported protocol version 4"),
        ("START_WAL_PUSH (proto_version '3', allow_timeline_creation 'yes')", "allow_timeline_creation"),
        ("START_REPLICATION PHYSICAL", "cannot read"),
        ("START_REPLICATION PHYSICAL 0/1", "was not found"),
        ("IDENTIFY_SYSTEM", "was not found"),
    ):
        with pytest.raises(ServerError, match=expected):
            await client.query(command)
    assert await client.query("TIMELINE_STATUS") == []
    assert await client.query("set datestyle to 'ISO'") == []
    client.abort()
    client = await node.connect(ttid, options="")
    with pytest.raises(ServerError, match="tenant_id and timeline_id must be given"):
        await client.query("TIMELINE_STATUS")
    client.abort()
    with pytest.raises(ServerError, match="interpreted"):
        await node.connect(ttid, options='protocol={"type":"interpreted"}')


async def test_without_permission_to_create_the_connection_is_closed_silently(fleet: Fleet) -> None:
    ttid = new_ttid()
    client = await fleet.nodes[0].connect(ttid)
    await client.start_copy_both("START_WAL_PUSH (proto_version '3', allow_timeline_creation 'false')")
    client.send_copy_data(ProposerGreeting(ttid, MembershipConfiguration(), PG_VERSION, 0, WAL_SEGMENT_SIZE).pack())
    assert await dead(client) == ""
    assert error_of("GET", fleet.nodes[0].timeline_url(ttid))[0] == 404


# -- the HTTP API


def members_of(fleet: Fleet) -> tuple[SafekeeperId, ...]:
    return tuple(SafekeeperId(node.id, "127.0.0.1", node.pg_port) for node in fleet.nodes)


async def test_timelines_made_by_the_api_with_generations(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(30)
    mconf = MembershipConfiguration(1, members_of(fleet))
    leader = proposer(wal, generation=1, mconf=mconf)
    body = {
        "tenant_id": str(leader.ttid.tenant_id),
        "timeline_id": str(leader.ttid.timeline_id),
        "mconf": mconf.to_json(),
        "pg_version": PG_VERSION,
        "start_lsn": format_lsn(START),
        "commit_lsn": format_lsn(START),
    }
    for node in fleet.nodes:
        assert http("POST", node.url("/v1/tenant/timeline"), body) is None
        assert http("POST", node.url("/v1/tenant/timeline"), body) is None, "an existing timeline is fine"
        assert {"tenant_id": body["tenant_id"], "timeline_id": body["timeline_id"]} in http(
            "GET", node.url("/v1/tenant/timeline")
        )
    await leader.elect(fleet.nodes)
    assert leader.term_start == START
    await leader.stream(wal.record_ends[9])
    # the membership moves on: the old generation is refused, the new one works
    newer = MembershipConfiguration(2, members_of(fleet)[:2], members_of(fleet))
    for node in fleet.nodes:
        url = node.timeline_url(leader.ttid, "/membership")
        answer = http("PUT", url, newer.to_json())
        assert (answer["previous_conf"]["generation"], answer["current_conf"]) == (1, newer.to_json())
        assert (answer["last_log_term"], answer["flush_lsn"]) == (1, format_lsn(wal.record_ends[9]))
        assert error_of("PUT", url, mconf.to_json())[0] == 409
        without_it = MembershipConfiguration(3, tuple(m for m in members_of(fleet) if m.node_id != node.id))
        assert error_of("PUT", url, without_it.to_json())[0] == 403
    leader.send(leader.members[0], wal.end)
    assert "generation" in await dead(leader.members[0].client)
    leader.leave()
    next_leader = proposer(wal, ttid=leader.ttid, generation=2)
    await next_leader.elect(fleet.nodes)
    await next_leader.stream(wal.end)
    next_leader.leave()


async def test_deleting_ends_streams_and_leaves_a_tombstone(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(5)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    node = fleet.nodes[0]
    reader = await node.connect(leader.ttid)
    await read_stream(reader, START, wal.end)
    assert http("DELETE", node.timeline_url(leader.ttid)) == {"dir_existed": True}
    assert http("DELETE", node.timeline_url(leader.ttid) + "?only_local=true") == {"dir_existed": False}
    assert "was deleted" in await dead(reader)
    assert "was deleted" in await dead(leader.members[0].client)
    assert not (node.directory / str(leader.ttid.tenant_id) / str(leader.ttid.timeline_id)).exists()
    assert error_of("GET", node.timeline_url(leader.ttid))[0] == 404
    client = await node.connect(leader.ttid)
    await client.start_copy_both("START_WAL_PUSH (proto_version '3', allow_timeline_creation 'true')")
    client.send_copy_data(ProposerGreeting(leader.ttid, leader.mconf, PG_VERSION, 0, WAL_SEGMENT_SIZE).pack())
    assert "was deleted" in await dead(client)
    body = {"tenant_id": str(leader.ttid.tenant_id), "timeline_id": str(leader.ttid.timeline_id)}
    body |= {"pg_version": PG_VERSION, "start_lsn": "0/1000028"}  # type: ignore[dict-item]
    assert error_of("POST", node.url("/v1/tenant/timeline"), body)[0] == 409
    tenant_url = fleet.nodes[1].url(f"/v1/tenant/{leader.ttid.tenant_id}")
    assert http("DELETE", tenant_url) == {str(leader.ttid.timeline_id): {"dir_existed": True}}
    leader.leave()


async def test_wrong_json_is_refused_by_field(fleet: Fleet) -> None:
    url = fleet.nodes[0].url("/v1/tenant/timeline")
    good = {"tenant_id": "1" * 32, "timeline_id": "2" * 32, "pg_version": 150004, "start_lsn": "0/1000028"}
    for change, field in (
        ({"tenant_id": "xyz"}, "tenant_id"),
        ({"timeline_id": None}, "timeline_id"),
        ({"pg_version": "15"}, "pg_version"),
        ({"pg_version": -1}, "pg_version"),
        ({"start_lsn": "1000028"}, "start_lsn"),
        ({"start_lsn": "0/0"}, "start_lsn"),
        ({"commit_lsn": "0/1"}, "commit_lsn"),
        ({"wal_seg_size": 1000}, "wal_seg_size"),
        ({"mconf": {"generation": 1, "members": []}}, "mconf"),
        ({"mconf": 7}, "mconf"),
    ):
        status, message = error_of("POST", url, {**good, **change})
        assert (status, field in message) == (400, True), message
    elsewhere = {"generation": 1, "members": [{"id": 99, "host": "h", "pg_port": 1}], "new_members": None}
    assert error_of("POST", url, {**good, "mconf": elsewhere})[0] == 403
    assert error_of("POST", url, b"{")[0] == 400
    assert error_of("POST", url, [1])[0] == 400
    ttid = new_ttid()
    assert error_of("GET", fleet.nodes[0].url(f"/v1/tenant/zzz/timeline/{ttid.timeline_id}"))[0] == 400
    assert error_of("POST", fleet.nodes[0].timeline_url(ttid, "/term_bump"), {"term": "1"})[0] == 400
    assert error_of("POST", fleet.nodes[0].timeline_url(ttid, "/term_bump"))[0] == 404


async def test_checkpoint_and_debug_dump(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(10)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    node = fleet.nodes[0]
    dump_url = node.url(f"/v1/debug_dump?dump_all=true&timeline_id={leader.ttid.timeline_id}")
    (before,) = http("GET", dump_url)["timelines"]
    assert before["memory"]["mem_state"]["commit_lsn"] == format_lsn(wal.end)
    assert before["control_file"]["commit_lsn"] != format_lsn(wal.end)
    assert http("POST", node.timeline_url(leader.ttid, "/checkpoint")) is None
    dump = http("GET", dump_url)
    (after,) = dump["timelines"]
    assert after["control_file"]["commit_lsn"] == format_lsn(wal.end)
    files = {file["name"]: file for file in after["disk_content"]["files"]}
    assert files["000000010000000000000001.partial"]["size"] == WAL_SEGMENT_SIZE
    assert files["000000010000000000000001.partial"]["end_zeroes"] >= 2 * WAL_SEGMENT_SIZE - wal.end
    assert dump["config"]["node_id"] == 1
    assert error_of("GET", node.url("/v1/debug_dump?dump_all=maybe"))[0] == 400
    assert http("GET", node.url("/v1/utilization"))["timeline_count"] >= 1
    leader.leave()


async def test_metrics_have_neons_names(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(10)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    labels = f'{{tenant_id="{leader.ttid.tenant_id}",timeline_id="{leader.ttid.timeline_id}"}}'

    def text() -> str:
        with urllib.request.urlopen(fleet.nodes[0].url("/metrics"), timeout=10) as answer:
            return answer.read().decode()

    await until(lambda: f"safekeeper_commit_lsn{labels}" in text(), "the timeline's metrics")
    found = {line.split()[0]: line.split()[1] for line in text().splitlines() if labels in line}
    assert float(found[f"safekeeper_flush_lsn{labels}"]) == wal.end
    assert float(found[f"safekeeper_acceptor_term{labels}"]) == 1
    assert float(found[f"safekeeper_connected_computes{labels}"]) == 1
    assert float(found[f"safekeeper_written_wal_bytes_total{labels}"]) == len(wal.data)
    for name in ("safekeeper_timelines", "safekeeper_flush_wal_seconds_count", "safekeeper_wal_receivers"):
        assert f"\n{name} " in text()
    leader.leave()


async def test_the_broker_client_reports_a_missing_broker() -> None:
    client = BrokerClient("http://127.0.0.1:1")
    with pytest.raises(BrokerError, match=r"127\.0\.0\.1:1"):
        await client.publish_one(bm.SafekeeperTimelineInfo(tenant_timeline_id=bm.encode_ttid(new_ttid())))
    await client.close()

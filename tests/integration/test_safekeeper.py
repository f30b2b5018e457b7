"""Real safekeepers on loopback, driven by a scripted proposer with synthetic WAL: streams, feedback, wrong input."""

import asyncio
from collections.abc import Iterator

import pytest

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn, format_lsn
from neon_services.protocols import broker_messages as bm
from neon_services.protocols import pgwire
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
    VoteRequest,
)
from neon_services.storage_broker.client import BrokerClient
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, dead, new_ttid, read_stream, running_fleet
from tests.integration.scripted_wal import START, error_of, proposer
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet"), 3, "--heartbeat-timeout", "3s") as fleet:
        yield fleet


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


async def test_a_proposer_that_ends_its_copy_with_a_failure_leaves_nothing_behind(fleet: Fleet) -> None:
    """Neither on its own connection, which goes on with another command, nor for those that get its descriptor afterwards."""
    node, ttid = fleet.nodes[0], new_ttid()
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(60)
    for last in range(9, 50, 10):
        leader, end = proposer(wal, ttid=ttid), wal.record_ends[last]
        await leader.elect([node])
        await leader.stream(wal.record_ends[last - 5])
        await leader.stream(end)
        client = leader.members[0].client
        client.write(pgwire.message(b"f", b"no more\0"))
        assert "no more" in await dead(client)
        assert await client.next_message() == (ord("Z"), b"I")
        leader.send(leader.members[0], wal.end)  # outside of a COPY: nobody's
        await client.start_copy_both("START_WAL_PUSH (proto_version '3')")
        greeting = ProposerGreeting(ttid, leader.mconf, PG_VERSION, SYSTEM_ID, WAL_SEGMENT_SIZE)
        client.send_copy_data(greeting.pack())
        assert await client.next_copy_data() is not None
        assert node.status(ttid)["flush_lsn"] == format_lsn(end)
        leader.leave()

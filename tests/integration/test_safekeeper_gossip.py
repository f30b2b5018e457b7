"""Safekeepers and the broker: what travels by gossip, and what happens without it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from neon_services.ground.lsn import WAL_SEGMENT_SIZE
from neon_services.protocols import broker_messages as bm
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.replication_stream import pack_pageserver_feedback
from neon_services.storage_broker.client import BrokerClient, BrokerError
from tests.integration.safekeeper_support import Fleet, dead, new_ttid, read_stream, running_fleet, until
from tests.integration.scripted_wal import START, proposer
from tests.unit.safekeeper.walmaker import WalMaker
from tests.waiting import eventually

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet"), 3, "--heartbeat-timeout", "3s") as fleet:
        yield fleet


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

    async def all_answer() -> bool:
        await client.publish_one(bm.SafekeeperDiscoveryRequest(tenant_timeline_id=bm.encode_ttid(leader.ttid)))
        return len(responses) == 3

    await eventually(all_answer, "all safekeepers to answer", interval=0.05)
    assert {r.commit_lsn for r in responses.values()} == {wal.end}
    assert responses[2].safekeeper_connstr == f"127.0.0.1:{fleet.nodes[1].pg_port}"
    listening.cancel()
    await client.close()


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


async def test_the_broker_client_reports_a_missing_broker() -> None:
    client = BrokerClient("http://127.0.0.1:1")
    with pytest.raises(BrokerError, match=r"127\.0\.0\.1:1"):
        await client.publish_one(bm.SafekeeperTimelineInfo(tenant_timeline_id=bm.encode_ttid(new_ttid())))
    await client.close()

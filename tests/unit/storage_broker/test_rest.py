"""The broker's JSON twin on its real port, slow subscribers of both kinds, and very many streams on one connection."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest

from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import parse_lsn
from neon_services.protocols import broker_messages as bm
from neon_services.storage_broker.client import BrokerClient
from neon_services.storage_broker.latest import KEPT_S, LatestInfos
from neon_services.storage_broker.server import BrokerConfig, BrokerServer
from tests.unit.storage_broker.test_server import OTHER, TTID, metric, wait_for_metric


def info(ttid: TenantTimelineId, sk_id: int, commit_lsn: int, connstr: str = "a:1") -> Any:
    return bm.SafekeeperTimelineInfo(
        safekeeper_id=sk_id,
        tenant_timeline_id=bm.encode_ttid(ttid),
        commit_lsn=commit_lsn,
        safekeeper_connstr=connstr,
        availability_zone="az",
    )


def url(broker: BrokerServer, path: str) -> str:
    return f"http://127.0.0.1:{broker.port}{path}"


async def get(broker: BrokerServer, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url(broker, path)) as answer:
        return answer.status, await answer.json()


async def lines(answer: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    async for line in answer.content:
        if line.strip():
            yield json.loads(line)


async def test_the_latest_of_every_timeline(broker: BrokerServer, client: BrokerClient) -> None:
    assert await get(broker, "/v1/timelines") == (200, [])
    for sk_id, commit_lsn in ((2, 0x100000010), (1, 0x10), (2, 0x100000020)):
        await client.publish_one(info(TTID, sk_id, commit_lsn))

    async def infos() -> AsyncIterator[Any]:
        yield info(OTHER, 1, 7)

    await client.publish_infos(infos())
    status, found = await get(broker, "/v1/timelines")
    assert status == 200
    assert [entry["timeline_id"] for entry in found] == [str(TTID.timeline_id), str(OTHER.timeline_id)]
    first = found[0]["safekeepers"]
    assert [(sk["safekeeper_id"], sk["commit_lsn"]) for sk in first] == [(1, "0/10"), (2, "1/20")]
    assert 0 <= first[0].pop("heard_ms_ago") < 60_000
    assert first[0] == {
        "safekeeper_id": 1,
        "term": 0,
        "last_log_term": 0,
        **dict.fromkeys(("flush_lsn", "backup_lsn", "remote_consistent_lsn", "peer_horizon_lsn", "local_start_lsn"), "0/0"),
        "commit_lsn": "0/10",
        "standby_horizon": "0/0",
        "safekeeper_connstr": "a:1",
        "http_connstr": "",
        "https_connstr": None,
        "availability_zone": "az",
    }
    _, found = await get(broker, f"/v1/timelines?timeline_id={OTHER.timeline_id}")
    assert [entry["timeline_id"] for entry in found] == [str(OTHER.timeline_id)]
    assert (await get(broker, f"/v1/timelines?tenant_id={TenantId(b'q' * 16)}"))[1] == []
    status, error = await get(broker, "/v1/timelines?tenant_id=xyz")
    assert status == 400 and "tenant_id" in error["msg"]
    assert (await get(broker, "/v1/nothing"))[0] == 404


def test_what_is_old_or_too_much_is_forgotten() -> None:
    now = 100.0
    latest = LatestInfos(lambda: now, max_infos=3)
    ttids = [TenantTimelineId(TenantId(b"t" * 16), TimelineId(bytes([i]) * 16)) for i in range(5)]
    for ttid in ttids:
        latest.record(ttid, 1, b"")
    latest.record(ttids[2], 1, b"again")
    assert [ttid for ttid, _, _ in latest.all()] == [ttids[3], ttids[4], ttids[2]]
    now += 30
    latest.record(ttids[0], 1, b"")
    now += KEPT_S - 29
    assert [(ttid, age) for ttid, age, _ in latest.all()] == [(ttids[0], KEPT_S - 29)]


async def test_a_stream_of_one_timeline_and_of_everything(broker: BrokerServer, client: BrokerClient) -> None:
    one = f"/v1/timelines/subscribe?tenant_id={TTID.tenant_id}&timeline_id={TTID.timeline_id}"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url(broker, one)) as narrow,
        session.get(url(broker, "/v1/timelines/subscribe")) as wide,
    ):
        await wait_for_metric(broker, "per_timeline_active_subscribers", 1)
        await wait_for_metric(broker, "all_keys_active_subscribers", 1)
        assert narrow.headers["Content-Type"] == "application/x-ndjson"
        await client.publish_one(info(OTHER, 1, 1))
        await client.publish_one(info(TTID, 1, 2))
        await client.publish_one(bm.SafekeeperDiscoveryRequest(tenant_timeline_id=bm.encode_ttid(TTID)))
        news, everything = lines(narrow), lines(wide)
        async with asyncio.timeout(10):
            first = await anext(news)
            assert (first["type"], first["commit_lsn"]) == ("SAFEKEEPER_TIMELINE_INFO", "0/2")
            assert first["timeline_id"] == str(TTID.timeline_id)
            assert (await anext(news))["type"] == "SAFEKEEPER_DISCOVERY_REQUEST"
            expected = [str(ttid.timeline_id) for ttid in (OTHER, TTID, TTID)]
            assert [(await anext(everything))["timeline_id"] for _ in range(3)] == expected
    for _ in range(3):  # a message, so that the broker notices who has gone
        await client.publish_one(info(TTID, 1, 2))
    await wait_for_metric(broker, "per_timeline_active_subscribers", 0)
    await wait_for_metric(broker, "all_keys_active_subscribers", 0)


async def test_streams_end_when_the_broker_stops() -> None:
    server = BrokerServer(BrokerConfig("127.0.0.1", 0))
    await server.start()
    async with aiohttp.ClientSession() as session, session.get(url(server, "/v1/timelines/subscribe")) as answer:
        await wait_for_metric(server, "all_keys_active_subscribers", 1)
        await asyncio.wait_for(server.stop(), 10)
        assert [line async for line in lines(answer)] == []


async def flood(client: BrokerClient, broker: BrokerServer, dropped_before: float) -> int:
    """Publish large infos until the broker has dropped some; how many were published."""
    large, count = "x" * 100_000, 0
    async with asyncio.timeout(30):
        while await metric(broker, "broadcast_dropped_messages_total") == dropped_before:

            async def infos(begin: int = count) -> AsyncIterator[Any]:
                for number in range(begin, begin + 100):
                    yield info(TTID, 1, number, large)

            await client.publish_infos(infos())
            count += 100
    return count


async def test_a_slow_reader_of_json_is_told_what_it_lost(
    broker: BrokerServer, client: BrokerClient, caplog: pytest.LogCaptureFixture
) -> None:
    before = await metric(broker, "broadcast_dropped_messages_total")
    async with (
        aiohttp.ClientSession(read_bufsize=4096) as session,
        session.get(url(broker, "/v1/timelines/subscribe")) as answer,
    ):
        await wait_for_metric(broker, "all_keys_active_subscribers", 1)
        # it does not read; the drop is only counted when it takes the next message
        published = 600

        async def infos() -> AsyncIterator[Any]:
            for number in range(published):
                yield info(TTID, 1, number, "x" * 100_000)

        await client.publish_infos(infos())
        lost, received, rest = 0, [], b""
        with caplog.at_level(logging.WARNING):
            async with asyncio.timeout(30):
                while not received or received[-1] != published - 1:
                    *whole, rest = (rest + await answer.content.readany()).split(b"\n")
                    for line in map(json.loads, filter(None, whole)):
                        lost += line.get("lost", 0)
                        if "type" in line:
                            received.append(parse_lsn(line["commit_lsn"]))
        assert received == sorted(received)
        assert lost > 0 and len(received) + lost == published
    assert await metric(broker, "broadcast_dropped_messages_total") == before + lost
    assert sum("too slow" in record.message for record in caplog.records) in (1, 2)


async def test_a_grpc_subscriber_that_is_always_behind_is_warned_of(broker: BrokerServer, client: BrokerClient) -> None:
    before = await metric(broker, "broadcast_dropped_messages_total")
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{broker.port}", options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        request = bm.SubscribeSafekeeperInfoRequest(all=bm.Empty()).SerializeToString()
        call = channel.unary_stream(f"/{bm.SERVICE}/SubscribeSafekeeperInfo")(request)
        await wait_for_metric(broker, "all_keys_active_subscribers", 1)

        async def slowly() -> None:
            async for _ in call:
                await asyncio.sleep(0.02)

        reader = asyncio.create_task(slowly())
        assert await flood(client, broker, before) > 0
        reader.cancel()
        call.cancel()
    await wait_for_metric(broker, "all_keys_active_subscribers", 0)


async def test_hundreds_of_streams_on_one_connection(broker: BrokerServer, client: BrokerClient) -> None:
    async def first(ttid: TenantTimelineId) -> int:
        async for message in client.subscribe(ttid, {bm.SAFEKEEPER_TIMELINE_INFO}):
            return message.safekeeper_timeline_info.commit_lsn
        raise AssertionError

    ttids = [TenantTimelineId(TenantId(b"t" * 16), TimelineId(i.to_bytes(16, "big"))) for i in range(300)]
    tasks = [asyncio.create_task(first(ttid)) for ttid in ttids]
    await wait_for_metric(broker, "per_timeline_active_subscribers", 300)

    async def infos() -> AsyncIterator[Any]:
        for number, ttid in enumerate(ttids):
            yield info(ttid, 1, number)

    await client.publish_infos(infos())
    assert await asyncio.wait_for(asyncio.gather(*tasks), 20) == list(range(300))


async def test_idle_connections_are_pinged() -> None:
    """A client that only opens a connection gets a ping of HTTP/2 after the configured interval."""
    server = BrokerServer(BrokerConfig("127.0.0.1", 0, http2_keepalive_interval_ms=1000))
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # the preface, empty SETTINGS
        async with asyncio.timeout(20):
            while True:
                header = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(header[:3], "big"))
                if header[3] == 6 and not header[4]:  # a PING that is no answer
                    break
    finally:
        writer.close()
        await server.stop()

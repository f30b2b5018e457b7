"""The broker's two protocols on one real port, and the semantics of its four methods."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest

from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.protocols import broker_messages as bm
from neon_services.storage_broker.client import BrokerClient, BrokerError
from neon_services.storage_broker.server import BrokerConfig, BrokerServer

TTID = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"l" * 16))
OTHER = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"o" * 16))


class Subscription:
    """Collects a stream in the background; ``open`` once the broker has it."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self.received: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.create_task(self._collect(messages))

    async def _collect(self, messages: AsyncIterator[Any]) -> None:
        async for message in messages:
            self.received.put_nowait(message)

    async def next(self) -> Any:
        return await asyncio.wait_for(self.received.get(), 5)


async def metric(broker: BrokerServer, name: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{broker.port}/metrics") as answer:
        assert answer.status == 200
        lines = (await answer.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"storage_broker_{name}"))


async def wait_for_metric(broker: BrokerServer, name: str, value: float) -> None:
    deadline = asyncio.get_running_loop().time() + 5
    while await metric(broker, name) != value:
        assert asyncio.get_running_loop().time() < deadline, f"{name} did not become {value}"


def info(ttid: TenantTimelineId, commit_lsn: int, safekeeper_id: int = 7) -> Any:
    return bm.SafekeeperTimelineInfo(
        safekeeper_id=safekeeper_id, tenant_timeline_id=bm.encode_ttid(ttid), commit_lsn=commit_lsn, availability_zone="az-1"
    )


async def test_http_shares_the_port(broker: BrokerServer) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{broker.port}/status") as answer:
            assert (answer.status, await answer.read()) == (200, b"")
        async with session.get(f"http://127.0.0.1:{broker.port}/nothing") as answer:
            assert answer.status == 404
    assert await metric(broker, "active_publishers") == 0


async def test_http_first_bytes_one_at_a_time(broker: BrokerServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    for byte in b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n":
        writer.write(bytes([byte]))
        await writer.drain()
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_stream_of_infos_reaches_both_kinds_of_subscribers(broker: BrokerServer, client: BrokerClient) -> None:
    everything = Subscription(client.subscribe_all())
    filtered = Subscription(client.subscribe(TTID, {bm.SAFEKEEPER_TIMELINE_INFO}))
    await wait_for_metric(broker, "all_keys_active_subscribers", 1)
    await wait_for_metric(broker, "per_timeline_active_subscribers", 1)

    async def infos() -> AsyncIterator[Any]:
        for ttid, lsn in ((TTID, 1), (OTHER, 2), (TTID, 3)):
            yield info(ttid, lsn)

    await asyncio.wait_for(client.publish_infos(infos()), 5)
    assert [(await everything.next()).commit_lsn for _ in range(3)] == [1, 2, 3]
    typed = [await filtered.next() for _ in range(2)]
    assert [message.safekeeper_timeline_info.commit_lsn for message in typed] == [1, 3]
    assert typed[0].type == bm.SAFEKEEPER_TIMELINE_INFO
    assert typed[0].safekeeper_timeline_info.availability_zone == "az-1"
    everything.task.cancel()
    filtered.task.cancel()
    await wait_for_metric(broker, "all_keys_active_subscribers", 0)
    await wait_for_metric(broker, "per_timeline_active_subscribers", 0)


async def test_discovery_by_publish_one(broker: BrokerServer, client: BrokerClient) -> None:
    requests = Subscription(client.subscribe(None, {bm.SAFEKEEPER_DISCOVERY_REQUEST}))
    infos = Subscription(client.subscribe_all())
    await wait_for_metric(broker, "all_keys_active_subscribers", 2)
    await client.publish_one(bm.SafekeeperDiscoveryRequest(tenant_timeline_id=bm.encode_ttid(TTID)))
    await client.publish_one(info(TTID, 5))
    assert bm.ttid_of((await requests.next()).safekeeper_discovery_request) == TTID
    assert (await infos.next()).commit_lsn == 5
    assert requests.received.empty()
    requests.task.cancel()
    infos.task.cancel()


async def raw_call(broker: BrokerServer, method: str, request: bytes) -> grpc.StatusCode:
    """The status of one call with arbitrary bytes."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{broker.port}") as channel:
        streaming = method.startswith("Subscribe")
        kind = channel.unary_stream if streaming else channel.unary_unary
        call = kind(f"/{bm.SERVICE}/{method}")(request, timeout=5)
        try:
            if streaming:
                await call.read()
            else:
                await call
        except grpc.aio.AioRpcError as error:
            return error.code()
        return await call.code()


@pytest.mark.parametrize(
    ("method", "request_message"),
    [
        ("SubscribeSafekeeperInfo", bm.SubscribeSafekeeperInfoRequest()),
        (
            "SubscribeSafekeeperInfo",
            bm.SubscribeSafekeeperInfoRequest(tenant_timeline_id=bm.TenantTimelineIdMessage(tenant_id=b"short")),
        ),
        ("SubscribeByFilter", bm.SubscribeByFilterRequest(tenant_timeline_id=bm.FilterTenantTimelineId(enabled=True))),
        (
            "SubscribeByFilter",
            bm.SubscribeByFilterRequest(
                tenant_timeline_id=bm.FilterTenantTimelineId(
                    enabled=True, tenant_timeline_id=bm.TenantTimelineIdMessage(tenant_id=b"t" * 15, timeline_id=b"l" * 16)
                )
            ),
        ),
        ("PublishOne", bm.TypedMessage(type=bm.SAFEKEEPER_TIMELINE_INFO)),
        ("PublishOne", bm.TypedMessage(type=bm.UNKNOWN, safekeeper_timeline_info=info(TTID, 1))),
        ("PublishOne", bm.TypedMessage(type=bm.SAFEKEEPER_DISCOVERY_REQUEST, safekeeper_timeline_info=info(TTID, 1))),
        ("PublishOne", bm.TypedMessage(type=77, safekeeper_timeline_info=info(TTID, 1))),
    ],
)
async def test_malformed_requests_are_invalid_arguments(broker: BrokerServer, method: str, request_message: Any) -> None:
    assert await raw_call(broker, method, request_message.SerializeToString()) == grpc.StatusCode.INVALID_ARGUMENT


async def test_garbage_is_an_invalid_argument(broker: BrokerServer) -> None:
    assert await raw_call(broker, "PublishOne", b"\xff\xff\xff") == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_info_without_ids_ends_its_publisher_only(broker: BrokerServer, client: BrokerClient) -> None:
    everything = Subscription(client.subscribe_all())
    await wait_for_metric(broker, "all_keys_active_subscribers", 1)

    async def infos() -> AsyncIterator[Any]:
        yield info(TTID, 1)
        yield bm.SafekeeperTimelineInfo(safekeeper_id=1)

    with pytest.raises(BrokerError, match="INVALID_ARGUMENT"):
        await asyncio.wait_for(client.publish_infos(infos()), 5)
    assert (await everything.next()).commit_lsn == 1
    await client.publish_one(info(TTID, 2))
    assert (await everything.next()).commit_lsn == 2
    everything.task.cancel()


async def test_fields_of_later_versions_survive(broker: BrokerServer, client: BrokerClient) -> None:
    everything = Subscription(client.subscribe_all())
    filtered = Subscription(client.subscribe(TTID, {bm.SAFEKEEPER_TIMELINE_INFO}))
    await wait_for_metric(broker, "all_keys_active_subscribers", 1)
    await wait_for_metric(broker, "per_timeline_active_subscribers", 1)
    unknown_field = bytes([99 << 3 & 0x7F | 0x80, 99 >> 4, 42])  # field 99, varint 42
    encoded = info(TTID, 3).SerializeToString() + unknown_field
    await client.publish_one(bm.SafekeeperTimelineInfo.FromString(encoded))
    assert (await everything.next()).SerializeToString().endswith(unknown_field)
    assert (await filtered.next()).safekeeper_timeline_info.SerializeToString().endswith(unknown_field)
    everything.task.cancel()
    filtered.task.cancel()


async def test_a_subscription_ends_with_an_error_when_the_broker_stops() -> None:
    server = BrokerServer(BrokerConfig("127.0.0.1", 0))
    await server.start()
    client = BrokerClient(f"http://127.0.0.1:{server.port}")
    subscription = Subscription(client.subscribe_all())
    await wait_for_metric(server, "all_keys_active_subscribers", 1)
    await server.stop()
    with pytest.raises(BrokerError):
        await asyncio.wait_for(subscription.task, 5)
    with pytest.raises(BrokerError):
        await client.publish_one(info(TTID, 1))
    await client.close()


async def test_the_client_survives_a_restart_of_the_broker() -> None:
    server = BrokerServer(BrokerConfig("127.0.0.1", 0))
    await server.start()
    port = server.port
    client = BrokerClient(f"http://127.0.0.1:{port}")
    await client.publish_one(info(TTID, 1))
    await server.stop()
    server = BrokerServer(BrokerConfig("127.0.0.1", port))
    await server.start()
    async with asyncio.timeout(10):
        while True:
            try:
                await client.publish_one(info(TTID, 2))
                break
            except BrokerError:
                await asyncio.sleep(0.1)
    await client.close()
    await server.stop()

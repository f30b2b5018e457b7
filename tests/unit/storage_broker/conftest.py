"""A broker on a port of its own, and a client of it."""

from collections.abc import AsyncIterator

import pytest

from neon_services.storage_broker.client import BrokerClient
from neon_services.storage_broker.server import BrokerConfig, BrokerServer


@pytest.fixture
async def broker() -> AsyncIterator[BrokerServer]:
    server = BrokerServer(BrokerConfig("127.0.0.1", 0, timeline_chan_size=4, all_keys_chan_size=64))
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def client(broker: BrokerServer) -> AsyncIterator[BrokerClient]:
    client = BrokerClient(f"http://127.0.0.1:{broker.port}")
    yield client
    await client.close()

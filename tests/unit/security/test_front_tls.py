"""The broker's front with TLS: the same relay, except that nobody can close one direction only."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from neon_services.ground.tls import ServerTls, client_context
from neon_services.storage_broker.front import HTTP2_PREFACE_START, Front
from tests.credentials import Authority
from tests.integration.cluster import wait_until

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
SIZE = 20 << 20
FIRST = {"grpc": HTTP2_PREFACE_START, "http": b"GET "}


class Servers:
    def __init__(self, directory: Path, authority: Authority) -> None:
        self.directory = directory
        self.front = Front(directory / "grpc", directory / "http")
        self.tls = ServerTls(directory / "server.key", directory / "server.crt", alpn=("h2", "http/1.1"))
        self.context = client_context(authority.ca_file)
        self.script: Script
        self.chosen: list[str] = []
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        for name in ("grpc", "http"):

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name) -> None:
                self.chosen.append(name)
                try:
                    await self.script(reader, writer)
                except ConnectionError:
                    pass
                finally:
                    writer.close()

            self._servers.append(await asyncio.start_unix_server(serve, self.directory / name))
        await self.front.start("127.0.0.1", 0)
        await self.front.start("127.0.0.1", 0, self.tls)

    async def connect(self, tls: bool = True) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        port = self.front.ports[tls]
        return await asyncio.open_connection("127.0.0.1", port, ssl=self.context if tls else None)

    async def stop(self) -> None:
        await self.front.stop()
        for server in self._servers:
            server.close()


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[Servers]:
    authority = Authority(tmp_path)
    authority.install(tmp_path)
    servers = Servers(tmp_path, authority)
    await servers.start()
    yield servers
    await servers.stop()


@pytest.mark.parametrize("kind", ["grpc", "http"])
async def test_the_same_choice_and_every_byte_both_ways(servers: Servers, kind: str) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    servers.script = echo
    for tls in (True, False):
        reader, writer = await servers.connect(tls)
        sent = FIRST[kind] + bytes(range(256)) * (SIZE // 256)

        async def feed(writer: asyncio.StreamWriter = writer, sent: bytes = sent) -> None:
            for begin in range(0, len(sent), 1 << 16):
                writer.write(sent[begin : begin + (1 << 16)])
                await writer.drain()

        async with asyncio.timeout(60):
            feeding = asyncio.create_task(feed())
            assert await reader.readexactly(len(sent)) == sent
            await feeding
        writer.close()
    assert servers.chosen == [kind, kind]


@pytest.mark.parametrize("kind", ["grpc", "http"])
async def test_the_end_of_either_side(servers: Servers, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Everything that a server said before it closed arrives; a client that goes is noticed."""

    async def say_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(4)
        writer.write(b"x" * SIZE)
        await writer.drain()

    servers.script = say_and_close
    reader, writer = await servers.connect()
    writer.write(FIRST[kind])
    async with asyncio.timeout(60):
        assert len(await reader.read()) == SIZE
    writer.close()

    gone = asyncio.Event()

    async def wait_for_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    servers.script = wait_for_end
    _, writer = await servers.connect()
    writer.write(FIRST[kind] + b"more")
    await writer.drain()
    writer.close()
    await asyncio.wait_for(gone.wait(), 10)
    with caplog.at_level(logging.WARNING):  # one that goes before anybody was chosen, or while the choice is made
        for first in (b"", b"PR", FIRST[kind]):
            _, writer = await servers.connect()
            writer.write(first)
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()
        await asyncio.to_thread(wait_until, lambda: not servers.front.clients, "the front to let all of them go", 10)
    assert not caplog.records, caplog.text  # the loop says so when a protocol asks a transport for what it cannot do


async def test_who_speaks_no_tls_is_dropped(servers: Servers) -> None:
    for first in (b"GET / HTTP/1.1\r\n\r\n", HTTP2_PREFACE_START + b"* HTTP/2.0\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", servers.front.ports[1])
        writer.write(first)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                await reader.read()
        writer.close()
    assert servers.chosen == []

"""The front's relay against scripted servers: choice by the first bytes, half-close, back-pressure, lost ends."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from neon_services.storage_broker.front import Front

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Servers:
    """A front and the two scripted servers behind it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.front = Front(directory / "grpc", directory / "http")
        self.scripts: dict[str, Script] = {}
        self.servers: list[asyncio.Server] = []

    async def start(self) -> None:
        for name in ("grpc", "http"):

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name) -> None:
                await self.scripts[name](reader, writer)
                writer.close()

            self.servers.append(await asyncio.start_unix_server(serve, self.directory / name))
        await self.front.start("127.0.0.1", 0)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.front.ports[0])

    async def stop(self) -> None:
        await self.front.stop()
        for server in self.servers:
            server.close()


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[Servers]:
    servers = Servers(tmp_path)
    await servers.start()
    yield servers
    await servers.stop()


def answer_after_eof(name: bytes) -> Script:
    """Read until the client's end of stream, then send back what came: works only if half-close passes both ways."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = await reader.read(-1)
        writer.write(name + b":" + received)
        await writer.drain()

    return script


@pytest.mark.parametrize(
    ("sent", "server"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"grpc"),
        (b"PRI ", b"grpc"),
        (b"PRX", b"http"),
        (b"PUT / HTTP/1.1", b"http"),
        (b"G", b"http"),
        (b"\0", b"http"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1000])
async def test_the_first_bytes_choose_and_half_close_passes(servers: Servers, sent: bytes, server: bytes, chunk: int) -> None:
    servers.scripts = {"grpc": answer_after_eof(b"grpc"), "http": answer_after_eof(b"http")}
    reader, writer = await servers.connect()
    for start in range(0, len(sent), chunk):
        writer.write(sent[start : start + chunk])
        await writer.drain()
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(-1), 5) == server + b":" + sent
    writer.close()


async def test_a_client_that_leaves_before_a_choice_is_forgotten(servers: Servers) -> None:
    reader, writer = await servers.connect()
    writer.write(b"PR")
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(-1), 5) == b""
    writer.close()


async def test_a_slow_client_stops_the_server_and_loses_nothing(servers: Servers) -> None:
    total = 64 * 1024 * 1024
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readexactly(4)
        chunk = bytes(range(256)) * 256
        while sent < total:
            writer.write(chunk)
            sent += len(chunk)
            await writer.drain()

    servers.scripts = {"grpc": flood, "http": flood}
    reader, writer = await servers.connect()
    writer.write(b"GET ")
    previous = -1
    while sent != previous or sent == 0:  # until the server is blocked: nobody reads
        previous = sent
        await asyncio.sleep(0.1)
    assert sent < total // 2, "the relay buffered without limit"
    received = 0
    while chunk := await asyncio.wait_for(reader.read(1 << 20), 5):
        assert chunk[0] == received % 256
        received += len(chunk)
    assert received == total
    writer.close()


async def test_a_lost_client_ends_the_server_side(servers: Servers) -> None:
    ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(4)
        writer.write(b"x")
        try:
            ended.set_result(await reader.read(1) == b"")
        except ConnectionError:
            ended.set_result(True)

    servers.scripts = {"grpc": wait, "http": wait}
    reader, writer = await servers.connect()
    writer.write(b"GET ")
    assert await asyncio.wait_for(reader.readexactly(1), 5) == b"x"
    writer.transport.abort()
    assert await asyncio.wait_for(ended, 5)


def test_a_server_that_speaks_first_is_heard(tmp_path: Path) -> None:
    """As gRPC servers do: their first frame must not get lost while the two sides are being joined. On the real loop."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "grpc"))
    listener.listen(100)

    def greet() -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = listener.accept()
                accepted.sendall(b"settings")
                accepted.recv(100)
                accepted.close()

    async def scenario() -> None:
        front = Front(tmp_path / "grpc", tmp_path / "http")
        await front.start("127.0.0.1", 0)
        for _ in range(300):
            reader, writer = await asyncio.open_connection("127.0.0.1", front.ports[0])
            writer.write(b"PRI * HTTP/2.0")
            assert await asyncio.wait_for(reader.readexactly(8), 5) == b"settings"
            writer.close()
        await front.stop()

    server = threading.Thread(target=greet)
    server.start()
    try:
        uvloop.run(scenario())
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        server.join()

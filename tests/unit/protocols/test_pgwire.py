"""The Postgres wire protocol: codecs on every prefix, and server and client against each other over a real socket."""

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from neon_services.ground.errors import NeonError, ProtocolViolation
from neon_services.protocols import pgclient, pgwire
from neon_services.protocols.pgserver import EndConnection, PgServer, ServerConnection
from neon_services.protocols.pgwire import ServerError, StartupMessage

STARTUP = pgwire.startup_message({"user": "u", "options": "-c tenant_id=a timeline_id=b", "application_name": "x y"})


# -- codecs


def test_startup_round_trip() -> None:
    assert struct.unpack_from("!ii", STARTUP) == (len(STARTUP), 196608)
    parsed = pgwire.parse_startup(STARTUP[4:])
    assert isinstance(parsed, StartupMessage)
    assert parsed.parameters == {"user": "u", "options": "-c tenant_id=a timeline_id=b", "application_name": "x y"}
    assert parsed.options() == {"tenant_id": "a", "timeline_id": "b"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("-c a=1 -cb=2 c=3", {"a": "1", "b": "2", "c": "3"}),
        ("-c  a=1\t\n b=", {"a": "1", "b": ""}),
        (r"a=x\ y b=\\", {"a": "x y", "b": "\\"}),
        ("a=1=2 lonely", {"a": "1=2"}),
        ('protocol={"type":"vanilla"}', {"protocol": '{"type":"vanilla"}'}),
    ],
)
def test_options(text: str, expected: dict[str, str]) -> None:
    assert StartupMessage({"options": text}).options() == expected


def test_every_prefix_of_a_startup_is_refused() -> None:
    packet = STARTUP[4:]
    for length in range(len(packet)):
        with pytest.raises(ProtocolViolation):
            pgwire.parse_startup(packet[:length])


@pytest.mark.parametrize("code", [pgwire.SSL_REQUEST, pgwire.GSSENC_REQUEST, pgwire.CANCEL_REQUEST])
def test_special_requests(code: int) -> None:
    assert pgwire.parse_startup(struct.pack("!i", code)) == code


def test_other_protocol_versions_are_refused() -> None:
    with pytest.raises(ProtocolViolation, match=r"2\.0"):
        pgwire.parse_startup(struct.pack("!i", 2 << 16) + b"user\0u\0\0")


def test_messages_come_out_whole_at_every_cut() -> None:
    messages = [pgwire.query("select 1"), pgwire.copy_data(b"\0\1\2"), pgwire.message(b"c"), pgwire.copy_data(bytes(300))]
    stream = b"".join(messages)
    ends = [sum(map(len, messages[: count + 1])) for count in range(len(messages))]
    for length in range(len(stream) + 1):
        found = list(pgwire.split_messages(memoryview(stream[:length])))
        assert [after for _, _, after in found] == [end for end in ends if end <= length]
        for (tag, body, _), whole in zip(found, messages, strict=False):
            assert (bytes([tag]), bytes(body)) == (whole[:1], whole[5:])


@pytest.mark.parametrize("length", [-1, 0, 3, pgwire.MAX_MESSAGE_BYTES + 1])
def test_impossible_lengths(length: int) -> None:
    with pytest.raises(ProtocolViolation, match="impossible length"):
        list(pgwire.split_messages(memoryview(b"d" + struct.pack("!i", length) + bytes(10))))


def test_error_response_round_trip() -> None:
    for sqlstate, text in (("XX000", "plain"), ("00000", 'ending streaming to Some("x")'), ("08P01", "nul \0 inside")):
        error = pgwire.parse_error_response(pgwire.error_response(text, sqlstate)[5:])
        assert (error.sqlstate, str(error), error.severity) == (sqlstate, text.replace("\0", " "), "ERROR")


def test_data_row_round_trip() -> None:
    values = ["", None, "text", "ünï"]
    assert pgwire.parse_data_row(pgwire.data_row(values)[5:]) == values


# -- server and client


class Handler:
    """Commands that exercise every way of answering."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection
        self.lost = asyncio.get_running_loop().create_future()

    async def startup(self, message: StartupMessage) -> None:
        if message.parameters["user"] == "stranger":
            raise ServerError("28000", "no strangers")

    async def query(self, connection: ServerConnection, sql: str) -> None:
        if sql == "rows":
            connection.send_rows([("a", pgwire.TEXT_OID), ("b", pgwire.INT4_OID)], [["x", "1"], [None, "2"]])
        elif sql == "tag":
            connection.send_command_complete("SET")
        elif sql == "fails":
            raise ServerError("55000", "on purpose")
        elif sql == "fails oddly":
            raise NeonError("internal matter")
        elif sql == "out":
            connection.begin_copy_out()
            for number in range(3):
                connection.send_copy_data(bytes([number]) * 70_000)
            connection.end_copy_out()
        elif sql == "echo":
            connection.begin_copy_both()
            while (data := await connection.next_copy_data()) is not None:
                connection.send_copy_data(data)
                await connection.drain()
            raise EndConnection("done")
        elif sql == "sink":
            await self.sink()

    async def sink(self) -> None:
        """The hot path: views, and one answer per batch."""
        sums: list[int] = []

        def batch_end() -> None:
            if sums:
                self.connection.send_copy_data(struct.pack("!Q", sum(sums)))
                sums.clear()

        self.connection.copy_sink = lambda view: sums.append(sum(view))
        self.connection.copy_batch_end = batch_end
        self.connection.begin_copy_both()
        await self.connection.next_copy_data()

    def connection_lost(self) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


class Listening:
    """A server and the handlers of its connections."""

    def __init__(self) -> None:
        self.handlers: list[Handler] = []
        self.server = PgServer(self._make)

    def _make(self, connection: ServerConnection) -> Handler:
        self.handlers.append(Handler(connection))
        return self.handlers[-1]

    async def client(self, user: str = "u") -> pgclient.PgClient:
        return await pgclient.connect("127.0.0.1", self.server.port, parameters={"user": user})


@pytest.fixture
async def listening() -> AsyncIterator[Listening]:
    listening = Listening()
    await listening.server.start("127.0.0.1", 0)
    yield listening
    await listening.server.stop()


async def test_queries_and_errors(listening: Listening) -> None:
    client = await listening.client()
    assert await client.query("rows") == [["x", "1"], [None, "2"]]
    assert await client.query("tag") == []
    for _ in range(2):  # an error does not end the connection
        with pytest.raises(ServerError, match="on purpose") as failure:
            await client.query("fails")
        assert failure.value.sqlstate == "55000"
    with pytest.raises(ServerError, match="internal matter") as failure:
        await client.query("fails oddly")
    assert failure.value.sqlstate == "XX000"
    chunks = [chunk async for chunk in client.copy_out("out")]
    assert chunks == [bytes([number]) * 70_000 for number in range(3)]
    assert await client.query("rows")
    client.close()
    await asyncio.wait_for(listening.handlers[0].lost, 5)


async def test_a_refused_startup(listening: Listening) -> None:
    with pytest.raises(ServerError, match="no strangers") as failure:
        await listening.client("stranger")
    assert failure.value.sqlstate == "28000"


async def test_copy_both_with_large_and_small_messages(listening: Listening) -> None:
    """More than the queue holds is under way in both directions: flow control must neither lose nor deadlock."""
    client = await listening.client()
    await client.start_copy_both("echo")
    generator = random.Random(4)
    sent = [generator.randbytes(generator.choice([0, 1, 100, 50_000, 400_000])) for _ in range(150)]

    async def send() -> None:
        for payload in sent:
            client.send_copy_data(payload)
            await client.drain()

    sending = asyncio.create_task(send())
    for payload in sent:
        assert await asyncio.wait_for(client.next_copy_data(), 10) == payload
    await sending
    client.write(pgwire.COPY_DONE)
    assert await asyncio.wait_for(client.next_copy_data(), 5) is None
    client.abort()


async def test_the_sink_sees_every_byte_at_every_cut(listening: Listening) -> None:
    """The stream arrives in pieces of one byte and more; every message is seen once, whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", listening.server.port)
    generator = random.Random(8)
    payloads = [generator.randbytes(size) for size in (0, 1, 5, 300_000, 7, 70_000)]
    for byte in pgwire.startup_message({"user": "u"}) + pgwire.query("sink"):
        writer.write(bytes([byte]))
        await writer.drain()
    await asyncio.wait_for(reader.readuntil(pgwire.COPY_BOTH_RESPONSE), 5)
    stream = b"".join(pgwire.copy_data(payload) for payload in payloads)
    position = 0
    while position < len(stream):
        size = 1 if position < 400 else generator.randrange(1, 90_000)
        writer.write(stream[position : position + size])
        await writer.drain()
        position += size
    expected, received = sum(sum(payload) for payload in payloads), 0
    while received != expected:
        header = await asyncio.wait_for(reader.readexactly(5), 5)
        body = await reader.readexactly(int.from_bytes(header[1:], "big") - 4)
        if header[:1] == b"d":
            received += int.from_bytes(body, "big")
        assert received <= expected
    writer.close()


async def test_ssl_and_gss_requests_are_declined(listening: Listening) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", listening.server.port)
    for code in (pgwire.SSL_REQUEST, pgwire.GSSENC_REQUEST):
        writer.write(struct.pack("!ii", 8, code))
        assert await asyncio.wait_for(reader.readexactly(1), 5) == b"N"
    writer.write(pgwire.startup_message({"user": "u"}))
    assert await asyncio.wait_for(reader.readexactly(1), 5) == b"R"
    writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack("!i", 4),
        struct.pack("!i", 100_000),
        struct.pack("!ii", 8, 12345),
        STARTUP + b"Q\0\0\0\1",
        STARTUP + pgwire.message(b"P", b"extended\0"),
        STARTUP + pgwire.query("echo") * 40,
    ],
)
async def test_violations_end_the_connection_with_an_error(listening: Listening, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", listening.server.port)
    writer.write(sent)
    answer = await asyncio.wait_for(reader.read(-1), 5)
    assert b"C08P01" in answer
    writer.close()
    assert await (await listening.client()).query("rows")


async def test_a_lost_client_cancels_its_query(listening: Listening) -> None:
    client = await listening.client()
    await client.start_copy_both("echo")
    client.abort()
    await asyncio.wait_for(listening.handlers[0].lost, 5)


async def test_a_silent_server_is_a_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TimeoutError):
            await pgclient.connect("127.0.0.1", silent.getsockname()[1], timeout=0.2)


async def test_a_client_of_something_else_fails_cleanly() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    with pytest.raises((NeonError, ConnectionError)):
        await pgclient.connect("127.0.0.1", server.sockets[0].getsockname()[1])
    server.close()

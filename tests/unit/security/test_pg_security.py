"""Passwords and TLS on Postgres-wire connections, from both ends, with psycopg and openssl as judges."""

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from neon_services.ground.errors import NeonError, ProtocolViolation
from neon_services.ground.tls import ClientTls, ServerTls, SslMode
from neon_services.protocols import pgclient, pgserver, pgwire
from neon_services.protocols.pgserver import PgServer, ServerConnection
from tests.credentials import Authority

CHUNK, CHUNKS = 64 << 10, 1000
SSL_REQUEST = struct.pack("!ii", 8, pgwire.SSL_REQUEST)


class Handler:
    """Answers a query of one letter with one large row, others with their length; wants a password if it is told one."""

    def __init__(self, connection: ServerConnection, password: str | None) -> None:
        self._connection = connection
        self._password = password
        self.lost = 0
        self.sent = 0
        self.blocked = asyncio.Event()

    async def startup(self, message: pgwire.StartupMessage) -> None:
        if self._password is not None and await self._connection.ask_password() != self._password:
            raise pgwire.ServerError("28P01", "wrong password", "FATAL")

    async def query(self, connection: ServerConnection, sql: str) -> None:
        if sql == "stream":
            await self._stream(connection)
            return
        connection.send_rows([("x", pgwire.TEXT_OID)], [[sql * 10_000 if len(sql) == 1 else str(len(sql))]])

    async def _stream(self, connection: ServerConnection) -> None:
        connection.begin_copy_out()
        for number in range(CHUNKS):
            connection.send_copy_data(bytes([number % 256]) * CHUNK)
            self.sent += CHUNK
            if not connection._writable.is_set():
                self.blocked.set()
            await connection.drain()
        connection.end_copy_out()

    def connection_lost(self) -> None:
        self.lost += 1


class Server:
    def __init__(self, tls: ServerTls | None, password: str | None) -> None:
        self.handlers: list[Handler] = []
        self._password = password
        self.server = PgServer(self._make, tls)

    def _make(self, connection: ServerConnection) -> Handler:
        self.handlers.append(Handler(connection, self._password))
        return self.handlers[-1]

    @property
    def open(self) -> int:
        return len(self.server._connections)


@contextlib.asynccontextmanager
async def serving(tls: ServerTls | None = None, password: str | None = None) -> AsyncIterator[Server]:
    server = Server(tls, password)
    await server.server.start("127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.server.stop()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path)
    made.install(tmp_path)
    return made


@pytest.fixture
def tls(authority: Authority) -> ServerTls:
    return ServerTls(authority.directory / "server.key", authority.directory / "server.crt")


async def dialogue(port: int, *sent: bytes, answer: int = 1) -> bytes:
    """Send raw bytes in pieces, each after ``answer`` bytes came; all that came until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        async with asyncio.timeout(10):
            for number, piece in enumerate(sent):
                if number:
                    received += await reader.readexactly(answer)
                writer.write(piece)
            return received + await reader.read()
    except (ConnectionError, asyncio.IncompleteReadError):
        return received
    finally:
        writer.close()


async def psql(port: int, sql: str = "x", **options: Any) -> str:
    def run() -> str:
        with psycopg.connect(
            host="127.0.0.1", port=port, user="u", dbname="d", autocommit=True, cursor_factory=psycopg.ClientCursor, **options
        ) as connection:
            row = connection.execute(sql).fetchone()  # type: ignore[call-overload]
            assert row is not None
            return row[0]

    return await asyncio.to_thread(run)


async def test_a_password(tls: ServerTls) -> None:
    async with serving(password="päss" * 1000) as server:
        port = server.server.port
        assert await psql(port, password="päss" * 1000) == "x" * 10_000
        client = await pgclient.connect("127.0.0.1", port, password="päss" * 1000)
        assert await client.query("y") == [["y" * 10_000]]
        client.abort()
        for wrong in ("", "pass", "päss" * 1000 + " "):
            with pytest.raises(pgwire.ServerError, match="wrong password"):
                await pgclient.connect("127.0.0.1", port, password=wrong)
        with pytest.raises(NeonError, match="none was given"):
            await pgclient.connect("127.0.0.1", port)
        with pytest.raises(psycopg.OperationalError):
            await psql(port)


async def test_nothing_is_done_for_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(password="secret") as server:
        port = server.server.port
        startup = pgwire.startup_message({"user": "u"})
        question = len(pgwire.AUTHENTICATION_CLEARTEXT)
        # a query before the password, with it, and instead of it
        both = await dialogue(port, startup + pgwire.query("x"), pgwire.password_message("wrong"), answer=question)
        assert b"wrong password" in both and b"xxxx" not in both
        for message in (
            pgwire.query("x"),
            pgwire.message(b"S"),
            pgwire.copy_data(b"x"),
            pgwire.COPY_DONE,
            pgwire.message(b"F"),
        ):
            asked = await dialogue(port, startup, message + pgwire.password_message("secret"), answer=question)
            assert b"a password was asked for, and nothing else" in asked
            assert b"xxxx" not in asked and pgwire.READY_FOR_QUERY not in asked and pgwire.AUTHENTICATION_OK not in asked
        assert await dialogue(port, startup, pgwire.TERMINATE, answer=question) == pgwire.AUTHENTICATION_CLEARTEXT
        huge = await dialogue(port, startup, b"p" + struct.pack("!i", 20_000), answer=question)
        assert b"impossible length" in huge
        huge = await dialogue(port, startup, b"d" + struct.pack("!i", 60_000_000), answer=question)
        assert b"impossible length" in huge
        assert b"unexpected message 'p'" in await dialogue(
            port, startup, pgwire.password_message("secret") * 2, answer=question
        )
        monkeypatch.setattr(pgserver, "PASSWORD_TIMEOUT_S", 0.1)
        assert b"no password within" in await dialogue(port, startup)
        monkeypatch.setattr(pgserver, "STARTUP_TIMEOUT_S", 0.1)
        assert await dialogue(port, startup[:5]) == b""
        await asyncio.sleep(0)
        assert server.open == 0


async def test_messages_may_be_long_after_the_password() -> None:
    async with serving(password="secret") as server:
        client = await pgclient.connect("127.0.0.1", server.server.port, password="secret")
        assert await client.query("y" * 10_000_000) == [["10000000"]]
        client.abort()


@pytest.mark.parametrize("mode", ["prefer", "require", "verify-full"])
async def test_clients_change_to_tls(authority: Authority, tls: ServerTls, mode: str) -> None:
    async with serving(tls, password="secret") as server:
        port = server.server.port
        client = await pgclient.connect(
            "127.0.0.1", port, password="secret", tls=ClientTls.parse(mode, authority.ca_file, what="x")
        )
        assert client.transport is not None and client.transport.get_extra_info("ssl_object") is not None
        for letter in "abc":
            assert await client.query(letter) == [[letter * 10_000]]
        client.abort()
        options = {"sslmode": mode, "sslrootcert": str(authority.ca_file), "password": "secret"}
        assert await psql(port, **options) == "x" * 10_000
    assert all(handler.lost == 1 for handler in server.handlers)


async def test_plaintext_is_refused_with_tls(tls: ServerTls) -> None:
    async with serving(tls, password="secret") as server:
        port = server.server.port
        for how in (None, ClientTls(SslMode.DISABLE)):
            with pytest.raises(pgwire.ServerError, match="must connect with TLS"):
                await pgclient.connect("127.0.0.1", port, password="secret", tls=how)
        with pytest.raises(psycopg.OperationalError, match="must connect with TLS"):
            await psql(port, sslmode="disable", password="secret")
        gss = struct.pack("!ii", 8, pgwire.GSSENC_REQUEST)
        answer = await dialogue(port, gss, pgwire.startup_message({"user": "u"}))
        assert answer.startswith(b"NE") and b"must connect with TLS" in answer
        assert server.handlers[-1].lost == 1


async def test_a_server_without_tls(authority: Authority) -> None:
    async with serving() as server:
        port = server.server.port
        client = await pgclient.connect("127.0.0.1", port, tls=ClientTls(SslMode.PREFER, authority.ca_file))
        assert await client.query("z") == [["z" * 10_000]]
        client.abort()
        for mode in (SslMode.REQUIRE, SslMode.VERIFY_FULL):
            with pytest.raises(NeonError, match=f"does not speak TLS, and sslmode is {mode}"):
                await pgclient.connect("127.0.0.1", port, tls=ClientTls(mode, authority.ca_file))
        assert await psql(port, sslmode="prefer") == "x" * 10_000


async def test_a_certificate_that_is_not_trusted(tmp_path: Path, tls: ServerTls, authority: Authority) -> None:
    stranger = Authority(tmp_path, "stranger")
    async with serving(tls) as server:
        port = server.server.port
        for how in (ClientTls(SslMode.PREFER, stranger.ca_file), ClientTls(SslMode.VERIFY_FULL)):
            with pytest.raises(ConnectionError, match="certificate is not trusted"):
                await pgclient.connect("127.0.0.1", port, tls=how)
        authority.install(tmp_path, "other.example")
        tls.reload()
        with pytest.raises(ConnectionError, match=r"not trusted.*127\.0\.0\.1"):
            await pgclient.connect("127.0.0.1", port, tls=ClientTls(SslMode.REQUIRE, authority.ca_file))
        client = await pgclient.connect("127.0.0.1", port, tls=ClientTls(SslMode.REQUIRE))
        client.abort()
        with pytest.raises(NeonError, match="No such file"):
            await pgclient.connect("127.0.0.1", port, tls=ClientTls(SslMode.PREFER, tmp_path / "missing"))


async def test_bytes_injected_before_tls(tls: ServerTls) -> None:
    """What comes in the clear behind the request for TLS must never be taken for what the client said inside."""
    async with serving(tls) as server:
        port = server.server.port
        for injected in (b"\x00", pgwire.startup_message({"user": "u"}), SSL_REQUEST):
            answer = await dialogue(port, SSL_REQUEST + injected)
            assert b"S" not in answer[:1]
        for nonsense in (b"\x16\x03\x01\x00\x05hello", pgwire.startup_message({"user": "u"}), b"x" * 1000):
            answer = await dialogue(port, SSL_REQUEST, nonsense)
            assert answer[:1] == b"S" and b"R\x00\x00\x00\x08" not in answer
        async with asyncio.timeout(5):
            await asyncio.gather(*(connection.lost for connection in set(server.server._connections)))
        assert server.open == 0
        assert all(handler.lost == 1 for handler in server.handlers)


@pytest.mark.parametrize("answer", [b"", b"S" + b"E", b"X", b"N" + b"R\x00", b"E\x00\x00\x00\x05\x00"])
async def test_a_client_takes_nothing_but_one_byte(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        with pytest.raises((ProtocolViolation, ConnectionError)):
            await pgclient.connect("127.0.0.1", server.sockets[0].getsockname()[1], tls=ClientTls(), timeout=5)
    finally:
        server.close()


async def test_a_slow_reader_holds_the_writer_back(authority: Authority, tls: ServerTls) -> None:
    async with serving(tls) as server:
        client = await pgclient.connect("127.0.0.1", server.server.port, tls=ClientTls(SslMode.REQUIRE, authority.ca_file))
        pieces = client.copy_out("stream")
        received = [await anext(pieces)]  # and then nothing is taken: the client's queue fills, and it stops reading
        handler = server.handlers[0]
        await asyncio.wait_for(handler.blocked.wait(), 20)
        assert handler.sent < CHUNK * CHUNKS
        async for piece in pieces:
            received.append(piece)
        assert b"".join(received) == b"".join(bytes([number % 256]) * CHUNK for number in range(CHUNKS))
        client.abort()


async def test_clients_that_leave_during_the_handshake(tls: ServerTls) -> None:
    async with serving(tls) as server:
        for first in (b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00" + b"\x01" * 100):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
            writer.write(SSL_REQUEST)
            assert await reader.readexactly(1) == b"S"
            writer.write(first)
            writer.close()
        async with asyncio.timeout(5):
            await asyncio.gather(*(connection.lost for connection in set(server.server._connections)))
        assert server.open == 0
        assert [handler.lost for handler in server.handlers] == [1, 1, 1]


async def test_stopping_in_the_middle_of_a_handshake(tls: ServerTls) -> None:
    server = Server(tls, None)
    await server.server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
    writer.write(SSL_REQUEST)
    assert await reader.readexactly(1) == b"S"
    async with asyncio.timeout(1.5):
        await server.server.stop()
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    assert server.open == 0 and server.handlers[0].lost == 1
    writer.close()


async def test_a_second_request_inside_tls(tls: ServerTls) -> None:
    def run(port: int) -> bytes:
        import socket

        with socket.create_connection(("127.0.0.1", port), 5) as plain:
            plain.sendall(SSL_REQUEST)
            assert plain.recv(1) == b"S"
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(plain) as secure:
                secure.sendall(SSL_REQUEST)
                answer = secure.recv(1)
                secure.sendall(pgwire.startup_message({"user": "u"}))
                return answer + secure.recv(1)

    async with serving(tls) as server:
        assert await asyncio.to_thread(run, server.server.port) == b"NR"


async def test_a_connection_that_is_dropped_before_its_change_to_tls_has_begun(tls: ServerTls) -> None:
    """A task that is cancelled before its first step runs nothing, not even its error handling."""
    async with serving(tls) as server:
        begun: asyncio.Future[ServerConnection] = asyncio.get_running_loop().create_future()
        real = ServerConnection._begin_tls

        def begin(self: ServerConnection, context: ServerTls) -> None:
            real(self, context)
            self.abort()  # as its deadline, or the end of the server, does in the same round of the event loop
            begun.set_result(self)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ServerConnection, "_begin_tls", begin)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
            writer.write(SSL_REQUEST)
            async with asyncio.timeout(5):
                await (await begun).lost
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() in (b"", b"S")
        assert server.open == 0 and server.handlers[0].lost == 1
        writer.close()


async def test_no_host_is_a_file_where_tls_is_wanted(tmp_path: Path) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(pgwire.AUTHENTICATION_CLEARTEXT)

    listening = await asyncio.start_unix_server(answer, tmp_path / ".s.PGSQL.5432")
    with pytest.raises(NeonError, match="is not a host"):
        await pgclient.connect(str(tmp_path), 5432, password="secret", tls=ClientTls(SslMode.PREFER))
    listening.close()


async def test_copy_data_that_nobody_waits_for_is_dropped() -> None:
    async with serving() as server:
        client = await pgclient.connect("127.0.0.1", server.server.port)
        for _ in range(100):
            client.send_copy_data(bytes(64 << 10))  # more than a connection keeps before it stops reading
        async with asyncio.timeout(10):
            assert await client.query("abc") == [["3"]]
        client.abort()


async def test_strangers_get_small_buffers() -> None:
    async with serving(password="p") as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
        writer.write(pgwire.startup_message({"user": "u"}))
        client = await pgclient.connect("127.0.0.1", server.server.port, password="p")
        assert await client.query("x" * 200_000) == [["200000"]]
        sizes = sorted(len(connection._buffer) for connection in server.server._connections)
        assert sizes[0] == pgserver.STRANGER_BUFFER_BYTES and sizes[-1] > 200_000
        client.abort()
        writer.close()

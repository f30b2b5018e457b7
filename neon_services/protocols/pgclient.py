"""A small asynchronous Postgres-wire client for what psycopg does not speak: COPY BOTH and Neon's own commands."""

import asyncio
import logging
import ssl
import struct
from collections.abc import AsyncIterator, Callable

from neon_services.ground.errors import ConfigError, NeonError, ProtocolViolation
from neon_services.ground.tls import HANDSHAKE_TIMEOUT_S, ClientTls, SslMode
from neon_services.protocols import pgwire
from neon_services.protocols.pgframe import FrameConnection

log = logging.getLogger(__name__)

_AUTH, _STATUS, _KEY, _READY, _ERROR, _NOTICE = b"RSKZEN"
_ROW_DESCRIPTION, _ROW, _COMPLETE, _EMPTY = b"TDCI"
_COPY_DATA, _COPY_DONE, _COPY_BOTH, _COPY_OUT = b"dcWH"


class PgClient(FrameConnection):
    """One connection to a server. Make it with ``await connect(...)``."""

    def __init__(self) -> None:
        super().__init__()
        self._copy_sink: Callable[[memoryview], None] | None = None
        self._copy_batch_end: Callable[[], None] | None = None
        self._batch_open = False  # the sink got early data, whose end nobody was told

    @property
    def copy_sink(self) -> Callable[[memoryview], None] | None:
        """Set in COPY BOTH mode to receive CopyData views synchronously (the hot path); otherwise they queue.

        It gets at once what has queued already: the server's first data may arrive together with its consent.
        """
        return self._copy_sink

    @copy_sink.setter
    def copy_sink(self, sink: Callable[[memoryview], None] | None) -> None:
        self._copy_sink = sink
        while sink is not None and self._queue and self._queue[0][0] == _COPY_DATA:
            _, body = self._queue.popleft()
            self._queued_bytes -= len(body) + 64
            self._batch_open = True
            sink(memoryview(body))
        self._end_early_batch()

    @property
    def copy_batch_end(self) -> Callable[[], None] | None:
        """Called after all messages of one read were given to ``copy_sink``."""
        return self._copy_batch_end

    @copy_batch_end.setter
    def copy_batch_end(self, callback: Callable[[], None] | None) -> None:
        self._copy_batch_end = callback
        self._end_early_batch()

    def _end_early_batch(self) -> None:
        if self._batch_open and self._copy_batch_end is not None:
            self._batch_open = False
            self._copy_batch_end()

    def on_message(self, tag: int, body: memoryview) -> None:
        if tag == _COPY_DATA and self._copy_sink is not None:
            self._copy_sink(body)
        elif tag not in (_NOTICE, _STATUS, _KEY):
            self.enqueue(tag, body)

    def on_batch_end(self) -> None:
        if self._copy_batch_end is not None:
            self._batch_open = False
            self._copy_batch_end()

    def on_violation(self, error: ProtocolViolation) -> None:
        log.warning("server %s: %s", self.peer, error)
        self.abort()

    async def _next(self) -> tuple[int, bytes]:
        queued = await self.next_message()
        if queued is None:
            raise ConnectionResetError("the server closed the connection")
        if queued[0] == _ERROR:
            raise pgwire.parse_error_response(queued[1])
        return queued

    async def _authenticate(self, parameters: dict[str, str], password: str | None) -> None:
        self.write(pgwire.startup_message(parameters))
        while True:
            tag, body = await self._next()
            if tag == _READY:
                return
            if tag != _AUTH:
                raise ProtocolViolation(f"unexpected message {chr(tag)!r} during startup")
            code = int.from_bytes(body[:4], "big")
            if code == 3 and password is not None:
                self.write(pgwire.password_message(password))
            elif code == 3:
                raise NeonError(f"server {self.peer} asks for a password and none was given")
            elif code != 0:
                raise NeonError(f"server {self.peer} asks for authentication method {code}, which this client does not speak")

    async def query(self, sql: str) -> list[list[str | None]]:
        """Run a simple query; its rows as text. Raises ServerError."""
        self.write(pgwire.query(sql))
        rows: list[list[str | None]] = []
        failure: pgwire.ServerError | None = None
        while True:
            try:
                tag, body = await self._next()
            except pgwire.ServerError as error:
                failure = error
                continue
            if tag == _ROW:
                rows.append(pgwire.parse_data_row(body))
            elif tag == _READY:
                if failure is not None:
                    raise failure
                return rows

    async def start_copy_both(self, sql: str) -> None:
        """Run a command that answers with COPY BOTH. Raises ServerError when it is refused."""
        self.write(pgwire.query(sql))
        tag, _ = await self._next()
        if tag != _COPY_BOTH:
            raise ProtocolViolation(f"expected COPY BOTH in answer to {sql!r}, got {chr(tag)!r}")

    async def copy_out(self, sql: str) -> AsyncIterator[bytes]:
        """Run a command that answers with COPY OUT and yield its chunks. Raises ServerError, also after the last chunk."""
        self.write(pgwire.query(sql))
        tag, _ = await self._next()
        if tag != _COPY_OUT:
            raise ProtocolViolation(f"expected COPY OUT in answer to {sql!r}, got {chr(tag)!r}")
        while True:
            tag, body = await self._next()
            if tag == _COPY_DATA:
                yield body
            elif tag == _READY:
                return

    async def next_copy_data(self) -> bytes | None:
        """The next queued CopyData payload; None when the server ended the stream. Raises ServerError."""
        queued = await self.next_message()
        # a walsender that shuts down ends its stream with CommandComplete alone
        if queued is None or queued[0] in (_COPY_DONE, _COMPLETE):
            return None
        if queued[0] == _ERROR:
            raise pgwire.parse_error_response(queued[1])
        if queued[0] == _COPY_DATA:
            return queued[1]
        raise ProtocolViolation(f"unexpected message {chr(queued[0])!r} inside COPY")

    def send_copy_data(self, payload: bytes) -> None:
        """Send one CopyData message."""
        self.write(pgwire.copy_data(payload))


class _Answer(asyncio.Protocol):
    """Waits for the one byte with which a server answers the request for TLS."""

    def __init__(self) -> None:
        self.byte: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.transport.write(struct.pack("!ii", 8, pgwire.SSL_REQUEST))

    def data_received(self, data: bytes) -> None:
        self.transport.pause_reading()  # what comes now is for somebody else
        if not self.byte.done():
            self.byte.set_result(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.byte.done():
            self.byte.set_exception(error or ConnectionResetError("the server closed the connection when asked for TLS"))


async def _connect_tls(host: str, port: int, factory: Callable[[], PgClient], tls: ClientTls) -> PgClient:
    loop = asyncio.get_running_loop()
    try:
        context = tls.context()
    except ConfigError as error:
        raise NeonError(str(error)) from error  # it may be mended while we run: the caller tries again
    transport, answer = await loop.create_connection(_Answer, host, port)
    try:
        byte = await answer.byte
        client = factory()
        if byte == b"S":
            secure = await _secured(transport, client, context, host, port)
            client.connection_made(secure)
        elif byte == b"N" and not tls.required:
            transport.set_protocol(client)
            client.connection_made(transport)
            transport.resume_reading()
        elif byte == b"N":
            raise NeonError(f"server {host}:{port} does not speak TLS, and sslmode is {tls.mode}")
        else:
            raise ProtocolViolation(f"server {host}:{port} answers the request for TLS with {byte[:20]!r}")
    except BaseException:
        transport.abort()
        raise
    return client


async def _secured(
    plain: asyncio.Transport, client: PgClient, context: ssl.SSLContext, host: str, port: int
) -> asyncio.Transport:
    loop = asyncio.get_running_loop()
    try:
        secure = await loop.start_tls(plain, client, context, server_hostname=host, ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S)
    except ssl.SSLCertVerificationError as error:
        raise ConnectionError(f"server {host}:{port}: its certificate is not trusted: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise ConnectionError(f"server {host}:{port}: TLS failed: {error.reason}") from error
    assert secure is not None
    return secure


async def connect(
    host: str,
    port: int,
    *,
    parameters: dict[str, str] | None = None,
    password: str | None = None,
    timeout: float = 10.0,
    factory: Callable[[], PgClient] = PgClient,
    tls: ClientTls | None = None,
) -> PgClient:
    """Connect and authenticate. Raises OSError, NeonError (ServerError among them), or TimeoutError after ``timeout`` seconds.

    A host that begins with a slash is the directory of a Unix socket, as in libpq. Without ``tls`` none is asked for.
    """
    settings = {"user": "no_user", "database": "replication", **(parameters or {})}
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout):
        if host.startswith("/"):
            if tls is not None:  # who names a file where a host belongs must not get the password
                raise NeonError(f"{host!r} is not a host that can be reached with TLS")
            _, client = await loop.create_unix_connection(factory, f"{host}/.s.PGSQL.{port}")
        elif tls is None or tls.mode is SslMode.DISABLE:
            _, client = await loop.create_connection(factory, host, port)
        else:
            client = await _connect_tls(host, port, factory, tls)
        try:
            await client._authenticate(settings, password)
        except BaseException:
            client.abort()
            raise
    return client

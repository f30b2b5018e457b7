"""A Postgres-wire server: startup, simple queries, COPY in all directions. What a query means is the handler's business.

A handler is made per connection. ``startup`` may refuse by raising; ``query`` answers with the connection's methods and
returns; then ReadyForQuery is sent. An exception from ``query`` becomes an ErrorResponse: ServerError keeps its SQLSTATE,
other errors of ours are XX000.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from typing import Protocol

from neon_services.ground.errors import NeonError, ProtocolViolation
from neon_services.ground.tls import HANDSHAKE_TIMEOUT_S, ServerTls
from neon_services.protocols import pgwire
from neon_services.protocols.pgframe import FrameConnection

log = logging.getLogger(__name__)

SERVER_VERSION = "14.1"
STARTUP_TIMEOUT_S = 60.0
PASSWORD_TIMEOUT_S = 60.0
MAX_PASSWORD_BYTES = 16 * 1024
STRANGER_BUFFER_BYTES = 32 * 1024  # of a connection that was not admitted yet: for a startup packet, or a password
_QUERY, _COPY_DATA, _COPY_DONE, _COPY_FAIL, _TERMINATE, _SYNC, _PASSWORD = b"QdcfXSp"


class Handler(Protocol):
    """What a service does with one connection."""

    async def startup(self, message: pgwire.StartupMessage) -> None:
        """Accept the connection, or raise ServerError."""

    async def query(self, connection: "ServerConnection", sql: str) -> None:
        """Carry out one simple query."""

    def connection_lost(self) -> None:
        """The connection is gone; a running query has been cancelled."""


class EndConnection(NeonError):
    """Raised by a handler to close the connection after what it has already sent."""


class ServerConnection(FrameConnection):
    """One client's connection. With ``tls`` nothing is served before the client has changed to TLS."""

    def __init__(self, handler_factory: Callable[["ServerConnection"], Handler], tls: ServerTls | None = None) -> None:
        super().__init__(STRANGER_BUFFER_BYTES)
        self._untagged = True
        self._tls = tls
        self._securing: asyncio.Task[None] | None = None
        self._plain: asyncio.Transport | None = None  # while the change to TLS is under way
        self._secured = False
        self._password: asyncio.Future[str] | None = None
        self._deadline: asyncio.TimerHandle | None = None  # of the startup packet
        self._handler = handler_factory(self)
        self._task: asyncio.Task[None] | None = None
        self._in_query = False
        #: Set by a handler in COPY BOTH mode to receive CopyData views synchronously (the hot path); otherwise they queue.
        self.copy_sink: Callable[[memoryview], None] | None = None
        #: Called after all messages of one read were given to ``copy_sink``.
        self.copy_batch_end: Callable[[], None] | None = None
        self._pending: asyncio.Queue[str] = asyncio.Queue(maxsize=16)

    # -- receiving

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().call_later(STARTUP_TIMEOUT_S, self.abort)

    def on_packet(self, packet: bytes) -> None:
        startup = pgwire.parse_startup(packet)
        if isinstance(startup, int):
            if startup == pgwire.CANCEL_REQUEST:
                self.close()
            elif startup == pgwire.SSL_REQUEST and self._tls is not None and not self._secured and self._securing is None:
                self._begin_tls(self._tls)
            else:
                self.write(b"N")  # neither (another layer of) TLS nor GSS encryption
            return
        self._untagged = False
        if self._deadline is not None:
            self._deadline.cancel()
        self._task = asyncio.get_running_loop().create_task(self._serve(startup))

    def on_message(self, tag: int, body: memoryview) -> None:
        if tag == _COPY_DATA and self.copy_sink is not None:
            self.copy_sink(body)
        elif self._password is not None and tag != _TERMINATE:
            self._take_password(tag, body)
        elif tag in (_COPY_DATA, _COPY_DONE, _COPY_FAIL):
            # else it is what is left of a COPY that has ended, and nobody waits for it
            if self._in_query or not self._pending.empty():
                self.enqueue(tag, body)
        elif tag == _QUERY:
            try:
                self._pending.put_nowait(pgwire.cstring(body))
            except asyncio.QueueFull:
                raise ProtocolViolation("too many queries without waiting for an answer") from None
        elif tag == _TERMINATE:
            self.close()
        elif tag == _SYNC:
            self.write(pgwire.READY_FOR_QUERY)
        else:
            raise ProtocolViolation(f"unexpected message {chr(tag)!r}: only simple queries and COPY are served here")

    def _take_password(self, tag: int, body: memoryview) -> None:
        assert self._password is not None
        if tag != _PASSWORD or self._password.done():
            raise ProtocolViolation(f"unexpected message {chr(tag)!r}: a password was asked for, and nothing else")
        self._password.set_result(pgwire.cstring(body))

    def on_batch_end(self) -> None:
        if self.copy_batch_end is not None:
            self.copy_batch_end()

    def on_violation(self, error: ProtocolViolation) -> None:
        log.warning("connection from %s: %s", self.peer, error)
        self.write(pgwire.error_response(str(error), "08P01", "FATAL"))
        self.close()

    def on_lost(self, error: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self._task is not None:
            self._task.cancel()
        self._handler.connection_lost()

    def fail(self, text: str, sqlstate: str = "XX000") -> None:
        """Send an ErrorResponse and close: how a COPY stream ends in an error."""
        self.write(pgwire.error_response(text, sqlstate))
        self.close()

    # -- TLS

    def _begin_tls(self, tls: ServerTls) -> None:
        if self._unread:
            raise ProtocolViolation("bytes behind the request for TLS: somebody injects them")
        assert self.transport is not None
        plain, self.transport = self.transport, None  # from here on nothing may be written, or taken, in the clear
        plain.pause_reading()
        plain.write(b"S")
        self._plain = plain
        self._securing = asyncio.get_running_loop().create_task(self._change_to_tls(plain, tls.current))

    async def _change_to_tls(self, plain: asyncio.Transport, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(plain, self, context, server_side=True, ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S)
            assert secure is not None
        except BaseException as error:
            plain.abort()
            self.connection_lost(None)
            if not isinstance(error, OSError):  # SSLError and ConnectionError are of that kind
                raise
            log.info("connection from %s: no TLS: %s", plain.get_extra_info("peername"), error)
            return
        self._securing = self._plain = None
        self._secured = True
        self.connection_made(secure)
        if self.closed:  # the client broke the protocol, or the server stopped, meanwhile
            secure.abort()

    def close(self) -> None:
        self._stop_securing()
        super().close()

    def abort(self) -> None:
        self._stop_securing()
        super().abort()

    def _stop_securing(self) -> None:
        if self._securing is not None:
            self._securing.cancel()
            if self._plain is not None:  # a task that is cancelled before it has begun never sees its transport
                self._plain.abort()
                self._plain = None
            self.connection_lost(None)

    # -- the conversation

    async def ask_password(self) -> str:
        """Ask for a password in clear text; what the client sends. Raises ConnectionError, ServerError or ProtocolViolation."""
        self._password = asyncio.get_running_loop().create_future()
        self._max_message_bytes = MAX_PASSWORD_BYTES  # strangers get no large buffers
        self.write(pgwire.AUTHENTICATION_CLEARTEXT)
        try:
            async with asyncio.timeout(PASSWORD_TIMEOUT_S):
                return await self._password
        except TimeoutError:
            raise pgwire.ServerError("57014", f"no password within {PASSWORD_TIMEOUT_S:.0f} s", "FATAL") from None
        finally:
            self._password = None
            self._max_message_bytes = pgwire.MAX_MESSAGE_BYTES

    async def _serve(self, startup: pgwire.StartupMessage) -> None:
        try:
            if self._securing is not None:
                await asyncio.wait({self._securing})  # its first message came with the end of the handshake
            if self._tls is not None and not self._secured:
                raise pgwire.ServerError("XX000", "must connect with TLS: ask for it with sslmode=require or stricter", "FATAL")
            await self._handler.startup(startup)
            self.admitted()
            self.write(
                pgwire.AUTHENTICATION_OK
                + pgwire.parameter_status("client_encoding", "UTF8")
                + pgwire.parameter_status("integer_datetimes", "on")
                + pgwire.parameter_status("server_version", SERVER_VERSION)
                + pgwire.READY_FOR_QUERY
            )
            while not self.closed:
                await self._answer(await self._pending.get())
        except EndConnection:
            self.close()
        except NeonError as error:
            self.fail(str(error), error.sqlstate if isinstance(error, pgwire.ServerError) else "XX000")
        except ConnectionError:
            self.close()
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("connection from %s", self.peer)
            self.fail("internal error; the server's log has the details")

    async def _answer(self, sql: str) -> None:
        self._in_query = True
        try:
            await self._handler.query(self, sql)
        except (EndConnection, ConnectionError, asyncio.CancelledError):
            raise
        except pgwire.ServerError as error:
            self.write(pgwire.error_response(str(error), error.sqlstate))
        except NeonError as error:
            log.warning("query %r from %s: %s", sql[:200], self.peer, error)
            self.write(pgwire.error_response(str(error)))
        finally:
            self._in_query = False
        self.copy_sink = self.copy_batch_end = self.fast_path = self.on_idle = None
        self.write(pgwire.READY_FOR_QUERY)

    # -- answers

    def send_rows(self, columns: Sequence[tuple[str, int]], rows: Sequence[Sequence[str | None]]) -> None:
        """Answer a query with rows of text values."""
        self.write(
            pgwire.row_description(columns)
            + b"".join(pgwire.data_row(row) for row in rows)
            + pgwire.command_complete(f"SELECT {len(rows)}")
        )

    def send_command_complete(self, tag: str) -> None:
        """Answer a query that has no rows."""
        self.write(pgwire.command_complete(tag))

    def begin_copy_both(self) -> None:
        """Switch to COPY BOTH: from here on both sides send CopyData."""
        self.write(pgwire.COPY_BOTH_RESPONSE)

    def begin_copy_out(self) -> None:
        """Switch to COPY OUT: send CopyData, then end_copy_out()."""
        self.write(pgwire.COPY_OUT_RESPONSE)

    def end_copy_out(self, tag: str = "SELECT 1") -> None:
        """End a COPY OUT."""
        self.write(pgwire.COPY_DONE + pgwire.command_complete(tag))

    def send_copy_data(self, payload: bytes) -> None:
        """Send one CopyData message."""
        self.write(pgwire.copy_data_header(len(payload)) + payload if len(payload) < 65536 else pgwire.copy_data(payload))

    async def next_copy_data(self) -> bytes | None:
        """The next queued CopyData payload, or None when the client ended the COPY or the connection."""
        queued = await self.next_message()
        if queued is None or queued[0] == _COPY_DONE:
            return None
        if queued[0] == _COPY_FAIL:
            raise pgwire.ServerError("57014", f"COPY ended by the client: {pgwire.cstring(queued[1])}")
        return queued[1]


class PgServer:
    """A listening socket and its connections. ``tls``: clients must change to TLS first."""

    def __init__(self, handler_factory: Callable[[ServerConnection], Handler], tls: ServerTls | None = None) -> None:
        self._handler_factory = handler_factory
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._connections: set[ServerConnection] = set()

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError when the address cannot be bound."""

        def make() -> ServerConnection:
            connection = ServerConnection(self._handler_factory, self._tls)
            self._connections.add(connection)
            connection.lost.add_done_callback(lambda _: self._connections.discard(connection))
            return connection

        self._server = await asyncio.get_running_loop().create_server(make, host, port, reuse_address=True)

    @property
    def port(self) -> int:
        """The bound port (useful after listening on port 0)."""
        assert self._server is not None
        return self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and end all connections."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close()
        waiting = [connection.lost for connection in self._connections]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=2)
            if late:
                for connection in list(self._connections):
                    connection.abort()

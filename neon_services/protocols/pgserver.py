"""A Postgres-wire server: startup, simple queries, COPY in all directions. What a query means is the handler's business.

A handler is made per connection. ``startup`` may refuse by raising; ``query`` answers with the connection's methods and
returns; then ReadyForQuery is sent. An exception from ``query`` becomes an ErrorResponse: ServerError keeps its SQLSTATE,
other errors of ours are XX000.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from neon_services.ground.errors import NeonError, ProtocolViolation
from neon_services.protocols import pgwire
from neon_services.protocols.pgframe import FrameConnection

log = logging.getLogger(__name__)

SERVER_VERSION = "14.1"
_QUERY, _COPY_DATA, _COPY_DONE, _COPY_FAIL, _TERMINATE, _SYNC = b"QdcfXS"


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
    """One client's connection."""

    def __init__(self, handler_factory: Callable[["ServerConnection"], Handler]) -> None:
        super().__init__()
        self._untagged = True
        self._handler = handler_factory(self)
        self._task: asyncio.Task[None] | None = None
        self._in_query = False
        #: Set by a handler in COPY BOTH mode to receive CopyData views synchronously (the hot path); otherwise they queue.
        self.copy_sink: Callable[[memoryview], None] | None = None
        #: Called after all messages of one read were given to ``copy_sink``.
        self.copy_batch_end: Callable[[], None] | None = None
        self._pending: asyncio.Queue[str] = asyncio.Queue(maxsize=16)

    # -- receiving

    def on_packet(self, packet: bytes) -> None:
        startup = pgwire.parse_startup(packet)
        if isinstance(startup, int):
            if startup == pgwire.CANCEL_REQUEST:
                self.close()
            else:
                self.write(b"N")  # neither TLS nor GSS encryption
            return
        self._untagged = False
        self._task = asyncio.get_running_loop().create_task(self._serve(startup))

    def on_message(self, tag: int, body: memoryview) -> None:
        if tag == _COPY_DATA:
            if self.copy_sink is not None:
                self.copy_sink(body)
            else:
                self.enqueue(tag, body)
        elif tag == _QUERY:
            try:
                self._pending.put_nowait(pgwire.cstring(body))
            except asyncio.QueueFull:
                raise ProtocolViolation("too many queries without waiting for an answer") from None
        elif tag == _TERMINATE:
            self.close()
        elif tag in (_COPY_DONE, _COPY_FAIL):
            self.enqueue(tag, body)
        elif tag == _SYNC:
            self.write(pgwire.READY_FOR_QUERY)
        else:
            raise ProtocolViolation(f"unexpected message {chr(tag)!r}: only simple queries and COPY are served here")

    def on_batch_end(self) -> None:
        if self.copy_batch_end is not None:
            self.copy_batch_end()

    def on_violation(self, error: ProtocolViolation) -> None:
        log.warning("connection from %s: %s", self.peer, error)
        self.write(pgwire.error_response(str(error), "08P01", "FATAL"))
        self.close()

    def on_lost(self, error: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()
        self._handler.connection_lost()

    def fail(self, text: str, sqlstate: str = "XX000") -> None:
        """Send an ErrorResponse and close: how a COPY stream ends in an error."""
        self.write(pgwire.error_response(text, sqlstate))
        self.close()

    # -- the conversation

    async def _serve(self, startup: pgwire.StartupMessage) -> None:
        try:
            await self._handler.startup(startup)
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
        try:
            await self._handler.query(self, sql)
        except (EndConnection, ConnectionError, asyncio.CancelledError):
            raise
        except pgwire.ServerError as error:
            self.write(pgwire.error_response(str(error), error.sqlstate))
        except NeonError as error:
            log.warning("query %r from %s: %s", sql[:200], self.peer, error)
            self.write(pgwire.error_response(str(error)))
        self.copy_sink = self.copy_batch_end = None
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
    """A listening socket and its connections."""

    def __init__(self, handler_factory: Callable[[ServerConnection], Handler]) -> None:
        self._handler_factory = handler_factory
        self._server: asyncio.Server | None = None
        self._connections: set[ServerConnection] = set()

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError when the address cannot be bound."""

        def make() -> ServerConnection:
            connection = ServerConnection(self._handler_factory)
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

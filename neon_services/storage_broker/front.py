"""One TCP port for two protocols: gRPC by its HTTP/2 preface, plain HTTP otherwise.

Invariant: the front looks at the first four bytes of a connection and then only copies bytes, in both directions, with
back-pressure and half-close (which TLS lacks); both servers listen on unix sockets that only this process's user can open.
"""

import asyncio
import logging
from pathlib import Path
from typing import Any

from neon_services.ground.tls import HANDSHAKE_TIMEOUT_S, ServerTls

log = logging.getLogger(__name__)

HTTP2_PREFACE_START = b"PRI "  # no HTTP/1.1 client sends this method
FIRST_BYTES_TIMEOUT_S = 60.0
BUFFER_BYTES = 256 * 1024


class _Leg(asyncio.Protocol):
    """One side of a relayed connection."""

    def __init__(self, other: "_Leg | None" = None) -> None:
        self.transport: asyncio.Transport | None = None
        self.other = other

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.transport.set_write_buffer_limits(high=BUFFER_BYTES)  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    @property
    def keeps_half_open(self) -> bool:
        """Whether the other direction stays open at the end of one: yes, except with TLS."""
        return self.transport is not None and self.transport.can_write_eof()

    def eof_received(self) -> bool:
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            if self.other.transport.can_write_eof():
                self.other.transport.write_eof()
            else:
                self.other.transport.close()  # after what is still to be sent
        return self.keeps_half_open

    def pause_writing(self) -> None:
        """This side's receiver is slow: stop reading from the other."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            if error is None:
                self.other.transport.close()
            else:
                self.other.transport.abort()


class _Client(_Leg):
    """The accepted side: chooses the server by the first bytes."""

    def __init__(self, front: "Front") -> None:
        super().__init__()
        self._front = front
        self._first = bytearray()
        self._eof = False
        self._connecting: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._front.clients.add(self)
        self._deadline = asyncio.get_running_loop().call_later(FIRST_BYTES_TIMEOUT_S, self._give_up)

    def _give_up(self) -> None:
        assert self.transport is not None
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            super().data_received(data)
            return
        self._first += data
        matched = min(len(self._first), len(HTTP2_PREFACE_START))
        same = self._first[:matched] == HTTP2_PREFACE_START[:matched]
        if same and matched < len(HTTP2_PREFACE_START):
            return  # too early to tell
        if self._connecting is None:
            assert self.transport is not None and self._deadline is not None
            self._deadline.cancel()
            self.transport.pause_reading()
            path = self._front.grpc_path if same else self._front.http_path
            self._connecting = asyncio.get_running_loop().create_task(self._connect(path))

    def eof_received(self) -> bool:
        self._eof = True
        if self.other is None:
            return self._connecting is not None and self.keeps_half_open  # without a choice there is nobody to answer
        return super().eof_received()

    async def _connect(self, path: Path) -> None:
        assert self.transport is not None
        try:
            # the server's side knows its client from the start: a gRPC server speaks before it is spoken to
            _, server = await asyncio.get_running_loop().create_unix_connection(lambda: _Leg(self), str(path))
        except OSError as error:
            log.error("%s: %s", path, error)
            self.transport.abort()
            return
        assert server.transport is not None
        if self.transport.is_closing():
            server.transport.abort()
            return
        self.other = server
        server.transport.write(bytes(self._first))
        self._first.clear()
        if self._eof:
            server.transport.write_eof()
        self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._front.clients.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(error)


class Front:
    """The listening sockets."""

    def __init__(self, grpc_path: Path, http_path: Path) -> None:
        self.grpc_path = grpc_path
        self.http_path = http_path
        self.clients: set[_Client] = set()
        self._servers: list[asyncio.Server] = []

    async def start(self, host: str, port: int, tls: ServerTls | None = None) -> None:
        """Listen on one more address. Raises OSError when it cannot be bound."""
        loop = asyncio.get_running_loop()
        secured: dict[str, Any] = {}
        if tls is not None:
            secured = {"ssl": tls.listening, "ssl_handshake_timeout": HANDSHAKE_TIMEOUT_S}
        self._servers.append(await loop.create_server(lambda: _Client(self), host, port, reuse_address=True, **secured))

    @property
    def ports(self) -> list[int]:
        """The bound ports, in the order of listening (useful after listening on port 0)."""
        return [server.sockets[0].getsockname()[1] for server in self._servers]

    async def stop(self) -> None:
        """Stop listening and drop all connections."""
        for server in self._servers:
            server.close()
        for client in list(self.clients):
            if client.transport is not None:
                client.transport.abort()

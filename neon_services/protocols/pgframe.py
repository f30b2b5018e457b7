"""The transport that both ends of a Postgres connection share: one receive buffer, frames parsed in place, flow control.

Hot path: bytes land in one reused buffer, whole frames are handed on as views of it, and nothing is copied unless the
receiver asks for it. A view is valid until on_batch_end(); when the connection ends before that, until on_lost().
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable

from neon_services.ground.errors import ProtocolViolation
from neon_services.protocols import pgwire

_LENGTH = struct.Struct("!i")
INITIAL_BUFFER = 256 * 1024
LARGEST_BUFFER = 2 * 1024 * 1024  # it grows so far for a sender who fills it again and again; a larger message makes it larger
MIN_ROOM = 64 * 1024
QUEUE_HIGH_BYTES = 4 * 1024 * 1024
WRITE_HIGH_BYTES = 1024 * 1024


class FrameConnection(asyncio.BufferedProtocol):
    """Splits the byte stream into tagged messages and writes with back-pressure. Subclasses implement the hooks."""

    def __init__(self, fixed_buffer_bytes: int = 0) -> None:
        """``fixed_buffer_bytes``: a buffer of this size, which grows before admitted() only for a message that needs it."""
        self.transport: asyncio.Transport | None = None
        self._fixed = fixed_buffer_bytes > 0
        self._buffer = bytearray(fixed_buffer_bytes or INITIAL_BUFFER)
        self._whole = memoryview(self._buffer)
        self._roomy = not self._fixed  # an empty buffer need not grow before it is read into
        #: Is given the receive buffer and the length of what is in it, before it is split into messages: it may take whole
        #: messages from the beginning and says how many bytes that was. What it does not understand it leaves.
        self.fast_path: Callable[[memoryview, int], int] | None = None
        #: Is told, when bytes came, whether no part of a message is left, so that a lane may take over from here.
        self.on_idle: Callable[[bool], None] | None = None
        self._filled = 0
        self._feeding = False
        self._was_full = False  # more could have been read at once: larger batches cost less
        self._untagged = False  # a server's first packet has no tag
        self._unread = 0  # bytes that came behind the untagged packet
        self._max_message_bytes = pgwire.MAX_MESSAGE_BYTES
        self._writable = asyncio.Event()
        self._writable.set()
        self.closed = False
        #: What has come and gone over this connection, in bytes.
        self.received_bytes = self.sent_bytes = 0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue: deque[tuple[int, bytes]] = deque()
        self._queued_bytes = 0
        self._reader: asyncio.Future[None] | None = None
        self._reading_paused = False

    # -- hooks

    def on_packet(self, packet: bytes) -> None:
        """The untagged first packet of a client, without its length."""
        raise ProtocolViolation("unexpected untagged packet")

    def on_message(self, tag: int, body: memoryview) -> None:
        """One tagged message; the view is valid until on_batch_end()."""
        raise NotImplementedError

    def on_batch_end(self) -> None:
        """All whole messages of one read have been handed over: the place to flush once for many."""

    def on_violation(self, error: ProtocolViolation) -> None:
        """The peer broke the protocol. The default closes the connection."""
        self.close()

    def on_lost(self, error: Exception | None) -> None:
        """The connection is gone."""

    # -- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Also called for the transport that takes the place of the first one after a change to TLS."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)  # type: ignore[union-attr]

    def get_buffer(self, sizehint: int) -> memoryview:
        if not self._filled and self._roomy and not self._was_full:
            return self._whole
        room = len(self._buffer) - self._filled
        if not room or (not self._fixed and (room < MIN_ROOM or self._was_full)):
            self._was_full = False
            grown = bytearray(max(len(self._buffer) * 2, INITIAL_BUFFER))
            grown[: self._filled] = memoryview(self._buffer)[: self._filled]
            self._buffer, self._whole, self._roomy = grown, memoryview(grown), True
        return self._whole[self._filled :]

    def admitted(self) -> None:
        """The peer is no stranger any more: the buffer may grow."""
        self._fixed = False

    def buffer_updated(self, nbytes: int) -> None:
        filled = self._filled = self._filled + nbytes
        self.received_bytes += nbytes
        self._was_full = filled == len(self._buffer) < LARGEST_BUFFER
        taken = 0
        if self.fast_path is not None:
            try:
                taken = self.fast_path(self._whole, filled)
            except BaseException:
                self._filled = 0
                raise
            if taken == filled or self.closed:
                self._filled = 0
                self._tell_idle()
                return
        self._split(taken)
        self._tell_idle()

    def feed(self, data: memoryview) -> None:
        """Take bytes that somebody else has received, and counted, on this connection."""
        self._feeding = True
        try:
            while data and not self.closed:
                room = self.get_buffer(-1)
                count = min(len(room), len(data))
                room[:count] = data[:count]
                self.received_bytes -= count
                self.buffer_updated(count)
                data = data[count:]
        except BaseException:
            self.abort()  # as the event loop does: what was handed out must not be overwritten by the next read
            raise
        finally:
            self._feeding = False
        self._tell_idle()

    def _tell_idle(self) -> None:
        if self.on_idle is not None and not self._feeding:
            self.on_idle(self.idle)

    def _split(self, taken: int) -> None:
        """Hand on the messages in the buffer, of whose bytes ``taken`` have been seen to, and keep the rest."""
        view = memoryview(self._buffer)[: self._filled]
        consumed = taken
        try:
            while self._untagged and self._filled - consumed >= 4:
                length = int.from_bytes(view[consumed : consumed + 4], "big")
                if not 8 <= length <= pgwire.MAX_STARTUP_BYTES:
                    raise ProtocolViolation(f"the startup packet has the impossible length {length}")
                if self._filled - consumed < length:
                    break
                packet = bytes(view[consumed + 4 : consumed + length])
                consumed += length
                self._unread = self._filled - consumed
                self.on_packet(packet)
            if not self._untagged:
                # split_messages() spelled out: this loop runs for every message of every commit
                end = self._filled
                while end - consumed >= 5:
                    (length,) = _LENGTH.unpack_from(view, consumed + 1)
                    if length < 4 or length > self._max_message_bytes:
                        raise ProtocolViolation(f"message {chr(view[consumed])!r} has the impossible length {length}")
                    after = consumed + 1 + length
                    if after > end:
                        break
                    tag, body = view[consumed], view[consumed + 5 : after]
                    consumed = after
                    self.on_message(tag, body)
                    if self.closed:
                        break
                if consumed > taken and not self.closed:
                    self.on_batch_end()
        except ProtocolViolation as error:
            consumed = self._filled
            self.on_violation(error)
        except BaseException:
            consumed = self._filled
            raise
        finally:
            left = self._filled - consumed
            # The tail moves to the front, and frames that were handed out are no longer valid. Not when the connection ends
            # in the middle of a batch: then their receiver has not been told of the batch's end, and may still need them.
            if consumed and left and not self.closed:
                self._buffer[:left] = bytes(view[consumed:])
            self._filled = left
            view.release()

    @property
    def idle(self) -> bool:
        """Whether the connection is open, no part of a message is in the receive buffer, and none waits to be taken."""
        return not self._filled and not self._queue and not self.closed

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if self.lost.done():
            return  # a change to TLS that fails is told of by both transports
        self.closed = True
        self._writable.set()
        self.on_lost(error)
        self.lost.set_result(None)
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    # -- writing

    def write(self, data: bytes) -> None:
        """Queue bytes for sending; never blocks. Long producers call drain() between writes."""
        if not self.closed and self.transport is not None:
            self.sent_bytes += len(data)
            self.transport.write(data)

    @property
    def has_room(self) -> bool:
        """Whether drain() would return at once."""
        return self._writable.is_set() and not self.closed

    async def drain(self) -> None:
        """Wait until the send buffer has room. Raises ConnectionResetError when the connection is gone."""
        await self._writable.wait()
        if self.closed:
            raise ConnectionResetError("the connection was closed by the peer")

    def close(self) -> None:
        """Close after sending what is queued."""
        if self.transport is not None and not self.closed:
            self.closed = True
            if not self.transport.is_closing():  # asyncio's TLS transport breaks when it is closed twice
                self.transport.close()

    def abort(self) -> None:
        """Close at once and drop what is queued."""
        if self.transport is not None:
            self.closed = True
            self.transport.abort()

    @property
    def peer(self) -> str:
        """The peer's address for logs."""
        name = self.transport.get_extra_info("peername") if self.transport else None
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "unknown")

    # -- a bounded queue of whole messages, for receivers that are coroutines

    def enqueue(self, tag: int, body: memoryview) -> None:
        """Keep a copy of the message for next_message(); stops reading from the socket while too much is queued."""
        self._queue.append((tag, bytes(body)))
        self._queued_bytes += len(body) + 64
        if self._queued_bytes > QUEUE_HIGH_BYTES and not self._reading_paused and self.transport is not None:
            self._reading_paused = True
            self.transport.pause_reading()
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    async def next_message(self) -> tuple[int, bytes] | None:
        """The next queued message, or None when the connection is gone and the queue is empty."""
        while not self._queue:
            if self.closed:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        tag, body = self._queue.popleft()
        self._queued_bytes -= len(body) + 64
        if self._reading_paused and self._queued_bytes < QUEUE_HIGH_BYTES // 2 and self.transport and not self.closed:
            self._reading_paused = False
            self.transport.resume_reading()
        return tag, body

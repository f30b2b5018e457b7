"""The connection to the local Postgres: its WAL goes into the ring, the quorum's progress goes back as standby status.

Invariant: what is reported as flushed is the quorum's commit_lsn, never what only this process has received.
"""

import logging
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from neon_services.compute.walproposer_ring import WalRing
from neon_services.ground.errors import NeonError, ProtocolViolation
from neon_services.ground.lsn import Lsn, format_lsn
from neon_services.ground.pgtime import to_postgres_us
from neon_services.protocols import pgclient, pgwire
from neon_services.protocols.lanes import Lane
from neon_services.protocols.safekeeper_messages import HotStandbyFeedback

log = logging.getLogger(__name__)

APPLICATION_NAME = "walproposer"
SLOT = "wal_proposer_slot"
_START = struct.Struct("!Q")
_STATUS = struct.Struct("!cicQQQqB")
_STANDBY_FEEDBACK = struct.Struct("!cqIIII")
_XLOG_HEADER = 25
# a CopyData message with XLogData in it: tag, length, 'w', where its WAL begins
_FRAMED_XLOG = struct.Struct("!cicQ")
_FRAMED_XLOG_HEADER = 5 + _XLOG_HEADER


@dataclass(frozen=True, slots=True)
class PostgresAddress:
    """Where Postgres listens; ``host`` may be the directory of its Unix socket."""

    host: str
    port: int
    user: str


class PostgresLink:
    """Streams WAL until Postgres ends the stream."""

    def __init__(
        self, ring: WalRing, on_wal: Callable[[], None], positions: Callable[[], tuple[Lsn, Lsn]], lane: Lane | None = None
    ) -> None:
        self.ring = ring
        self._lane = lane
        self._on_wal = on_wal
        #: (commit_lsn, the position that pageservers have applied)
        self._positions = positions
        self._client: pgclient.PgClient | None = None
        self._paused = False
        self._reply_requested = False
        self._error: NeonError | None = None
        self.last_status_s = 0.0

    async def stream(self, address: PostgresAddress, on_attached: Callable[[], None]) -> bool:
        """Stream from the end of the ring on. True when Postgres ended the stream in order, having sent everything.

        Raises OSError, TimeoutError, NeonError when it could not connect or the stream broke.
        """
        parameters = {"user": address.user, "replication": "true", "application_name": APPLICATION_NAME}
        client = await pgclient.connect(address.host, address.port, parameters=parameters)
        try:
            await self._ensure_slot(client)
            start = format_lsn(self.ring.end)
            await client.start_copy_both(f'START_REPLICATION SLOT "{SLOT}" PHYSICAL {start}')
            self._client, self._paused, self._error = client, False, None
            client.copy_sink, client.copy_batch_end = self._on_message, self._on_batch_end
            client.fast_path = self._take
            if self._lane is not None:
                self._lane.attach(client)
            on_attached()
            self.send_status()
            ended = await client.next_copy_data()
            if self._error is not None:
                raise self._error
            # CopyDone is Postgres's orderly end; the end of the connection without it is not
            return ended is None and not client.closed
        finally:
            self._client = None
            if self._lane is not None:
                self._lane.detach()
            client.close()

    async def _ensure_slot(self, client: pgclient.PgClient) -> None:
        try:
            await client.query(f'CREATE_REPLICATION_SLOT "{SLOT}" PHYSICAL RESERVE_WAL')
        except pgwire.ServerError as error:
            if error.sqlstate != "42710":  # duplicate_object: it is there already
                raise

    # -- receiving

    def _take(self, buffer: memoryview, filled: int) -> int:
        """The WAL of one commit, which fills the receive buffer, in few steps; _on_message takes everything else."""
        if filled <= _FRAMED_XLOG_HEADER:
            return 0
        tag, length, kind, start = _FRAMED_XLOG.unpack_from(buffer)
        if length != filled - 1 or tag != b"d" or kind != b"w" or start != self.ring.end:
            return 0
        self.ring.append(buffer[_FRAMED_XLOG_HEADER:filled])
        self._on_wal()
        return filled

    def _on_message(self, body: memoryview) -> None:
        if body[0] == 119:  # 'w': XLogData
            (start,) = _START.unpack_from(body, 1)
            ring = self.ring
            data = body[_XLOG_HEADER:]
            if start != ring.end:
                behind = ring.end - start
                if behind < 0:
                    self._fail(f"Postgres sent WAL from {format_lsn(start)}, but {format_lsn(ring.end)} comes next")
                    return
                data = data[behind:]
            ring.append(data)
        elif body[0] == 107:  # 'k': keepalive
            if body[17]:
                self._reply_requested = True
        else:
            self._fail(f"unexpected {bytes(body[:1])!r} in Postgres's replication stream")

    def _fail(self, text: str) -> None:
        self._error = ProtocolViolation(text)
        if self._client is not None:
            self._client.abort()

    def _on_batch_end(self) -> None:
        if self._error is None:
            self._on_wal()
            if self._reply_requested:
                self.send_status()

    def pause(self) -> None:
        """Stop reading: Postgres keeps the WAL."""
        if self._client is not None and self._client.transport is not None and not self._paused:
            self._paused = True
            self._client.transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._paused and self._client is not None and self._client.transport is not None:
            self._paused = False
            self._client.transport.resume_reading()

    @property
    def paused(self) -> bool:
        """Whether reading is stopped."""
        return self._paused and self._client is not None

    # -- sending

    def send_status(self) -> None:
        """Standby status: write = flush = commit_lsn of the quorum."""
        if self._client is not None:
            now = time.time_ns()
            commit_lsn, applied_lsn = self._positions()
            self._reply_requested = False
            self.last_status_s = now / 1e9
            timestamp = to_postgres_us(now // 1000)
            self._client.write(_STATUS.pack(b"d", 38, b"r", commit_lsn, commit_lsn, applied_lsn, timestamp, 0))

    def send_standby_feedback(self, feedback: HotStandbyFeedback) -> None:
        """What the read replicas still need, so that vacuum on this Postgres spares it."""
        if self._client is not None:
            mask = 0xFFFF_FFFF
            self._client.send_copy_data(
                _STANDBY_FEEDBACK.pack(
                    b"h",
                    to_postgres_us(time.time_ns() // 1000),
                    feedback.xmin & mask,
                    feedback.xmin >> 32,
                    feedback.catalog_xmin & mask,
                    feedback.catalog_xmin >> 32,
                )
            )

"""One connection to a safekeeper: WAL comes in, is decoded and ingested, and feedback goes back.

Invariant: bytes are handed to the decoder in stream order without a gap, and feedback never claims more than the timeline has:
``last_received_lsn`` is its last record, ``remote_consistent_lsn`` only what may be forgotten by safekeepers.

Speed: ingesting a batch costs about the same whatever its size, and a busy compute has few processors to spare. So a little
WAL that follows another batch soon is left to become more, unless somebody waits for its LSN or asks for the latest one. Our
safekeeper, too, sends WAL soon after feedback, of which each batch is followed by some, and a little later otherwise.
"""

import asyncio
import contextlib
import logging
import os
import time

from prometheus_client import Counter

from neon_services.ground.errors import NeonError, ProtocolViolation
from neon_services.ground.lsn import Lsn, align_lsn, format_lsn, skip_page_header
from neon_services.ground.net import parse_host_port
from neon_services.ground.pgtime import to_postgres_us
from neon_services.ground.tls import ClientTls
from neon_services.pageserver.ingest import WalIngest
from neon_services.pageserver.lsn_waiters import LsnTimeout, LsnWaiters
from neon_services.pageserver.relations import Relations
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.wal_candidates import Candidate, ConnectionView
from neon_services.protocols import pgclient
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.replication_stream import Keepalive, XLogData, pack_pageserver_feedback, parse_sender_message
from neon_services.wal.decoder import WalDecoder

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20  # decoded and ingested at a time: large enough for bulk work, a few milliseconds
BUFFER_HIGH_BYTES = 8 << 20  # above, the socket is not read
GATHER_S = 0.2  # the shortest time between two batches smaller than GATHER_BYTES
GATHER_BYTES = 256 << 10
ASKED_S = 0.02  # within this time after feedback our safekeeper begins to send what it has: twice what it takes for that
_NEVER = 1 << 64

_RECEIVED_BYTES = Counter("pageserver_wal_ingest_bytes_received", "Bytes of WAL received")
_RECEIVED_RECORDS = Counter("pageserver_wal_ingest_records_received", "WAL records decoded")


class _StreamOver(NeonError):
    """Nothing more is ingested from this connection."""


class WalConnection:
    """Streams from one safekeeper until it ends, fails or is cancelled."""

    def __init__(
        self,
        timeline: Timeline,
        candidate: Candidate,
        node_id: int,
        availability_zone: str | None,
        *,
        tls: ClientTls | None = None,
    ) -> None:
        self._timeline = timeline
        self._tls = tls
        self._candidate = candidate
        self._node_id = node_id
        self._availability_zone = availability_zone
        self._buffer = bytearray()
        self._received_until = 0
        self._offered_lsn = 0  # up to where the safekeeper had WAL for us when it sent some
        self._wake = asyncio.Event()
        self._due = asyncio.Event()  # what is in the buffer must be ingested now
        self._ingested = LsnWaiters(0)  # up to where the bytes of the stream went to the decoder and what came out was ingested
        self._ingested.on_wait = self._due.set
        self._ingested_at = -GATHER_S
        self._ended = False
        self._reply_wanted = False
        self._paused = False
        self._client: pgclient.PgClient | None = None
        now = time.monotonic()
        self.started_at = now
        self.view = ConnectionView(candidate.safekeeper_id, candidate.availability_zone, now, now, candidate.commit_lsn)
        self.streaming = False
        self.progressed = False  #: some record was ingested
        self.last_message_lsn = 0
        self.last_message_at_us = 0  #: microseconds since the Unix epoch

    @property
    def connstr(self) -> str:
        return self._candidate.connstr

    async def run(self) -> None:
        """Stream. Returns when the safekeeper ends the stream in the normal way.

        Raises OSError, TimeoutError, ServerError, ProtocolViolation, WalDecodeError, CorruptionError and what ingest raises.
        """
        host, port = parse_host_port(self._candidate.connstr, what=f"address of safekeeper {self._candidate.safekeeper_id}")
        client = self._client = await pgclient.connect(
            host, port, parameters=self._parameters(), password=os.environ.get("NEON_AUTH_TOKEN"), tls=self._tls
        )
        try:
            rows = await client.query("IDENTIFY_SYSTEM")
            start = skip_page_header(align_lsn(self._timeline.last_record_lsn))
            log.info(
                "timeline %s: receiving WAL from safekeeper %d at %s, from %s (its WAL ends at %s)",
                self._timeline,
                self._candidate.safekeeper_id,
                self._candidate.connstr,
                format_lsn(start),
                rows[0][2] if rows else "?",
            )
            client.copy_sink = self._receive
            client.copy_batch_end = self._wake.set
            self._received_until = start
            self._ingested.advance(start)
            await client.start_copy_both(f"START_REPLICATION PHYSICAL {format_lsn(start)}")
            self.streaming = True
            end = asyncio.create_task(self._watch_for_end(client), name="end of WAL stream")
            try:
                await self._ingest_all(client, start, end)
            finally:
                end.cancel()
                await asyncio.gather(end, return_exceptions=True)
        finally:
            client.abort()
            self._ingested.close(_StreamOver("the stream of WAL is over"))

    async def ingest_latest(self, timeout_s: float) -> None:
        """Return when all that has been received by now is ingested, and what the safekeeper had kept back, or the stream is
        over. Raises LsnTimeout.
        """
        what = f"timeline {self._timeline}: ingest"
        until = time.monotonic() + timeout_s
        with contextlib.suppress(_StreamOver):
            await self._ingested.wait(self._received_until, timeout_s, what)
            # The feedback after that asks for what there is. While somebody waits, all that comes is ingested at once and asks
            # for more; the first message already says up to where there is more.
            with contextlib.suppress(LsnTimeout):
                await self._ingested.wait(_NEVER, ASKED_S, what)
            await self._ingested.wait(self._offered_lsn, max(0.0, until - time.monotonic()), what)

    def _parameters(self) -> dict[str, str]:
        timeline = self._timeline
        options = f'-c timeline_id={timeline.timeline_id} tenant_id={timeline.tenant_id} protocol={{"type":"vanilla"}}'
        if self._availability_zone is not None:
            zone = self._availability_zone.replace("\\", "\\\\").replace(" ", "\\ ")
            options += f" availability_zone={zone}"
        return {"application_name": f"pageserver-{self._node_id}", "replication": "true", "options": options}

    # -- receiving

    def _receive(self, body: memoryview) -> None:
        message = parse_sender_message(body)
        self.view.heard_at = time.monotonic()
        if isinstance(message, Keepalive):
            self.view.commit_lsn = message.wal_end_lsn
            self._reply_wanted |= message.reply_requested
            return
        assert isinstance(message, XLogData)
        if message.start_lsn != self._received_until:
            raise ProtocolViolation(
                f"safekeeper {self._candidate.safekeeper_id} sent WAL from {format_lsn(message.start_lsn)}, "
                f"expected {format_lsn(self._received_until)}"
            )
        self._buffer += message.data
        self._received_until += len(message.data)
        self._offered_lsn = message.wal_end_lsn
        self.view.wal_at = self.view.heard_at
        self.view.commit_lsn = message.wal_end_lsn
        self.last_message_lsn = self._received_until
        self.last_message_at_us = time.time_ns() // 1000
        if len(self._buffer) >= GATHER_BYTES:
            self._due.set()
        if len(self._buffer) > BUFFER_HIGH_BYTES and not self._paused:
            assert self._client is not None and self._client.transport is not None
            self._paused = True
            self._client.transport.pause_reading()

    async def _watch_for_end(self, client: pgclient.PgClient) -> None:
        """CopyDone, an ErrorResponse, or the end of the connection."""
        try:
            await client.next_copy_data()
        finally:
            self._ended = True
            self._wake.set()
            self._due.set()

    # -- ingest

    async def _ingest_all(self, client: pgclient.PgClient, start: Lsn, end: "asyncio.Task[None]") -> None:
        decoder = WalDecoder(start, self._timeline.pg_version)
        ingest = WalIngest(self._timeline)
        self._timeline.ingested_by(self._due.set, self.ingest_latest)
        try:
            self._send_feedback(client)
            while True:
                if not self._buffer:
                    if self._reply_wanted:
                        self._send_feedback(client)
                    if self._ended:
                        await end  # raises the reason unless the end is a plain one
                        return
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._gather()
                chunk = bytes(self._buffer[:CHUNK_BYTES])
                del self._buffer[: len(chunk)]
                _RECEIVED_BYTES.inc(len(chunk))
                batch = decoder.feed(chunk)
                if len(batch.records):
                    await ingest.ingest(batch)
                    _RECEIVED_RECORDS.inc(len(batch.records))
                    self.progressed = True
                self._ingested_at = time.monotonic()
                self._ingested.advance(self._received_until - len(self._buffer))
                self._send_feedback(client)
                self._resume(client)
                await self._timeline.ingest_backpressure()
        finally:
            decoder.close()

    async def _gather(self) -> None:
        """Wait for more WAL, as long as the buffer is not due."""
        rest_s = self._ingested_at + GATHER_S - time.monotonic()
        self._due.clear()
        if rest_s <= 0 or self._ended or len(self._buffer) >= GATHER_BYTES:
            return
        if self._timeline.has_lsn_waiters or self._ingested.waiting:
            return
        timer = asyncio.get_running_loop().call_later(rest_s, self._due.set)
        try:
            await self._due.wait()
        finally:
            timer.cancel()

    def _resume(self, client: pgclient.PgClient) -> None:
        if self._paused and len(self._buffer) < BUFFER_HIGH_BYTES // 2 and client.transport is not None and not client.closed:
            self._paused = False
            # time that we did not read must not count as the safekeeper's silence
            self.view.heard_at = self.view.wal_at = time.monotonic()
            client.transport.resume_reading()

    def _send_feedback(self, client: pgclient.PgClient) -> None:
        timeline = self._timeline
        self._reply_wanted = False
        feedback = PageserverFeedback(
            current_timeline_size=Relations.of(timeline).logical_size or 0,
            last_received_lsn=Lsn(timeline.last_record_lsn),
            disk_consistent_lsn=Lsn(timeline.disk_consistent_lsn),
            remote_consistent_lsn=Lsn(timeline.remote_consistent_lsn_visible),
            replytime_us=to_postgres_us(time.time_ns() // 1000),
            shard_number=timeline.tenant_shard_id.number,
        )
        client.send_copy_data(pack_pageserver_feedback(feedback))

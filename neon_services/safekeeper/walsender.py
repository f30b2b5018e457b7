"""START_REPLICATION: one reader's connection.

Invariant: in commit mode a reader gets bytes below commit_lsn only, in term mode bytes below flush_lsn as long as the term is
the one it asked for; and what it has once been sent is never sent differently.

Speed: a pageserver gets what comes soon after the last sending a little later and together. The first news after a silence
goes at once; but every commit for itself would cost the pageserver, this process and the proposer, which gets an answer for
each, more than the commit. Its feedback says that it wants more: what there is goes soon then, and what comes afterwards later.
"""

import asyncio
import logging
import math
import time

from neon_services.ground import failpoints
from neon_services.ground.errors import Cancelled, NeonError
from neon_services.ground.lsn import INVALID_LSN, XLOG_BLCKSZ, Lsn, format_lsn
from neon_services.ground.pgtime import to_postgres_us
from neon_services.protocols import pgwire
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.pgserver import EndConnection, ServerConnection
from neon_services.protocols.replication_stream import (
    MAX_XLOG_DATA_BYTES,
    XLOG_DATA_HEADER_BYTES,
    Keepalive,
    StandbyStatus,
    pack_xlog_data_header,
    parse_receiver_message,
)
from neon_services.protocols.safekeeper_messages import HotStandbyFeedback
from neon_services.safekeeper import metrics
from neon_services.safekeeper.connections import LATER_S, SOON_S, WalSenderState
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.wal_reader import WalReader

log = logging.getLogger(__name__)

KEEPALIVE_INTERVAL_S = 1.0
IDLE_TIMEOUT_S = 600.0
_REST_SHARE = 0.8  # of the time that news may take: what a lane tells next can then go at once, without a timer
_TARGETS = {"pageserver", "replica", "standby", "wal_proposer_recovery", "walproposer", "safekeeper"}
_PAUSE_SEND = failpoints.declare("sk-pause-send")  # everybody but pageservers gets no WAL
_REPLICA_SLEEP = failpoints.declare("sk-send-wal-replica-sleep", can_wait=True)  # return(ms): after each message


def next_chunk_end(position: int, end: int, segment_size: int) -> int:
    """Where the next XLogData ends: never behind a segment's end; before ``end`` only at a page boundary."""
    segment_end = position - position % segment_size + segment_size
    chunk_end = min(position + MAX_XLOG_DATA_BYTES, end, segment_end)
    if chunk_end < end and chunk_end % XLOG_BLCKSZ:
        chunk_end -= chunk_end % XLOG_BLCKSZ
    return chunk_end


class WalSender:
    """Streams WAL to one connection until either side ends it."""

    def __init__(self, timeline: Timeline, connection: ServerConnection, appname: str | None, term: int | None) -> None:
        self._timeline = timeline
        self._connection = connection
        self._appname = appname
        self._term = term
        self._news = asyncio.Event()
        self._end_reason: str | None = None
        self._failure: NeonError | None = None
        self._heard_at = time.monotonic()
        self._position = INVALID_LSN  # everything below has been sent
        self._rest: asyncio.TimerHandle | None = None  # at whose end there is more to send
        self._sent_at = -math.inf
        self._waiting_since = 0.0
        self._alarm: asyncio.TimerHandle | None = None  # of the next keepalive
        self._quiet = False  # it rang
        self._loop = asyncio.get_running_loop()
        self._state = WalSenderState(timeline.ttid, connection.peer, appname, wake=self._wake, close=self._on_end)

    async def run(self, start: Lsn) -> None:
        """Stream from ``start``. Raises what the connection is to be told; EndConnection when the reader ended it."""
        timeline = self._timeline
        self._check_start(start)
        # Neon's word for a reader that is not shared; the target without its number, of a known kind, for clients choose it
        target = (self._appname or "unknown").split("-")[0]
        gauge = metrics.WAL_READERS.labels("future", target if target in _TARGETS else "unknown")
        gauge.inc()
        timeline.senders[self._state.conn_id] = self._state
        timeline.retime()
        self._connection.copy_sink = self._on_message
        self._connection.begin_copy_both()
        ended = asyncio.create_task(self._watch_end())
        try:
            await self._stream_from(start)
        finally:
            ended.cancel()
            for timer in (self._alarm, self._rest):
                if timer is not None:
                    timer.cancel()
            gauge.dec()
            del timeline.senders[self._state.conn_id]
            timeline.standby_feedback_changed()
            timeline.on_change(timeline)

    def _check_start(self, start: Lsn) -> None:
        """Raise what makes the stream impossible, before it begins."""
        timeline = self._timeline
        if start < timeline.first_available_lsn:
            raise NeonError(
                f"WAL at {format_lsn(start)} is not here: the first WAL of timeline {timeline.ttid} on this safekeeper "
                f"is at {format_lsn(timeline.first_available_lsn)}"
            )
        self._end_position()  # a wrong term

    async def _watch_end(self) -> None:
        """CopyDone, or a lost connection."""
        try:
            await self._connection.next_copy_data()
            self._failure = EndConnection("the reader ended the stream")
        except pgwire.ServerError as error:
            self._failure = error
        self._news.set()

    async def _stream_from(self, start: Lsn) -> None:
        self._position = start
        reader = self._timeline.reader()
        try:
            await self._stream(reader)
        finally:
            reader.close()

    async def _stream(self, reader: WalReader) -> None:
        while True:
            self._news.clear()
            self._check_end()
            end = self._end_position()
            if _PAUSE_SEND.actions is not None and self._is_held_back():
                end = self._position
            if self._position < end:
                await self._send(reader, end)
                self._sent_at = self._loop.time()
                if self._rests:
                    self._want_news_in(LATER_S)
            await self._wait_for_news(self._position)

    async def _wait_for_news(self, position: Lsn) -> None:
        """Until something may have changed; after a second without news, see whether the stream ends and say that we live."""
        self._waiting_since = self._loop.time()
        self._quiet = False  # even if it rang while WAL was sent
        if self._alarm is None:
            self._alarm = self._loop.call_later(KEEPALIVE_INTERVAL_S, self._ring)
        await self._news.wait()
        if self._quiet:
            self._end_if_caught_up(position)
            if time.monotonic() - self._heard_at > IDLE_TIMEOUT_S:
                raise NeonError(f"nothing received for {IDLE_TIMEOUT_S:.0f} s") from None
            now = to_postgres_us(time.time_ns() // 1000)
            self._connection.send_copy_data(Keepalive(self._end_position(), now, True).pack())
            await self._drain()

    def _ring(self) -> None:
        """One timer for all waits: news are frequent, and each would make and cancel one."""
        quiet_s = self._loop.time() - self._waiting_since
        if quiet_s < KEEPALIVE_INTERVAL_S:
            self._alarm = self._loop.call_later(KEEPALIVE_INTERVAL_S - quiet_s, self._ring)
            return
        self._alarm = None
        self._quiet = True
        self._news.set()

    async def _send(self, reader: WalReader, end: Lsn) -> None:
        timeline, connection = self._timeline, self._connection
        while (position := self._position) < end:
            chunk_end = next_chunk_end(position, end, timeline.segment_size)
            data = await reader.read(position, chunk_end - position)
            self._check_end()
            if self._term is not None:
                self._end_position()  # the term may have changed during the read
            now = to_postgres_us(time.time_ns() // 1000)
            header = pack_xlog_data_header(position, end, now)
            connection.write(pgwire.copy_data_header(XLOG_DATA_HEADER_BYTES + len(data)) + header + data)
            self._position = Lsn(chunk_end)
            await self._drain()
            if _REPLICA_SLEEP.actions is not None and self._appname == "replica":
                hit = await _REPLICA_SLEEP.reach()
                await _REPLICA_SLEEP.wait_ms(None if hit is None else hit.value)

    @property
    def _rests(self) -> bool:
        """Whether the reader is content with news a little later: a pageserver, of what is committed."""
        return self._state.pageserver is not None and self._term is None

    def _want_news_in(self, news_s: float) -> None:
        if news_s != self._state.news_s:
            self._state.news_s = news_s
            self._timeline.retime()

    def _end_rest(self) -> None:
        self._rest = None
        if self._timeline.acceptor.commit_lsn > self._position:
            self._news.set()

    def _wake(self) -> None:
        """A position moved: for a pageserver not worth a sending of its own when there was one just now."""
        if not self._rests or self._timeline.acceptor.commit_lsn - self._position >= MAX_XLOG_DATA_BYTES:
            self._news.set()
        elif self._rest is None:
            rest_s = self._sent_at + _REST_SHARE * self._state.news_s - self._loop.time()
            if rest_s <= 0:
                self._news.set()
            else:
                self._rest = self._loop.call_later(rest_s, self._end_rest)

    def _feed(self) -> None:
        """The pageserver wants more: what a lane has taken meanwhile, and perhaps not told, too."""
        self._want_news_in(SOON_S)
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if self._timeline.acceptor.commit_lsn > self._position:
            self._wake()

    def _is_held_back(self) -> bool:
        is_pageserver = (self._appname or "").split("-")[0] == "pageserver"
        return not is_pageserver and _PAUSE_SEND.hit() is not None

    async def _drain(self) -> None:
        if self._connection.has_room:
            return
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                await self._connection.drain()
        except TimeoutError:
            raise NeonError(f"the reader took nothing for {IDLE_TIMEOUT_S:.0f} s") from None

    def _end_position(self) -> Lsn:
        acceptor = self._timeline.acceptor
        if self._term is None:
            return acceptor.commit_lsn
        if acceptor.term != self._term:
            raise NeonError(f"failed to acquire term {self._term}, current term {acceptor.term}")
        return acceptor.flush_lsn

    def _check_end(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._end_reason is not None:
            self._connection.fail(self._end_reason, "00000")
            raise EndConnection(self._end_reason)
        if self._timeline.cancelled:
            raise Cancelled(f"timeline {self._timeline.ttid} is being deleted or shut down")

    def _end_if_caught_up(self, position: Lsn) -> None:
        """A pageserver that has everything, while no compute writes, is sent away; it comes back with the next news."""
        timeline = self._timeline
        commit_lsn, pageserver = timeline.acceptor.commit_lsn, self._state.pageserver
        if self._term is not None or pageserver is None or timeline.computes:
            return
        # its own word: another shard, or another pageserver, may be further
        if not commit_lsn or pageserver.remote_consistent_lsn >= commit_lsn:
            appname = "None" if self._appname is None else f'Some("{self._appname}")'
            text = f"ending streaming to {appname} at {format_lsn(position)}, receiver is caughtup and there is no computes"
            self._connection.fail(text, "00000")
            raise EndConnection(text)

    def _on_end(self, reason: str) -> None:
        self._end_reason = reason
        self._news.set()

    def _on_message(self, view: memoryview) -> None:
        """The reader's feedback. A message that makes no sense ends the connection (ProtocolViolation)."""
        message = parse_receiver_message(view)
        self._heard_at = time.monotonic()
        timeline = self._timeline
        if isinstance(message, PageserverFeedback):
            self._state.pageserver = message
            self._feed()
            timeline.pageserver_feedback(message)
        elif isinstance(message, HotStandbyFeedback):
            self._state.standby_feedback = message
            timeline.standby_feedback_changed()
        elif isinstance(message, StandbyStatus):
            self._state.standby_status = message

"""START_WAL_PUSH: one proposer's connection.

Hot path: every message is handled synchronously as a view of the receive buffer, and after the last whole message of a read
one flush makes all of them durable and one AppendResponse answers them. While the disk works, the socket collects the next
batch. A commit waits for every step here, so while nothing but plain appends comes a lane takes them, without a step of Python
(append_lane.py), and others are taken from the buffer directly (``_take``); what nobody waits for comes after the answer.

Invariant: what was written is in the kernel before the receive buffer is reused, and flushed when the proposer goes.
"""

import asyncio
import logging
import operator
from collections.abc import Callable
from typing import NamedTuple

from neon_services.consensus.acceptor import AcceptorState
from neon_services.ground.errors import Cancelled, ConfigError, NeonError, ProtocolViolation
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import format_lsn
from neon_services.protocols import safekeeper_messages_v2 as v2
from neon_services.protocols.pgserver import ServerConnection
from neon_services.protocols.safekeeper_messages import (
    FRAMED_APPEND_OVERHEAD,
    AcceptorMessage,
    AppendRequest,
    ProposerElected,
    ProposerGreeting,
    ProposerMessage,
    framed_append,
    parse_proposer_message,
)
from neon_services.safekeeper import metrics
from neon_services.safekeeper.append_lane import AppendLane
from neon_services.safekeeper.connections import WalReceiverState
from neon_services.safekeeper.disk_guard import DiskLimitReached
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import TimelineNotFound, Timelines

log = logging.getLogger(__name__)

_MESSAGES = metrics.PROPOSER_ACCEPTOR_MESSAGES.counts


class Codec(NamedTuple):
    """How a version of the protocol reads what proposers send and writes the answers."""

    parse: Callable[[memoryview], ProposerMessage]
    pack: Callable[[AcceptorMessage], bytes]


V2 = Codec(v2.parse_proposer_message, v2.pack_acceptor_message)
V3 = Codec(parse_proposer_message, operator.methodcaller("pack"))


class WalReceiver:
    """Handles the messages of one proposer. ``close`` must be called when the connection is gone."""

    def __init__(
        self,
        timelines: Timelines,
        connection: ServerConnection,
        ttid: TenantTimelineId,
        codec: Codec = V3,
        *,
        allow_creation: bool,
    ) -> None:
        self._timelines = timelines
        self._connection = connection
        self._ttid = ttid
        self._allow_creation = allow_creation
        self._timeline: Timeline | None = None
        self._lane: AppendLane | None = None
        self._parse, self._pack = codec
        self._state = WalReceiverState(send=connection.send_copy_data, close=self._end, pack=codec.pack)
        self._wrote = False
        self._handled = 0  # messages that were not counted yet
        self._telling: asyncio.TimerHandle | None = None
        self._clock = asyncio.get_running_loop().time
        #: When the last message came, by the event loop's clock.
        self.heard_at = self._clock()

    def start(self) -> None:
        """Take over the connection's COPY stream."""
        self._connection.begin_copy_both()
        self._connection.copy_sink = self._on_message
        self._connection.copy_batch_end = self._on_batch_end

    def _fail(self, error: NeonError | OSError) -> None:
        """Any error ends this connection, and nothing else."""
        _MESSAGES["error"] += 1
        log.warning("proposer %s of %s: %s", self._connection.peer, self._ttid, error)
        self._save_written()
        if isinstance(error, TimelineNotFound) and not self._allow_creation:
            self._connection.close()  # Neon's proposers expect silence here
        else:
            self._connection.fail(str(error))

    def _end(self, reason: str) -> None:
        self._connection.fail(reason, "00000")

    def _save_written(self) -> None:
        """The receive buffer is about to be reused: hand remembered views to the kernel."""
        self._wrote = False
        if self._timeline is not None and not self._timeline.cancelled:
            try:
                self._timeline.store.write_out()
            except NeonError as error:
                log.error("proposer %s of %s: %s", self._connection.peer, self._ttid, error)

    def _on_message(self, view: memoryview) -> None:
        try:
            self._handle(self._parse(view))
        except (NeonError, OSError) as error:
            self._fail(error)

    def _handle(self, message: ProposerMessage) -> None:
        timeline = self._timeline
        if timeline is None:
            if not isinstance(message, ProposerGreeting):
                raise ProtocolViolation("the proposer must greet first")
            timeline = self._open(message)
        if timeline.cancelled:
            raise Cancelled(f"timeline {self._ttid} is being deleted or shut down")
        if not self._wrote:  # the first message of a batch
            self._check_room(timeline)
            self._wrote = True
        proposer = self._state.proposer
        if isinstance(message, AppendRequest):
            replies = timeline.append(proposer, message)
        else:
            replies = timeline.run(timeline.acceptor.handle(proposer, message))
        for reply in replies:
            self._answer(reply)
        self._handled += 1
        if isinstance(message, ProposerElected) and timeline.acceptor.is_streaming(self._state.proposer):
            start = format_lsn(message.start_streaming_at)
            log.info(
                "timeline %s: leader of term %d at %s streams from %s", self._ttid, message.term, self._connection.peer, start
            )

    def _answer(self, reply: AcceptorMessage) -> None:
        self._connection.send_copy_data(self._pack(reply))

    def _take(self, buffer: memoryview, filled: int) -> int:
        """Handle the appends at the beginning of the receive buffer; how many bytes they were.

        Everything else, and every refusal of WAL, is left to _on_message, which does the same to an append, in more steps.
        """
        timeline, lane = self._timeline, self._lane
        if timeline is None or timeline.cancelled or self._refusal(timeline) is not None:
            return 0
        at, proposer = 0, self._state.proposer
        try:
            if lane is not None and not lane.attached:
                at, answer = lane.take(buffer, filled)
                if at:
                    self._connection.write(answer)  # first of all: commits wait for it
                    self._tell_soon(timeline)
                    return at
            while (message := framed_append(buffer, at, filled)) is not None:
                at += FRAMED_APPEND_OVERHEAD + len(message.wal_data)
                self._wrote = True
                for reply in timeline.append(proposer, message):
                    self._answer(reply)
                self._handled += 1
        except (NeonError, OSError) as error:
            self._fail(error)
            return at
        if at:
            self._on_batch_end()
        return at

    def _taken(self, count: int) -> None:
        """The lane took appends."""
        self._handled += count

    def _tell_soon(self, timeline: Timeline) -> None:
        """Where the event loop runs no lanes."""
        delay_s = timeline.news_s
        if not delay_s:
            self._tell()
        elif self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(delay_s, self._tell)

    def _retime(self) -> None:
        if self._lane is not None:
            self._lane.retime()
        timeline, telling = self._timeline, self._telling
        if timeline is not None and telling is not None and telling.when() > self._clock() + timeline.news_s:
            self._tell()

    def _tell(self) -> None:
        """Tell everybody else what the lane took."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._count_handled()
        if self._timeline is not None:
            self._timeline.changed()

    def _lend(self, idle: bool) -> None:
        """When nothing but a next message can come now, the lane may take it."""
        timeline, lane = self._timeline, self._lane
        if timeline is None or lane is None or not lane.attached:
            return
        if idle and not timeline.cancelled:
            lane.lend()
        else:
            lane.shut()

    def _count_handled(self) -> None:
        self.heard_at = self._clock()
        _MESSAGES["success"] += self._handled
        self._handled = 0

    def _refusal(self, timeline: Timeline) -> str | None:
        return self._timelines.disk_refusal or timeline.wal_refusal

    def _check_room(self, timeline: Timeline) -> None:
        refusal = self._refusal(timeline)
        if refusal is not None:
            metrics.WAL_STORAGE_LIMIT_ERRORS.inc()
            raise DiskLimitReached(refusal)

    def _open(self, greeting: ProposerGreeting) -> Timeline:
        if greeting.ttid != self._ttid:
            raise ProtocolViolation(f"the proposer greets timeline {greeting.ttid} on a connection of {self._ttid}")
        timeline = self._timelines.find(self._ttid)
        if timeline is None:
            if not self._allow_creation:
                self._timelines.get(self._ttid)  # says why it is not here
            timeline = self._timelines.create(
                self._ttid,
                AcceptorState(pg_version=greeting.pg_version, system_id=greeting.system_id, wal_seg_size=greeting.wal_seg_size),
            )
        if timeline.offloaded:  # evicted between the command and the greeting
            raise NeonError(f"timeline {self._ttid} is in object storage: connect again to bring it back")
        self._timeline = timeline
        timeline.receivers[self._state.conn_id] = self._state
        if self._parse is V3.parse:
            self._open_lane(timeline)
        metrics.WAL_RECEIVERS.inc()
        timeline.on_change(timeline)
        return timeline

    def _open_lane(self, timeline: Timeline) -> None:
        self._connection.fast_path = self._take
        try:
            lane = AppendLane(
                timeline.acceptor,
                timeline.store,
                self._state.proposer,
                refused=lambda: self._refusal(timeline) is not None,
                tell_s=lambda: timeline.news_s,
            )
        except ConfigError:
            return  # no compiled library, as WalScanner has told: everything goes the long way
        lane.on_taken, lane.on_due, lane.on_failed = self._taken, self._tell, self._fail
        lane.attach(self._connection)
        self._lane, self._connection.on_idle, self._state.retime = lane, self._lend, self._retime

    def _on_batch_end(self) -> None:
        timeline = self._timeline
        self._count_handled()
        if timeline is None or not self._wrote:
            return
        self._wrote = False
        try:
            timeline.flush(self._state.proposer, self._answer)
        except (NeonError, OSError) as error:
            self._fail(error)

    def close(self) -> None:
        """The connection is gone, or has ended its COPY: keep what it wrote. May be called again."""
        if self._lane is not None:
            self._lane.detach()
            self._lane = self._connection.on_idle = None
        self._tell()
        timeline, self._timeline = self._timeline, None
        if timeline is None:
            return
        timeline.receivers.pop(self._state.conn_id, None)
        metrics.WAL_RECEIVERS.dec()
        if not timeline.cancelled:
            try:
                timeline.run(timeline.acceptor.flush_on_disconnect(self._state.proposer))
            except NeonError as error:
                log.error("proposer of %s left, and flushing its WAL failed: %s", self._ttid, error)
        timeline.on_change(timeline)

"""One safekeeper's connection: kept up for ever, feeding the state machine, and the donor stream for one that lags.

Invariant: what is written to the connection is, in order and without a gap, what the state machine's ``sent_lsn`` says.
"""

import asyncio
import logging
import math
import os
import struct
import time
from collections.abc import Callable
from typing import Protocol

from neon_services.compute.walproposer_config import WalProposerConfig
from neon_services.compute.walproposer_lanes import ProposerLanes
from neon_services.compute.walproposer_ring import WalRing
from neon_services.consensus.proposer import Deposed, Member, MemberPhase, Proposer
from neon_services.ground.errors import ConfigError, NeonError, ProtocolViolation
from neon_services.ground.lsn import Lsn, format_lsn
from neon_services.ground.pgtime import to_postgres_us
from neon_services.protocols import pgclient, pgwire
from neon_services.protocols.safekeeper_messages import (
    FRAMED_APPEND_RESPONSE,
    MAX_APPEND_BYTES,
    NO_STANDBY_FEEDBACK,
    AppendResponse,
    HotStandbyFeedback,
    ProposerMessage,
    parse_acceptor_message,
    parse_append_response,
)

log = logging.getLogger(__name__)

BURST_BYTES = 1024 * 1024
_COPY_DATA = struct.Struct("!ci")
_XLOG_DATA = struct.Struct("!cQQq")
_APPEND_OVERHEAD = 4 + 45
FIRST_PAUSE_S = 0.05


def append_message(header: bytes, views: tuple[memoryview, ...], count: int) -> bytes:
    """An append of so many bytes in its CopyData message; copied, for the transport may keep it, and the ring comes round."""
    return b"".join((_COPY_DATA.pack(b"d", _APPEND_OVERHEAD + count), header, *views))


class Owner(Protocol):
    """What a link needs of the process it belongs to."""

    config: WalProposerConfig
    core: Proposer
    ring: WalRing | None
    links: list["SafekeeperLink"]
    lanes: ProposerLanes | None

    def acknowledged(self, link: "SafekeeperLink", moved: bool) -> None:
        """An AppendResponse was taken in; ``moved``: and commit_lsn with it."""

    def member_changed(self, link: "SafekeeperLink") -> None:
        """The member's phase changed, or that of the proposer."""

    def pump(self, slot: int) -> None:
        """Send what is due to this member."""

    def fail(self, error: BaseException) -> None:
        """The process cannot go on."""


class _Client(pgclient.PgClient):
    """A client that says when it can be written to again."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.on_room: Callable[[], None] | None = None
        #: Something was received since the owner last looked.
        self.heard = True

    def pause_writing(self) -> None:
        super().pause_writing()
        self.full = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self.full = False
        if self.on_room is not None:
            self.on_room()

    def on_batch_end(self) -> None:
        self.heard = True


class SafekeeperLink:
    """The connection to one safekeeper of the list."""

    def __init__(self, owner: Owner, slot: int) -> None:
        self.owner = owner
        self.slot = slot
        self.host, self.port = owner.config.safekeepers[slot]
        self.member: Member = owner.core.members[slot]
        #: An append is on its way and nothing was answered since: small ones wait, to become one.
        self.awaiting = False
        #: A donor feeds this member; the ring must not.
        self.feeding = False
        #: Smoothed time from append to answer, seconds.
        self.answer_s = 0.0
        self.last_sent_s = 0.0
        #: When it told of a pageserver that reads there.
        self.pageserver_at_s = -math.inf
        #: When the append was sent whose answer is awaited.
        self.sent_at_s = 0.0
        self._client: _Client | None = None
        self._last_heard_s = 0.0
        self._wake = asyncio.Event()
        self._error: NeonError | None = None
        self._loop = asyncio.get_running_loop()

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    # -- life

    async def run(self) -> None:
        """Connect, serve, reconnect, until cancelled."""
        config = self.owner.config
        pause, complaint = FIRST_PAUSE_S, ""
        while True:
            try:
                await self._session()
            except (Deposed, ConfigError) as error:
                self.owner.fail(error)
                return
            except (OSError, TimeoutError, NeonError) as error:
                text = str(error) or type(error).__name__
                if text != complaint:
                    log.warning("safekeeper %s: %s", self, text)
                complaint = text
            if self.member.phase is not MemberPhase.OFFLINE:
                pause, complaint = FIRST_PAUSE_S, ""
                self._down()
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pause = min(pause * 2, config.reconnect_timeout_s)
            self._wake.clear()

    def _down(self) -> None:
        self.owner.core.disconnected(self.slot)
        self.awaiting = False
        self.owner.member_changed(self)

    async def _session(self) -> None:
        """One connection, from its beginning to its end. Raises what ended it."""
        config = self.owner.config
        ttid = config.ttid
        parameters = {
            "user": "no_user",
            "database": "replication",
            "application_name": "walproposer",
            "options": f"-c timeline_id={ttid.timeline_id} tenant_id={ttid.tenant_id}",
        }
        token = os.environ.get("NEON_AUTH_TOKEN")
        client = await pgclient.connect(
            self.host,
            self.port,
            parameters=parameters,
            password=token,
            timeout=config.connect_timeout_s,
            factory=_Client,
            tls=config.tls,
        )
        assert isinstance(client, _Client)
        lane = None if self.owner.lanes is None else self.owner.lanes.members[self.slot]
        try:
            creation = "false" if config.generation else "true"
            async with asyncio.timeout(config.connect_timeout_s):
                await client.start_copy_both(f"START_WAL_PUSH (proto_version '3', allow_timeline_creation '{creation}')")
            self._client, self._error = client, None
            client.copy_sink = self._on_message
            client.fast_path = self._take
            client.on_room = self._on_room
            if lane is not None:
                lane.attach(client)
            self.send([message for _, message in self.owner.core.connected(self.slot)])
            self.owner.member_changed(self)
            # CopyData goes to copy_sink; what is queued is the end of the stream
            end = await client.next_copy_data()
            if self._error is not None:
                raise self._error
            raise ConnectionResetError("the safekeeper closed the connection" if end is None else "unexpected CopyData")
        finally:
            self._client = None
            if lane is not None:
                lane.detach()
            client.abort()

    def reconnect(self, reason: str) -> None:
        """End the present connection and make a new one at once."""
        self._wake.set()
        if self._client is not None:
            self._error = NeonError(reason)
            self._client.abort()

    def check_silence(self, now_s: float) -> None:
        """Reset a connection on which nothing was received for too long."""
        client = self._client
        if client is None or client.heard:
            self._last_heard_s = now_s
            if client is not None:
                client.heard = False
        elif now_s - self._last_heard_s > self.owner.config.connect_timeout_s:
            self.reconnect(f"silent for {self.owner.config.connect_timeout_s:.0f} s")

    def lag_s(self, now_s: float) -> float:
        """How slowly it answers: smoothed, or the time that an answer is overdue by now."""
        return max(self.answer_s, now_s - self.sent_at_s) if self.awaiting else self.answer_s

    # -- receiving

    def _take(self, buffer: memoryview, filled: int) -> int:
        """One acknowledgement that fills the receive buffer, in few steps; _on_message takes everything else."""
        if filled != FRAMED_APPEND_RESPONSE.size or self.member.phase is not MemberPhase.ACTIVE:
            return 0
        tag, length, kind, generation, term, flush_lsn, commit_lsn, *standby = FRAMED_APPEND_RESPONSE.unpack_from(buffer)
        if length != filled - 1 or tag != b"d" or kind != b"a":
            return 0
        feedback = HotStandbyFeedback(*standby) if any(standby) else NO_STANDBY_FEEDBACK
        try:
            self._acknowledged(AppendResponse(generation, term, flush_lsn, commit_lsn, feedback))
        except (Deposed, ConfigError) as error:
            self.owner.fail(error)
        except NeonError as error:
            self._break(error)
        self.heard()
        return filled

    def heard(self) -> None:
        """Something was received."""
        if self._client is not None:
            self._client.heard = True

    def _acknowledged(self, response: AppendResponse) -> None:
        if response.pageserver_feedback is not None:
            self.pageserver_at_s = self._loop.time()
        moved = self.owner.core.append_response(self.slot, response)
        if self.awaiting:
            self.awaiting = False
            self.answer_s += (self._loop.time() - self.sent_at_s - self.answer_s) / 16
        self.owner.acknowledged(self, moved)

    def _break(self, error: NeonError) -> None:
        self._error = error
        if self._client is not None:
            self._client.abort()

    def _on_message(self, body: memoryview) -> None:
        core = self.owner.core
        try:
            if self.member.phase is MemberPhase.ACTIVE and body[0] == 97:
                self._acknowledged(parse_append_response(body))
                return
            outgoing = core.received(self.slot, parse_acceptor_message(body))
            for slot, message in outgoing:
                self.owner.links[slot].send([message])
            self.owner.member_changed(self)
        except (Deposed, ConfigError) as error:
            self.owner.fail(error)
        except NeonError as error:
            self._break(error)

    # -- sending

    @property
    def writable(self) -> bool:
        """Whether WAL may be written now."""
        return self._client is not None and not self._client.full and self.member.phase is MemberPhase.ACTIVE

    def send(self, messages: list[ProposerMessage]) -> None:
        """Send messages without WAL."""
        if self._client is not None:
            self._client.write(b"".join(pgwire.copy_data(message.pack()) for message in messages))
            self.last_sent_s = self._loop.time()

    def heartbeat(self) -> None:
        """Tell commit_lsn and ask for an answer."""
        if self._client is not None and self.member.phase is MemberPhase.ACTIVE:
            self.send([self.owner.core.heartbeat(self.slot)])
            self._mark_sent()

    def due_now(self, begin: Lsn) -> bool:
        """Whether this member has everything up to here, and nothing keeps it from getting what follows at once."""
        member, client = self.member, self._client
        return (
            member.sent_lsn == begin
            and not self.awaiting
            and not self.feeding
            and client is not None
            and not client.full
            and member.phase is MemberPhase.ACTIVE
        )

    def send_append(self, append: bytes) -> None:
        """Send an append that the state machine counts as sent, in its CopyData message."""
        assert self._client is not None
        self._client.write(append)
        self._mark_sent()

    def send_wal(self, ring: WalRing) -> bool:
        """Send WAL from the ring, at most BURST_BYTES. True when more is left."""
        client = self._client
        assert client is not None
        member, core = self.member, self.owner.core
        end = min(ring.end, member.sent_lsn + BURST_BYTES)
        pieces: list[bytes] = []
        while (begin := member.sent_lsn) < end:
            until = Lsn(min(end, begin + MAX_APPEND_BYTES))
            pieces.append(append_message(core.append_header(self.slot, until), ring.views(begin, until), until - begin))
        client.write(b"".join(pieces))
        self._mark_sent()
        return member.sent_lsn < ring.end

    def _mark_sent(self) -> None:
        self.last_sent_s = self._loop.time()
        if not self.awaiting:
            self.awaiting = True
            self.sent_at_s = self.last_sent_s

    def _on_room(self) -> None:
        if not self.feeding:
            self.owner.pump(self.slot)

    # -- catching up from a donor

    async def feed(self) -> None:
        """Bring this member up to where the ring begins, from another safekeeper whose log is known to be ours."""
        session = self._client
        try:
            while self._behind(session):
                for slot in self.owner.core.donors():
                    if slot != self.slot and self.owner.core.donor_end(slot) > self.member.sent_lsn:
                        try:
                            await self._feed_from(slot, session)
                        except (OSError, TimeoutError, NeonError) as error:
                            log.warning("safekeeper %s: catching up: %s", self, error)
                        break
                if self._behind(session):
                    await asyncio.sleep(0.1)
        finally:
            self.feeding = False
        self.owner.pump(self.slot)

    def _behind(self, session: _Client | None) -> bool:
        ring = self.owner.ring
        return (
            self._client is session
            and self.member.phase is MemberPhase.ACTIVE
            and ring is not None
            and self.member.sent_lsn < ring.start
        )

    async def _feed_from(self, donor: int, session: _Client | None) -> None:
        config, core, member = self.owner.config, self.owner.core, self.member
        host, port = config.safekeepers[donor]
        ttid = config.ttid
        parameters = {
            "application_name": "wal_proposer_recovery",
            "options": f"-c timeline_id={ttid.timeline_id} tenant_id={ttid.tenant_id}",
        }
        token = os.environ.get("NEON_AUTH_TOKEN")
        source = await pgclient.connect(
            host, port, parameters=parameters, password=token, timeout=config.connect_timeout_s, tls=config.tls
        )
        try:
            start = format_lsn(member.sent_lsn)
            log.info("safekeeper %s: catching up from %s:%d at %s", self, host, port, start)
            async with asyncio.timeout(config.connect_timeout_s):
                await source.start_copy_both(f"START_REPLICATION PHYSICAL {start} (term='{core.term}')")
            while self._behind(session):
                async with asyncio.timeout(config.connect_timeout_s):
                    body = await source.next_copy_data()
                if body is None:
                    raise ConnectionResetError(f"the donor {host}:{port} ended the stream")
                if body[:1] == b"k":
                    source.send_copy_data(_status(member.sent_lsn))
                    continue
                if body[:1] != b"w" or len(body) < _XLOG_DATA.size:
                    raise ProtocolViolation(f"unexpected {body[:1]!r} from the donor {host}:{port}")
                _, lsn, _, _ = _XLOG_DATA.unpack_from(body)
                if lsn != member.sent_lsn:
                    raise ProtocolViolation(f"the donor {host}:{port} sent {format_lsn(lsn)} instead of {start}")
                # what the donor has beyond its acknowledgements is ours as well, but that is not known yet
                known = min(len(body) - _XLOG_DATA.size, core.donor_end(donor) - lsn)
                if known <= 0:
                    return
                await self._forward(memoryview(body)[_XLOG_DATA.size : _XLOG_DATA.size + known], session)
                if known < len(body) - _XLOG_DATA.size:
                    return
        finally:
            source.abort()

    async def _forward(self, data: memoryview, session: _Client | None) -> None:
        core, member = self.owner.core, self.member
        while data:
            assert session is not None
            await session.drain()
            if self._client is not session or member.phase is not MemberPhase.ACTIVE:
                return
            piece = data[:MAX_APPEND_BYTES]
            head = core.append_header(self.slot, Lsn(member.sent_lsn + len(piece)))
            session.write(append_message(head, (piece,), len(piece)))
            self._mark_sent()
            data = data[len(piece) :]


def _status(lsn: int) -> bytes:
    return struct.pack("!cQQQqB", b"r", lsn, lsn, 0, to_postgres_us(time.time_ns() // 1000), 0)

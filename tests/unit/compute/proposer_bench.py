"""An elected proposer with its lanes, of which the test has the other ends of the sockets."""

import asyncio
import socket
import struct
from collections.abc import Coroutine
from typing import Any

from neon_services.compute.walproposer import WalProposer
from neon_services.compute.walproposer_config import parse_config
from neon_services.compute.walproposer_lanes import ProposerLanes
from neon_services.compute.walproposer_postgres import PostgresLink
from neon_services.compute.walproposer_ring import WalRing
from neon_services.compute.walproposer_safekeeper import _Client
from neon_services.ground.lsn import Lsn
from neon_services.protocols import pgclient, pgwire
from neon_services.protocols.lanes import LaneEventLoop
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    MembershipConfiguration,
    TermLsn,
    VoteResponse,
    parse_proposer_message,
)

START = Lsn(0x10000000)
TERM = 1
RING = 8 << 20
NO_FEEDBACK = HotStandbyFeedback()


class Bench:
    """An elected proposer that streams; the test has the other ends of its sockets."""

    def __init__(self, members: int = 3, mconf: MembershipConfiguration = NO_MEMBERSHIP, lazy_ms: int = 0) -> None:
        self.generation = mconf.generation
        config = parse_config(
            {
                "tenant_id": "0" * 31 + "1",
                "timeline_id": "0" * 31 + "2",
                "safekeepers": [f"127.0.0.{slot + 1}:1" for slot in range(members)],
                "generation": mconf.generation,
                "pg_version": 150020,
                "system_id": None,
                "lazy_ms": lazy_ms,
            }
        )
        self.proposer = WalProposer(config, lambda _: None)
        core = self.core = self.proposer.core
        for slot in range(members):
            core.connected(slot)
        for slot in range(members):
            core.received(slot, AcceptorGreeting(slot + 1, mconf, 0))
        for slot in core.must_reconnect():
            core.disconnected(slot)
            core.connected(slot)
            core.received(slot, AcceptorGreeting(slot + 1, mconf, 0))
        for slot in range(members):
            core.received(slot, VoteResponse(mconf.generation, TERM, True, START, START, (TermLsn(0, START),)))
        for slot in range(members):
            core.append_response(slot, AppendResponse(mconf.generation, TERM, START, START))
        assert core.ready
        self.ring = self.proposer.ring = WalRing(RING, START)
        self.proposer._announced_elected = self.proposer._announced_ready = True
        self.proposer._seen_lsn = START
        self.loop = asyncio.get_running_loop()
        self.wal = b""  # everything that Postgres has sent
        self.told = [b""] * members  # what each member received, and was not looked at
        self.reached: list[int] = [START] * members
        self.status = b""

    async def connect(self) -> "Bench":
        lanes = self.proposer.lanes
        assert lanes is not None
        self.lanes: ProposerLanes = lanes
        self.sockets = []
        for link in self.proposer.links:
            client = link._client = await self._pair(_Client, self.sockets)
            client.copy_sink, client.fast_path, client.on_room = link._on_message, link._take, link._on_room
            lanes.members[link.slot].attach(client)
        postgres = self.proposer.postgres = PostgresLink(
            self.ring, self.proposer.on_wal, self.proposer._positions, lanes.postgres
        )
        ends: list[socket.socket] = []
        client = postgres._client = await self._pair(pgclient.PgClient, ends)
        client.copy_sink, client.copy_batch_end, client.fast_path = postgres._on_message, postgres._on_batch_end, postgres._take
        lanes.postgres.attach(client)
        self.postgres = ends[0]
        return self

    async def _pair(self, factory: Any, ends: list[socket.socket]) -> Any:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
        ours.setblocking(False)
        _, client = await self.loop.create_connection(factory, sock=theirs)
        ends.append(ours)
        return client

    async def close(self) -> None:
        clients = [link._client for link in self.proposer.links] + [self.proposer.postgres and self.proposer.postgres._client]
        for lane in (*self.lanes.members, self.lanes.postgres):
            lane.detach()
        for client in clients:
            if client is not None:
                client.abort()
                await client.lost
        self.lanes.close()
        for end in (*self.sockets, self.postgres):
            end.close()

    # -- the other ends

    async def send_wal(self, data: bytes, cut: int | None = None) -> None:
        lsn = START + len(self.wal)
        self.wal += data
        message = pgwire.copy_data(struct.pack("!cQQq", b"w", lsn, lsn + len(data), 0) + data)
        for part in (message[:cut], message[cut:]) if cut else (message,):
            await self.loop.sock_sendall(self.postgres, part)
            await asyncio.sleep(0)

    async def answer(self, slot: int, flush: int, feedback: HotStandbyFeedback = NO_FEEDBACK, **more: Any) -> None:
        response = AppendResponse(self.generation, TERM, Lsn(flush), START, feedback)
        for name, value in more.items():
            setattr(response, name, value)
        await self.loop.sock_sendall(self.sockets[slot], pgwire.copy_data(response.pack()))

    def look(self) -> None:
        """Take what has been sent to the test."""
        for slot, end in enumerate(self.sockets):
            self.told[slot] += available(end)
        self.status += available(self.postgres)

    def appends(self, slot: int) -> list[AppendRequest]:
        """What this member got since the last call; checks that it is all of the WAL, in order."""
        self.look()
        found, used = [], 0
        for _, body, end in pgwire.split_messages(memoryview(self.told[slot])):
            append = parse_proposer_message(body)
            assert isinstance(append, AppendRequest)
            assert append.begin_lsn == self.reached[slot]
            assert (append.term, append.generation) == (TERM, self.generation)
            assert bytes(append.wal_data) == self.wal[append.begin_lsn - START : append.end_lsn - START]
            assert append.commit_lsn <= self.core.commit_lsn
            self.reached[slot] = append.end_lsn
            found.append(append)
            used = end
        self.told[slot] = self.told[slot][used:]
        return found

    def member_has(self, slot: int) -> int:
        """Up to where this member got WAL."""
        self.appends(slot)
        return self.reached[slot]

    def statuses(self) -> list[int]:
        """The flushed position of every status that Postgres was sent."""
        self.look()
        flushed = []
        for tag, body, _ in pgwire.split_messages(memoryview(self.status)):
            assert (tag, body[0]) == (ord("d"), ord("r"))
            written, flush, applied = struct.unpack_from("!QQQ", body, 1)
            assert written == flush >= applied
            flushed.append(flush)
        return flushed


def available(end: socket.socket) -> bytes:
    data = b""
    try:
        while piece := end.recv(1 << 20):
            data += piece
    except BlockingIOError:
        pass
    return data


def run(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LaneEventLoop) as runner:
        runner.run(scenario)

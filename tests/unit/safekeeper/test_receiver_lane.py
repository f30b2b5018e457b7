"""A proposer's connection on an event loop that runs lanes: real sockets, and whatever may come between two appends."""

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from neon_services.consensus.acceptor import AcceptorState, ProposerConnection
from neon_services.ground.lsn import Lsn
from neon_services.protocols import pgwire
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.lanes import LaneEventLoop
from neon_services.protocols.pgserver import ServerConnection
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    MembershipConfiguration,
    ProposerElected,
    ProposerGreeting,
    SafekeeperId,
    TermLsn,
    VoteRequest,
    parse_acceptor_message,
    parse_append_response,
)
from neon_services.safekeeper import metrics
from neon_services.safekeeper.connections import AT_ONCE_S, SOON_S, WalSenderState
from neon_services.safekeeper.disk_guard import DiskGuard, DiskSpace
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines
from neon_services.safekeeper.walreceiver import WalReceiver
from tests.unit.safekeeper.test_snapshot import SEGMENT, START
from tests.unit.safekeeper.test_timelines import TTID
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker
from tests.waiting import eventually


class Handler:
    """Ends the receiver with its connection, as the WAL service does."""

    def __init__(self) -> None:
        self.receiver: WalReceiver | None = None

    def connection_lost(self) -> None:
        assert self.receiver is not None
        self.receiver.close()


class Leader:
    """The proposer's end of a socket, and what serves it on the other one."""

    def __init__(self, timelines: Timelines, timeline: Timeline) -> None:
        self.timelines, self.timeline = timelines, timeline
        self.loop = asyncio.get_running_loop()
        self.taken = 0
        self.received = b""

    async def connect(self, term: int = 1) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        handler = Handler()
        self.connection = ServerConnection(lambda _: handler)  # type: ignore[arg-type, return-value]
        await self.loop.create_connection(lambda: self.connection, sock=theirs)
        self.connection._untagged = False
        self.connection.admitted()
        self.receiver = handler.receiver = WalReceiver(self.timelines, self.connection, TTID, allow_creation=False)
        self.receiver.start()
        start = Lsn(max(START, self.timeline.store.flush_lsn))
        history = tuple(TermLsn(t, START if t < term else start) for t in range(term + 1))
        for message in (
            ProposerGreeting(TTID, NO_MEMBERSHIP, PG_VERSION, SYSTEM_ID, SEGMENT),
            VoteRequest(0, term),
            ProposerElected(0, term, start, history),
        ):
            await self.send(pgwire.copy_data(message.pack()))
        proposer = self.receiver._state.proposer
        await eventually(lambda: self.timeline.acceptor.is_streaming(proposer), "the leader to be followed")
        lane = self.receiver._lane
        assert lane is not None and lane.attached
        self.lane = lane
        on_taken = lane.on_taken

        def count(appends: int) -> None:
            self.taken += appends
            on_taken(appends)

        lane.on_taken = count
        await self.messages(3)  # CopyBothResponse, greeting, vote

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.socket, data)

    async def messages(self, count: int) -> list[bytes]:
        """The bodies of the next messages."""
        found: list[bytes] = []
        while True:
            used = 0
            for _, body, end in pgwire.split_messages(memoryview(self.received)):
                if len(found) < count:
                    found.append(bytes(body))
                    used = end
            self.received = self.received[used:]
            if len(found) == count:
                return found
            async with asyncio.timeout(10):
                data = await self.loop.sock_recv(self.socket, 65536)
            if not data:
                raise ConnectionResetError("the safekeeper closed the connection")
            self.received += data

    async def answer(self) -> AppendResponse:
        return parse_append_response(memoryview((await self.messages(1))[0]))

    async def append(self, wal: WalMaker, begin: int, end: int, commit: int = START, term: int = 1) -> AppendResponse:
        await self.send(framed(wal, begin, end, commit, term))
        return await self.answer()

    async def warm(self, wal: WalMaker) -> int:
        """The first append of a term goes the long way; after it the lane is open. Its end."""
        first = wal.record_ends[0]
        assert (await self.append(wal, START, first)).flush_lsn == first
        assert self.lane.base.open
        return first

    async def leave(self) -> None:
        self.socket.close()
        await self.connection.lost


def framed(wal: WalMaker, begin: int, end: int, commit: int = START, term: int = 1) -> bytes:
    return pgwire.copy_data(AppendRequest(0, term, Lsn(begin), Lsn(end), Lsn(commit), START, wal.slice(begin, end)).pack())


def heartbeat(at: int, commit: int = START) -> bytes:
    return pgwire.copy_data(AppendRequest(0, 1, Lsn(at), Lsn(at), Lsn(commit), START).pack())


@contextlib.asynccontextmanager
async def a_leader(directory: Path) -> AsyncIterator[Leader]:
    timelines = Timelines(directory, 1, sync=True)
    state = AcceptorState.create(
        NO_MEMBERSHIP, pg_version=PG_VERSION, system_id=SYSTEM_ID, wal_seg_size=SEGMENT, start_lsn=START
    )
    leader = Leader(timelines, timelines.create(TTID, state))
    try:
        await leader.connect()
        yield leader
        await leader.leave()
    finally:
        timelines.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LaneEventLoop) as runner:
        runner.run(scenario)


async def on_disk(timeline: Timeline, end: int) -> bytes:
    data, reader = b"", timeline.reader()
    while (position := START + len(data)) < end:
        data += await reader.read(Lsn(position), min(end, position - position % SEGMENT + SEGMENT) - position)
    reader.close()
    return data


@pytest.mark.parametrize("reader", ["nobody", "pageserver", "replica"])
def test_appends_of_a_leader(tmp_path: Path, reader: str) -> None:
    """Each is answered and counted; a replica is told of each before the next, others soon."""

    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(60)
        async with a_leader(tmp_path) as leader:
            timeline, woken = leader.timeline, list[int]()
            if reader != "nobody":
                sender = WalSenderState(
                    TTID, "reader", None, wake=lambda: woken.append(timeline.store.flush_lsn), close=lambda _: None
                )
                sender.news_s = AT_ONCE_S if reader == "replica" else SOON_S
                timeline.senders[sender.conn_id] = sender
            changes: list[int] = []
            timeline.on_change = lambda changed: changes.append(changed.store.flush_lsn)
            counted, position = metrics.PROPOSER_ACCEPTOR_MESSAGES.counts["success"], await leader.warm(wal)
            for end in wal.record_ends[1:]:
                answer = await leader.append(wal, position, end, commit=position)
                assert answer == AppendResponse(0, 1, Lsn(end), START)
                assert (timeline.acceptor.flush_lsn, timeline.acceptor.commit_lsn) == (end, position)
                if reader == "replica":
                    assert woken[-1] == end
                position = end
            await eventually(lambda: changes[-1:] == [wal.end], "the manager to be told")
            assert reader == "nobody" or woken[-1] == wal.end
            assert leader.taken == 59
            assert metrics.PROPOSER_ACCEPTOR_MESSAGES.counts["success"] - counted == 60
            assert timeline.store.written_bytes == len(wal.data)
            assert leader.connection.received_bytes > len(wal.data)
            assert await on_disk(timeline, wal.end) == bytes(wal.data)
            timeline.senders.clear()

    run(scenario())


def test_a_reader_that_wants_news_sooner_does_not_wait_for_the_time_that_was_set(tmp_path: Path) -> None:
    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(4)
        async with a_leader(tmp_path) as leader:
            timeline, woken = leader.timeline, list[int]()
            wake = lambda: woken.append(timeline.store.flush_lsn)  # noqa: E731
            sender = WalSenderState(TTID, "reader", None, wake=wake, close=lambda _: None, news_s=3600.0)
            timeline.senders[sender.conn_id] = sender
            position = await leader.warm(wal)
            for end in wal.record_ends[1:]:
                await leader.append(wal, position, end, commit=position)
                position = end
            assert not woken or woken[-1] < wal.end
            sender.news_s = SOON_S
            timeline.retime()
            await eventually(lambda: woken[-1:] == [wal.end], "the reader to be told")
            timeline.senders.clear()

    run(scenario())


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_between(tmp_path: Path, seed: int) -> None:
    """Cuts anywhere, heartbeats, bytes that Python sends, recalls in the middle of messages, segments that end."""
    print("seed", seed)

    async def scenario() -> None:
        rng = random.Random(seed)
        wal = WalMaker(START, SEGMENT, seed=seed).until(START + 2 * SEGMENT + 9000, largest=9000)
        async with a_leader(tmp_path) as leader:
            timeline, position, commit = leader.timeline, int(START), int(START)
            while position < wal.end:
                stream, flushed = b"", 0
                for _ in range(rng.choice((1, 1, 1, 2, 7))):
                    end = min(position + rng.choice((8, 100, 700, 9000, 128 * 1024)), wal.end)
                    stream += framed(wal, position, end, commit)
                    if rng.random() < 0.1:
                        stream += heartbeat(end, commit)
                    position = end
                flushed = max((e for e in wal.record_ends if e <= position), default=START)
                while stream:
                    cut = len(stream) if rng.random() < 0.6 else rng.randint(1, len(stream))
                    await leader.send(stream[:cut])
                    stream = stream[cut:]
                    chance = rng.random()
                    if chance < 0.1:
                        timeline.store.recall()
                    elif chance < 0.15:
                        timeline.acceptor.standby_feedback = HotStandbyFeedback(rng.randrange(9), 1, 1)
                        timeline.store.recall()
                    elif chance < 0.2:
                        timeline._feedback_rests = False
                        timeline.pageserver_feedback(PageserverFeedback())
                    if stream and rng.random() < 0.5:
                        await asyncio.sleep(0)
                reached = 0
                while reached < flushed:  # answers come for each or for many, and feedback between them
                    message = parse_acceptor_message(memoryview((await leader.messages(1))[0]))
                    assert isinstance(message, AppendResponse)
                    assert message.flush_lsn <= timeline.store.flush_lsn
                    assert message.flush_lsn >= reached
                    reached = message.flush_lsn
                commit = rng.randint(commit, max(commit, reached))
            assert timeline.store.flush_lsn == wal.record_ends[-1]
            assert await on_disk(timeline, wal.end) == bytes(wal.data)
            assert leader.taken > 20, "the lane was hardly ever open"

    run(scenario())


RECALLS: dict[str, tuple[Callable[[Timeline], object], bool]] = {
    "a term bump": (lambda t: t.run(t.acceptor.term_bump()), False),
    "a vote": (lambda t: t.run(t.acceptor.vote_request(ProposerConnection(greeted=True), VoteRequest(0, 2))), False),
    "a membership": (
        lambda t: t.run(t.acceptor.membership_switch(MembershipConfiguration(3, (SafekeeperId(1, "h", 1),)))),
        False,
    ),
    "a save": (lambda t: t.run(t.acceptor.persist_volatile()), True),
    "a replica's feedback": (lambda t: t.standby_feedback_changed(), True),
    "a flush": (lambda t: t.store.flush(), True),
    "an eviction": (lambda t: t.store.release(), False),
    "a refusal": (lambda t: setattr(t, "wal_refusal", "no room") or t.store.recall(), False),
}


@pytest.mark.parametrize("why", RECALLS)
def test_what_was_lent_is_recalled(tmp_path: Path, why: str) -> None:
    """What changes the state that an append depends on shuts the lane first; only what changes nothing lets it go on."""
    change, goes_on = RECALLS[why]

    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(8)
        async with a_leader(tmp_path) as leader:
            first = await leader.warm(wal)
            change(leader.timeline)
            assert not leader.lane.base.open
            await leader.send(framed(wal, first, wal.record_ends[1], first))
            if goes_on:
                assert (await leader.answer()).flush_lsn == wal.record_ends[1]
                assert (await leader.append(wal, wal.record_ends[1], wal.end)).flush_lsn == wal.end
                assert leader.taken == 1, "it is lent again"
            elif why in ("a term bump", "a vote"):
                answer = await leader.answer()
                assert (answer.term, leader.timeline.store.flush_lsn) == (2, first)
            else:
                await leader.connection.lost
                assert leader.timeline.store.flush_lsn == first
            assert leader.taken == goes_on

    run(scenario())


def test_the_disk_guard_recalls(tmp_path: Path) -> None:
    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(3)
        async with a_leader(tmp_path) as leader:
            first = await leader.warm(wal)
            DiskGuard(leader.timelines, tmp_path).judge(DiskSpace(1 << 40, 0), 1.0)
            assert leader.timelines.disk_refusal is not None
            assert not leader.lane.base.open
            await leader.send(framed(wal, first, wal.end))
            await leader.connection.lost
            assert leader.timeline.store.flush_lsn == first

    run(scenario())


def test_a_write_that_fails(tmp_path: Path) -> None:
    """It ends the connection, and the log takes nothing before an election."""

    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(4)
        async with a_leader(tmp_path) as leader:
            first = await leader.warm(wal)
            leader.lane.c.file, leader.lane.c.flags = os.open("/dev/full", os.O_WRONLY), 0
            await leader.send(framed(wal, first, wal.record_ends[1]) + framed(wal, wal.record_ends[1], wal.end))
            (body,) = await leader.messages(1)
            assert b"No space left" in body
            os.close(leader.lane.c.file)
            store = leader.timeline.store
            assert (store.write_lsn, store.flush_lsn) == (first, first)
            await leader.connection.lost
            await leader.connect(term=2)
            assert (await leader.append(wal, first, wal.end, term=2)).flush_lsn == wal.end
            assert await on_disk(leader.timeline, wal.end) == bytes(wal.data)

    run(scenario())


def test_bytes_that_are_not_wal(tmp_path: Path) -> None:
    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(4)
        async with a_leader(tmp_path) as leader:
            first = await leader.warm(wal)
            wal.data[-50] ^= 1
            await leader.send(framed(wal, first, wal.end))
            (body,) = await leader.messages(1)
            assert b"not WAL" in body
            await leader.connection.lost
            assert leader.timeline.store.flush_lsn == first
            assert leader.timeline.store.plain_writes() is None

    run(scenario())


@pytest.mark.parametrize("rest", [b"", b"d", "part", b"X\0\0\0\4"], ids=["nothing", "a byte", "a part", "goodbye"])
def test_the_connection_ends_behind_appends(tmp_path: Path, rest: bytes | str) -> None:
    """What was whole is kept, wherever the stream breaks off; and another leader goes on."""

    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(6)
        async with a_leader(tmp_path) as leader:
            first, second = await leader.warm(wal), wal.record_ends[1]
            more = framed(wal, second, wal.end)
            await leader.send(framed(wal, first, second) + (rest if isinstance(rest, bytes) else more[:-1]))
            await leader.leave()
            assert leader.timeline.store.flush_lsn == second
            assert not leader.lane.attached
            await leader.connect(term=2)
            assert (await leader.append(wal, second, wal.end, term=2)).flush_lsn == wal.end
            assert await on_disk(leader.timeline, wal.end) == bytes(wal.data)

    run(scenario())


def test_a_leader_that_reads_nothing_loses_nothing(tmp_path: Path) -> None:
    """Answers that the socket does not take are sent later, whole and in order, behind what Python has queued."""

    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(3000, 40)
        async with a_leader(tmp_path) as leader:
            served = leader.connection.transport
            assert served is not None
            served.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
            position = await leader.warm(wal)
            for end in wal.record_ends[1:]:
                await leader.send(framed(wal, position, end))
                await eventually(lambda end=end: leader.timeline.store.flush_lsn == end, "the append to be flushed", interval=0)
                position = end
            assert served.get_write_buffer_size() > 0, "the socket took everything"
            reached = 0
            while reached < wal.end:
                answer = await leader.answer()
                assert answer.flush_lsn > reached
                reached = answer.flush_lsn

    run(scenario())


def test_an_unforeseen_error_in_what_the_lane_left_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that were taken in before it are on the disk as they came, or not at all: nothing is read over them."""

    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(30)
        async with a_leader(tmp_path) as leader:
            position = await leader.warm(wal)
            second, third = wal.record_ends[9], wal.record_ends[19]
            store = leader.timeline.store
            assert store._scanner is not None
            real = store._scanner.feed

            def feed(data: memoryview) -> None:
                if leader.timeline.store.write_lsn >= second:
                    raise MemoryError("no memory")
                real(data)

            monkeypatch.setattr(store._scanner, "feed", feed)
            leader.loop.set_exception_handler(lambda *_: None)
            stream = heartbeat(position) + framed(wal, position, second) + framed(wal, second, third)
            await leader.send(stream)
            with contextlib.suppress(OSError):
                await leader.send(b"d" * len(stream))
            await asyncio.wait_for(asyncio.shield(leader.connection.lost), 10)
            assert store.flush_lsn in (position, second)
            assert await on_disk(leader.timeline, store.flush_lsn) == wal.slice(START, store.flush_lsn)

    run(scenario())


def test_while_python_has_a_part_of_a_message_the_lane_takes_nothing(tmp_path: Path) -> None:
    """Whatever the rest looks like: here, like the beginning of an append."""

    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(400, 100)
        async with a_leader(tmp_path) as leader:
            position = await leader.warm(wal)
            served = leader.connection.transport
            assert served is not None
            for end in (START + at + 1 for at in range(position - START, len(wal.data)) if wal.data[at] == ord("d")):
                if end <= position:
                    continue
                leader.connection.write(pgwire.copy_data(bytes(1 << 20)))  # Python has bytes to send: it receives
                assert leader.lane.base.open
                message = framed(wal, position, end)
                await leader.send(message[:-1])
                await eventually(lambda: not leader.connection.idle, "Python to have a part", interval=0)
                while len((await leader.messages(1))[0]) < 1 << 20:
                    pass
                await eventually(lambda: not served.get_write_buffer_size(), "everything to be sent", interval=0)
                await leader.send(message[-1:])
                await eventually(lambda end=end: leader.timeline.store.write_lsn == end, "the append", interval=0)
                position = end
                for end in [end for end in wal.record_ends if end > position][:2]:  # the end of a record opens the lane again
                    await leader.send(framed(wal, position, end))
                    await eventually(lambda end=end: leader.timeline.store.flush_lsn == end, "the append", interval=0)
                    position = end
                if position > wal.end - 4000:
                    break
            assert leader.taken > 10

    run(scenario())


def test_a_part_behind_what_opened_the_lane_shuts_it_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(4)
        async with a_leader(tmp_path) as leader:
            first = await leader.warm(wal)
            leader.connection.feed(memoryview(heartbeat(first)))
            assert leader.lane.base.open
            message = framed(wal, first, wal.end)
            leader.connection.feed(memoryview(message[:20]))
            assert not leader.lane.base.open
            await leader.send(message[20:])
            while (await leader.answer()).flush_lsn < wal.end:
                pass

    run(scenario())


def test_what_the_lane_receives_is_counted_once(tmp_path: Path) -> None:
    """Whether it takes it or leaves it, or the connection ends."""

    async def scenario() -> None:
        wal = WalMaker(START, SEGMENT).records(4)
        async with a_leader(tmp_path) as leader:
            before, sent = leader.connection.received_bytes, 0
            first = wal.record_ends[0]
            for message in (framed(wal, START, first), heartbeat(first), framed(wal, first, wal.end), heartbeat(wal.end)):
                await leader.send(message)
                sent += len(message)
                await leader.answer()
            await leader.send(heartbeat(wal.end)[:30])
            await leader.leave()
            assert leader.connection.received_bytes - before == sent + 30
            assert leader.lane._buffer is None, "the memory is given back"
            await leader.connect(term=2)

    run(scenario())

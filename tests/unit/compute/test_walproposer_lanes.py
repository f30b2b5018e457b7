"""The proposer's lanes over real sockets: what Postgres is told is what a quorum has, and every member gets the same WAL."""

import asyncio
import ctypes
import os
import random
import socket
import struct
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from neon_services.compute import walproposer
from neon_services.compute.walproposer import WalProposer
from neon_services.compute.walproposer_config import parse_config
from neon_services.compute.walproposer_lanes import ProposerLanes
from neon_services.compute.walproposer_postgres import PostgresLink
from neon_services.compute.walproposer_ring import WalRing
from neon_services.compute.walproposer_safekeeper import _Client
from neon_services.consensus.membership import quorum_lsn
from neon_services.consensus.proposer import Deposed
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn
from neon_services.protocols import pgclient, pgwire
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.lanes import CProposerLane, CProposerMember, LaneEventLoop, library
from neon_services.protocols.safekeeper_messages import (
    MAX_APPEND_BYTES,
    NO_MEMBERSHIP,
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    MembershipConfiguration,
    SafekeeperId,
    TermLsn,
    VoteResponse,
    parse_proposer_message,
)
from tests.waiting import eventually

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
            self.told[slot] += _available(end)
        self.status += _available(self.postgres)

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


def _available(end: socket.socket) -> bytes:
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


def test_a_commit_takes_no_step_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        bench = await Bench().connect()
        for name in ("on_wal", "pump", "acknowledged"):
            monkeypatch.setattr(WalProposer, name, lambda *_, **__: pytest.fail("Python moved WAL"))
        position = int(START)
        for number in range(50):
            await bench.send_wal(bytes([number]) * 300)
            position += 300
            for slot in (0, 1):
                await eventually(lambda slot=slot, at=position: bench.member_has(slot) == at, "an append", interval=0)
                await bench.answer(slot, position)
            await eventually(lambda at=position: bench.statuses()[-1:] == [at], "the commit", interval=0)
            assert bench.core.commit_lsn == bench.ring.end == position
            await bench.answer(2, position)
        assert bench.statuses() == [START + 300 * n for n in range(1, 51)]
        assert [link.answer_s > 0 for link in bench.proposer.links] == [True] * 3
        monkeypatch.undo()
        await bench.close()

    run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes(seed: int) -> None:
    """Any sizes, cuts, members that read nothing for a while, feedback, keepalives; the ring comes round several times."""
    print("seed", seed)

    async def scenario() -> None:
        rng = random.Random(seed)
        members = rng.choice((3, 3, 5))
        bench = await Bench(members, lazy_ms=rng.choice((0, 10))).connect()
        bench.proposer._choose_lazy()
        acknowledged = [int(START)] * members
        feedback = [NO_FEEDBACK] * members
        while len(bench.wal) < 2 * RING:
            if START + len(bench.wal) - sorted(acknowledged)[members // 2] < RING - walproposer.RING_RESERVE - (1 << 20):
                data = rng.randbytes(rng.choice((1, 300, 300, 300, 9000, MAX_APPEND_BYTES)))
                cut = rng.randrange(len(data)) if rng.random() < 0.2 else None
                await bench.send_wal(data, cut)
            if rng.random() < 0.05:
                keepalive = struct.pack("!cQQB", b"k", 0, 0, rng.randrange(2))
                await bench.loop.sock_sendall(bench.postgres, pgwire.copy_data(keepalive))
            for slot in range(members):
                if rng.random() < 0.7:
                    has = bench.member_has(slot)
                    if rng.random() < 0.05:
                        feedback[slot] = HotStandbyFeedback(1, rng.randrange(3), 0)
                    flush = rng.choice((has, has, rng.randint(acknowledged[slot], has)))
                    acknowledged[slot] = flush
                    more = {"pageserver_feedback": PageserverFeedback(last_received_lsn=START)} if rng.random() < 0.03 else {}
                    await bench.answer(slot, flush, feedback[slot], **more)
            quorum = sorted(acknowledged)[(members - 1) // 2]
            told = bench.statuses()
            assert told == sorted(told)
            assert (told or [START])[-1] <= quorum
            assert bench.core.commit_lsn <= quorum
        end = START + len(bench.wal)

        async def answer_all() -> bool:
            for slot in range(members):
                await bench.answer(slot, bench.member_has(slot), feedback[slot])
            return min(bench.reached) == end and bench.core.commit_lsn == end

        await eventually(answer_all, "everything to be sent and committed")
        await eventually(lambda: bench.statuses()[-1:] == [end], "Postgres to be told", interval=0)
        await bench.close()

    run(scenario())


def test_two_sets_of_voters_must_both_agree() -> None:
    old = tuple(SafekeeperId(n, f"s{n}", 1) for n in (1, 2, 3))
    new = tuple(SafekeeperId(n, f"s{n}", 1) for n in (3, 4, 5))

    async def scenario() -> None:
        bench = await Bench(5, MembershipConfiguration(4, old, new)).connect()
        await bench.send_wal(b"x" * 100)
        end = START + 100
        for slot in range(5):
            await eventually(lambda slot=slot: bench.member_has(slot) == end, "the append", interval=0)
        for slot in (0, 1, 3):
            await bench.answer(slot, end)
        await bench.answer(3, end)
        await eventually(lambda: bench.core.members[3].flush_lsn == end, "the answers", interval=0)
        assert (bench.core.commit_lsn, bench.statuses()) == (START, [])
        await bench.answer(4, end)
        await eventually(lambda: bench.statuses() == [end], "the commit", interval=0)
        await bench.close()

    run(scenario())


@pytest.mark.parametrize("seed", range(3))
def test_the_quorum_is_that_of_the_state_machine(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    found = 0
    for _ in range(2000):
        count = rng.randint(1, 9)
        nodes = list(range(count))
        sets = [frozenset(rng.sample(range(count + 2), rng.randint(0 if rng.random() < 0.05 else 1, count))) for _ in range(2)]
        sets = sets[: rng.randint(1, 2)]
        if len(sets) == 2 and not sets[1]:
            continue
        flushed = {node: Lsn(rng.choice((0, rng.randint(90, 110), rng.randint(90, 110)))) for node in nodes}
        c, members = CProposerLane(), [CProposerMember() for _ in nodes]
        c.members, c.term_start_lsn = count, rng.choice((95, 100))
        for place, voters in enumerate(sets):
            c.voters[place] = len(voters)
        for node, member in zip(nodes, members, strict=True):
            member.flush_lsn = flushed[node]
            member.voter = sum(1 << place for place, voters in enumerate(sets) if node in voters)
            c.member[node] = ctypes.addressof(member)
        expected = quorum_lsn(tuple(sets), flushed, Lsn(c.term_start_lsn))
        assert library().proposer_lane_quorum_lsn(ctypes.addressof(c)) == expected
        found += expected > 0
    assert found > 150


def test_a_member_that_reads_nothing_gets_everything_later() -> None:
    """The others go on; what its socket does not take is not overwritten when the ring comes round."""

    async def scenario() -> None:
        bench = await Bench().connect()
        rng = random.Random(1)
        position = int(START)
        while len(bench.wal) < RING // 2:
            await bench.send_wal(rng.randbytes(9000))
            position += 9000
            for slot in (0, 1):
                await eventually(
                    lambda slot=slot, at=position: bench.proposer.links[slot].member.sent_lsn == at, "the append", interval=0
                )
                bench.told[slot] += _available(bench.sockets[slot])
                await bench.answer(slot, position)
        await eventually(lambda: bench.core.commit_lsn == position, "the commit", interval=0)
        third = bench.proposer.links[2]
        assert third.member.sent_lsn < position
        while bench.member_has(2) < position:
            if third.member.sent_lsn == bench.member_has(2):
                await bench.answer(2, third.member.sent_lsn)
            await asyncio.sleep(0)
        assert [bench.member_has(slot) for slot in range(3)] == [position] * 3
        await bench.close()

    run(scenario())


@pytest.mark.parametrize("wrong", ["a higher term", "beyond what was sent", "another generation", "no message"])
def test_wrong_answers(wrong: str) -> None:
    async def scenario() -> None:
        bench = await Bench().connect()
        await bench.send_wal(b"x" * 100)
        await eventually(lambda: bench.member_has(0) == START + 100, "the append", interval=0)
        if wrong == "a higher term":
            await bench.answer(0, START + 100, term=TERM + 1)
        elif wrong == "beyond what was sent":
            await bench.answer(0, START + (1 << 30))
        elif wrong == "another generation":
            await bench.answer(0, START + 100, generation=7)
        else:
            await bench.loop.sock_sendall(bench.sockets[0], b"d\0\0\0\1" + bytes(60))
        client = bench.proposer.links[0]._client
        assert client is not None
        if wrong in ("a higher term", "another generation"):
            with pytest.raises(Deposed):
                await asyncio.wait_for(bench.proposer.ended, 10)
        else:
            await asyncio.wait_for(asyncio.shield(client.lost), 10)
            assert not bench.proposer.ended.done()
        assert (bench.core.commit_lsn, bench.statuses()) == (START, [])
        await bench.close()

    run(scenario())


def test_a_commit_that_the_acknowledgements_do_not_say_stops_the_proposer() -> None:
    async def scenario() -> None:
        bench = await Bench().connect()
        await bench.send_wal(b"x" * 100)
        await eventually(lambda: bench.member_has(0) == START + 100, "the append", interval=0)
        lent = bench.lanes.lend
        bench.loop.lanes.before_wait[:] = [lambda: (lent(), setattr(bench.lanes.c, "commit_lsn", START + 50))]  # type: ignore[attr-defined]
        await bench.answer(0, START + 100)
        await eventually(bench.proposer.ended.done, "the proposer to end")
        with pytest.raises(NeonError, match="acknowledgements say"):
            bench.proposer.ended.result()
        bench.loop.lanes.before_wait[:] = [lent]  # type: ignore[attr-defined]
        await bench.close()

    run(scenario())


def test_members_hear_of_a_commit_that_no_append_tells() -> None:
    async def scenario() -> None:
        bench = await Bench().connect()
        await bench.send_wal(b"x" * 100)
        end = START + 100
        for slot in (0, 1):
            await eventually(lambda slot=slot: bench.member_has(slot) == end, "the append", interval=0)
            await bench.answer(slot, end)
        for slot in range(3):
            told = await eventually(lambda slot=slot: [a for a in bench.appends(slot) if a.commit_lsn == end], "a heartbeat")
            assert told[-1].begin_lsn == told[-1].end_lsn == end
        await bench.close()

    run(scenario())


def _processors(bench: Bench, statistics: Path, *, idle: int = 0, iowait: int = 0) -> None:
    """Of 100 ticks since the lanes looked last, so many were idle."""
    statistics.write_text(f"cpu  {94 - idle - iowait} 1 1 {idle} {iowait} 1 1 2 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    c = bench.lanes.c
    os.close(c.statistics)
    bench.lanes._statistics = c.statistics = os.open(statistics, os.O_RDONLY)
    c.looked_ns, c.all_ticks, c.idle_ticks = 1, 0, 0
    c.gather_ns = c.broadcast_ns = 3600 * 10**9  # until the test says so


async def _commit_with_more_wal_behind(bench: Bench) -> int:
    """A first commit; WAL that came while its appends were under way is in the ring. Where the first one ends."""
    await bench.send_wal(b"a" * 100)
    first = START + 100
    for slot in (0, 1):
        await eventually(lambda slot=slot: bench.member_has(slot) == first, "the append", interval=0)
    await bench.send_wal(b"b" * 100)
    await eventually(lambda: bench.ring.end == first + 100, "more WAL", interval=0)
    for slot in (0, 1):
        await bench.answer(slot, first)
    await eventually(lambda: bench.statuses()[-1:] == [first], "the commit", interval=0)
    return first


def test_what_came_in_the_meantime_is_gathered_while_processors_are_short(tmp_path: Path) -> None:
    """It waits for more, and is one append with it; what comes when nothing is under way goes at once."""

    async def scenario() -> None:
        bench = await Bench(lazy_ms=10).connect()
        bench.proposer.lazy_slot = 2
        _processors(bench, tmp_path / "stat", idle=4, iowait=5)
        c = bench.lanes.c
        first = await _commit_with_more_wal_behind(bench)
        await bench.send_wal(b"c" * 100)
        end = first + 200
        await eventually(lambda: bench.ring.end == end, "more WAL", interval=0)
        assert c.gather_due_ns > 0
        assert [bench.member_has(slot) for slot in (0, 1)] == [first] * 2
        c.gather_due_ns = bench.lanes.postgres.base.due_ns = 1
        for slot in (0, 1):
            appends = await eventually(lambda slot=slot: bench.appends(slot), "the append", interval=0)
            assert [(a.begin_lsn, a.end_lsn) for a in appends] == [(first, end)]
            await bench.answer(slot, end)
        await eventually(lambda: bench.statuses()[-1:] == [end], "the commit", interval=0)
        assert c.gather_due_ns == 0
        await bench.send_wal(b"d" * 100)
        for slot in (0, 1):
            await eventually(lambda slot=slot: bench.member_has(slot) == end + 100, "the append", interval=0)
        await bench.close()

    run(scenario())


@pytest.mark.parametrize(("idle", "iowait"), [(10, 0), (0, 10), (5, 5), (50, 3)])
def test_nothing_is_gathered_while_processors_are_idle(tmp_path: Path, idle: int, iowait: int) -> None:
    async def scenario() -> None:
        bench = await Bench().connect()
        _processors(bench, tmp_path / "stat", idle=idle, iowait=iowait)
        first = await _commit_with_more_wal_behind(bench)
        for slot in (0, 1):
            await eventually(lambda slot=slot: bench.member_has(slot) == first + 100, "the append", interval=0)
        assert (bench.lanes.c.looked_ns > 1, bench.lanes.c.gather_due_ns) == (True, 0)
        await bench.close()

    run(scenario())


@pytest.mark.parametrize(
    "text", ["", "cpu", "cpu ", "cpu  1 2 3 4 5 6 7\n", "cpu0 1 2 3 4 5 6 7 8\n", "12.3 4.56\n", "cpu  1 2 -3 4 5 6 7 8"]
)
def test_strange_statistics_gather_nothing(tmp_path: Path, text: str) -> None:
    c = CProposerLane()
    path = tmp_path / "stat"
    path.write_text(text)
    with path.open() as file:
        c.statistics, c.looked_ns, c.crowded = file.fileno(), 1, 1
        assert not library().proposer_lane_look_at_processors(ctypes.addressof(c), 10**9)
        assert (c.crowded, c.statistics) == (0, -1)


def test_statistics_without_any_time_gather_nothing(tmp_path: Path) -> None:
    """Some sandboxes count nothing."""
    c = CProposerLane()
    path = tmp_path / "stat"
    path.write_text("cpu  0 0 0 0 0 0 0 0 0 0\n")
    with path.open() as file:
        c.statistics, c.looked_ns, c.crowded = file.fileno(), 1, 1
        assert not library().proposer_lane_look_at_processors(ctypes.addressof(c), 10**9)
        assert (c.crowded, c.statistics, c.looked_ns) == (0, file.fileno(), 10**9)


def test_this_machine_has_statistics() -> None:
    async def scenario() -> None:
        bench = await Bench().connect()
        c = bench.lanes.c
        library().proposer_lane_look_at_processors(bench.lanes.postgres.address, 10**9)
        assert c.statistics >= 0
        assert c.all_ticks > c.idle_ticks > 0
        await bench.close()

    run(scenario())


def test_what_was_gathered_is_sent_when_the_lanes_stop(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = await Bench().connect()
        _processors(bench, tmp_path / "stat")
        first = await _commit_with_more_wal_behind(bench)
        await eventually(lambda: bench.lanes.c.gather_due_ns > 0, "gathering", interval=0)
        bench.lanes.postgres.detach()
        for slot in (0, 1):
            await eventually(lambda slot=slot: bench.member_has(slot) == first + 100, "the append, by Python's way")
        assert bench.lanes.c.gather_due_ns == 0
        await bench.close()

    run(scenario())


def test_the_lazy_member_is_the_slowest_or_else_one_with_a_pageserver() -> None:
    async def scenario() -> None:
        bench = await Bench(lazy_ms=10).connect()
        proposer, links = bench.proposer, bench.proposer.links

        def chosen() -> int:
            proposer._choose_lazy()
            return proposer.lazy_slot

        assert chosen() == 2
        for slot in (0, 1):
            await bench.answer(slot, START, pageserver_feedback=PageserverFeedback(last_received_lsn=START))
            await eventually(lambda slot=slot: links[slot].pageserver_at_s > 0, "the feedback", interval=0)
            assert [chosen() for _ in range(3)] == [0] * 3, "it does not change between equals"
        links[0].pageserver_at_s -= walproposer.PAGESERVER_READS_S
        assert chosen() == 1
        links[2].answer_s = 1.0
        assert [chosen() for _ in range(3)] == [2] * 3, "a slow one is not waited for, whoever reads elsewhere"
        links[2].answer_s = links[1].answer_s
        assert chosen() == 1
        links[1].pageserver_at_s -= walproposer.PAGESERVER_READS_S
        assert chosen() == 1, "nobody is better than who it is"
        await bench.close()

    run(scenario())


def test_reading_stops_when_nothing_is_committed_and_goes_on_afterwards() -> None:
    async def scenario() -> None:
        bench = await Bench().connect()
        postgres = bench.proposer.postgres
        assert postgres is not None
        sending = bench.loop.create_task(_send_for_ever(bench))
        await eventually(lambda: postgres.paused, "reading to stop")
        assert bench.ring.end - bench.core.commit_lsn <= RING
        for _ in range(300):
            for slot in range(3):
                bench.told[slot] += _available(bench.sockets[slot])
                await bench.answer(slot, bench.proposer.links[slot].member.sent_lsn)
            await asyncio.sleep(0.001)
            if sending.done():
                break
        await sending
        assert not postgres.paused
        await bench.close()

    run(scenario())


async def _send_for_ever(bench: Bench) -> None:
    for _ in range(2 * RING // 60_000):
        await bench.send_wal(bytes(60_000))


def test_what_was_lent_before_postgres_went_is_not_taken_over_afterwards() -> None:
    async def scenario() -> None:
        bench = await Bench().connect()
        await bench.send_wal(b"x" * 100)
        end = START + 100
        for slot in range(3):
            await eventually(lambda slot=slot: bench.member_has(slot) == end, "the append", interval=0)
        answer = pgwire.copy_data(AppendResponse(0, TERM, Lsn(end), START).pack())
        await bench.loop.sock_sendall(bench.sockets[0], answer[:20])
        await eventually(lambda: bench.lanes.members[0].base.filled == 20, "the part to be received")
        bench.lanes.postgres.detach()
        await bench.answer(1, end)
        await bench.answer(2, end)
        await eventually(lambda: bench.core.commit_lsn == end, "the commit, by Python's way")
        await bench.loop.sock_sendall(bench.sockets[0], answer[20:])
        await eventually(lambda: bench.core.members[0].flush_lsn == end, "the rest of the answer")
        assert not bench.proposer.ended.done()
        assert bench.core.commit_lsn == bench.ring.end == end
        for slot in range(3):  # the lanes would have told it
            await eventually(
                lambda slot=slot: bench.appends(slot)[-1:] and bench.core.members[slot].told_commit_lsn == end, "it"
            )
        await bench.close()

    run(scenario())


def test_nothing_is_sent_on_a_connection_that_was_aborted() -> None:
    """A part of an append was queued and dropped: no other append may follow the part that has gone."""

    async def scenario() -> None:
        bench = await Bench().connect()
        client = bench.proposer.links[0]._client
        assert client is not None and client.transport is not None
        position = int(START)
        while not client.transport.get_write_buffer_size():
            await bench.send_wal(bytes(60_000))
            position += 60_000
            await eventually(lambda at=position: bench.ring.end == at, "the WAL", interval=0)
            for slot in (1, 2):
                bench.told[slot] += _available(bench.sockets[slot])
                await bench.answer(slot, bench.proposer.links[slot].member.sent_lsn)
        first = bench.proposer.links[0]
        while first.awaiting or first.member.sent_lsn < position:
            await bench.answer(0, START)
            await asyncio.sleep(0)
        received = bench.told[0] + _available(bench.sockets[0])  # there is room again, and nobody knows
        client.abort()
        lsn = START + len(bench.wal)
        bench.postgres.send(pgwire.copy_data(struct.pack("!cQQq", b"w", lsn, lsn + 500, 0) + b"y" * 500))
        await eventually(lambda: bench.ring.end == lsn + 500, "the WAL")
        while True:
            try:
                piece = bench.sockets[0].recv(1 << 20)
            except BlockingIOError:
                continue
            if not piece:
                break
            received += piece
        *_, (_, _, whole) = [(0, 0, 0), *pgwire.split_messages(memoryview(received))]
        assert b"y" not in received[whole:]
        await bench.close()

    run(scenario())


def test_a_member_that_came_back_with_less_wal_is_no_reason_to_end() -> None:
    """What it acknowledged on an earlier connection is more, by more than a segment, than what it was sent on this one."""

    async def scenario() -> None:
        bench = await Bench().connect()
        await bench.send_wal(b"x" * 100)
        end = Lsn(START + 100)
        for slot in range(3):
            await eventually(lambda slot=slot: bench.member_has(slot) == end, "the append", interval=0)
        core = bench.core
        before = Lsn(START - (40 << 20))
        core.members[0].flush_lsn = core._flushed[0] = end
        core.members[0].sent_lsn = before
        bench.proposer.links[0].feeding = True
        core.members[0].persisted_commit_lsn = Lsn(0)
        await bench.answer(0, before)
        await eventually(lambda: core.members[0].persisted_commit_lsn == START, "the answer")
        assert not bench.proposer.ended.done()
        assert (core.members[0].flush_lsn, core.commit_lsn) == (end, START)
        await bench.answer(1, end)
        await eventually(lambda: bench.statuses() == [end], "the commit")
        await bench.close()

    run(scenario())

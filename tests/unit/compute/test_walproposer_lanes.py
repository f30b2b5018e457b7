"""The proposer's lanes over real sockets: what Postgres is told is what a quorum has, and every member gets the same WAL."""

import asyncio
import ctypes
import random
import struct

import pytest

from neon_services.compute import walproposer
from neon_services.compute.walproposer import WalProposer
from neon_services.consensus.membership import quorum_lsn
from neon_services.consensus.proposer import Deposed
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn
from neon_services.protocols import pgwire
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.lanes import CProposerLane, CProposerMember, library
from neon_services.protocols.safekeeper_messages import (
    MAX_APPEND_BYTES,
    AppendResponse,
    HotStandbyFeedback,
    MembershipConfiguration,
    SafekeeperId,
)
from tests.unit.compute.proposer_bench import NO_FEEDBACK, RING, START, TERM, Bench, available, run
from tests.waiting import eventually


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
                bench.told[slot] += available(bench.sockets[slot])
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


def test_what_python_has_timers_for_is_done_by_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each commit would keep Python's timer alive, and every round of it costs as much as half a commit."""
    rang: list[str] = []
    for name in ("_feed_lazy", "_broadcast_later"):
        monkeypatch.setattr(WalProposer, name, lambda _, name=name: rang.append(name))

    async def scenario() -> None:
        bench = await Bench(lazy_ms=200).connect()
        bench.proposer._choose_lazy()
        lazy = bench.proposer.lazy_slot
        first, second = (slot for slot in range(3) if slot != lazy)
        for number in range(1, 4):
            await bench.send_wal(b"x" * 100)
            end = START + 100 * number
            for slot in (first, second):
                await eventually(lambda slot=slot, end=end: bench.member_has(slot) == end, "the append", interval=0)
            await bench.answer(first, end)
            # the long way, as all that has feedback of a pageserver
            await bench.answer(second, end, pageserver_feedback=PageserverFeedback(last_received_lsn=START))
            await eventually(lambda end=end: bench.statuses()[-1:] == [end], "the commit", interval=0)
        bench.lanes.c.lazy_due_ns = 0  # what the lanes saw to by themselves
        bench.proposer._arm_lazy()
        for slot in range(3):
            await eventually(lambda slot=slot: any(a.commit_lsn == end for a in bench.appends(slot)), "a heartbeat")
        await eventually(lambda: bench.member_has(lazy) == end, "the lazy member's turn")
        assert rang == []
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
                bench.told[slot] += available(bench.sockets[slot])
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
                bench.told[slot] += available(bench.sockets[slot])
                await bench.answer(slot, bench.proposer.links[slot].member.sent_lsn)
        first = bench.proposer.links[0]
        while first.awaiting or first.member.sent_lsn < position:
            await bench.answer(0, START)
            await asyncio.sleep(0)
        received = bench.told[0] + available(bench.sockets[0])  # there is room again, and nobody knows
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

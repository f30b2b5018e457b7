"""What waits for company at the proposer: small appends while processors are short, and whatever goes to the lazy member."""

import ctypes
import os
from pathlib import Path

import pytest

from neon_services.compute import walproposer
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.lanes import CProcessors, library
from tests.unit.compute.proposer_bench import START, Bench, run
from tests.waiting import eventually


def _processors(bench: Bench, statistics: Path, *, idle: int = 0, iowait: int = 0) -> None:
    """Of 100 ticks since the lanes looked last, so many were idle."""
    statistics.write_text(f"cpu  {94 - idle - iowait} 1 1 {idle} {iowait} 1 1 2 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    c = bench.lanes.c
    os.close(c.processors.statistics)
    bench.lanes._statistics = os.open(statistics, os.O_RDONLY)
    c.processors = CProcessors(1, 0, 0, bench.lanes._statistics)
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
        assert (bench.lanes.c.processors.looked_ns > 1, bench.lanes.c.gather_due_ns) == (True, 0)
        await bench.close()

    run(scenario())


@pytest.mark.parametrize(
    "text", ["", "cpu", "cpu ", "cpu  1 2 3 4 5 6 7\n", "cpu0 1 2 3 4 5 6 7 8\n", "12.3 4.56\n", "cpu  1 2 -3 4 5 6 7 8"]
)
def test_strange_statistics_gather_nothing(tmp_path: Path, text: str) -> None:
    c = CProcessors()
    path = tmp_path / "stat"
    path.write_text(text)
    with path.open() as file:
        c.statistics, c.looked_ns, c.are_short = file.fileno(), 1, 1
        assert not library().processors_are_short(ctypes.addressof(c), 10**9)
        assert (c.are_short, c.statistics) == (0, -1)


def test_statistics_without_any_time_gather_nothing(tmp_path: Path) -> None:
    """Some sandboxes count nothing."""
    c = CProcessors()
    path = tmp_path / "stat"
    path.write_text("cpu  0 0 0 0 0 0 0 0 0 0\n")
    with path.open() as file:
        c.statistics, c.looked_ns, c.are_short = file.fileno(), 1, 1
        assert not library().processors_are_short(ctypes.addressof(c), 10**9)
        assert (c.are_short, c.statistics, c.looked_ns) == (0, file.fileno(), 10**9)


def test_this_machine_has_statistics() -> None:
    async def scenario() -> None:
        bench = await Bench().connect()
        c = bench.lanes.c.processors
        library().processors_are_short(ctypes.addressof(c), 10**9)
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

"""A reader's stream: a pageserver gets what comes soon after the last sending together, a replica gets everything at once.

And what computes hear of a pageserver's feedback.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from neon_services.consensus.acceptor import AcceptorState
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.replication_stream import StandbyStatus, XLogData, pack_pageserver_feedback, parse_sender_message
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP, AppendResponse, parse_acceptor_message
from neon_services.safekeeper import timeline, walsender
from neon_services.safekeeper.connections import WalReceiverState
from neon_services.safekeeper.timelines import Timelines
from neon_services.safekeeper.walsender import WalSender
from tests.unit.safekeeper.test_snapshot import SEGMENT, START, SmallLeader, append_all
from tests.unit.safekeeper.test_timelines import TTID
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker
from tests.waiting import eventually


class Reader:
    """The connection of a reader that keeps what it gets."""

    def __init__(self) -> None:
        self.peer = "127.0.0.1:1"
        self.has_room = True
        self.copy_sink: Any = None
        self.sender: WalSender
        self.streaming = asyncio.Event()
        self.received: asyncio.Queue[XLogData] = asyncio.Queue()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin_copy_both(self) -> None:
        self.streaming.set()

    def write(self, data: bytes) -> None:
        message = parse_sender_message(data[5:])
        assert isinstance(message, XLogData)
        self.received.put_nowait(message)

    def send_copy_data(self, payload: bytes) -> None:
        """Keepalives are of no interest."""

    async def drain(self) -> None:
        pass

    async def next_copy_data(self) -> bytes | None:
        await self._gone
        return None

    async def next(self) -> XLogData:
        async with asyncio.timeout(5):
            return await self.received.get()


@pytest.fixture
def leader(tmp_path: Path) -> Iterator[SmallLeader]:
    timelines = Timelines(tmp_path, 1, sync=False)
    state = AcceptorState.create(
        NO_MEMBERSHIP, pg_version=PG_VERSION, system_id=SYSTEM_ID, wal_seg_size=SEGMENT, start_lsn=START
    )
    yield SmallLeader(timelines.create(TTID, state)).elect()
    timelines.close()


@pytest.fixture
async def reader(leader: SmallLeader, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reader]:
    monkeypatch.setattr(walsender, "LATER_S", 3600.0)
    monkeypatch.setattr(walsender, "KEEPALIVE_INTERVAL_S", 3600.0)
    made = Reader()
    made.sender = WalSender(leader.timeline, made, "pageserver-1", None)  # type: ignore[arg-type]
    task = asyncio.create_task(made.sender.run(START))
    await made.streaming.wait()
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def nothing_sent_beyond(reader: Reader, lsn: int) -> None:
    """Not even read: a sender that was woken has begun within a few turns of the event loop."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert reader.received.empty() and not reader.sender._news.is_set() and reader.sender._position == lsn


def commit(leader: SmallLeader, wal: WalMaker, end: int) -> None:
    append_all(leader, wal, end)
    leader.append(wal, end, end)  # an empty one that tells the commit


async def test_a_pageserver_gets_the_first_news_at_once_and_the_next_together(leader: SmallLeader, reader: Reader) -> None:
    wal = WalMaker(START, SEGMENT).records(60)
    reader.copy_sink(memoryview(pack_pageserver_feedback(PageserverFeedback())))
    commit(leader, wal, wal.record_ends[0])
    first = await reader.next()
    assert (first.start_lsn, len(first.data)) == (START, wal.record_ends[0] - START)
    for end in wal.record_ends[1:50]:
        commit(leader, wal, end)
        await asyncio.sleep(0)
    assert reader.received.empty()
    reader.sender._end_rest()
    together = await reader.next()
    assert bytes(together.data) == wal.slice(wal.record_ends[0], wal.record_ends[49])
    assert reader.received.empty()


async def test_much_wal_does_not_wait(leader: SmallLeader, reader: Reader) -> None:
    wal = WalMaker(START, SEGMENT).until(START + 300_000)
    reader.copy_sink(memoryview(pack_pageserver_feedback(PageserverFeedback())))
    commit(leader, wal, wal.record_ends[0])
    await reader.next()
    commit(leader, wal, wal.end)
    assert (await reader.next()).start_lsn == wal.record_ends[0]


async def test_a_replica_gets_every_commit_at_once(leader: SmallLeader, reader: Reader) -> None:
    wal = WalMaker(START, SEGMENT).records(20)
    reader.copy_sink(memoryview(StandbyStatus(START, START, START, 0).pack()))
    position: int = START
    for end in wal.record_ends:
        commit(leader, wal, end)
        message = await reader.next()
        assert (message.start_lsn, len(message.data)) == (position, end - position)
        position = end


async def test_a_resting_stream_ends_at_once(leader: SmallLeader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walsender, "LATER_S", 3600.0)
    monkeypatch.setattr(walsender, "KEEPALIVE_INTERVAL_S", 3600.0)
    wal = WalMaker(START, SEGMENT).records(2)
    made = Reader()
    made.fail = lambda text, sqlstate: None  # type: ignore[attr-defined]
    task = asyncio.create_task(WalSender(leader.timeline, made, "pageserver-1", None).run(START))  # type: ignore[arg-type]
    await made.streaming.wait()
    made.copy_sink(memoryview(pack_pageserver_feedback(PageserverFeedback(last_received_lsn=Lsn(START)))))
    commit(leader, wal, wal.record_ends[0])
    await made.next()
    leader.timeline.close("the timeline is being deleted")
    with pytest.raises(NeonError, match="being deleted"):
        async with asyncio.timeout(5):
            await task


async def test_a_quiet_stream_says_that_it_lives_and_a_busy_one_does_not(
    leader: SmallLeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walsender, "KEEPALIVE_INTERVAL_S", 0.05)
    wal = WalMaker(START, SEGMENT).records(40)
    made = Reader()
    keepalives: list[float] = []
    loop = asyncio.get_running_loop()
    made.send_copy_data = lambda _: keepalives.append(loop.time())  # type: ignore[method-assign]
    sender = WalSender(leader.timeline, made, "pageserver-1", None)  # type: ignore[arg-type]
    begun = loop.time()
    task = asyncio.create_task(sender.run(START))
    await made.streaming.wait()
    await eventually(lambda: len(keepalives) == 2, "two keepalives")
    assert keepalives[0] - begun >= 0.05 and keepalives[1] - keepalives[0] >= 0.05
    # news begin the time anew: the alarm is not moved, but finds out
    commit(leader, wal, wal.record_ends[0])
    await made.next()
    sender._waiting_since = loop.time() + 3600
    rung = len(keepalives)
    sender._ring()
    assert len(keepalives) == rung and not sender._quiet
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sender._alarm is not None and sender._alarm.cancelled()


async def test_news_after_a_rest_go_at_once(leader: SmallLeader, reader: Reader) -> None:
    wal = WalMaker(START, SEGMENT).records(3)
    reader.copy_sink(memoryview(pack_pageserver_feedback(PageserverFeedback())))
    commit(leader, wal, wal.record_ends[0])
    await reader.next()
    reader.sender._sent_at -= 3600
    commit(leader, wal, wal.record_ends[1])
    assert (await reader.next()).start_lsn == wal.record_ends[0]
    assert reader.sender._rest is None


async def test_a_pageserver_that_speaks_gets_what_there_is_and_the_next_at_once(
    leader: SmallLeader, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walsender, "SOON_S", 0.0)
    wal = WalMaker(START, SEGMENT).records(6)
    timeline, ends, speak = leader.timeline, wal.record_ends, memoryview(pack_pageserver_feedback(PageserverFeedback()))
    reader.copy_sink(speak)
    commit(leader, wal, ends[0])
    await reader.next()
    assert timeline.news_s == 3600
    commit(leader, wal, ends[1])
    await nothing_sent_beyond(reader, ends[0])
    reader.copy_sink(speak)
    assert timeline.news_s == 0
    assert (await reader.next()).start_lsn == ends[0]
    commit(leader, wal, ends[2])
    await nothing_sent_beyond(reader, ends[1])
    assert timeline.news_s == 3600  # it has got some since
    reader.copy_sink(speak)
    await reader.next()
    reader.copy_sink(speak)  # nothing is here for it: the next goes at once
    commit(leader, wal, ends[3])
    assert (await reader.next()).start_lsn == ends[2]
    # a lane took it, and has not told yet
    monkeypatch.setattr(timeline, "changed", lambda: None)
    commit(leader, wal, ends[4])
    await nothing_sent_beyond(reader, ends[3])
    reader.copy_sink(speak)
    assert (await reader.next()).start_lsn == ends[3]


async def test_who_takes_appends_hears_what_readers_want(leader: SmallLeader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walsender, "LATER_S", 3600.0)
    timeline, wanted, made = leader.timeline, list[float](), Reader()
    state = WalReceiverState(lambda _: None, lambda _: None, retime=lambda: wanted.append(timeline.news_s))
    timeline.receivers[state.conn_id] = state
    task = asyncio.create_task(WalSender(timeline, made, "pageserver-1", None).run(START))  # type: ignore[arg-type]
    await made.streaming.wait()
    for _ in range(3):
        made.copy_sink(memoryview(pack_pageserver_feedback(PageserverFeedback())))
    wal = WalMaker(START, SEGMENT).records(1)
    commit(leader, wal, wal.end)
    await made.next()
    await eventually(lambda: timeline.news_s == 3600, "the pageserver to be content")
    assert wanted == [0.0, walsender.SOON_S, 3600.0]  # a replica for all we know, a pageserver, one that has got some
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    timeline.receivers.clear()


async def test_computes_hear_of_pageservers_at_once_and_then_seldom(
    leader: SmallLeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last word of each shard is what they hear after a rest."""
    monkeypatch.setattr(timeline, "FEEDBACK_S", 3600.0)
    ours = leader.timeline
    heard: list[tuple[int, int]] = []

    def send(data: bytes) -> None:
        message = parse_acceptor_message(memoryview(data))
        assert isinstance(message, AppendResponse) and message.pageserver_feedback is not None
        heard.append((message.pageserver_feedback.shard_number, message.pageserver_feedback.last_received_lsn))

    receiver = WalReceiverState(send=send, close=lambda _: None, proposer=leader.connection)
    ours.receivers[receiver.conn_id] = receiver
    ours.pageserver_feedback(PageserverFeedback(last_received_lsn=Lsn(1)))
    assert heard == [(0, 1)]
    for lsn in (2, 3):
        for shard in (0, 1):
            ours.pageserver_feedback(PageserverFeedback(last_received_lsn=Lsn(lsn + 10 * shard), shard_number=shard))
    assert (heard, ours.ps_feedback_count) == ([(0, 1)], 5)
    assert ours.last_ps_feedback is not None and ours.last_ps_feedback.last_received_lsn == 13
    ours._hand_on_feedback()  # the rest is over
    assert sorted(heard[1:]) == [(0, 3), (1, 13)]
    ours._hand_on_feedback()
    assert len(heard) == 3
    ours.pageserver_feedback(PageserverFeedback(last_received_lsn=Lsn(4)))
    assert heard[3:] == [(0, 4)]


async def test_feedback_that_waits_is_handed_on_by_itself(leader: SmallLeader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "FEEDBACK_S", 0.001)
    heard: list[bytes] = []
    receiver = WalReceiverState(send=heard.append, close=lambda _: None, proposer=leader.connection)
    leader.timeline.receivers[receiver.conn_id] = receiver
    leader.timeline.pageserver_feedback(PageserverFeedback())
    leader.timeline.pageserver_feedback(PageserverFeedback())
    await eventually(lambda: len(heard) == 2, "the second one")

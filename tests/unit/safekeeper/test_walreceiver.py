"""A proposer's connection that ends in the middle of a read: what was taken in before is kept as it came."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neon_services.consensus.acceptor import AcceptorState
from neon_services.ground.lsn import Lsn
from neon_services.protocols import pgwire
from neon_services.protocols.pgserver import ServerConnection
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    AppendRequest,
    ProposerElected,
    ProposerGreeting,
    TermLsn,
    VoteRequest,
    parse_append_response,
)
from neon_services.safekeeper import metrics
from neon_services.safekeeper.connections import AT_ONCE_S, SOON_S, WalSenderState
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines
from neon_services.safekeeper.walreceiver import WalReceiver
from tests.unit.safekeeper.test_snapshot import SEGMENT, START
from tests.unit.safekeeper.test_timelines import TTID
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker
from tests.waiting import until


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.sent = b""

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        pass

    abort = close

    def set_write_buffer_limits(self, **_: Any) -> None:
        pass

    def get_extra_info(self, _: str) -> None:
        return None

    def is_closing(self) -> bool:
        return False


class Handler:
    """Nobody asks anything."""

    def connection_lost(self) -> None:
        pass


class Proposer:
    """Feeds a connection with bytes as a socket does, through the connection's own buffer."""

    def __init__(self, timelines: Timelines) -> None:
        self.connection = ServerConnection(lambda _: Handler())  # type: ignore[arg-type, return-value]
        self.transport = Transport()
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]
        self.connection._untagged = False
        self.connection.admitted()
        self.receiver = WalReceiver(timelines, self.connection, TTID, allow_creation=False)
        self.receiver.start()
        for message in (
            ProposerGreeting(TTID, NO_MEMBERSHIP, PG_VERSION, SYSTEM_ID, SEGMENT),
            VoteRequest(0, 1),
            ProposerElected(0, 1, START, (TermLsn(0, START), TermLsn(1, START))),
        ):
            self.read(pgwire.copy_data(message.pack()))

    def read(self, data: bytes) -> None:
        buffer = self.connection.get_buffer(-1)
        buffer[: len(data)] = data
        self.connection.buffer_updated(len(data))

    def leave(self) -> None:
        self.receiver.close()
        self.connection.connection_lost(None)


def append(wal: WalMaker, begin: int, end: int) -> bytes:
    return pgwire.copy_data(AppendRequest(0, 1, Lsn(begin), Lsn(end), START, START, wal.slice(begin, end)).pack())


@pytest.fixture(params=[False, True], ids=["unsynced", "synced"])
def timelines(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Timelines]:
    made = Timelines(tmp_path, 1, sync=request.param)
    yield made
    made.close()


@pytest.fixture
def timeline(timelines: Timelines) -> Timeline:
    state = AcceptorState.create(
        NO_MEMBERSHIP, pg_version=PG_VERSION, system_id=SYSTEM_ID, wal_seg_size=SEGMENT, start_lsn=START
    )
    return timelines.create(TTID, state)


async def on_disk(timeline: Timeline, end: int) -> bytes:
    return await timeline.reader().read(START, end - START)


async def test_an_unforeseen_error_in_mid_read_spoils_nothing(timelines: Timelines, timeline: Timeline) -> None:
    wal = WalMaker(START, SEGMENT).records(30)
    first, second = wal.record_ends[9], wal.record_ends[19]
    proposer = Proposer(timelines)
    scanner = timeline.store._scanner
    assert scanner is not None
    real = scanner.feed

    def feed(data: Any) -> None:
        if len(data) == second - first:
            raise MemoryError("no room for the record")
        real(data)

    scanner.feed = feed
    tail = append(wal, second, wal.end)[:-1]
    with pytest.raises(MemoryError):
        proposer.read(append(wal, START, first) + append(wal, first, second) + tail)
    proposer.leave()  # as the event loop does after such an error
    assert timeline.store.flush_lsn == first
    assert await on_disk(timeline, first) == wal.slice(START, first)


async def test_what_follows_a_goodbye_spoils_nothing(timelines: Timelines, timeline: Timeline) -> None:
    wal = WalMaker(START, SEGMENT).records(30)
    first = wal.record_ends[9]
    proposer = Proposer(timelines)
    goodbye = b"X" + (4).to_bytes(4, "big")
    proposer.read(append(wal, START, first) + goodbye + append(wal, first, wal.end))
    proposer.leave()
    assert timeline.store.flush_lsn == first
    assert await on_disk(timeline, first) == wal.slice(START, first)


@pytest.mark.parametrize("replica", [False, True])
async def test_appends_that_fill_their_reads(timelines: Timelines, timeline: Timeline, replica: bool) -> None:
    """Where the event loop runs no lanes they go the short way when they are synced; a replica is told of each, others soon."""
    wal = WalMaker(START, SEGMENT).records(40)
    proposer = Proposer(timelines)
    woken: list[int] = []
    reader = WalSenderState(TTID, "reader", None, wake=lambda: woken.append(timeline.store.flush_lsn), close=lambda _: None)
    reader.news_s = AT_ONCE_S if replica else SOON_S
    timeline.senders[reader.conn_id] = reader
    changes: list[int] = []
    timeline.on_change = lambda changed: changes.append(changed.store.flush_lsn)
    lane = proposer.receiver._lane
    assert lane is not None
    taken: list[bool] = []
    real = lane.take

    def take(buffer: memoryview, filled: int) -> tuple[int, bytes]:
        done = real(buffer, filled)
        taken.append(done[0] > 0)
        return done

    lane.take = take  # type: ignore[method-assign]
    counted, position = metrics.PROPOSER_ACCEPTOR_MESSAGES.counts["success"], int(START)
    proposer.transport.sent = b""
    for end in wal.record_ends:
        proposer.read(append(wal, position, end))
        position = end
    answers = [
        parse_append_response(body).flush_lsn for _, body, _ in pgwire.split_messages(memoryview(proposer.transport.sent))
    ]
    assert answers == wal.record_ends
    if replica or not timeline._sync:
        assert woken == wal.record_ends
    await until(lambda: changes[-1:] == woken[-1:] == [wal.end], "everybody to be told")
    del timeline.senders[reader.conn_id]
    assert metrics.PROPOSER_ACCEPTOR_MESSAGES.counts["success"] - counted == 40
    assert timeline.store.written_bytes == len(wal.data)
    assert taken == [False] + [timeline._sync] * 39, "the first one shows that the disk can do it"
    assert await on_disk(timeline, wal.end) == bytes(wal.data)
    proposer.leave()


async def test_readers_that_want_news_sooner_hear_at_once_what_was_to_be_told_later(
    timelines: Timelines, timeline: Timeline
) -> None:
    wal = WalMaker(START, SEGMENT).records(3)
    proposer = Proposer(timelines)
    woken: list[int] = []
    wake = lambda: woken.append(timeline.store.flush_lsn)  # noqa: E731
    reader = WalSenderState(TTID, "reader", None, wake=wake, close=lambda _: None, news_s=1800.0)
    timeline.senders[reader.conn_id] = reader
    position = int(START)
    for end in wal.record_ends:
        proposer.read(append(wal, position, end))
        position = end
    if timeline._sync:  # elsewhere everything goes the long way
        assert woken[-1:] != [wal.end]
        reader.news_s = 3600.0
        timeline.retime()
        assert woken[-1:] != [wal.end]
        reader.news_s = SOON_S
        timeline.retime()
    assert woken[-1] == wal.end
    del timeline.senders[reader.conn_id]
    proposer.leave()


async def test_nothing_is_taken_when_the_disk_is_too_full(timelines: Timelines, timeline: Timeline) -> None:
    wal = WalMaker(START, SEGMENT).records(3)
    first, second, third = wal.record_ends
    proposer = Proposer(timelines)
    proposer.read(append(wal, START, first))
    proposer.read(append(wal, first, second))
    timeline.wal_refusal = "no room"
    proposer.read(append(wal, second, third))
    assert timeline.store.write_lsn == second
    assert b"no room" in proposer.transport.sent
    assert proposer.connection.closed
    proposer.leave()

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
)
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines
from neon_services.safekeeper.walreceiver import WalReceiver
from tests.unit.safekeeper.test_snapshot import SEGMENT, START
from tests.unit.safekeeper.test_timelines import TTID
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker


class Transport:
    """Takes what is written and forgets it."""

    def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass

    abort = close

    def set_write_buffer_limits(self, **_: Any) -> None:
        pass

    def get_extra_info(self, _: str) -> None:
        return None


class Handler:
    """Nobody asks anything."""

    def connection_lost(self) -> None:
        pass


class Proposer:
    """Feeds a connection with bytes as a socket does, through the connection's own buffer."""

    def __init__(self, timelines: Timelines) -> None:
        self.connection = ServerConnection(lambda _: Handler())  # type: ignore[arg-type, return-value]
        self.connection.connection_made(Transport())  # type: ignore[arg-type]
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


@pytest.fixture
def timelines(tmp_path: Path) -> Iterator[Timelines]:
    made = Timelines(tmp_path, 1, sync=False)
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

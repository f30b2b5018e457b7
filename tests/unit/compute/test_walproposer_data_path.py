"""What leaves the proposer is the same, whichever way WAL and acknowledgements reach it: whole reads, parts, or many."""

import asyncio
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from neon_services.compute.walproposer import WalProposer
from neon_services.compute.walproposer_config import parse_config
from neon_services.compute.walproposer_postgres import PostgresLink
from neon_services.compute.walproposer_ring import WalRing
from neon_services.compute.walproposer_safekeeper import _Client
from neon_services.ground.lsn import Lsn
from neon_services.protocols import pgclient, pgwire
from neon_services.protocols.pgframe import LARGEST_BUFFER
from neon_services.protocols.safekeeper_messages import (
    MAX_APPEND_BYTES,
    NO_MEMBERSHIP,
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    TermLsn,
    VoteResponse,
    parse_proposer_message,
)

START = Lsn(0x1000000)
ONE = bytes(30_000)
TERM = 1


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading

    def is_closing(self) -> bool:
        return self.aborted

    def set_write_buffer_limits(self, **_: Any) -> None:
        pass


def connect(client: pgclient.PgClient) -> Transport:
    transport = Transport()
    client.connection_made(transport)  # type: ignore[arg-type]
    return transport


class Bench:
    """An elected proposer whose sockets are transports of the test."""

    def __init__(self, *, direct: bool) -> None:
        config = parse_config(
            {
                "tenant_id": "0" * 31 + "1",
                "timeline_id": "0" * 31 + "2",
                "safekeepers": ["127.0.0.1:1", "127.0.0.2:1", "127.0.0.3:1"],
                "generation": 0,
                "pg_version": 150020,
                "system_id": None,
            }
        )
        self.direct = direct
        self.proposer = WalProposer(config, lambda _: None)
        core = self.proposer.core
        for slot in range(3):
            core.connected(slot)
        for slot in range(3):
            core.received(slot, AcceptorGreeting(slot + 1, NO_MEMBERSHIP, 0))
        vote = VoteResponse(0, TERM, True, START, START, (TermLsn(0, START),))
        for slot in range(3):
            core.received(slot, vote)
        for slot in range(2):
            core.append_response(slot, AppendResponse(0, TERM, START, START))
        assert core.ready
        ring = self.proposer.ring = WalRing(8 << 20, START)
        self.proposer._announced_elected = True
        self.proposer._arm_broadcast = lambda: None  # nothing is sent by a clock
        self.proposer._seen_lsn = ring.end
        self.transports = []
        for link in self.proposer.links:
            link._client = _Client()
            link._client._copy_sink = link._on_message
            if direct:
                link._client.fast_path = link._take
            self.transports.append(connect(link._client))
        on_wal = self.proposer.on_wal if direct else self.pump_all
        postgres = self.proposer.postgres = PostgresLink(ring, on_wal, self.proposer._positions)
        client = postgres._client = pgclient.PgClient()
        client._copy_sink, client._copy_batch_end = postgres._on_message, postgres._on_batch_end
        if direct:
            client.fast_path = postgres._take
        self.postgres = connect(client)
        self.postgres_client = client

    def pump_all(self) -> None:
        """What on_wal() means."""
        for slot in range(3):
            self.proposer.pump(slot)
        self.proposer.check_room()

    def read(self, client: pgclient.PgClient | None, data: bytes, cut: Callable[[int], int]) -> None:
        """The bytes arrive, in reads of the sizes that ``cut`` says."""
        assert client is not None
        while data and not client.closed:
            room = client.get_buffer(-1)
            count = min(cut(len(data)), len(room))
            room[:count] = data[:count]
            client.buffer_updated(count)
            data = data[count:]

    def keepalive(self) -> None:
        self.read(self.postgres_client, pgwire.copy_data(struct.pack("!cQQB", b"k", 0, 0, 0)), at_once)

    def wal(self, data: bytes, cut: Callable[[int], int]) -> None:
        assert self.proposer.ring is not None
        start = self.proposer.ring.end
        head = struct.pack("!cQQq", b"w", start, start + len(data), 0)
        self.read(self.postgres_client, pgwire.copy_data(head + data), cut)

    @property
    def postgres_paused(self) -> bool:
        assert self.proposer.postgres is not None
        return self.proposer.postgres.paused

    def answer(self, slot: int, response: AppendResponse, cut: Callable[[int], int]) -> None:
        self.read(self.proposer.links[slot]._client, pgwire.copy_data(response.pack()), cut)

    def appends(self, slot: int) -> list[AppendRequest]:
        found: list[AppendRequest] = []
        for tag, body, _ in pgwire.split_messages(memoryview(bytes(self.transports[slot].sent))):
            assert tag == ord("d")
            message = parse_proposer_message(body)
            assert isinstance(message, AppendRequest)
            found.append(message)
        return found

    def statuses(self) -> list[tuple[int, int, int]]:
        """(written, flushed, applied) of every status that Postgres was sent."""
        sent = bytes(self.postgres.sent)
        assert len(sent) % 39 == 0
        return [struct.unpack_from("!QQQ", sent, at + 6) for at in range(0, len(sent), 39)]


def at_once(count: int) -> int:
    return count


@pytest.mark.parametrize("seed", range(5))
async def test_the_short_ways_send_what_the_long_ways_send(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    short, long = Bench(direct=True), Bench(direct=False)
    flushed = [START] * 3
    for _ in range(300):
        assert short.postgres_paused == long.postgres_paused
        if rng.random() < 0.1:
            short.keepalive()
            long.keepalive()
        if rng.random() < 0.5 and not long.postgres_paused:
            data = rng.randbytes(rng.choice((1, 50, 400, 400, 400, 9000, MAX_APPEND_BYTES + 5)))
            cut = at_once if rng.random() < 0.8 else lambda n: rng.randint(1, n)
            short.wal(data, cut)
            long.wal(data, at_once)
        else:
            slot = rng.randrange(3)
            sent = long.proposer.core.members[slot].sent_lsn
            flushed[slot] = Lsn(rng.choice((sent, sent, rng.randint(flushed[slot], sent))))
            feedback = HotStandbyFeedback(1, rng.randrange(3), 0) if rng.random() < 0.2 else HotStandbyFeedback()
            response = AppendResponse(0, TERM, flushed[slot], START, feedback)
            cut = at_once if rng.random() < 0.8 else lambda n: rng.randint(1, n)
            short.answer(slot, response, cut)
            long.answer(slot, response, at_once)
        await asyncio.sleep(0)  # what is left of a long append is sent by the event loop
        assert [bytes(t.sent) for t in short.transports] == [bytes(t.sent) for t in long.transports]
        assert short.statuses() == long.statuses()
        assert short.proposer.core == long.proposer.core
    assert short.proposer.core.commit_lsn > START, "nothing was committed"


async def test_members_that_wait_for_nothing_get_wal_at_once() -> None:
    bench = Bench(direct=True)
    bench.wal(b"a" * 100, at_once)
    assert [(a.begin_lsn, a.end_lsn) for a in bench.appends(0)] == [(START, START + 100)]
    assert bench.transports[0].sent == bench.transports[1].sent == bench.transports[2].sent
    bench.wal(b"b" * 100, at_once)
    assert len(bench.appends(0)) == 1, "the next small one waits for the answer"
    bench.answer(0, AppendResponse(0, TERM, Lsn(START + 100), START), at_once)
    assert [(a.begin_lsn, a.end_lsn) for a in bench.appends(0)][1:] == [(START + 100, START + 200)]
    assert bench.statuses() == []
    bench.answer(1, AppendResponse(0, TERM, Lsn(START + 100), START), at_once)
    assert bench.statuses() == [(START + 100,) * 3], "two of three have it"


async def test_a_wrong_answer_ends_its_connection_only() -> None:
    bench = Bench(direct=True)
    bench.wal(b"a" * 100, at_once)
    bench.answer(0, AppendResponse(0, TERM, Lsn(START + (1 << 30)), START), at_once)
    assert [t.aborted for t in bench.transports] == [True, False, False]
    assert not bench.proposer.ended.done()
    bench.answer(1, AppendResponse(0, TERM + 1, Lsn(START + 100), START), at_once)
    with pytest.raises(Exception, match="promised term 2"):
        await bench.proposer.ended


async def test_wal_that_leaves_a_gap_ends_the_stream() -> None:
    bench = Bench(direct=True)
    head = struct.pack("!cQQq", b"w", START + 8, START + 108, 0)
    bench.read(bench.postgres_client, pgwire.copy_data(head + b"a" * 100), at_once)
    assert bench.postgres.aborted
    assert not bench.appends(0)


async def test_a_keepalive_is_no_wal() -> None:
    bench = Bench(direct=True)
    bench.keepalive()
    assert not bench.appends(0)
    bench.wal(b"a" * 100, at_once)
    assert [(a.begin_lsn, a.end_lsn) for a in bench.appends(0)] == [(START, START + 100)], "it waits for nothing"


@pytest.mark.parametrize("read_bytes", [100_000, LARGEST_BUFFER])
async def test_reading_stops_before_the_ring_would_come_round(read_bytes: int) -> None:
    """Whatever is read at once, WAL that is not committed stays in the ring; and reading goes on when it is committed."""
    bench = Bench(direct=True)
    ring = bench.proposer.ring
    assert ring is not None
    for _ in range(25):  # so that reads do not fit the ring exactly
        bench.wal(ONE, at_once)
    while not bench.postgres_paused:
        read = b""
        while len(read) < read_bytes - 40_000:
            lsn = ring.end + len(read) - len(read) // (len(ONE) + 30) * 30
            read += pgwire.copy_data(struct.pack("!cQQq", b"w", lsn, lsn, 0) + ONE)
        bench.read(bench.postgres_client, read, at_once)
        await asyncio.sleep(0)
        assert ring.end - bench.proposer.core.commit_lsn <= ring.size
    for slot in range(2):
        bench.answer(slot, AppendResponse(0, TERM, bench.proposer.core.members[slot].sent_lsn, START), at_once)
    assert not bench.postgres_paused

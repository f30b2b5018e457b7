"""Interpreted WAL of a real Postgres, from a real safekeeper: the values and effects are those of our own ingest."""

import asyncio
import random
import shutil
import socket
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import format_lsn, skip_page_header
from neon_services.protocols import pgwire
from neon_services.protocols.interpreted_options import BINCODE, PROTOBUF, InterpretedProtocol, format_protocol
from neon_services.protocols.pgwire import ServerError
from neon_services.protocols.sharding import ShardIdentity
from neon_services.wal.redo import RedoPool
from tests.integration.cluster import http
from tests.integration.interpreted_oracle import Ingested, compare_metadata, compare_values
from tests.integration.interpreted_support import RealWal, Receiver, make_real_wal, signature
from tests.integration.real_postgres import PG_BIN, PG_MAJOR
from tests.integration.safekeeper_support import Fleet, Node, ScriptedProposer, dead, new_ttid, running_fleet, until

pytestmark = [pytest.mark.cluster, pytest.mark.postgres, pytest.mark.asyncio(loop_scope="module")]

ROWS = 1500
PORT = 25540
STRIPE = 8  # pages: small, so that small relations are spread
UNSHARDED = ShardIdentity(0, 0, 2048)
SHARDS = [ShardIdentity(number, 4, STRIPE) for number in range(4)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wal() -> AsyncIterator[RealWal]:
    pool = RedoPool(PG_BIN, PG_MAJOR, 1)
    base = Path(tempfile.mkdtemp(prefix="interpreted-wal-", dir="/tmp"))  # the server's user must be able to enter it
    try:
        yield await make_real_wal(base, PORT, pool, ROWS)
    finally:
        await pool.close()
        shutil.rmtree(base)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two safekeepers: the second one interprets WAL once for all shards."""
    with running_fleet(tmp_path_factory.mktemp("fleet"), 2) as fleet:
        fleet.nodes[1].kill()
        fleet.nodes[1].argv.append("--wal-reader-fanout")
        fleet.nodes[1].start()
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ttid(wal: RealWal, fleet: Fleet) -> TenantTimelineId:
    """A timeline with all of the WAL, committed, at both."""
    ttid = new_ttid()
    leader = proposer(wal, ttid)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    leader.leave()
    return ttid


def proposer(wal: RealWal, ttid: TenantTimelineId) -> ScriptedProposer:
    return ScriptedProposer(ttid, wal.begin, wal.data, wal.pg_version, wal.system_id)


async def received(
    node: Node, ttid: TenantTimelineId, wal: RealWal, shard: ShardIdentity, how: tuple[str, int | None] = (BINCODE, None)
) -> Receiver:
    """Everything from the start to the end."""
    receiver = Receiver(InterpretedProtocol(*how, shard), wal.start)
    await receiver.connect(node, ttid)
    await receiver.receive_until(wal.end)
    receiver.leave()
    return receiver


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reference(wal: RealWal, fleet: Fleet, ttid: TenantTimelineId) -> list[Receiver]:
    """What each of four shards gets."""
    return [await received(fleet.nodes[0], ttid, wal, shard) for shard in SHARDS]


async def test_values_are_those_of_our_ingest(wal: RealWal, reference: list[Receiver]) -> None:
    counts = await compare_values(wal, Ingested(wal.ingested), [receiver.records for receiver in reference])
    print(dict(counts))
    assert counts["values"] > 20_000 and counts["images"] > 100 and counts["observed"] > counts["values"] // 4
    assert counts["implied map pages"] > 50
    assert all(counts[f"shard {number}"] > 1000 for number in range(4))


async def test_metadata_says_what_our_ingest_does(wal: RealWal, reference: list[Receiver]) -> None:
    counts = compare_metadata(Ingested(wal.ingested), [receiver.records for receiver in reference])
    print(dict(counts))
    assert counts["ClearVmBits flags 2"] and counts["ClearVmBits flags 3"] and counts["RunningXacts"] and counts["XlogRaw"]


async def test_an_only_shard_gets_everything(
    wal: RealWal, fleet: Fleet, ttid: TenantTimelineId, reference: list[Receiver]
) -> None:
    whole = await received(fleet.nodes[0], ttid, wal, UNSHARDED)
    assert [record.next_record_lsn for record in whole.records] == wal.record_ends
    assert [record.next_record_lsn for record in reference[0].records] == wal.record_ends
    counts = await compare_values(wal, Ingested(wal.ingested), [whole.records])
    assert not counts["observed"]
    assert compare_metadata(Ingested(wal.ingested), [whole.records])["ClearVmBits"]
    single = await received(fleet.nodes[0], ttid, wal, ShardIdentity(0, 1, 2048))
    assert signature(single.records) == signature(whole.records)


@pytest.mark.parametrize(("payload_format", "level"), [(PROTOBUF, None), (PROTOBUF, 1), (BINCODE, 3)])
async def test_formats_say_the_same(
    wal: RealWal, fleet: Fleet, ttid: TenantTimelineId, reference: list[Receiver], payload_format: str, level: int | None
) -> None:
    for shard, expected in zip(SHARDS, reference, strict=True):
        receiver = await received(fleet.nodes[0], ttid, wal, shard, (payload_format, level))
        assert signature(receiver.records) == signature(expected.records)


@pytest.mark.parametrize("number", [0, 1])
async def test_reconnecting_anywhere_loses_and_repeats_nothing(
    wal: RealWal, fleet: Fleet, ttid: TenantTimelineId, reference: list[Receiver], number: int
) -> None:
    """With and without sharing: shards come and go at random, each where it was; all get what an unbroken stream has."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def follow(shard: ShardIdentity, expected: Receiver) -> None:
        receiver = Receiver(InterpretedProtocol(BINCODE, None, shard), wal.start)
        connections = 0
        while receiver.next_lsn < wal.end:
            await receiver.connect(fleet.nodes[number], ttid)
            connections += 1
            for _ in range(rng.choice((1, 2, 5, 60))):
                if receiver.next_lsn >= wal.end:
                    break
                await receiver.receive()
            receiver.leave()
        assert connections > 3
        assert signature(receiver.records) == signature(expected.records)

    await asyncio.gather(*(follow(shard, expected) for shard, expected in zip(SHARDS, reference, strict=True)))


@pytest.mark.parametrize("number", [0, 1])
async def test_a_killed_safekeeper_goes_on_where_it_was(
    wal: RealWal, fleet: Fleet, reference: list[Receiver], number: int
) -> None:
    ttid, node = new_ttid(), fleet.nodes[number]
    leader = proposer(wal, ttid)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.record_ends[len(wal.record_ends) * 9 // 10])
    shards = [Receiver(InterpretedProtocol(PROTOBUF, 1, shard), wal.start) for shard in SHARDS]
    for messages, receiver in enumerate(shards):
        await receiver.connect(node, ttid)
        for _ in range(10 * messages):
            assert await receiver.receive()
    node.kill()
    for receiver in shards:
        assert receiver.client is not None
        await dead(receiver.client)
    node.start()
    leader.leave()
    leader = proposer(wal, ttid)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    for receiver in shards:
        await receiver.connect(node, ttid)
    await asyncio.gather(*(receiver.receive_until(wal.end) for receiver in shards))
    for receiver, expected in zip(shards, reference, strict=True):
        assert signature(receiver.records) == signature(expected.records)
        receiver.leave()
    leader.leave()


@pytest.mark.parametrize("number", [0, 1])
async def test_starting_at_any_record(
    wal: RealWal, fleet: Fleet, ttid: TenantTimelineId, reference: list[Receiver], number: int
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def start_at(shard: ShardIdentity, expected: Receiver) -> None:
        start = rng.choice(wal.record_ends[:-1])
        receiver = Receiver(InterpretedProtocol(PROTOBUF, 1, shard), start)
        await receiver.connect(fleet.nodes[number], ttid)
        await receiver.receive_until(wal.end)
        receiver.leave()
        assert signature(receiver.records) == signature([r for r in expected.records if r.next_record_lsn > start])

    await asyncio.gather(*(start_at(*pair) for pair in zip(SHARDS * 2, reference * 2, strict=True)))


async def test_shards_share_the_work_while_wal_is_written(wal: RealWal, fleet: Fleet, reference: list[Receiver]) -> None:
    """Live: all follow the commit position; one reader does the work; each gets the same as without sharing."""
    ttid, node = new_ttid(), fleet.nodes[1]
    leader = proposer(wal, ttid)
    await leader.elect(fleet.nodes)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    await leader.stream(wal.record_ends[10])
    shards = [Receiver(InterpretedProtocol(PROTOBUF, 1, shard), wal.start) for shard in SHARDS]
    for receiver in shards:
        await receiver.connect(node, ttid)
    tasks = [asyncio.create_task(receiver.receive_until(wal.end)) for receiver in shards]
    number = 10
    while number < len(wal.record_ends) - 1:
        number = min(number + rng.choice((1, 2, 10, 300, 3000)), len(wal.record_ends) - 1)
        if rng.random() < 0.5:
            for member in leader.members:  # WAL that ends in the middle of a record
                leader.send(member, wal.record_ends[number - 1] + 20)
        await leader.stream(wal.record_ends[number])
    await asyncio.gather(*tasks)
    for receiver, expected in zip(shards, reference, strict=True):
        assert signature(receiver.records) == signature(expected.records)
    await until(lambda: reader_tasks(node, ttid) == 1, "one reader for four shards")
    states = [sender["Interpreted"] for sender in node.status(ttid)["walsenders"]]
    assert [state["shard"]["number"] for state in states] == [0, 1, 2, 3]
    for receiver in shards:
        receiver.leave()
    await until(lambda: not node.status(ttid)["walsenders"], "the shards to be gone")
    assert reader_tasks(node, ttid) == 0
    leader.leave()


def reader_tasks(node: Node, ttid: TenantTimelineId) -> float:
    """The metric of a timeline."""
    with urllib.request.urlopen(node.url("/metrics"), timeout=10) as answer:
        text = answer.read().decode()
    lines = [line for line in text.splitlines() if line.startswith("safekeeper_interpreted_wal_reader_tasks{")]
    return float(next(line for line in lines if str(ttid.timeline_id) in line).split()[-1])


async def test_a_shard_that_reads_nothing_does_not_stall_the_others(wal: RealWal, fleet: Fleet, ttid: TenantTimelineId) -> None:
    node = fleet.nodes[1]
    options = format_protocol(InterpretedProtocol(BINCODE, None, SHARDS[0]))
    options |= {"tenant_id": str(ttid.tenant_id), "timeline_id": str(ttid.timeline_id)}
    with socket.create_connection(("127.0.0.1", node.pg_port)) as stuck:
        stuck.sendall(
            pgwire.startup_message({"user": "x", "options": " ".join(f"{key}={value}" for key, value in options.items())})
        )
        stuck.sendall(pgwire.query(f"START_REPLICATION PHYSICAL {format_lsn(wal.start)}"))
        await until(lambda: len(node.status(ttid)["walsenders"]) == 1, "the stuck shard to stream")
        others = [Receiver(InterpretedProtocol(BINCODE, None, shard), wal.start) for shard in SHARDS[1:]]
        for receiver in others:
            await receiver.connect(node, ttid)
        await asyncio.gather(*(receiver.receive_until(wal.end) for receiver in others))
        assert len(node.status(ttid)["walsenders"]) == 4
        for receiver in others:
            receiver.leave()


async def test_feedback_keepalives_and_the_end(wal: RealWal, fleet: Fleet, ttid: TenantTimelineId) -> None:
    node = fleet.nodes[0]
    receiver = Receiver(InterpretedProtocol(PROTOBUF, None, SHARDS[2]), wal.start)
    await receiver.connect(node, ttid, "pageserver-7")
    await receiver.receive_until(wal.end)
    assert receiver.commit_lsn == wal.end
    while not receiver.keepalives:
        await receiver.receive()
    (state,) = node.status(ttid)["walsenders"]
    shown = state["Interpreted"]
    assert shown["shard"] == {"number": 2, "count": 4, "stripe_size": STRIPE, "layout": 1}
    assert shown["appname"] == "pageserver-7"
    assert shown["feedback"]["Pageserver"]["remote_consistent_lsn"] == "0/0"
    receiver.feedback(wal.end - 1)
    await until(
        lambda: node.status(ttid)["walsenders"][0]["Interpreted"]["feedback"]["Pageserver"]["shard_number"] == 2, "the feedback"
    )
    count = receiver.keepalives
    while receiver.keepalives < count + 2:  # not yet everything: the stream goes on
        await receiver.receive()
    receiver.feedback(wal.end)
    assert receiver.client is not None
    text = await dead(receiver.client)
    assert text == (
        f'ending streaming to Some("pageserver-7") at {format_lsn(wal.end)}, receiver is caughtup and there is no computes'
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (format_protocol(InterpretedProtocol(PROTOBUF, 1, SHARDS[0])) | {"shard_count": None}, "needs the option shard_count"),
        ({"shard_count": "4", "shard_number": "0", "shard_stripe_size": "8"}, "shard_count belongs to the interpreted"),
        (format_protocol(InterpretedProtocol(PROTOBUF, 1, ShardIdentity(4, 4, 8))), "shard_number 4 does not fit"),
        ({"protocol": "interpreted"}, "is not JSON"),
    ],
)
async def test_bad_options_are_refused(
    fleet: Fleet, ttid: TenantTimelineId, options: dict[str, str | None], words: str
) -> None:
    given = {"tenant_id": str(ttid.tenant_id), "timeline_id": str(ttid.timeline_id), **options}
    text = " ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    with pytest.raises(ServerError, match=words) as refused:
        await fleet.nodes[0].connect(ttid, options=text)
    assert refused.value.sqlstate == "22023"


async def test_starts_that_are_no_record(wal: RealWal, fleet: Fleet, ttid: TenantTimelineId) -> None:
    """In the middle of a record: an error that names the position. Before the first segment: as for plain WAL."""
    longest = max(zip(wal.record_ends, wal.record_ends[1:], strict=False), key=lambda pair: pair[1] - pair[0])
    middle = longest[0] + 128
    for start, words in ((middle, f"WAL from {format_lsn(middle)} on cannot be interpreted"), (8, "is not here")):
        receiver = Receiver(InterpretedProtocol(PROTOBUF, None, UNSHARDED), start)
        with pytest.raises(ServerError, match=words):
            await receiver.connect(fleet.nodes[0], ttid)
            await receiver.receive()
        receiver.leave()


async def test_a_start_beyond_the_end_waits(wal: RealWal, fleet: Fleet, ttid: TenantTimelineId) -> None:
    receiver = Receiver(InterpretedProtocol(PROTOBUF, None, UNSHARDED), wal.end + 8192)
    await receiver.connect(fleet.nodes[0], ttid)
    assert not await receiver.receive()
    assert receiver.keepalives == 1
    receiver.leave()


async def test_a_page_start_inside_a_record_begins_with_the_next_one(
    wal: RealWal, fleet: Fleet, ttid: TenantTimelineId, reference: list[Receiver]
) -> None:
    """As for plain WAL at a page start: the tail of the record before is nobody's."""
    ends = wal.record_ends
    page = next(
        end - end % 8192 for end, before in zip(ends[500:], ends[499:], strict=False) if before < end - end % 8192 < end
    )
    first = next(end for end in ends if end > page)
    receiver = Receiver(InterpretedProtocol(BINCODE, None, SHARDS[0]), page)
    await receiver.connect(fleet.nodes[0], ttid)
    await receiver.receive_until(wal.end)
    receiver.leave()
    assert signature(receiver.records) == signature([r for r in reference[0].records if r.next_record_lsn > first])


@pytest.mark.parametrize("number", [0, 1])
async def test_pageservers_begin_behind_the_header_of_a_page(
    wal: RealWal, fleet: Fleet, ttid: TenantTimelineId, reference: list[Receiver], number: int
) -> None:
    """Where the next record really begins, when the last one ended with its page."""
    ends = [end for end in wal.record_ends if end % 8192 == 0][:3]
    assert ends
    for end in ends:
        receiver = Receiver(InterpretedProtocol(BINCODE, None, SHARDS[0]), skip_page_header(end))
        assert receiver.next_lsn > end
        await receiver.connect(fleet.nodes[number], ttid)
        await receiver.receive_until(wal.end)
        receiver.leave()
        assert signature(receiver.records) == signature([r for r in reference[0].records if r.next_record_lsn > end])


async def test_uncommitted_wal_is_only_for_readers_of_a_term(wal: RealWal, fleet: Fleet) -> None:
    ttid, node = new_ttid(), fleet.nodes[1]
    leader = proposer(wal, ttid)
    await leader.elect(fleet.nodes)
    end = wal.record_ends[3000]
    for member in leader.members:
        leader.send(member, end)
        while member.flushed < end:
            await leader.answer(member)
    readers = [Receiver(InterpretedProtocol(PROTOBUF, None, shard), wal.start) for shard in SHARDS[:2]]
    await readers[0].connect(node, ttid, "safekeeper_recovery", leader.term)
    await readers[0].receive_until(end)
    await readers[1].connect(node, ttid)
    assert not await readers[1].receive(), "nothing is committed"
    wrong = Receiver(InterpretedProtocol(PROTOBUF, None, SHARDS[0]), wal.start)
    with pytest.raises(ServerError, match=f"failed to acquire term {leader.term + 1}, current term {leader.term}"):
        await wrong.connect(node, ttid, "safekeeper_recovery", leader.term + 1)
    leader.commit = end
    for member in leader.members:
        leader.send(member, end)
    await readers[1].receive_until(end)
    for receiver in (*readers, wrong):
        receiver.leave()
    leader.leave()


async def test_deleting_the_timeline_ends_the_stream(wal: RealWal, fleet: Fleet) -> None:
    ttid = new_ttid()
    leader = proposer(wal, ttid)
    await leader.elect(fleet.nodes[:1])
    await leader.stream(wal.record_ends[2000])
    leader.leave()
    receiver = Receiver(InterpretedProtocol(BINCODE, None, SHARDS[0]), wal.start)
    await receiver.connect(fleet.nodes[0], ttid)
    await receiver.receive()
    http("DELETE", fleet.nodes[0].timeline_url(ttid))
    assert receiver.client is not None
    assert "delet" in await dead(receiver.client)

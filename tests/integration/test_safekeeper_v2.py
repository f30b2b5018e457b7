"""A proposer of protocol version 2 at real safekeepers, next to one of version 3."""

import asyncio
import struct
from collections.abc import Iterator

import pytest

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn
from neon_services.protocols import pgclient
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.replication_stream import pack_pageserver_feedback
from neon_services.protocols.safekeeper_messages import MembershipConfiguration
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, ScriptedProposer, dead, new_ttid, running_fleet
from tests.integration.test_pull_timeline import create, members
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

pytestmark = pytest.mark.cluster
START = Lsn(0x1002028)
UUID = b"u" * 16


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("v2"), 2) as fleet:
        yield fleet


def tag(letter: str) -> bytes:
    return letter.encode() + bytes(7)


class OldProposer:
    """Speaks version 2 to one safekeeper, in bytes that are made here."""

    def __init__(self, client: pgclient.PgClient) -> None:
        self.client = client

    async def answer(self) -> bytes:
        payload = await asyncio.wait_for(self.client.next_copy_data(), 10)
        assert payload is not None
        return bytes(payload)

    async def greet(self, ttid: object, segment_size: int = WAL_SEGMENT_SIZE) -> tuple[int, int]:
        ids = ttid.timeline_id.raw + ttid.tenant_id.raw  # type: ignore[attr-defined]
        message = tag("g") + struct.pack("<II", 2, PG_VERSION) + UUID + struct.pack("<Q", SYSTEM_ID) + ids
        self.client.send_copy_data(message + struct.pack("<II", 1, segment_size))
        answer = await self.answer()
        assert answer[:8] == tag("g") and len(answer) == 24
        return struct.unpack("<QQ", answer[8:])

    async def vote(self, term: int) -> tuple[int, int, list[tuple[int, int]]]:
        self.client.send_copy_data(tag("v") + struct.pack("<Q", term) + UUID)
        answer = await self.answer()
        assert answer[:8] == tag("v")
        got, given, flush, _, count = struct.unpack_from("<QQQQI", answer, 8)
        assert got == term and len(answer) == 44 + 16 * count + 8
        return given, flush, [struct.unpack_from("<QQ", answer, 44 + 16 * i) for i in range(count)]

    def elected(self, term: int, start: int, history: list[tuple[int, int]]) -> None:
        entries = b"".join(struct.pack("<QQ", *entry) for entry in history)
        message = tag("e") + struct.pack("<QQI", term, start, len(history)) + entries
        self.client.send_copy_data(message + struct.pack("<Q", history[0][1]))

    def append(self, term: int, begin: int, data: bytes, commit: int) -> None:
        head = tag("a") + struct.pack("<QQQQQQ", term, 0, begin, begin + len(data), commit, START)
        self.client.send_copy_data(head + UUID + data)

    async def flushed(self, term: int, lsn: int) -> bytes:
        while True:
            answer = await self.answer()
            assert answer[:8] == tag("a")
            got, flush, _ = struct.unpack_from("<QQQ", answer, 8)
            assert got == term
            if flush >= lsn:
                return answer


async def test_the_default_is_version_2_and_both_versions_agree(fleet: Fleet) -> None:
    node, ttid, wal = fleet.nodes[0], new_ttid(), WalMaker(START, WAL_SEGMENT_SIZE).records(100)
    half = wal.record_ends[50]
    client = await node.connect(ttid, "walproposer")
    await client.start_copy_both("START_WAL_PUSH")
    old = OldProposer(client)
    assert await old.greet(ttid) == (0, node.id)
    assert await old.vote(1) == (1, 0, [])
    old.elected(1, START, [(1, START)])
    old.append(1, START, wal.slice(START, half), 0)
    await old.flushed(1, half)
    old.append(1, half, b"", half)
    await old.flushed(1, half)
    assert node.lsn(ttid, "commit_lsn") == half
    # feedback of a pageserver comes in the old layout too
    reader = await node.connect(ttid, "pageserver-1")
    await reader.start_copy_both(f"START_REPLICATION PHYSICAL {half >> 32:X}/{half & 0xFFFFFFFF:X}")
    feedback = PageserverFeedback(last_received_lsn=Lsn(half), disk_consistent_lsn=Lsn(half), remote_consistent_lsn=Lsn(START))
    reader.send_copy_data(pack_pageserver_feedback(feedback))
    answer = await old.flushed(1, half)
    while len(answer) == 56:
        answer = await old.flushed(1, half)
    assert PageserverFeedback.parse(answer[56:]).last_received_lsn == half
    reader.abort()
    client.abort()
    # a leader of version 3 takes over what the old one wrote, and the old one learns the term
    new = ScriptedProposer(ttid, START, wal.data, PG_VERSION, SYSTEM_ID)
    await new.elect(fleet.nodes)
    assert new.members[0].vote is not None and new.members[0].vote.flush_lsn == half
    await new.stream(wal.end)
    client = await node.connect(ttid, "walproposer")
    await client.start_copy_both("START_WAL_PUSH (proto_version '2', allow_timeline_creation 'false')")
    again = OldProposer(client)
    assert await again.greet(ttid) == (2, node.id)
    assert await again.vote(2) == (0, wal.end, [(1, START), (2, half)])
    assert await again.vote(3) == (1, wal.end, [(1, START), (2, half)])
    again.append(2, wal.end, b"", 0)
    assert struct.unpack_from("<QQQ", await again.answer(), 8) == (3, 0, 0)
    client.abort()
    new.leave()
    assert node.digest(ttid, START, wal.end) == fleet.nodes[1].digest(ttid, START, wal.end)


async def test_version_2_cannot_lead_a_timeline_with_generations(fleet: Fleet) -> None:
    node, ttid = fleet.nodes[0], new_ttid()
    create(ttid, MembershipConfiguration(1, members(node)), [node])
    client = await node.connect(ttid, "walproposer")
    await client.start_copy_both("START_WAL_PUSH (proto_version '2')")
    old = OldProposer(client)
    assert await old.greet(ttid, 1 << 20) == (0, node.id)
    client.send_copy_data(tag("v") + struct.pack("<Q", 5) + UUID)
    assert "generation 0" in await dead(client)
    assert node.status(ttid)["acceptor_state"]["term"] == 0


async def test_a_cut_message_ends_only_its_connection(fleet: Fleet) -> None:
    node, ttid = fleet.nodes[0], new_ttid()
    for bad in (b"", b"g", tag("g") + bytes(71), tag("q") + bytes(80)):
        client = await node.connect(ttid, "walproposer")
        await client.start_copy_both("START_WAL_PUSH")
        client.send_copy_data(bad)
        assert await dead(client) != ""
    assert http("GET", node.url("/v1/status")) == {"id": node.id, "wal_refused": None}

"""The lane does with appends what the long way does, or nothing at all."""

import errno
import os
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from neon_services.consensus.acceptor import Acceptor, AcceptorState, ProposerConnection, run
from neon_services.ground.disk import Disk, Views
from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.lsn import Lsn
from neon_services.protocols import pgwire
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    ProposerElected,
    ProposerGreeting,
    TermLsn,
    VoteRequest,
    parse_append_response,
)
from neon_services.safekeeper.append_lane import AppendLane
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.timeline_storage import TimelineStorage
from neon_services.safekeeper.wal_store import WalStoreError
from tests.unit.safekeeper.test_timelines import TTID
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)


class FickleDisk(Disk):
    """Writes as the test says."""

    def __init__(self) -> None:
        self.meddle: Callable[[int, Views, int, int], int] | None = None
        self.writes = 0

    def pwritev(self, descriptor: int, views: Views, offset: int, flags: int) -> int:
        self.writes += 1
        if self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            return meddle(descriptor, views, offset, flags)
        return super().pwritev(descriptor, views, offset, flags)


class Node:
    """A timeline with one leader in term 1."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.disk = FickleDisk()
        state = AcceptorState.create(
            NO_MEMBERSHIP, pg_version=PG_VERSION, system_id=SYSTEM_ID, wal_seg_size=SEGMENT, start_lsn=START
        )
        control = ControlFile(TTID, state, creation_ts_ns=0)
        control.save(directory)
        self.directory = directory
        self.storage = TimelineStorage.load(directory, disk=self.disk)
        self.store = self.storage.store
        self.acceptor = Acceptor(1, TTID, self.storage.control.acceptor, self.store)
        self.connection = ProposerConnection()
        self.lane = AppendLane(self.acceptor, self.store, self.connection)
        self.lead(self.connection, 1)

    def lead(self, connection: ProposerConnection, term: int) -> None:
        start = Lsn(max(START, self.store.flush_lsn))
        history = tuple(TermLsn(t, START if t < term else start) for t in range(term + 1))
        for message in (
            ProposerGreeting(TTID, NO_MEMBERSHIP, PG_VERSION, SYSTEM_ID, SEGMENT),
            VoteRequest(0, term),
            ProposerElected(0, term, start, history),
        ):
            run(self.acceptor.handle(connection, message), self.storage.perform)

    def slowly(self, append: AppendRequest) -> AppendResponse:
        """The long way."""
        assert run(self.acceptor.append_request(self.connection, append), self.storage.perform) == []
        (answer,) = run(self.acceptor.flush_batch(self.connection), self.storage.perform)
        assert isinstance(answer, AppendResponse)
        return answer

    def quickly(self, append: AppendRequest) -> AppendResponse | None:
        """The short way; None when it is not open."""
        return self.take(pgwire.copy_data(append.pack()))

    def take(self, received: bytes) -> AppendResponse | None:
        taken, answer = self.lane.take(memoryview(bytearray(received + b"left over")), len(received))
        if not taken:
            assert answer == b""
            return None
        assert taken == len(received)
        tag, length = answer[:1], int.from_bytes(answer[1:5], "big")
        assert (tag, length) == (b"d", len(answer) - 1)
        return parse_append_response(answer[5:])

    def settle(self) -> "Node":
        """As after a first flush that wrote something: the short way is open."""
        self.store._has_dsynced = True
        self.store.flush()
        return self

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.directory.iterdir() if "tmp" not in path.name}

    def standing(self) -> tuple[Any, ...]:
        store, acceptor = self.store, self.acceptor
        lsns = store.write_lsn, store.write_record_lsn, store.flush_lsn, acceptor.commit_lsn, acceptor.peer_horizon_lsn
        return (*lsns, acceptor.state, self.connection)


def appends(wal: WalMaker, seed: int) -> list[AppendRequest]:
    """The whole log in appends of random sizes, which mostly end inside of records."""
    rng = random.Random(seed)
    made: list[AppendRequest] = []
    begin, commit = int(START), int(START)
    while begin < wal.end:
        end = min(begin + rng.choice((8, 100, 5000, 30_000, 128 * 1024)), wal.end)
        commit = rng.randrange(commit, begin + 1)
        made.append(AppendRequest(0, 1, Lsn(begin), Lsn(end), Lsn(commit), Lsn(START), wal.slice(begin, end)))
        begin = end
    return made


@pytest.mark.parametrize("seed", range(6))
def test_both_ways_end_in_the_same_place(tmp_path: Path, seed: int) -> None:
    """Answers, positions and bytes are the same, whichever way an append goes, over several segments."""
    print("seed", seed)
    wal = WalMaker(START, SEGMENT, seed=seed).until(START + 2 * SEGMENT + 7000, largest=9000)
    slow, mixed = Node(tmp_path / "slow"), Node(tmp_path / "mixed")
    rng = random.Random(seed)
    taken = 0
    for append in appends(wal, seed):
        expected = slow.slowly(append)
        answer = mixed.quickly(append) if rng.random() < 0.9 else None
        taken += answer is not None
        assert (answer or mixed.slowly(append)) == expected
        assert mixed.standing() == slow.standing()
    assert taken > len(appends(wal, seed)) / 2, "the short way was hardly ever open"
    assert mixed.store.written_bytes == slow.store.written_bytes == len(wal.data)
    mixed.store.close()
    slow.store.close()
    assert mixed.content() == slow.content()


def test_many_appends_are_one_write_and_one_answer(tmp_path: Path) -> None:
    """What follows the last whole append is left: a part of one, or something else."""
    wal = WalMaker(START, SEGMENT).records(10, 200)
    cuts = sorted({START, Lsn(START + 100), *map(Lsn, wal.record_ends)})
    messages = [
        pgwire.copy_data(AppendRequest(0, 1, begin, end, begin, START, wal.slice(begin, end)).pack())
        for begin, end in pairwise(cuts)
    ]
    for rest in (b"", messages[-1][:-1], b"d", b"X" + messages[-1][1:], messages[0]):
        node = Node(tmp_path / f"node{len(rest)}{rest[:1].hex()}").settle()
        received, whole = b"".join(messages[:-1]) + rest, sum(map(len, messages[:-1]))
        writes = node.disk.writes
        taken, answer = node.lane.take(memoryview(bytearray(received)), len(received))
        assert taken == whole
        assert parse_append_response(answer[5:]) == AppendResponse(0, 1, cuts[-2], START)
        assert node.disk.writes == writes + 1
        assert (node.acceptor.commit_lsn, node.store.flush_lsn) == (cuts[-3], cuts[-2])
        assert node.store.written_bytes == cuts[-2] - START


def test_an_append_behind_one_that_is_refused_is_not_taken(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(4, 200)
    cuts = [START, *map(Lsn, wal.record_ends)]
    messages = [
        pgwire.copy_data(AppendRequest(0, term, begin, end, begin, START, wal.slice(begin, end)).pack())
        for term, (begin, end) in zip((1, 2, 1, 1), pairwise(cuts), strict=True)
    ]
    node = Node(tmp_path / "node").settle()
    received = b"".join(messages)
    assert node.lane.take(memoryview(bytearray(received)), len(received))[0] == len(messages[0])
    assert node.store.write_lsn == cuts[1]


def test_one_write_and_nothing_else(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(3, 200)
    node = Node(tmp_path / "node").settle()
    node.acceptor.standby_feedback = HotStandbyFeedback(5, 6, 7)
    writes = node.disk.writes
    answer = node.quickly(AppendRequest(0, 1, START, wal.end, START, START, bytes(wal.data)))
    assert answer == AppendResponse(0, 1, wal.end, START, HotStandbyFeedback(5, 6, 7))
    assert node.disk.writes == writes + 1


def good(wal: WalMaker) -> AppendRequest:
    return AppendRequest(0, 1, START, wal.end, START, START, bytes(wal.data))


def test_what_is_not_one_plain_append_is_left_alone(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(3, 200)
    node = Node(tmp_path / "node").settle()
    whole = pgwire.copy_data(good(wal).pack())
    left = {
        "a part": whole[:-1],
        "another tag": b"c" + whole[1:],
        "another length": whole[:1] + (len(whole)).to_bytes(4, "big") + whole[5:],
        "a negative length": whole[:1] + b"\xff\xff\xff\xff" + whole[5:],
        "another kind": whole[:5] + b"v" + whole[6:],
        "nothing": b"",
        "a heartbeat": pgwire.copy_data(replace(good(wal), end_lsn=START, wal_data=b"").pack()),
        "an old term": pgwire.copy_data(replace(good(wal), term=0).pack()),
        "a new term": pgwire.copy_data(replace(good(wal), term=2).pack()),
        "another generation": pgwire.copy_data(replace(good(wal), generation=1).pack()),
        "a gap": pgwire.copy_data(replace(good(wal), begin_lsn=Lsn(START + 8), end_lsn=Lsn(wal.end + 8)).pack()),
        "an overlap": pgwire.copy_data(replace(good(wal), begin_lsn=Lsn(START - 8), end_lsn=Lsn(wal.end - 8)).pack()),
        "positions that do not fit": pgwire.copy_data(replace(good(wal), end_lsn=Lsn(wal.end + 8)).pack()),
    }
    before, content, writes = node.standing(), node.content(), node.disk.writes
    for what, received in left.items():
        assert node.take(received) is None, what
        assert node.standing() == before, what
    assert (node.content(), node.disk.writes) == (content, writes)
    assert node.take(whole) is not None, "the same append is taken when it is in order"


@pytest.mark.parametrize(
    "why", ["deposed", "another connection leads", "an answer is due", "unflushed", "not settled", "closed"]
)
def test_it_is_closed_unless_everything_is_settled(tmp_path: Path, why: str) -> None:
    wal = WalMaker(START, SEGMENT).records(3, 200)
    node = Node(tmp_path / "node")
    if why == "not settled":
        assert node.quickly(good(wal)) is None, "before the first flush after the election"
        return
    node.settle()
    if why == "deposed":
        run(node.acceptor.vote_request(ProposerConnection(greeted=True), VoteRequest(0, 2)), node.storage.perform)
    elif why == "another connection leads":
        node.lead(ProposerConnection(), 2)
    elif why == "an answer is due":
        node.connection.answer_due = True
    elif why == "unflushed":
        first = wal.record_ends[0]
        node.store.write(START, wal.slice(START, first))
        assert node.quickly(replace(good(wal), begin_lsn=Lsn(first), wal_data=wal.slice(first, wal.end))) is None
        return
    else:
        node.store.release()
    assert node.quickly(good(wal)) is None


def test_a_commit_that_must_be_saved_goes_the_long_way(tmp_path: Path) -> None:
    """The first time that the leader's own term is committed is remembered durably: sync-safekeepers waits for it."""
    wal = WalMaker(START, SEGMENT).records(3, 200)
    node = Node(tmp_path / "node").settle()
    first, second = (Lsn(end) for end in wal.record_ends[:2])
    assert node.quickly(AppendRequest(0, 1, START, first, START, START, wal.slice(START, first))) is not None
    node.lead(node.connection, 2)
    node.settle()
    assert (node.acceptor.term_start_lsn, node.acceptor.state.commit_lsn) == (first, START)
    append = AppendRequest(0, 2, first, second, first, START, wal.slice(first, second))
    assert node.quickly(append) is None
    assert node.slowly(append).commit_lsn == node.storage.control.acceptor.commit_lsn == first
    last = AppendRequest(0, 2, second, wal.end, second, START, wal.slice(second, wal.end))
    assert node.quickly(last) is not None


def test_it_waits_until_a_durable_write_has_been_seen_to_work(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(3, 200)
    first, second = (Lsn(end) for end in wal.record_ends[:2])
    node = Node(tmp_path / "node")

    def refuse(*_: Any) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    node.store.flush()
    append = AppendRequest(0, 1, START, first, START, START, wal.slice(START, first))
    assert node.quickly(append) is None
    node.disk.meddle = refuse
    assert node.slowly(append).flush_lsn == first, "by write and fdatasync"
    append = AppendRequest(0, 1, first, second, START, START, wal.slice(first, second))
    assert node.quickly(append) is None


def test_bytes_that_are_not_wal(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(3, 200)
    node = Node(tmp_path / "node").settle()
    wal.data[-60] ^= 1
    content = node.content()
    with pytest.raises(ProtocolViolation, match="not WAL"):
        node.quickly(good(wal))
    assert node.content() == content, "nothing of it was written"
    assert node.store.flush_lsn == START
    assert node.quickly(good(wal)) is None
    with pytest.raises(WalStoreError, match="election"):
        node.slowly(good(wal))


def test_a_failed_write_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(3, 200)
    node = Node(tmp_path / "node").settle()

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    node.disk.meddle = refuse
    with pytest.raises(WalStoreError, match="No space"):
        node.quickly(good(wal))
    assert (node.store.write_lsn, node.store.write_record_lsn, node.store.flush_lsn) == (START, START, START)
    assert node.quickly(good(wal)) is None, "an election must come first"
    node.lead(node.connection, 2)
    node.settle()
    assert node.quickly(replace(good(wal), term=2)) is not None


def test_a_short_write_is_completed(tmp_path: Path) -> None:
    wal = WalMaker(START, SEGMENT).records(3, 200)
    node = Node(tmp_path / "node").settle()

    def short(descriptor: int, views: Views, offset: int, flags: int) -> int:
        assert flags == os.RWF_DSYNC
        return os.pwritev(descriptor, [bytes(views[0][:100])], offset, flags)

    node.disk.meddle = short
    answer = node.quickly(good(wal))
    assert answer is not None
    assert answer.flush_lsn == wal.end
    node.store.close()
    again = TimelineStorage.load(node.directory)
    assert again.store.flush_lsn == wal.end

"""The acceptor, message by message and crash by crash."""

import random
from dataclasses import replace
from typing import Any

import pytest

from neon_services.consensus.acceptor import (
    Acceptor,
    AcceptorState,
    Effect,
    FlushWal,
    PeerInfo,
    PersistState,
    ProposerConnection,
    TruncateWal,
    WriteWal,
    run,
)
from neon_services.ground.errors import NeonError, ProtocolViolation, StaleGeneration
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.safekeeper_messages import (
    AppendRequest,
    AppendResponse,
    MembershipConfiguration,
    ProposerElected,
    ProposerGreeting,
    SafekeeperId,
    TermLsn,
    VoteRequest,
    VoteResponse,
)
from neon_services.simulation.model_storage import ModelStorage, ModelWal

TTID = TenantTimelineId(TenantId(bytes(16)), TimelineId(bytes(16)))
MEMBERS = tuple(SafekeeperId(i, f"s{i}", 5454) for i in (1, 2, 3))
MCONF = MembershipConfiguration(5, MEMBERS)
START = Lsn(100)


class ByteWal(ModelWal):
    """Every byte ends a record."""

    def _scan(self) -> None:
        self.write_record_lsn = self.write_lsn


class Node:
    """An acceptor with its disk and one greeted connection."""

    def __init__(self, mconf: MembershipConfiguration = MCONF, *, legacy: bool = False) -> None:
        state = AcceptorState.create(mconf, pg_version=150020, system_id=0, wal_seg_size=1 << 24, start_lsn=START)
        self.disk = ModelStorage(AcceptorState() if legacy else state, random.Random(1))
        self.disk.wal = ByteWal()
        if not legacy:
            self.disk.wal.initialize(START)
        self.done: list[Effect] = []
        self.boot()
        self.connection = self.connect()

    def boot(self) -> None:
        self.acceptor = Acceptor(1, TTID, self.disk.state, self.disk.wal)

    def connect(self) -> ProposerConnection:
        connection = ProposerConnection()
        self.send(ProposerGreeting(TTID, self.acceptor.state.mconf, 150020, 0, 1 << 24), connection)
        return connection

    def perform(self, effect: Effect) -> Any:
        self.done.append(effect)
        return self.disk.perform(effect)

    def send(self, message: Any, connection: ProposerConnection | None = None) -> list[Any]:
        self.done.clear()
        return run(self.acceptor.handle(connection or self.connection, message), self.perform)

    def flush(self) -> list[Any]:
        self.done.clear()
        return run(self.acceptor.flush_batch(self.connection), self.perform)

    def lead(self, term: int, start: int, *history: tuple[int, int]) -> None:
        self.send(VoteRequest(self.acceptor.state.mconf.generation, term))
        self.send(self.elected(term, start, *history))

    def elected(self, term: int, start: int, *history: tuple[int, int]) -> ProposerElected:
        entries = tuple(TermLsn(t, Lsn(lsn)) for t, lsn in history)
        return ProposerElected(self.acceptor.state.mconf.generation, term, Lsn(start), entries)

    def append(self, term: int, begin: int, data: bytes = b"", commit: int = 0) -> list[Any]:
        end = Lsn(begin + len(data))
        return self.send(AppendRequest(5, term, Lsn(begin), end, Lsn(commit), Lsn(0), data))

    def effects(self) -> list[type]:
        return [type(effect) for effect in self.done]


def test_vote_once_per_term_after_flush_and_persist() -> None:
    node = Node()
    (reply,) = node.send(VoteRequest(5, 3))
    assert node.effects() == [FlushWal, PersistState]
    assert reply == VoteResponse(5, 3, True, START, START, (TermLsn(0, START),))
    (again,) = node.send(VoteRequest(5, 3))
    assert again == replace(reply, vote_given=False) and node.effects() == [FlushWal]
    (lower,) = node.send(VoteRequest(5, 2))
    assert (lower.term, lower.vote_given) == (3, False)


@pytest.mark.parametrize("performed", range(2))
def test_a_crash_before_the_vote_is_spoken_is_silence(performed: int) -> None:
    node = Node()
    steps = node.acceptor.vote_request(node.connection, VoteRequest(5, 3))
    effect = next(steps)
    for _ in range(performed):
        effect = steps.send(node.disk.perform(effect))
    del steps  # the power goes here
    node.boot()
    node.connection = node.connect()
    assert node.acceptor.term == 0
    assert node.send(VoteRequest(5, 3))[0].vote_given


def test_append_flush_acknowledge_once_per_batch() -> None:
    node = Node()
    node.lead(1, 100, (0, 100), (1, 100))
    assert node.append(1, 100, b"abc") == [] and node.effects() == [WriteWal]
    assert node.append(1, 103, b"def", commit=102) == []
    assert node.flush() == [AppendResponse(5, 1, Lsn(106), Lsn(100))]
    assert node.effects() == [FlushWal]
    assert node.acceptor.commit_lsn == 102 and node.disk.state.commit_lsn == 100
    assert node.flush() == []
    node.append(1, 106, commit=200)
    assert node.flush() == [AppendResponse(5, 1, Lsn(106), Lsn(100))]
    assert node.effects() == [] and node.acceptor.commit_lsn == 106


def test_commit_reaching_the_term_start_is_persisted() -> None:
    node = Node()
    node.lead(1, 100, (0, 100), (1, 100))
    node.append(1, 100, bytes(50))
    node.flush()
    node.lead(2, 150, (0, 100), (1, 100), (2, 150))
    node.append(2, 150, commit=150)
    assert node.flush() == [AppendResponse(5, 2, Lsn(150), Lsn(150))]
    assert node.disk.state.commit_lsn == 150


def test_a_deposed_leader_learns_the_term() -> None:
    node = Node()
    node.lead(1, 100, (0, 100), (1, 100))
    node.send(VoteRequest(5, 2), node.connect())
    assert node.append(1, 100, b"late") == [AppendResponse(5, 2, Lsn(0), Lsn(0))]
    assert node.effects() == [] and node.flush() == []
    assert node.send(node.elected(1, 100, (0, 100), (1, 100))) == []  # ignored
    assert node.acceptor.term == 2


def test_gap_overlap_and_missing_election_are_refused() -> None:
    node = Node()
    node.send(VoteRequest(5, 1))
    with pytest.raises(ProtocolViolation, match="not the leader's newest"):
        node.append(1, 100, b"x")
    with pytest.raises(ProtocolViolation, match="without election"):
        node.append(2, 100, b"x")
    node.send(node.elected(1, 100, (0, 100), (1, 100)))
    for begin in (99, 101):
        with pytest.raises(ProtocolViolation, match="gap or overlaps"):
            node.append(1, begin, b"x")


def test_only_the_newest_connection_of_a_leader_may_append() -> None:
    node = Node()
    node.lead(1, 100, (0, 100), (1, 100))
    newer = node.connect()
    node.send(VoteRequest(5, 1), newer)
    node.send(node.elected(1, 100, (0, 100), (1, 100)), newer)
    with pytest.raises(ProtocolViolation, match="newest"):
        node.append(1, 100, b"x")
    assert node.acceptor.feedback_response(node.connection, PageserverFeedback()) is None
    assert node.acceptor.feedback_response(newer, PageserverFeedback()) is not None


def test_elected_cuts_then_adopts() -> None:
    node = Node()
    node.lead(1, 100, (0, 100), (1, 100))
    node.append(1, 100, bytes(100), commit=150)
    node.flush()
    node.send(VoteRequest(5, 3))
    history = ((0, 100), (1, 100), (3, 170))
    node.send(node.elected(3, 170, *history))
    assert node.effects() == [TruncateWal, PersistState]
    assert node.disk.wal.write_lsn == 170 and node.disk.state.term_history[-1] == (3, 170)


def test_a_crash_between_cut_and_adoption_tells_the_truth() -> None:
    node = Node()
    node.lead(1, 100, (0, 100), (1, 100))
    node.append(1, 100, bytes(100))
    node.flush()
    node.send(VoteRequest(5, 3))
    steps = node.acceptor.elected(node.connection, node.elected(3, 170, (0, 100), (1, 100), (3, 170)))
    node.disk.perform(next(steps))
    del steps
    node.boot()
    assert (node.acceptor.flush_lsn, node.acceptor.last_log_term) == (170, 1)


def test_elected_that_does_not_fit_is_refused() -> None:
    node = Node()
    node.lead(1, 100, (0, 100), (1, 100))
    node.append(1, 100, bytes(100), commit=150)
    node.flush()
    node.send(VoteRequest(5, 2))
    with pytest.raises(ProtocolViolation, match="logs part at"):
        node.send(node.elected(2, 180, (0, 100), (1, 100), (2, 190)))
    with pytest.raises(ProtocolViolation, match="below commit_lsn"):
        node.send(node.elected(2, 120, (0, 100), (1, 100), (2, 120)))
    assert node.disk.wal.write_lsn == 200


def test_disconnect_flushes() -> None:
    node = Node()
    node.lead(1, 100, (0, 100), (1, 100))
    node.append(1, 100, b"last words")
    run(node.acceptor.flush_on_disconnect(node.connection), node.perform)
    assert node.disk.wal.flush_lsn == 110


def test_greeting_checks() -> None:
    node = Node()
    with pytest.raises(ProtocolViolation, match="greet first"):
        node.send(VoteRequest(5, 1), ProposerConnection())
    other = TenantTimelineId(TenantId(b"x" * 16), TimelineId(bytes(16)))
    for bad, text in (
        (ProposerGreeting(other, MCONF, 150020, 0, 1 << 24), "greets timeline"),
        (ProposerGreeting(TTID, MCONF, 160004, 0, 1 << 24), "Postgres 15"),
        (ProposerGreeting(TTID, MCONF, 150020, 0, 1 << 20), "segments"),
    ):
        with pytest.raises(ProtocolViolation, match=text):
            node.send(bad)
    node.send(ProposerGreeting(TTID, MCONF, 150021, 77, 1 << 24))
    assert (node.disk.state.system_id, node.disk.state.pg_version) == (77, 150021)


def test_membership_by_greeting_and_by_switch() -> None:
    node = Node()
    newer = MembershipConfiguration(6, MEMBERS, MEMBERS[:2])
    (reply,) = node.send(ProposerGreeting(TTID, newer, 150020, 0, 1 << 24))
    assert reply.mconf == newer == node.disk.state.mconf
    with pytest.raises(StaleGeneration):
        node.send(VoteRequest(5, 1))
    with pytest.raises(NeonError, match="not a member"):
        node.send(ProposerGreeting(TTID, MembershipConfiguration(7, MEMBERS[1:]), 150020, 0, 1 << 24))
    with pytest.raises(StaleGeneration):
        run(node.acceptor.membership_switch(MCONF), node.perform)
    assert run(node.acceptor.membership_switch(newer), node.perform) == newer
    assert run(node.acceptor.membership_switch(MembershipConfiguration(7, MEMBERS)), node.perform) == newer


def test_term_bump_deposes() -> None:
    node = Node()
    node.lead(1, 100, (0, 100), (1, 100))
    assert run(node.acceptor.term_bump(), node.perform) == (1, 2)
    assert run(node.acceptor.term_bump(2), node.perform) == (2, 2)
    assert node.append(1, 100, b"x") == [AppendResponse(5, 2, Lsn(0), Lsn(0))]


def test_peers_tell_commit_only_for_the_same_last_leader() -> None:
    node = Node()
    node.lead(1, 100, (0, 100), (1, 100))
    node.append(1, 100, bytes(100))
    node.flush()
    assert node.acceptor.peer_info(PeerInfo(2, Lsn(180), Lsn(150), Lsn(140), Lsn(130)))
    a = node.acceptor
    assert (a.commit_lsn, a.backup_lsn, a.remote_consistent_lsn, a.peer_horizon_lsn) == (100, 150, 140, 130)
    node.acceptor.peer_info(PeerInfo(1, Lsn(900), Lsn(0), Lsn(0), Lsn(0)))
    assert node.acceptor.commit_lsn == 200
    assert node.disk.state.commit_lsn == 100
    run(node.acceptor.persist_volatile(), node.perform)
    assert (node.disk.state.commit_lsn, node.disk.state.backup_lsn) == (200, 150)
    node.done.clear()
    run(node.acceptor.persist_volatile(), node.perform)
    assert not node.done


def test_an_empty_legacy_timeline_learns_its_start() -> None:
    node = Node(legacy=True)
    (vote,) = node.send(VoteRequest(0, 1))
    assert (vote.vote_given, vote.flush_lsn, vote.term_history) == (True, 0, ())
    node.send(node.elected(1, 4096, (1, 4096)))
    state = node.disk.state
    assert (state.timeline_start_lsn, state.local_start_lsn, state.commit_lsn, state.peer_horizon_lsn) == (4096,) * 4
    assert node.disk.wal.write_lsn == 4096


def test_a_failed_effect_leaves_the_state_as_it_was() -> None:
    node = Node()

    def full(effect: Effect) -> Any:
        if isinstance(effect, PersistState):
            raise OSError("disk full")
        return node.disk.perform(effect)

    with pytest.raises(OSError):
        run(node.acceptor.vote_request(node.connection, VoteRequest(5, 3)), full)
    assert node.acceptor.term == 0
    assert node.send(VoteRequest(5, 3))[0].vote_given

"""The proposer, message by message."""

from dataclasses import replace

import pytest

from neon_services.consensus.proposer import Deposed, MemberPhase, Phase, Proposer, ProposerConfig
from neon_services.ground.errors import ConfigError, ProtocolViolation
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    AcceptorGreeting,
    AppendResponse,
    MembershipConfiguration,
    ProposerElected,
    SafekeeperId,
    TermHistory,
    TermLsn,
    VoteRequest,
    VoteResponse,
    parse_append_request,
)

TTID = TenantTimelineId(TenantId(bytes(16)), TimelineId(bytes(16)))
MEMBERS = tuple(SafekeeperId(i, f"s{i}", 5454) for i in range(1, 6))
THREE = MembershipConfiguration(5, MEMBERS[:3])
H1 = (TermLsn(0, Lsn(100)), TermLsn(1, Lsn(100)))


def proposer(*, slots: int = 3, generations: bool = True, bootstrap: int = 0) -> Proposer:
    return Proposer(ProposerConfig(TTID, slots, 150020, use_generations=generations, bootstrap_lsn=Lsn(bootstrap)))


def greet(p: Proposer, slot: int, *, term: int = 1, mconf: MembershipConfiguration = THREE, node: int = 0) -> list:
    p.connected(slot)
    return p.received(slot, AcceptorGreeting(node or slot + 1, mconf, term))


def vote(p: Proposer, slot: int, flush: int, history: TermHistory = H1, *, given: bool = True, truncate: int = 100) -> list:
    return p.received(slot, VoteResponse(p.mconf.generation, p.term, given, Lsn(flush), Lsn(truncate), history))


def acknowledge(p: Proposer, slot: int, flush: int, commit: int = 0, *, term: int = 0) -> bool:
    return p.append_response(slot, AppendResponse(p.mconf.generation, term or p.term, Lsn(flush), Lsn(commit)))


def elected(flushes: tuple[int, ...] = (200, 180)) -> Proposer:
    p = proposer()
    greet(p, 0)
    greet(p, 1)
    for slot, flush in enumerate(flushes):
        vote(p, slot, flush)
    assert p.elected
    return p


def test_campaign_needs_a_quorum_of_the_members() -> None:
    p = proposer(slots=5)
    assert greet(p, 0, term=4) == []
    assert greet(p, 4) == []  # known, but no member
    requests = greet(p, 1, term=7)
    assert p.phase is Phase.CAMPAIGN and p.term == 8
    assert requests == [(0, VoteRequest(5, 8)), (1, VoteRequest(5, 8))]
    assert p.members[4].phase is MemberPhase.OBSERVED
    assert greet(p, 2) == [(2, VoteRequest(5, 8))]


def test_generation_zero_waits_when_generations_are_required() -> None:
    p = proposer()
    for slot in range(3):
        assert greet(p, slot, mconf=NO_MEMBERSHIP) == []
    assert p.phase is Phase.COLLECTING_TERMS
    legacy = proposer(generations=False)
    greet(legacy, 0, mconf=NO_MEMBERSHIP)
    assert greet(legacy, 1, mconf=NO_MEMBERSHIP) == [(0, VoteRequest(0, 2)), (1, VoteRequest(0, 2))]


def test_an_older_configuration_is_greeted_again_with_the_newest() -> None:
    p = proposer()
    older = replace(THREE, generation=4)
    assert p.connected(0)[0][1].mconf == NO_MEMBERSHIP
    p.received(0, AcceptorGreeting(1, older, 1))
    greet(p, 1)
    assert p.must_reconnect() == [0]
    p.disconnected(0)
    assert p.connected(0)[0][1].mconf == THREE
    assert p.received(0, AcceptorGreeting(1, THREE, 1)) == [(0, VoteRequest(5, 2))]


def test_one_node_listed_twice_is_a_configuration_error() -> None:
    p = proposer()
    greet(p, 0, node=1)
    with pytest.raises(ConfigError, match="same node"):
        greet(p, 1, node=1)


def test_the_best_log_is_taken_over_and_each_starts_where_it_parts() -> None:
    p = proposer()
    greet(p, 0, term=3)
    greet(p, 1, term=2)
    newer = (*H1, TermLsn(2, Lsn(150)))
    assert vote(p, 0, 300) == []  # longer, of an older leader
    sent = vote(p, 1, 180, newer)
    assert (p.donor_slot, p.donor_term, p.term_start_lsn) == (1, 2, 180)
    announcements = [m for _, m in sent if isinstance(m, ProposerElected)]
    assert [a.start_streaming_at for a in announcements] == [150, 180]
    assert announcements[0].term_history == (*newer, TermLsn(4, Lsn(180)))
    greet(p, 2)
    (late, heartbeat) = vote(p, 2, 0, ())
    assert late[1].start_streaming_at == 100 and heartbeat[1].begin_lsn == 100  # type: ignore[union-attr]


def test_commit_counts_only_from_the_term_start() -> None:
    p = elected()
    acknowledge(p, 0, 200)
    assert not acknowledge(p, 1, 180) and p.commit_lsn == 0
    p.append_header(1, Lsn(200))
    assert acknowledge(p, 1, 200) and p.commit_lsn == 200 and p.ready


def test_acknowledgements_survive_reconnections_but_not_another_node() -> None:
    p = elected((200, 200))
    acknowledge(p, 0, 200)
    p.disconnected(0)
    assert acknowledge(p, 1, 200) and p.commit_lsn == 200
    p.append_header(1, Lsn(300))
    acknowledge(p, 1, 300)
    p.connected(0)
    p.received(0, AcceptorGreeting(3, THREE, p.term))  # the third node at the first one's address
    assert p.members[0].flush_lsn == 0


def test_truncate_waits_for_all_members() -> None:
    p = elected((200, 200))
    acknowledge(p, 0, 200)
    acknowledge(p, 1, 200)
    assert p.truncate_lsn == 100
    greet(p, 2)
    vote(p, 2, 100, ())
    p.append_header(2, Lsn(150))
    acknowledge(p, 2, 150)
    assert p.truncate_lsn == 150


def test_a_repeated_vote_request_is_answered_with_the_promise_of_before() -> None:
    p = proposer()
    greet(p, 0)
    greet(p, 1)
    vote(p, 0, 200)
    p.disconnected(0)
    assert greet(p, 0, term=2) == [(0, VoteRequest(5, 2))]
    vote(p, 0, 200, given=False)
    assert not p.elected
    vote(p, 1, 200)
    assert p.elected


def test_votes_count_only_while_the_connection_lives() -> None:
    p = proposer()
    greet(p, 0)
    greet(p, 1)
    vote(p, 0, 200)
    p.disconnected(0)
    vote(p, 1, 200)
    assert not p.elected


def test_ways_to_be_deposed() -> None:
    p = proposer()
    greet(p, 0)
    greet(p, 1)
    with pytest.raises(Deposed, match="another proposer") as lost:
        vote(p, 0, 200, given=False)
    assert lost.value.retry
    p = elected()
    with pytest.raises(Deposed, match="promised term 9") as higher:
        acknowledge(p, 0, 0, term=9)
    assert not higher.value.retry
    with pytest.raises(Deposed, match="generation 6") as moved:
        greet(p, 2, mconf=replace(THREE, generation=6))
    assert moved.value.retry
    with pytest.raises(Deposed, match="generation 6"):
        p.append_response(0, AppendResponse(6, p.term, Lsn(200), Lsn(0)))


def test_violations() -> None:
    p = elected((200, 200))
    with pytest.raises(ProtocolViolation, match="sent only up to"):
        acknowledge(p, 0, 200 + (1 << 24) + 1)
    acknowledge(p, 0, 264)  # within a segment: a WAL switch; credited only as far as was sent
    assert p.members[0].flush_lsn == 200
    with pytest.raises(ProtocolViolation, match="out of turn"):
        acknowledge(p, 2, 200)
    with pytest.raises(ProtocolViolation, match="out of turn"):
        vote(p, 0, 200)


def test_joint_configurations_need_both_quorums() -> None:
    joint = MembershipConfiguration(6, MEMBERS[:3], MEMBERS[2:])
    p = proposer(slots=5)
    for slot in (0, 1, 3):
        greet(p, slot, mconf=joint)
    assert p.phase is Phase.COLLECTING_TERMS
    greet(p, 4, mconf=joint)
    for slot in (0, 1, 3):
        vote(p, slot, 100)
    assert not p.elected
    vote(p, 4, 100)
    assert p.elected
    for slot in (0, 1, 3):
        acknowledge(p, slot, 100)
    assert p.commit_lsn == 0
    acknowledge(p, 4, 100)
    assert p.commit_lsn == 100


def test_headers_account_for_what_is_sent() -> None:
    p = elected((200, 200))
    acknowledge(p, 0, 200)
    acknowledge(p, 1, 200)
    request = parse_append_request(p.append_header(0, Lsn(203)) + b"abc")
    assert (request.begin_lsn, request.end_lsn, request.commit_lsn, request.truncate_lsn) == (200, 203, 200, 100)
    assert parse_append_request(p.append_header(0, Lsn(204)) + b"d").begin_lsn == 203
    assert p.members[0].told_commit_lsn == 200


def test_feedback_is_kept_per_shard() -> None:
    p = elected((200, 200))
    for shard in (0, 1, 0):
        feedback = PageserverFeedback(last_received_lsn=Lsn(150 + shard), shard_number=shard)
        p.append_response(0, AppendResponse(5, p.term, Lsn(200), Lsn(0), pageserver_feedback=feedback))
    assert {shard: told.last_received_lsn for shard, told in p.pageserver_feedback.items()} == {0: 150, 1: 151}


class TestSynchronisation:
    def test_nothing_anywhere(self) -> None:
        p = proposer(generations=False)
        for slot in (0, 1):
            greet(p, slot, mconf=NO_MEMBERSHIP, term=0)
        for slot in (0, 1):
            assert vote(p, slot, 0, (), truncate=0) == []
        assert p.synchronised() == 0

    def test_bootstrap(self) -> None:
        p = proposer(generations=False, bootstrap=4096)
        for slot in (0, 1):
            greet(p, slot, mconf=NO_MEMBERSHIP, term=0)
        vote(p, 0, 0, (), truncate=0)
        sent = vote(p, 1, 0, (), truncate=0)
        assert [m.start_streaming_at for _, m in sent if isinstance(m, ProposerElected)] == [4096, 4096]
        assert p.history == (TermLsn(1, Lsn(4096)),)

    def test_all_aligned_already(self) -> None:
        p = proposer()
        for slot in (0, 1):
            greet(p, slot)
        vote(p, 0, 200, truncate=200)
        vote(p, 1, 200, truncate=150)
        assert p.synchronised() == 200

    def test_every_reachable_one_must_have_it_persisted(self) -> None:
        p = elected((200, 200))
        acknowledge(p, 0, 200, 200)
        acknowledge(p, 1, 200, 100)
        assert p.ready and p.synchronised() is None
        p.connected(2)  # reachable, but not heard of yet
        acknowledge(p, 1, 200, 200)
        assert p.synchronised() is None
        p.disconnected(2)
        assert p.synchronised() == 200

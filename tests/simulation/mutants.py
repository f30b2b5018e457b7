"""Planted bugs: state machines that break one rule each. The simulation must find every one of them."""

from dataclasses import replace
from typing import Any

from neon_services.consensus import term_history
from neon_services.consensus.acceptor import (
    Acceptor,
    AcceptorState,
    InitializeWal,
    PeerInfo,
    PersistState,
    ProposerConnection,
    Steps,
    TruncateWal,
    WalStore,
)
from neon_services.consensus.membership import quorum_size
from neon_services.consensus.migration import Migration, PullTimeline, Standing
from neon_services.consensus.migration import Steps as Migrating
from neon_services.consensus.proposer import Member, Proposer
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import (
    AppendRequest,
    AppendResponse,
    MembershipConfiguration,
    ProposerElected,
    SafekeeperId,
    TermLsn,
    VoteRequest,
    VoteResponse,
)
from neon_services.simulation.controller import SimulatedController

# --- proposers


class CommitsOfFormerTerms(Proposer):
    """Counts acknowledgements below term_start_lsn: commits WAL of former terms before its own term has a quorum."""

    def _advance(self) -> bool:
        start, self.term_start_lsn = self.term_start_lsn, Lsn(1)
        try:
            return super()._advance()
        finally:
            self.term_start_lsn = start


class CountsItselfTwice(Proposer):
    """Believes one acknowledgement fewer than a quorum to be enough."""

    def _advance(self) -> bool:
        flushed = sorted((m.flush_lsn for m in self.members), reverse=True)
        reached = flushed[max(quorum_size(len(flushed)) - 2, 0)]
        moved = self.commit_lsn < reached >= self.term_start_lsn
        if moved:
            self.commit_lsn = reached
        return moved


class DonorByLength(Proposer):
    """Takes over the longest log instead of the one with the newest leader."""

    def _take_over(self, voters: list[Member]) -> None:
        longest = max(voters, key=lambda m: m.vote.flush_lsn if m.vote else 0)
        for voter in voters:
            if voter is not longest and voter.vote is not None and longest.vote is not None:
                common = tuple(entry for entry in voter.vote.term_history if entry in longest.vote.term_history)
                voter.vote = replace(
                    voter.vote, term_history=common, flush_lsn=min(voter.vote.flush_lsn, longest.vote.flush_lsn)
                )
        super()._take_over([longest, *(v for v in voters if v is not longest)])


class ElectedByOne(Proposer):
    """Takes the first vote for a quorum."""

    def _vote(self, slot: int, message: VoteResponse) -> Any:
        outgoing = super()._vote(slot, message)
        if not self.elected and self.members[slot].vote is not None:
            self._take_over([self.members[slot]])
            return self._announce(self.members[slot])
        return outgoing


class ForgetsWhoAcknowledged(Proposer):
    """Credits the most advanced acknowledgement to everybody."""

    def append_response(self, slot: int, message: AppendResponse) -> bool:
        moved = super().append_response(slot, message)
        best = max(m.flush_lsn for m in self.members)
        for member in self.members:
            member.flush_lsn = self._flushed[self._key(member)] = best
        return self._advance() or moved


class StreamsFromFlush(Proposer):
    """Streams to everybody from the end of its log instead of from where the logs part."""

    def _announce(self, member: Member) -> Any:
        vote = member.vote
        assert vote is not None
        if vote.flush_lsn:
            member.vote = replace(vote, term_history=term_history.up_to(self.history, vote.flush_lsn))
        return super()._announce(member)


# --- acceptors


class VotesBeforeFlush(Acceptor):
    """Tells its flush_lsn without flushing first, and acknowledges what it flushes later."""

    def vote_request(self, connection: ProposerConnection, message: VoteRequest) -> Steps:
        steps = super().vote_request(connection, message)
        next(steps)  # FlushWal, not carried out
        return (yield from steps)

    def flush_batch(self, connection: ProposerConnection) -> Steps:
        term, streaming = connection.elected_term, self._streaming is connection
        replies = yield from super().flush_batch(connection)
        if not replies and streaming and 0 < term < self.state.term:
            return [replace(self.append_response(), term=term)]
        return replies


class VotesBeforePersist(Acceptor):
    """Speaks the vote and keeps it in memory only."""

    def vote_request(self, connection: ProposerConnection, message: VoteRequest) -> Steps:
        steps = super().vote_request(connection, message)
        outcome: Any = None
        while True:
            try:
                effect = steps.send(outcome)
            except StopIteration as done:
                return done.value
            outcome = None if isinstance(effect, PersistState) else (yield effect)


class VotesTwice(Acceptor):
    """Gives its vote for a term again to whoever asks."""

    def vote_request(self, connection: ProposerConnection, message: VoteRequest) -> Steps:
        (reply,) = yield from super().vote_request(connection, message)
        assert isinstance(reply, VoteResponse)
        return [replace(reply, vote_given=True)] if reply.term == message.term else [reply]


class ForgetsItsPromiseAtBoot(Acceptor):
    """Boots with the term of the last leader that it followed instead of the last one that it promised."""

    def __init__(self, node_id: int, ttid: TenantTimelineId, state: AcceptorState, wal: WalStore) -> None:
        term = state.term_history[-1].term if state.term_history else 0
        super().__init__(node_id, ttid, replace(state, term=term), wal)


class AdoptsBeforeTruncate(Acceptor):
    """Writes the new history first and cuts the log then."""

    def elected(self, connection: ProposerConnection, message: ProposerElected) -> Steps:
        held: Any = None
        steps = super().elected(connection, message)
        outcome: Any = None
        while True:
            try:
                effect = steps.send(outcome)
            except StopIteration as done:
                return done.value
            outcome = None
            if isinstance(effect, TruncateWal):
                held = effect
                continue
            if isinstance(effect, InitializeWal) or held is None:
                outcome = yield effect
                continue
            yield effect
            yield held
            held = None


class NeverTruncates(Acceptor):
    """Adopts the leader's history over its own old bytes."""

    def elected(self, connection: ProposerConnection, message: ProposerElected) -> Steps:
        steps = super().elected(connection, message)
        outcome: Any = None
        while True:
            try:
                effect = steps.send(outcome)
            except StopIteration as done:
                return done.value
            outcome = None if isinstance(effect, TruncateWal) else (yield effect)

    def append_request(self, connection: ProposerConnection, message: AppendRequest) -> Steps:
        if message.end_lsn <= self.wal.write_lsn and message.begin_lsn < self.wal.write_lsn:
            message = replace(message, begin_lsn=message.end_lsn, wal_data=b"")
        return (yield from super().append_request(connection, message))


class FollowsAnyTerm(Acceptor):
    """Accepts WAL of a deposed leader."""

    def append_request(self, connection: ProposerConnection, message: AppendRequest) -> Steps:
        if connection is self._streaming and connection.elected_term == message.term < self.state.term:
            term, self.state = self.state.term, replace(self.state, term=message.term)
            replies = yield from super().append_request(connection, message)
            self.state = replace(self.state, term=term)
            return replies
        return (yield from super().append_request(connection, message))

    def flush_batch(self, connection: ProposerConnection) -> Steps:
        if connection is self._streaming and connection.elected_term < self.state.term:
            term, self.state = self.state.term, replace(self.state, term=connection.elected_term)
            replies = yield from super().flush_batch(connection)
            self.state = replace(self.state, term=term)
            return replies
        return (yield from super().flush_batch(connection))


class BelievesEveryPeer(Acceptor):
    """Adopts a peer's commit_lsn whatever leader wrote the end of its own log."""

    def peer_info(self, peer: PeerInfo) -> bool:
        return super().peer_info(replace(peer, last_log_term=self.last_log_term))


class AcknowledgesBeforeFlush(Acceptor):
    """Acknowledges what is written, not what is flushed."""

    def append_response(self) -> AppendResponse:
        return replace(super().append_response(), flush_lsn=max(self.wal.write_record_lsn, self.flush_lsn))

    def flush_batch(self, connection: ProposerConnection) -> Steps:
        steps = super().flush_batch(connection)
        outcome: Any = None
        while True:
            try:
                effect = steps.send(outcome)
            except StopIteration as done:
                return done.value
            outcome = (yield effect) if isinstance(effect, PersistState) else self.wal.flush_lsn


class CommitsBeyondFlush(Acceptor):
    """Believes the leader's commit_lsn though it has not got so far."""

    def append_request(self, connection: ProposerConnection, message: AppendRequest) -> Steps:
        replies = yield from super().append_request(connection, message)
        self.commit_lsn = max(self.commit_lsn, message.commit_lsn)
        return replies


class ReportsAdoptedHistory(Acceptor):
    """Votes with its whole history, also the part of which no byte has arrived."""

    def vote_request(self, connection: ProposerConnection, message: VoteRequest) -> Steps:
        (reply,) = yield from super().vote_request(connection, message)
        assert isinstance(reply, VoteResponse)
        history = self.state.term_history
        if history and history[-1].lsn > reply.flush_lsn:
            capped = tuple(TermLsn(t, Lsn(min(lsn, reply.flush_lsn))) for t, lsn in history)
            return [replace(reply, term_history=capped)]
        return [reply]


class ForgetsToCutWhatItVoted(Acceptor):
    """Follows a leader without checking where the logs part."""

    def _check_start(self, start: Lsn, history: Any) -> None:
        if start < self.commit_lsn:
            super()._check_start(start, history)


# --- changes of the membership


class JointByNewSetOnly(Proposer):
    """Takes a quorum of the new members for a quorum of a joint configuration."""

    def _voter_sets(self) -> Any:
        return super()._voter_sets()[-1:]


class AnyGeneration(Acceptor):
    """Votes for and follows a proposer of another membership generation."""

    def _check_fit(self, connection: ProposerConnection, generation: int) -> None:
        super()._check_fit(connection, self.state.mconf.generation)

    def append_request(self, connection: ProposerConnection, message: AppendRequest) -> Steps:
        return (yield from super().append_request(connection, replace(message, generation=self.state.mconf.generation)))


class GenerationBlindProposer(Proposer):
    """Does not mind the generation of an answer."""

    def received(self, slot: int, message: Any) -> Any:
        if isinstance(message, VoteResponse | AppendResponse):
            message = replace(message, generation=self.mconf.generation)
        return super().received(slot, message)


class _FitWithoutLog(Migration):
    def is_fit(self, standing: Standing, wanted: tuple[int, int], term: int) -> bool:
        return standing.term >= term


class FinishesUnsynchronised(SimulatedController):
    """Does not wait until the new set has the old one's log."""

    algorithm = _FitWithoutLog


class _FitWithoutTerm(Migration):
    def _raise_term(self, node: SafekeeperId, term: int) -> Migrating:
        return iter(())  # type: ignore[return-value]

    def is_fit(self, standing: Standing, wanted: tuple[int, int], term: int) -> bool:
        return standing.position >= wanted


class FinishesWithoutTerms(SimulatedController):
    """Does not raise the new set's terms to what the old set promised, nor those of copies."""

    algorithm = _FitWithoutTerm

    def _promised(self, known: Any) -> int:
        return 0


class _WithoutJoining(Migration):
    def prepare(self, joint: MembershipConfiguration) -> Migrating:
        copies, new = 0, joint.new_members or ()
        while copies < quorum_size(len(new)):
            copies = 0
            for node in new:
                copies += bool((yield PullTimeline(node, joint.members[:1], joint)))


class SkipsJoint(SimulatedController):
    """Stores the final configuration at once and copies whatever a single old member has."""

    algorithm = _WithoutJoining

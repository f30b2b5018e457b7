"""The leader's side of the consensus about a timeline's WAL, without sockets, files or clocks.

Invariants:

1. At most one proposer is elected in a term: it takes votes of a quorum, and a node votes once in a term.
2. The leader's log begins as the log of the voter with the greatest (last_log_term, flush_lsn), so it holds every byte that
   was committed in an earlier term.
3. commit_lsn is a position that a quorum has flushed *in this leader's own term*: a flush position below term_start_lsn counts
   as nothing, because such a node does not yet prefer this log to a competitor's.
4. Positions of one safekeeper are never credited to another, however connections come and go.

The driver tells what happened (``connected``, ``received``, ``disconnected``) and sends the messages it gets back; it moves
the WAL itself, with ``append_header`` in front. Deposed ends the process; ProtocolViolation ends one connection.
"""

import enum
from dataclasses import dataclass, field

from neon_services.consensus import term_history
from neon_services.consensus.membership import VoterSets, is_quorum, quorum_lsn, voter_sets
from neon_services.ground.errors import ConfigError, NeonError, ProtocolViolation
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import INVALID_LSN, WAL_SEGMENT_SIZE, Lsn, format_lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    NO_STANDBY_FEEDBACK,
    AcceptorGreeting,
    AcceptorMessage,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    MembershipConfiguration,
    ProposerElected,
    ProposerGreeting,
    ProposerMessage,
    TermHistory,
    TermLsn,
    VoteRequest,
    VoteResponse,
    pack_append_header,
)


class Deposed(NeonError):
    """This proposer can commit nothing any more. ``retry``: a new campaign is in order, for nobody is known to lead instead."""

    def __init__(self, text: str, *, retry: bool = False) -> None:
        super().__init__(text)
        self.retry = retry


@dataclass(frozen=True, slots=True)
class ProposerConfig:
    """Who proposes, and to whom. ``safekeepers`` counts the configured addresses; a *slot* is an index among them."""

    ttid: TenantTimelineId
    safekeepers: int
    pg_version: int
    #: Use membership generations: wait for a configuration instead of counting the configured addresses.
    use_generations: bool = True
    mconf: MembershipConfiguration = NO_MEMBERSHIP
    system_id: int = 0
    wal_seg_size: int = WAL_SEGMENT_SIZE
    #: Where the log begins when no safekeeper has any; 0 when this proposer only synchronises.
    bootstrap_lsn: Lsn = INVALID_LSN


class Phase(enum.Enum):
    """Of the proposer as a whole; it never goes back."""

    COLLECTING_TERMS = enum.auto()
    CAMPAIGN = enum.auto()
    ELECTED = enum.auto()


class MemberPhase(enum.Enum):
    """Of one safekeeper's connection."""

    OFFLINE = enum.auto()
    GREETING = enum.auto()  # greeting sent
    WAIT_VOTING = enum.auto()  # greeted, until a quorum has told its terms
    WAIT_VERDICT = enum.auto()  # vote requested
    WAIT_ELECTED = enum.auto()  # voted, until a quorum has voted
    ACTIVE = enum.auto()  # receives WAL
    OBSERVED = enum.auto()  # not a member of the configuration: left alone


@dataclass(slots=True)
class Member:
    """One configured safekeeper."""

    slot: int
    phase: MemberPhase = MemberPhase.OFFLINE
    node_id: int | None = None
    #: Generation of the configuration in our greeting on this connection, and of the one that it answered with.
    greeted_generation: int = 0
    generation: int = 0
    term: int = 0
    #: It promised our term in the present campaign, on whatever connection.
    promised: bool = False
    vote: VoteResponse | None = None
    start_lsn: Lsn = INVALID_LSN
    #: End of the WAL handed to the present connection.
    sent_lsn: Lsn = INVALID_LSN
    #: The highest commit_lsn it was told on this connection.
    told_commit_lsn: Lsn = INVALID_LSN
    #: From the last AppendResponse in our term; flush_lsn stays true across reconnections.
    flush_lsn: Lsn = INVALID_LSN
    persisted_commit_lsn: Lsn = INVALID_LSN
    hs_feedback: HotStandbyFeedback = NO_STANDBY_FEEDBACK


Outgoing = list[tuple[int, ProposerMessage]]


@dataclass(slots=True)
class Proposer:
    """The state machine."""

    config: ProposerConfig
    phase: Phase = Phase.COLLECTING_TERMS
    mconf: MembershipConfiguration = NO_MEMBERSHIP
    members: list[Member] = field(default_factory=list)
    term: int = 0
    history: TermHistory = ()
    #: Term of the leader that wrote the end of the log we took over.
    donor_term: int = 0
    donor_slot: int = -1
    term_start_lsn: Lsn = INVALID_LSN
    commit_lsn: Lsn = INVALID_LSN
    truncate_lsn: Lsn = INVALID_LSN
    #: Latest feedback per pageserver shard, and up to where every one of them has received WAL; None when none has told.
    pageserver_feedback: dict[int, PageserverFeedback] = field(default_factory=dict)
    pageservers_received_lsn: Lsn | None = None
    _sets: VoterSets = ()
    #: What each voter has flushed in our term, by _key().
    _flushed: dict[int, Lsn] = field(default_factory=dict)
    _aligned: bool = False

    def __post_init__(self) -> None:
        self.mconf = self.config.mconf
        self.members = [Member(slot) for slot in range(self.config.safekeepers)]
        self._sets = self._voter_sets()

    # -- what happens

    def connected(self, slot: int) -> Outgoing:
        """A connection to this safekeeper is ready for messages."""
        member = self.members[slot]
        member.phase = MemberPhase.GREETING
        member.greeted_generation = self.mconf.generation
        config = self.config
        greeting = ProposerGreeting(config.ttid, self.mconf, config.pg_version, config.system_id, config.wal_seg_size)
        return [(slot, greeting)]

    def disconnected(self, slot: int) -> None:
        """The connection is gone. Its vote no longer counts; what it has flushed in our term does."""
        member = self.members[slot]
        member.phase = MemberPhase.OFFLINE
        member.vote = None
        member.persisted_commit_lsn = member.told_commit_lsn = INVALID_LSN
        member.hs_feedback = NO_STANDBY_FEEDBACK

    def received(self, slot: int, message: AcceptorMessage) -> Outgoing:
        """A safekeeper's message; returns what to send. Raises Deposed, ConfigError, ProtocolViolation."""
        if isinstance(message, AppendResponse):
            self.append_response(slot, message)
            return []
        if isinstance(message, AcceptorGreeting):
            return self._greeting(slot, message)
        return self._vote(slot, message)

    def must_reconnect(self) -> list[int]:
        """Safekeepers that hold an older configuration than was found since: greet them again with it on a new connection."""
        return [
            member.slot
            for member in self.members
            if member.phase is MemberPhase.WAIT_VOTING and member.generation < self.mconf.generation
        ]

    # -- streaming

    def append_header(self, slot: int, end_lsn: Lsn) -> bytes:
        """The header of an AppendRequest with the WAL from ``sent_lsn`` to ``end_lsn``; accounts for it as sent."""
        member = self.members[slot]
        begin_lsn = member.sent_lsn
        member.sent_lsn = end_lsn
        member.told_commit_lsn = self.commit_lsn
        return pack_append_header(self.mconf.generation, self.term, begin_lsn, end_lsn, self.commit_lsn, self.truncate_lsn)

    def heartbeat(self, slot: int) -> AppendRequest:
        """An AppendRequest without WAL: tells commit_lsn and asks for an answer."""
        member = self.members[slot]
        member.told_commit_lsn = self.commit_lsn
        return AppendRequest(
            self.mconf.generation, self.term, member.sent_lsn, member.sent_lsn, self.commit_lsn, self.truncate_lsn
        )

    def append_response(self, slot: int, message: AppendResponse) -> bool:
        """An acknowledgement. True when commit_lsn moved. Raises Deposed, ProtocolViolation."""
        if message.term > self.term:
            raise Deposed(f"safekeeper {self.members[slot].node_id} has promised term {message.term}, ours is {self.term}")
        member = self.members[slot]
        if member.phase is not MemberPhase.ACTIVE or message.term != self.term:
            raise ProtocolViolation(f"acknowledgement of term {message.term} out of turn; ours is {self.term}")
        if message.generation != self.mconf.generation:
            text = f"membership generation {message.generation} replaced ours, {self.mconf.generation}"
            raise Deposed(text, retry=True)
        flush_lsn = message.flush_lsn
        if flush_lsn > member.sent_lsn:
            # after a WAL switch record the end of the last record is the end of its segment, of which the rest is still to come
            if flush_lsn - member.sent_lsn > self.config.wal_seg_size:
                raise ProtocolViolation(
                    f"flush_lsn {format_lsn(flush_lsn)} acknowledged, but WAL was sent only up to {format_lsn(member.sent_lsn)}"
                )
            flush_lsn = member.sent_lsn
        member.persisted_commit_lsn = message.commit_lsn
        member.hs_feedback = message.hs_feedback
        if message.pageserver_feedback is not None:
            told = self.pageserver_feedback
            told[message.pageserver_feedback.shard_number] = message.pageserver_feedback
            self.pageservers_received_lsn = min(feedback.last_received_lsn for feedback in told.values())
        if flush_lsn <= member.flush_lsn:
            return False
        member.flush_lsn = flush_lsn
        self._flushed[self._key(member)] = flush_lsn
        return self._advance()

    # -- answers to the driver

    @property
    def elected(self) -> bool:
        """Whether this proposer leads its term."""
        return self.phase is Phase.ELECTED

    @property
    def ready(self) -> bool:
        """Whether everything before this term is committed."""
        return self.elected and self.commit_lsn >= self.term_start_lsn

    def is_voter(self, slot: int) -> bool:
        """Whether this safekeeper counts."""
        key = self._key(self.members[slot])
        return any(key in voters for voters in self._sets)

    def voters(self) -> tuple[int, ...]:
        """How many voters each set has."""
        return tuple(map(len, self._sets))

    def voter_bits(self, slot: int) -> int:
        """In which of the sets this safekeeper is a voter: bit 0 for the first, bit 1 for the second."""
        key = self._key(self.members[slot])
        return sum(1 << place for place, voters in enumerate(self._sets) if key in voters)

    def synchronised(self) -> Lsn | None:
        """sync-safekeepers: the end of committed WAL once every reachable safekeeper knows it durably; else None."""
        if not self.elected:
            return None
        if not self.term_start_lsn or self._aligned:
            return self.term_start_lsn
        online = [m for m in self.members if m.phase not in (MemberPhase.OFFLINE, MemberPhase.OBSERVED)]
        if self.ready and all(member.persisted_commit_lsn >= self.term_start_lsn for member in online):
            return self.term_start_lsn
        return None

    def donors(self) -> list[int]:
        """Safekeepers whose log is known to be ours, by what they flushed in our term; the election's donor first of equals."""
        active = [m for m in self.members if m.phase is MemberPhase.ACTIVE]
        active.sort(key=lambda m: (m.flush_lsn, m.slot == self.donor_slot), reverse=True)
        return [member.slot for member in active if member.flush_lsn or member.slot == self.donor_slot]

    def donor_end(self, slot: int) -> Lsn:
        """Up to where this safekeeper's log is known to be ours."""
        floor = self.term_start_lsn if slot == self.donor_slot else INVALID_LSN
        return max(self.members[slot].flush_lsn, floor)

    # -- the election

    def _key(self, member: Member) -> int:
        """What identifies a voter: its node id, or without generations its place in the list."""
        if self.mconf.generation:
            return -1 if member.node_id is None else member.node_id
        return member.slot

    def _voter_sets(self) -> VoterSets:
        if self.mconf.generation:
            return voter_sets(self.mconf)
        return (frozenset() if self.config.use_generations else frozenset(range(self.config.safekeepers)),)

    def _greeting(self, slot: int, message: AcceptorGreeting) -> Outgoing:
        member = self.members[slot]
        if member.phase is not MemberPhase.GREETING:
            raise ProtocolViolation("greeting out of turn")
        self._identify(member, message.node_id)
        member.generation = message.mconf.generation
        if message.mconf.generation > self.mconf.generation:
            if self.phase is not Phase.COLLECTING_TERMS:
                text = f"membership generation {message.mconf.generation} replaced ours, {self.mconf.generation}"
                raise Deposed(text, retry=True)
            self.mconf = message.mconf
            self._sets = self._voter_sets()
        if self.phase is Phase.ELECTED and message.term > self.term:
            raise Deposed(f"safekeeper {message.node_id} has promised term {message.term}, ours is {self.term}")
        member.term = message.term
        member.phase = MemberPhase.WAIT_VOTING
        if self.phase is not Phase.COLLECTING_TERMS:
            return self._request_vote(member)
        greeted = [m for m in self.members if m.phase is MemberPhase.WAIT_VOTING]
        if not is_quorum(self._sets, [self._key(m) for m in greeted]):
            return []
        self.phase = Phase.CAMPAIGN
        self.term = max(m.term for m in self.members) + 1
        return [request for m in greeted for request in self._request_vote(m)]

    def _identify(self, member: Member, node_id: int) -> None:
        for other in self.members:
            if other is not member and other.node_id == node_id:
                raise ConfigError(
                    f"safekeepers {other.slot + 1} and {member.slot + 1} of the list are the same node, id {node_id}: "
                    "each may be listed once"
                )
        if member.node_id is not None and member.node_id != node_id:
            # another node answers at this address: nothing that was learned of the former one holds for it
            self._flushed.pop(self._key(member), None)
            member.flush_lsn = INVALID_LSN
            member.promised = False
            member.term = 0
            if self.donor_slot == member.slot:
                self.donor_slot = -1
        member.node_id = node_id

    def _request_vote(self, member: Member) -> Outgoing:
        if member.generation < self.mconf.generation:
            return []  # must_reconnect() names it
        if not self.is_voter(member.slot):
            member.phase = MemberPhase.OBSERVED
            return []
        member.phase = MemberPhase.WAIT_VERDICT
        return [(member.slot, VoteRequest(self.mconf.generation, self.term))]

    def _vote(self, slot: int, message: VoteResponse) -> Outgoing:
        member = self.members[slot]
        if member.phase is not MemberPhase.WAIT_VERDICT:
            raise ProtocolViolation("vote out of turn")
        if message.term > self.term:
            text = f"safekeeper {member.node_id} has promised term {message.term}, ours is {self.term}"
            raise Deposed(text, retry=self.phase is Phase.CAMPAIGN)
        if message.term < self.term or message.generation != self.mconf.generation:
            raise ProtocolViolation(f"vote for term {message.term} of generation {message.generation} was not asked for")
        # A node that already promised us this term refuses it the second time, after a reconnection: its vote is ours still.
        if not message.vote_given and not member.promised and self.phase is Phase.CAMPAIGN:
            text = f"safekeeper {member.node_id} gave its vote for term {self.term} to another proposer"
            raise Deposed(text, retry=True)
        member.promised = member.promised or message.vote_given
        member.vote = message
        member.phase = MemberPhase.WAIT_ELECTED
        if self.phase is Phase.ELECTED:
            return self._announce(member)
        voters = [m for m in self.members if m.phase is MemberPhase.WAIT_ELECTED]
        if not is_quorum(self._sets, [self._key(m) for m in voters]):
            return []
        self._take_over(voters)
        if not self.term_start_lsn:
            return []  # nothing anywhere, and nothing to begin with: synchronised() says so
        return [announcement for m in voters for announcement in self._announce(m)]

    def _take_over(self, voters: list[Member]) -> None:
        """Become the leader: continue the best log among the voters."""

        def rank(member: Member) -> tuple[int, int]:
            vote = member.vote
            assert vote is not None
            return (term_history.last_log_term(vote.term_history, vote.flush_lsn), vote.flush_lsn)

        donor = max(voters, key=rank)
        assert donor.vote is not None
        self.donor_term, self.donor_slot = rank(donor)[0], donor.slot
        self.phase = Phase.ELECTED
        taken = term_history.up_to(donor.vote.term_history, donor.vote.flush_lsn)
        self.term_start_lsn = donor.vote.flush_lsn or self.config.bootstrap_lsn
        self.history = (*taken, TermLsn(self.term, self.term_start_lsn))
        reported = max(m.vote.truncate_lsn for m in voters if m.vote is not None)
        self._aligned = bool(reported) and reported == self.term_start_lsn
        self.truncate_lsn = reported or self.history[0].lsn

    def _announce(self, member: Member) -> Outgoing:
        """Tell a voter who leads and where streaming starts, and ask at once what it has."""
        vote = member.vote
        assert vote is not None
        mine = term_history.up_to(vote.term_history, vote.flush_lsn)
        parting = term_history.divergence_lsn(self.history, mine, vote.flush_lsn)
        member.start_lsn = member.sent_lsn = self.history[0].lsn if parting is None else parting
        member.phase = MemberPhase.ACTIVE
        elected = ProposerElected(self.mconf.generation, self.term, member.start_lsn, self.history)
        return [(member.slot, elected), (member.slot, self.heartbeat(member.slot))]

    def _advance(self) -> bool:
        """Recompute commit_lsn and truncate_lsn from what is flushed."""
        flushed = self._flushed
        commit_lsn = quorum_lsn(self._sets, flushed, self.term_start_lsn)
        moved = commit_lsn > self.commit_lsn
        if moved:
            self.commit_lsn = commit_lsn
        everywhere = min([flushed.get(key, INVALID_LSN) for voters in self._sets for key in voters])
        self.truncate_lsn = max(self.truncate_lsn, min(everywhere, self.commit_lsn))
        return moved

"""One member's side of the consensus about a timeline's WAL, without sockets, files or clocks.

Invariants, each kept by the order of the steps below:

1. A promise is durable before it is spoken: a term is persisted before a vote is answered or a leader is followed.
2. A vote is the last word about the log: written WAL is flushed before the vote, so nothing can appear behind it.
3. The log is cut before the new history is adopted. A crash in between leaves the old history over a shorter log, which is
   true; the other order would label the old leader's bytes with the new term.
4. The log is never cut below commit_lsn, and commit_lsn never passes flush_lsn.
5. Bytes are accepted only in order, only from the leader of the current term, only on the connection that announced it last.

Methods that touch the world are generators: they yield effects and are sent the result of each, and they return the answers.
The caller carries out one method at a time per timeline (``run`` is the synchronous caller). When an effect fails, drop the
generator: the state is as it was before that effect. A crash at any yield is as if the message had been lost there.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from neon_services.consensus import term_history
from neon_services.ground.errors import NeonError, ProtocolViolation, StaleGeneration
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
    refuse_term,
)


@dataclass(frozen=True, slots=True)
class AcceptorState:
    """What must survive a crash; the control file embeds it. LSNs are 0 as long as they are unknown.

    The volatile twins of commit_lsn, backup_lsn, peer_horizon_lsn and remote_consistent_lsn live in the Acceptor.
    """

    mconf: MembershipConfiguration = NO_MEMBERSHIP
    term: int = 0
    term_history: TermHistory = ()
    pg_version: int = 0
    system_id: int = 0
    wal_seg_size: int = WAL_SEGMENT_SIZE
    proposer_uuid: bytes = bytes(16)
    timeline_start_lsn: Lsn = INVALID_LSN
    local_start_lsn: Lsn = INVALID_LSN
    commit_lsn: Lsn = INVALID_LSN
    backup_lsn: Lsn = INVALID_LSN
    peer_horizon_lsn: Lsn = INVALID_LSN
    remote_consistent_lsn: Lsn = INVALID_LSN

    @classmethod
    def create(
        cls,
        mconf: MembershipConfiguration,
        *,
        pg_version: int,
        system_id: int,
        wal_seg_size: int,
        start_lsn: Lsn,
        commit_lsn: Lsn | None = None,
    ) -> "AcceptorState":
        """The state of a timeline that the control plane creates with a known start. (A compute's implicit one is all zero.)"""
        commit = start_lsn if commit_lsn is None else commit_lsn
        return cls(
            mconf=mconf,
            term_history=(TermLsn(0, start_lsn),) if commit else (),
            pg_version=pg_version,
            system_id=system_id,
            wal_seg_size=wal_seg_size,
            timeline_start_lsn=start_lsn,
            local_start_lsn=start_lsn,
            commit_lsn=commit,
            backup_lsn=start_lsn,
            peer_horizon_lsn=start_lsn,
        )


class WalStore(Protocol):
    """Positions of the log on this node's disk. All are 0 while the store is empty."""

    @property
    def write_lsn(self) -> Lsn:
        """End of the bytes handed to the store: the only position at which the next bytes may begin."""

    @property
    def write_record_lsn(self) -> Lsn:
        """End of the last complete record in them."""

    @property
    def flush_lsn(self) -> Lsn:
        """End of the last complete record that is on disk."""


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FlushWal:
    """Make written WAL durable. Result: the new flush_lsn."""


@dataclass(slots=True)
class WriteWal:
    """Append bytes at begin_lsn. They need not be durable. Result: the new write_lsn. The view is valid during the effect."""

    begin_lsn: Lsn
    data: memoryview | bytes


@dataclass(frozen=True, slots=True)
class TruncateWal:
    """Cut the log at lsn, durably: afterwards all positions are lsn. Also run, as a check, when nothing lies beyond."""

    lsn: Lsn


@dataclass(frozen=True, slots=True)
class InitializeWal:
    """Begin the empty log at lsn, durably."""

    lsn: Lsn


@dataclass(frozen=True, slots=True)
class PersistState:
    """Replace the durable state, atomically."""

    state: AcceptorState


Effect = FlushWal | WriteWal | TruncateWal | InitializeWal | PersistState
Replies = list[AcceptorMessage]
Steps = Generator[Effect, Any, Replies]

Result = TypeVar("Result")

_FLUSH = FlushWal()
_NO_REPLIES: Replies = []


def run(steps: Generator[Effect, Any, Result], perform: Callable[[Effect], Any]) -> Result:
    """Carry out the effects of one method in order and return its result. An exception of ``perform`` ends the method."""
    outcome: Any = None
    while True:
        try:
            effect = steps.send(outcome)
        except StopIteration as done:
            return done.value
        outcome = perform(effect)


@dataclass(slots=True)
class ProposerConnection:
    """What the acceptor remembers about one proposer's connection."""

    name: str = ""
    greeted: bool = False
    #: Term whose Elected was followed on this connection; 0 = none.
    elected_term: int = 0
    #: An append came since the last flush_batch, so an answer is due.
    answer_due: bool = False
    #: Highest commit_lsn that this leader has announced; only its flushed part becomes ours.
    announced_commit_lsn: Lsn = INVALID_LSN


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What the broker says about another member's copy of the timeline."""

    last_log_term: int
    commit_lsn: Lsn
    backup_lsn: Lsn
    remote_consistent_lsn: Lsn
    peer_horizon_lsn: Lsn


class Acceptor:
    """The state machine. ``state`` is what was last persisted; ``wal`` tells the positions of the log."""

    def __init__(self, node_id: int, ttid: TenantTimelineId, state: AcceptorState, wal: WalStore) -> None:
        self.node_id = node_id
        self.ttid = ttid
        self.state = state
        self.wal = wal
        self.commit_lsn = state.commit_lsn
        self.backup_lsn = state.backup_lsn
        self.peer_horizon_lsn = state.peer_horizon_lsn
        self.remote_consistent_lsn = state.remote_consistent_lsn
        self.standby_feedback: HotStandbyFeedback = NO_STANDBY_FEEDBACK
        self._streaming: ProposerConnection | None = None

    # -- what others ask

    @property
    def term(self) -> int:
        """The highest term promised."""
        return self.state.term

    @property
    def flush_lsn(self) -> Lsn:
        """End of the durable log; never below the start of the timeline."""
        return max(self.wal.flush_lsn, self.state.timeline_start_lsn)

    @property
    def last_log_term(self) -> int:
        """Term of the leader that wrote the end of the durable log."""
        return term_history.last_log_term(self.state.term_history, self.flush_lsn)

    @property
    def term_start_lsn(self) -> Lsn:
        """Where the newest term in the history begins; 0 when there is none."""
        history = self.state.term_history
        return history[-1].lsn if history else INVALID_LSN

    def is_streaming(self, connection: ProposerConnection) -> bool:
        """Whether WAL is accepted from this connection."""
        return self._streaming is connection and connection.elected_term == self.state.term

    # -- messages

    def handle(self, connection: ProposerConnection, message: ProposerMessage) -> Steps:
        """Any message of a proposer. Raises ProtocolViolation or StaleGeneration, which end the connection."""
        if isinstance(message, AppendRequest):
            return self.append_request(connection, message)
        if isinstance(message, ProposerGreeting):
            return self.greeting(connection, message)
        if isinstance(message, VoteRequest):
            return self.vote_request(connection, message)
        return self.elected(connection, message)

    def greeting(self, connection: ProposerConnection, message: ProposerGreeting) -> Steps:
        """Check that proposer and timeline fit, follow a newer membership, say who I am."""
        state = self.state
        if message.ttid != self.ttid:
            raise ProtocolViolation(f"the proposer greets timeline {message.ttid} on a connection of {self.ttid}")
        if state.pg_version and message.pg_version // 10000 != state.pg_version // 10000:
            raise ProtocolViolation(
                f"timeline {self.ttid} is of Postgres {state.pg_version // 10000}, "
                f"the proposer of Postgres {message.pg_version // 10000}"
            )
        if state.wal_seg_size and message.wal_seg_size != state.wal_seg_size:
            raise ProtocolViolation(
                f"timeline {self.ttid} has WAL segments of {state.wal_seg_size} bytes, the proposer of {message.wal_seg_size}"
            )
        wanted = state
        if message.system_id and message.system_id != state.system_id:
            wanted = replace(wanted, system_id=message.system_id, pg_version=message.pg_version or state.pg_version)
        if not wanted.wal_seg_size:
            wanted = replace(wanted, wal_seg_size=message.wal_seg_size)
        if message.mconf.generation > state.mconf.generation:
            self._check_member(message.mconf)
            wanted = replace(wanted, mconf=message.mconf)
        if wanted is not state:
            yield from self._persist(wanted)
        connection.greeted = True
        return [AcceptorGreeting(self.node_id, self.state.mconf, self.state.term)]

    def vote_request(self, connection: ProposerConnection, message: VoteRequest) -> Steps:
        """Promise the term when it is higher than any promised before."""
        self._check_fit(connection, message.generation)
        yield _FLUSH
        vote_given = self.state.term < message.term
        if vote_given:
            yield from self._persist(replace(self.state, term=message.term))
        flush_lsn = self.flush_lsn
        return [
            VoteResponse(
                generation=self.state.mconf.generation,
                term=self.state.term,
                vote_given=vote_given,
                flush_lsn=flush_lsn,
                truncate_lsn=self.peer_horizon_lsn,
                term_history=term_history.up_to(self.state.term_history, flush_lsn),
            )
        ]

    def elected(self, connection: ProposerConnection, message: ProposerElected) -> Steps:
        """Follow the leader: cut the log where it parts from the leader's, adopt the leader's history. No answer."""
        self._check_fit(connection, message.generation)
        if message.term < self.state.term:
            return _NO_REPLIES  # its next append learns the term
        if message.term > self.state.term:
            yield from self._persist(replace(self.state, term=message.term))
        start = message.start_streaming_at
        history = message.term_history
        self._check_start(start, history)
        # From here until the end nobody may append: a failure midway needs a new Elected.
        self._streaming = None
        if not self.wal.write_lsn:
            yield InitializeWal(start)
        yield TruncateWal(start)
        yield from self._persist(self._adopted(start, history))
        connection.elected_term = message.term
        connection.announced_commit_lsn = INVALID_LSN
        self._streaming = connection
        return _NO_REPLIES

    def append_request(self, connection: ProposerConnection, message: AppendRequest) -> Steps:
        """Write, without flushing. The answer comes from flush_batch(), once for all appends of a batch."""
        state = self.state
        if message.term != state.term or message.generation != state.mconf.generation:
            self._check_fit(connection, message.generation)
            if message.term < state.term:
                connection.answer_due = False
                return [refuse_term(state.mconf.generation, state.term)]
            raise ProtocolViolation(f"append in term {message.term} without election; the term here is {state.term}")
        if self._streaming is not connection or connection.elected_term != message.term:
            raise ProtocolViolation(f"append in term {message.term} on a connection that is not the leader's newest")
        if message.end_lsn != message.begin_lsn:
            write_lsn = self.wal.write_lsn
            if message.begin_lsn != write_lsn:
                raise ProtocolViolation(
                    f"append at {format_lsn(message.begin_lsn)} leaves a gap or overlaps: "
                    f"the log ends at {format_lsn(write_lsn)}"
                )
            yield WriteWal(message.begin_lsn, message.wal_data)
        if message.commit_lsn > connection.announced_commit_lsn:
            connection.announced_commit_lsn = message.commit_lsn
        if message.truncate_lsn > self.peer_horizon_lsn:
            self.peer_horizon_lsn = message.truncate_lsn
        connection.answer_due = True
        return _NO_REPLIES

    def takes(self, connection: ProposerConnection, generation: int, term: int) -> bool:
        """Whether append_request() would write an append of this leader that begins at write_lsn.

        And whether, once it is flushed, appended() may stand for flush_batch(): nothing has to be persisted then.
        """
        state = self.state
        return (
            self._streaming is connection
            and connection.elected_term == term == state.term
            and generation == state.mconf.generation
            and state.commit_lsn >= state.term_history[-1].lsn
            and not connection.answer_due
        )

    def appended(self, connection: ProposerConnection, flush_lsn: Lsn, commit_lsn: Lsn, truncate_lsn: Lsn) -> None:
        """An append that takes() allowed was written and flushed: the log is durable up to ``flush_lsn``."""
        if truncate_lsn > self.peer_horizon_lsn:
            self.peer_horizon_lsn = truncate_lsn
        if commit_lsn > connection.announced_commit_lsn:
            connection.announced_commit_lsn = commit_lsn
        commit_lsn = min(connection.announced_commit_lsn, flush_lsn)
        if commit_lsn > self.commit_lsn:
            self.commit_lsn = commit_lsn

    def flush_batch(self, connection: ProposerConnection) -> Steps:
        """Flush what the appends of one batch wrote, and answer them with one AppendResponse."""
        if not connection.answer_due:
            return _NO_REPLIES
        connection.answer_due = False
        wal = self.wal
        if wal.write_record_lsn != wal.flush_lsn:
            yield _FLUSH
        if self._streaming is not connection or connection.elected_term != self.state.term:
            return _NO_REPLIES  # deposed meanwhile
        commit_lsn = min(connection.announced_commit_lsn, self.flush_lsn)
        if commit_lsn > self.commit_lsn:
            self.commit_lsn = commit_lsn
            # sync-safekeepers waits until the end of the previous terms' WAL is committed on disk here
            if self.state.commit_lsn < self.term_start_lsn <= commit_lsn:
                yield from self.persist_volatile()
        return [self.append_response()]

    def flush_on_disconnect(self, connection: ProposerConnection) -> Steps:
        """The connection is gone: flush what it wrote, so that the last bytes of a dying compute are not lost."""
        if self._streaming is connection:
            yield from self.flush_batch(connection)
            self._streaming = None
        return _NO_REPLIES

    def feedback_response(self, connection: ProposerConnection, feedback: PageserverFeedback) -> AppendResponse | None:
        """Hand pageserver feedback to the leader, unasked. None for a connection that is not the leader's newest.

        Before Elected was followed nothing may be acknowledged: the end of the log may still be another leader's.
        """
        if not self.is_streaming(connection):
            return None
        return replace(self.append_response(), pageserver_feedback=feedback)

    def append_response(self) -> AppendResponse:
        """Where this member stands; only for the leader that streams."""
        state = self.state
        return AppendResponse(state.mconf.generation, state.term, self.flush_lsn, state.commit_lsn, self.standby_feedback)

    # -- from other sources than the proposer

    def peer_info(self, peer: PeerInfo) -> bool:
        """Learn from another member through the broker; volatile only. True when something moved.

        Its commit_lsn means something here only when both logs end in WAL of the same leader.
        """
        before = (self.commit_lsn, self.backup_lsn, self.remote_consistent_lsn, self.peer_horizon_lsn)
        if peer.last_log_term == self.last_log_term:
            self.commit_lsn = max(self.commit_lsn, min(peer.commit_lsn, self.flush_lsn))
        self.backup_lsn = max(self.backup_lsn, peer.backup_lsn)
        self.remote_consistent_lsn = max(self.remote_consistent_lsn, peer.remote_consistent_lsn)
        self.peer_horizon_lsn = max(self.peer_horizon_lsn, peer.peer_horizon_lsn)
        return before != (self.commit_lsn, self.backup_lsn, self.remote_consistent_lsn, self.peer_horizon_lsn)

    def membership_switch(self, mconf: MembershipConfiguration) -> Generator[Effect, Any, MembershipConfiguration]:
        """Follow a membership configuration; returns the previous one.

        An equal generation changes nothing. Raises StaleGeneration for a lower one, NeonError when this node is not in it.
        """
        previous = self.state.mconf
        if mconf.generation < previous.generation:
            raise StaleGeneration(
                f"membership generation {mconf.generation} is older than {previous.generation}, which is in force"
            )
        if mconf.generation > previous.generation:
            self._check_member(mconf)
            yield from self._persist(replace(self.state, mconf=mconf))
        return previous

    def term_bump(self, term: int | None = None) -> Generator[Effect, Any, tuple[int, int]]:
        """Raise the term to the given one, or by one: a leader of the old term is deposed. Returns (previous, current)."""
        previous = self.state.term
        wanted = previous + 1 if term is None else term
        if wanted > previous:
            yield from self._persist(replace(self.state, term=wanted))
        return previous, self.state.term

    def persist_volatile(self) -> Generator[Effect, Any, None]:
        """Save the LSNs that live in memory; losing them costs nothing but time."""
        saved = replace(
            self.state,
            commit_lsn=self.commit_lsn,
            backup_lsn=self.backup_lsn,
            peer_horizon_lsn=self.peer_horizon_lsn,
            remote_consistent_lsn=self.remote_consistent_lsn,
        )
        if saved != self.state:
            yield from self._persist(saved)

    # -- inside

    def _persist(self, state: AcceptorState) -> Generator[Effect, Any, None]:
        yield PersistState(state)
        self.state = state

    def _check_member(self, mconf: MembershipConfiguration) -> None:
        if not mconf.contains(self.node_id):
            raise NeonError(f"safekeeper {self.node_id} is not a member of configuration generation {mconf.generation}")

    def _check_fit(self, connection: ProposerConnection, generation: int) -> None:
        if not connection.greeted:
            raise ProtocolViolation("the proposer must greet first")
        mine = self.state.mconf.generation
        if generation != mine:
            raise StaleGeneration(f"the proposer works with membership generation {generation}, this safekeeper with {mine}")

    def _check_start(self, start: Lsn, history: TermHistory) -> None:
        """The leader and I must see the same point where our logs part, and it must not lie below what is committed."""
        flush_lsn = self.flush_lsn
        mine = term_history.up_to(self.state.term_history, flush_lsn)
        parting = term_history.divergence_lsn(history, mine, flush_lsn)
        expected = history[0].lsn if parting is None else parting
        if start != expected:
            raise ProtocolViolation(
                f"the leader of term {history[-1].term} wants to stream from {format_lsn(start)}, but the logs part at "
                f"{format_lsn(expected)}: the log moved since the vote; a new connection settles it"
            )
        if start < self.commit_lsn:
            raise ProtocolViolation(
                f"the leader of term {history[-1].term} wants to cut the log at {format_lsn(start)}, "
                f"below commit_lsn {format_lsn(self.commit_lsn)}: refused"
            )

    def _adopted(self, start: Lsn, history: TermHistory) -> AcceptorState:
        timeline_start = self.state.timeline_start_lsn or history[0].lsn
        self.commit_lsn = max(self.commit_lsn, timeline_start)
        self.backup_lsn = max(self.backup_lsn, timeline_start)
        self.remote_consistent_lsn = max(self.remote_consistent_lsn, timeline_start)
        self.peer_horizon_lsn = self.peer_horizon_lsn or timeline_start
        return replace(
            self.state,
            term_history=history,
            timeline_start_lsn=timeline_start,
            local_start_lsn=self.state.local_start_lsn or start,
            commit_lsn=self.commit_lsn,
            backup_lsn=self.backup_lsn,
            peer_horizon_lsn=self.peer_horizon_lsn,
            remote_consistent_lsn=self.remote_consistent_lsn,
        )

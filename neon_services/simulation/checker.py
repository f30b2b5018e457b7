"""What must hold at every step, whatever is lost, late, doubled or dead. The checker sees everything and tells nobody.

The committed log is one byte string that only grows: whatever any leader reports as committed, and whatever any safekeeper
believes to be committed, must be a prefix of it or extend it.
"""

from typing import TYPE_CHECKING

from neon_services.consensus.acceptor import Effect, PersistState, TruncateWal
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import AppendResponse, VoteResponse

if TYPE_CHECKING:
    from neon_services.simulation.proposer import SimulatedProposer
    from neon_services.simulation.safekeeper import SimulatedSafekeeper
    from neon_services.simulation.world import World


class InvariantViolation(AssertionError):
    """The protocol, or its implementation, is wrong."""


class Checker:
    """All invariants of one world."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.start_lsn = world.start_lsn
        self.log = bytearray()  # committed, from start_lsn on
        self.leaders: dict[int, SimulatedProposer] = {}
        self.term_starts: dict[int, Lsn] = {}
        self.commits: dict[int, Lsn] = {}  # the highest commit_lsn that the leader of each term reported
        self.votes: dict[tuple[int, int], bytes] = {}

    @property
    def committed_lsn(self) -> Lsn:
        """End of the committed log."""
        return Lsn(self.start_lsn + len(self.log))

    def require(self, holds: bool, text: str, *values: object) -> None:
        """Raise InvariantViolation with the seed."""
        if not holds:
            raise InvariantViolation(f"seed {self.world.seed} at {self.world.now_us / 1000:.1f} ms: {text % values}")

    # -- acceptors

    def effect(self, node: "SimulatedSafekeeper", effect: Effect) -> None:
        """Before an effect is carried out."""
        if type(effect) is TruncateWal:
            commit_lsn = max(node.acceptor.commit_lsn, node.disk.state.commit_lsn)
            self.require(
                effect.lsn >= commit_lsn, "%s cuts its log at %d, below its commit_lsn %d", node, effect.lsn, commit_lsn
            )
        elif type(effect) is PersistState:
            # what counts is what was spoken: a state that reached the disk though the write failed was never acted on
            old, new = node.acceptor.state, effect.state
            self.require(new.term >= old.term, "%s: persisted term goes back from %d to %d", node, old.term, new.term)
            self.require(new.commit_lsn >= old.commit_lsn, "%s: persisted commit_lsn goes back to %d", node, new.commit_lsn)
            self.require(new.mconf.generation >= old.mconf.generation, "%s: membership goes back", node)
            if new.term_history is not old.term_history:
                for before, after in zip(new.term_history, new.term_history[1:], strict=False):
                    holds = after.term > before.term and after.lsn >= before.lsn
                    self.require(holds, "%s: history goes back: %s, %s", node, before, after)
                for entry in new.term_history:
                    known = self.term_starts.setdefault(entry.term, entry.lsn)
                    self.require(known == entry.lsn, "%s: term %d starts at %d and at %d", node, entry.term, entry.lsn, known)

    def acceptor(self, node: "SimulatedSafekeeper") -> None:
        """After every step of a safekeeper."""
        acceptor = node.acceptor
        term, commit_lsn = acceptor.term, acceptor.commit_lsn
        self.require(term >= node.seen_term, "%s: term goes back from %d to %d", node, node.seen_term, term)
        node.seen_term = term
        if commit_lsn != node.seen_commit:
            self.require(
                commit_lsn > node.seen_commit, "%s: commit_lsn goes back from %d to %d", node, node.seen_commit, commit_lsn
            )
            self.require(commit_lsn <= acceptor.flush_lsn, "%s: commit_lsn %d is beyond flush_lsn", node, commit_lsn)
            self.require(commit_lsn <= self.committed_lsn, "%s believes %d to be committed, which is not", node, commit_lsn)
            node.seen_commit = commit_lsn
            self._same(node, commit_lsn)
        elif node.seen_commit:
            self.require(
                node.seen_commit <= acceptor.flush_lsn, "%s lost committed WAL: flush_lsn %d", node, acceptor.flush_lsn
            )

        if node.acknowledged_term == term:
            holds = acceptor.flush_lsn >= node.acknowledged_lsn
            self.require(holds, "%s lost WAL that it acknowledged to the present leader: %d", node, node.acknowledged_lsn)

    def acknowledged(self, node: "SimulatedSafekeeper", answer: AppendResponse) -> None:
        """An acknowledgement is spoken: it stays true as long as the term does."""
        if answer.flush_lsn:
            node.acknowledged_term, node.acknowledged_lsn = answer.term, answer.flush_lsn

    def _same(self, node: "SimulatedSafekeeper", until: Lsn) -> None:
        mine = node.disk.wal.read(self.start_lsn, until)
        self.require(mine == self.log[: until - self.start_lsn], "%s has other bytes below commit_lsn %d", node, until)

    def vote(self, node: "SimulatedSafekeeper", vote: VoteResponse) -> None:
        """A vote is spoken."""
        history = vote.term_history
        ends_right = not history or history[-1].lsn <= vote.flush_lsn
        self.require(ends_right, "%s votes with a history beyond flush_lsn %d", node, vote.flush_lsn)
        if vote.vote_given:
            self.require(
                node.disk.state.term >= vote.term, "%s spoke a vote for term %d before it was durable", node, vote.term
            )
        wal = node.disk.wal
        self.votes[vote.term, node.node_id] = wal.read(self.start_lsn, vote.flush_lsn) if vote.flush_lsn else b""

    # -- proposers

    def elected(self, proposer: "SimulatedProposer") -> bytes:
        """A proposer won; returns the log it takes over."""
        core, world = proposer.core, self.world
        world.stats.elections += 1
        world.trace("%s is elected in term %d at %d", proposer, core.term, core.term_start_lsn)
        other = self.leaders.setdefault(core.term, proposer)
        self.require(other is proposer, "%s and %s are both elected in term %d", proposer, other, core.term)
        if not core.term_start_lsn:
            self.require(not self.log, "%s starts from nothing though something is committed", proposer)
            return b""
        start = self.term_starts.setdefault(core.term, core.term_start_lsn)
        self.require(start == core.term_start_lsn, "term %d starts at %d and at %d", core.term, start, core.term_start_lsn)
        for term, lsn in self.commits.items():
            holds = term > core.term or lsn <= core.term_start_lsn
            self.require(holds, "%s of term %d starts at %d, term %d committed %d", proposer, core.term, start, term, lsn)
        donor = core.members[core.donor_slot].node_id or 0
        taken = self.votes[core.term, donor][: core.term_start_lsn - self.start_lsn]
        common = min(
            len(taken), max((lsn - self.start_lsn for term, lsn in self.commits.items() if term < core.term), default=0)
        )
        self.require(taken[:common] == self.log[:common], "%s took over a log that lacks committed bytes", proposer)
        return taken

    def committed(self, proposer: "SimulatedProposer") -> None:
        """A leader's commit_lsn moved: Postgres acknowledges transactions up to it."""
        core, world = proposer.core, self.world
        commit_lsn, term = core.commit_lsn, core.term
        world.trace("%s commits %d in term %d", proposer, commit_lsn, term)
        self.require(commit_lsn <= proposer.end_lsn, "%s commits %d, beyond its log", proposer, commit_lsn)
        for later, leader in self.leaders.items():
            holds = later <= term or not leader.core.term_start_lsn or commit_lsn <= leader.core.term_start_lsn
            self.require(holds, "term %d commits %d, but the log of term %d lacks it", term, commit_lsn, later)
        self.commits[term] = commit_lsn
        until = commit_lsn - self.start_lsn
        common = min(until, len(self.log))
        self.require(
            proposer.log[:common] == self.log[:common], "%s commits %d over other committed bytes", proposer, commit_lsn
        )
        if until > len(self.log):
            world.stats.committed_bytes += until - len(self.log)
            world.stats.commits += 1
            self.log += proposer.log[len(self.log) : until]

    def synchronised(self, proposer: "SimulatedProposer", lsn: Lsn) -> None:
        """sync-safekeepers is about to print an LSN."""
        term = proposer.core.term
        lowest = max((commit for t, commit in self.commits.items() if t < term), default=0)
        self.require(lsn >= lowest, "sync-safekeepers prints %d, but %d is committed", lsn, lowest)
        self.require(lsn <= self.committed_lsn or not lsn, "sync-safekeepers prints %d, which is not committed", lsn)

    def final(self) -> None:
        """After everything has healed: all nodes hold the same log, and it begins with the committed one."""
        for node in self.world.addresses():
            self.require(node.acceptor.flush_lsn >= self.committed_lsn, "%s lacks committed WAL in the end", node)
            self._same(node, self.committed_lsn)

"""What must hold at every step, whatever is lost, late, doubled or dead. The checker sees everything and tells nobody.

The committed log is one byte string that only grows: whatever any leader reports as committed, and whatever any safekeeper
believes to be committed, must be a prefix of it or extend it. What a safekeeper says to be flushed must be on its disk so that
no loss of power takes it away, and must be the log of the leader whose term its history names.
"""

from typing import TYPE_CHECKING

from neon_services.consensus.acceptor import Effect, PersistState, TruncateWal
from neon_services.consensus.membership import is_quorum, voter_sets
from neon_services.ground.errors import CorruptionError, NeonError
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import AppendResponse, VoteResponse

if TYPE_CHECKING:
    from neon_services.simulation.proposer import SimulatedProposer
    from neon_services.simulation.safekeeper import SimulatedSafekeeper
    from neon_services.simulation.world import World


class InvariantViolation(AssertionError):
    """The protocol, or its implementation, is wrong. ``invariant`` is the name of what was broken."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"{text} [{invariant}]")
        self.invariant = invariant


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
        #: The bucket: committed WAL up to here is in it as WAL, and as layers.
        self.offloaded_lsn = self.layers_lsn = world.start_lsn

    @property
    def committed_lsn(self) -> Lsn:
        """End of the committed log."""
        return Lsn(self.start_lsn + len(self.log))

    def require(self, holds: bool, invariant: str, text: str, *values: object) -> None:
        """Raise InvariantViolation with the seed."""
        if not holds:
            self.fail(invariant, text, *values)

    def fail(self, invariant: str, text: str, *values: object) -> None:
        """Raise InvariantViolation with the seed."""
        world = self.world
        raise InvariantViolation(invariant, f"seed {world.seed} at {world.now_us / 1000:.1f} ms: {text % values}")

    # -- acceptors

    def effect(self, node: "SimulatedSafekeeper", effect: Effect) -> None:
        """Before an effect is carried out."""
        if type(effect) is TruncateWal:
            commit_lsn = max(node.acceptor.commit_lsn, node.storage.state.commit_lsn)
            text = "%s cuts its log at %d, below its commit_lsn %d"
            self.require(effect.lsn >= commit_lsn, "commit is kept", text, node, effect.lsn, commit_lsn)
            self.world.stats.truncations += effect.lsn < node.acceptor.wal.write_lsn
            node.same_lsn = min(node.same_lsn, effect.lsn)
        elif type(effect) is PersistState:
            # what counts is what was spoken: a state that reached the disk though the write failed was never acted on
            old, new = node.acceptor.state, effect.state
            text = "%s: persisted term goes back from %d to %d"
            self.require(new.term >= old.term, "term is monotonic", text, node, old.term, new.term)
            text = "%s: persisted commit_lsn goes back to %d"
            self.require(new.commit_lsn >= old.commit_lsn, "commit is kept", text, node, new.commit_lsn)
            text = "%s: membership goes back"
            self.require(new.mconf.generation >= old.mconf.generation, "generation is monotonic", text, node)
            if new.term_history is not old.term_history:
                for before, after in zip(new.term_history, new.term_history[1:], strict=False):
                    holds = after.term > before.term and after.lsn >= before.lsn
                    self.require(holds, "history is ordered", "%s: history goes back: %s, %s", node, before, after)
                for entry in new.term_history:
                    known = self.term_starts.setdefault(entry.term, entry.lsn)
                    text = "%s: term %d starts at %d and at %d"
                    self.require(known == entry.lsn, "one start per term", text, node, entry.term, entry.lsn, known)

    def carried_out(self, node: "SimulatedSafekeeper", effect: Effect) -> None:
        """After an effect was carried out."""
        if type(effect) is TruncateWal and (stale := node.storage.stale_bytes_behind(effect.lsn)) is not None:
            text = "%s has cut its log at %d, but a loss of power may leave old bytes at %d"
            self.fail("nothing behind the end", text, node, effect.lsn, stale)

    def acceptor(self, node: "SimulatedSafekeeper") -> None:
        """After every step of a safekeeper."""
        acceptor = node.acceptor
        term, commit_lsn, flush_lsn = acceptor.state.term, acceptor.commit_lsn, acceptor.flush_lsn
        if term == node.seen_term and commit_lsn == node.seen_commit and flush_lsn == node.seen_flush:
            return
        node.seen_flush = flush_lsn
        text = "%s: term goes back from %d to %d"
        self.require(term >= node.seen_term, "term is monotonic", text, node, node.seen_term, term)
        node.seen_term = term
        if commit_lsn != node.seen_commit:
            text = "%s: commit_lsn goes back from %d to %d"
            self.require(commit_lsn > node.seen_commit, "commit is kept", text, node, node.seen_commit, commit_lsn)
            text = "%s: commit_lsn %d is beyond flush_lsn"
            self.require(commit_lsn <= flush_lsn, "commit is flushed", text, node, commit_lsn)
            text = "%s believes %d to be committed, which is not"
            self.require(commit_lsn <= self.committed_lsn, "commit is true", text, node, commit_lsn)
            self._same(node, node.seen_commit, commit_lsn)
            node.seen_commit = commit_lsn
        elif node.seen_commit:
            text = "%s lost committed WAL: flush_lsn %d"
            self.require(node.seen_commit <= flush_lsn, "commit is kept", text, node, flush_lsn)
        if node.acknowledged_term == term:
            text = "%s lost WAL that it acknowledged to the present leader: %d"
            holds = flush_lsn >= node.acknowledged_lsn
            self.require(holds, "flush is durable", text, node, node.acknowledged_lsn)

    def booted(self, node: "SimulatedSafekeeper") -> None:
        """A safekeeper has loaded the timeline."""
        text = "%s promised term %d and comes back with term %d"
        term = node.acceptor.term
        self.require(term >= node.promised_term, "a promise survives", text, node, node.promised_term, term)
        text = "%s has joined generation %d and comes back with generation %d"
        generation = node.acceptor.state.mconf.generation
        holds = generation >= node.promised_generation
        self.require(holds, "a promise survives", text, node, node.promised_generation, generation)
        self.acceptor(node)
        self._log_matches(node)

    def acknowledged(self, node: "SimulatedSafekeeper", answer: AppendResponse) -> None:
        """An acknowledgement is spoken: it stays true as long as the term does."""
        if not answer.flush_lsn:
            return
        before = node.acknowledged_lsn if node.acknowledged_term == answer.term else self.start_lsn
        node.acknowledged_term, node.acknowledged_lsn = answer.term, answer.flush_lsn
        node.promised_term = max(node.promised_term, answer.term)
        begin = max(self.start_lsn, node.storage.first_lsn, min(before, answer.flush_lsn))
        self._surely_holds(node, begin, answer.flush_lsn)
        self._log_matches(node)

    def _surely_holds(self, node: "SimulatedSafekeeper", begin: Lsn, end: Lsn) -> None:
        """What was said to be flushed survives any loss of power."""
        if end > begin:
            sure = node.storage.sure_bytes(begin, end)
            text = "%s says that WAL is flushed up to %d, but a loss of power may leave it at %d"
            self.require(len(sure) == end - begin, "flush is durable", text, node, end, begin + len(sure))

    def _log_matches(self, node: "SimulatedSafekeeper", *, whole: bool = False) -> None:
        """The flushed log is the log of the leader that the history names as its last."""
        acceptor = node.acceptor
        end = acceptor.flush_lsn
        leader = self.leaders.get(acceptor.last_log_term)
        if not acceptor.wal.flush_lsn or leader is None:
            return
        begin = max(self.start_lsn, node.storage.first_lsn, self.start_lsn if whole else min(node.same_lsn, end))
        text = "%s holds other bytes than the leader of term %d wrote, somewhere in [%d, %d)"
        mine = self._read(node, begin, end)
        theirs = leader.log[begin - self.start_lsn : end - self.start_lsn]
        self.require(mine == theirs, "logs match", text, node, acceptor.last_log_term, begin, end)
        node.same_lsn = end

    def _read(self, node: "SimulatedSafekeeper", begin: Lsn, end: Lsn) -> bytes:
        try:
            return node.storage.read(begin, end) if end > begin else b""
        except NeonError as error:
            self.fail("flush is durable", "%s cannot read its log: %s", node, error)
            raise

    def _same(self, node: "SimulatedSafekeeper", begin: int, until: Lsn) -> None:
        begin = max(self.start_lsn, node.storage.first_lsn, begin)
        mine = self._read(node, Lsn(begin), until)
        holds = mine == self.log[begin - self.start_lsn : until - self.start_lsn] if until > begin else True
        self.require(holds, "committed bytes are kept", "%s has other bytes below commit_lsn %d", node, until)

    def vote(self, node: "SimulatedSafekeeper", vote: VoteResponse) -> None:
        """A vote is spoken."""
        history = vote.term_history
        ends_right = not history or history[-1].lsn <= vote.flush_lsn
        text = "%s votes with a history beyond flush_lsn %d"
        self.require(ends_right, "history is flushed", text, node, vote.flush_lsn)
        if vote.vote_given:
            self.promised(node, term=vote.term, generation=vote.generation)
        first = max(self.start_lsn, node.storage.first_lsn)
        if vote.flush_lsn > first:
            self._surely_holds(node, first, vote.flush_lsn)
            self._log_matches(node, whole=True)
        rest = self._read(node, first, vote.flush_lsn) if vote.flush_lsn else b""
        self.votes[vote.term, node.node_id] = bytes(self.log[: first - self.start_lsn]) + rest

    def promised(self, node: "SimulatedSafekeeper", *, term: int = 0, generation: int = 0) -> None:
        """A node has said that it will not go below this term and generation."""
        try:
            states = node.storage.sure_states()
        except CorruptionError as error:
            self.fail("a promise survives", "%s promises while its state is not durable: %s", node, error)
            raise
        lowest = min((state.term for state in states), default=-1)
        text = "%s promised term %d before it was durable: a loss of power may leave term %d"
        self.require(lowest >= term, "a promise survives", text, node, term, lowest)
        lowest = min((state.mconf.generation for state in states), default=-1)
        text = "%s joined generation %d before it was durable: a loss of power may leave generation %d"
        self.require(lowest >= generation, "a promise survives", text, node, generation, lowest)
        node.promised_term = max(node.promised_term, term)
        node.promised_generation = max(node.promised_generation, generation)

    def removed(self, node: "SimulatedSafekeeper", below: Lsn) -> None:
        """A safekeeper removed WAL."""
        self.world.stats.removals += 1
        text = "%s removed WAL below %d, in the bucket it is up to %d and its effects up to %d"
        sure = min(self.offloaded_lsn, self.layers_lsn)
        self.require(below <= sure, "WAL is kept until offloaded", text, node, below, self.offloaded_lsn, self.layers_lsn)

    # -- proposers

    def elected(self, proposer: "SimulatedProposer") -> bytes:
        """A proposer won; returns the log it takes over."""
        core, world = proposer.core, self.world
        world.stats.elections += 1
        world.trace("%s is elected in term %d at %d", proposer, core.term, core.term_start_lsn)
        other = self.leaders.setdefault(core.term, proposer)
        text = "%s and %s are both elected in term %d"
        self.require(other is proposer, "one leader per term", text, proposer, other, core.term)
        if not core.term_start_lsn:
            self.require(not self.log, "committed bytes are kept", "%s starts from nothing, something is committed", proposer)
            return b""
        start = self.term_starts.setdefault(core.term, core.term_start_lsn)
        text = "term %d starts at %d and at %d"
        self.require(start == core.term_start_lsn, "one start per term", text, core.term, start, core.term_start_lsn)
        for term, lsn in self.commits.items():
            holds = term > core.term or lsn <= core.term_start_lsn
            text = "%s of term %d starts at %d, term %d committed %d"
            self.require(holds, "committed bytes are kept", text, proposer, core.term, start, term, lsn)
        donor = core.members[core.donor_slot].node_id or 0
        taken = self.votes[core.term, donor][: core.term_start_lsn - self.start_lsn]
        earlier = max((lsn - self.start_lsn for term, lsn in self.commits.items() if term < core.term), default=0)
        common = min(len(taken), earlier)
        text = "%s took over a log that lacks committed bytes"
        self.require(taken[:common] == self.log[:common], "committed bytes are kept", text, proposer)
        return taken

    def committed(self, proposer: "SimulatedProposer") -> None:
        """A leader's commit_lsn moved: Postgres acknowledges transactions up to it."""
        core, world = proposer.core, self.world
        commit_lsn, term = core.commit_lsn, core.term
        world.trace("%s commits %d in term %d", proposer, commit_lsn, term)
        text = "%s commits %d, beyond its log"
        self.require(commit_lsn <= proposer.end_lsn, "commit is true", text, proposer, commit_lsn)
        for later, leader in self.leaders.items():
            holds = later <= term or not leader.core.term_start_lsn or commit_lsn <= leader.core.term_start_lsn
            text = "term %d commits %d, but the log of term %d lacks it"
            self.require(holds, "committed bytes are kept", text, term, commit_lsn, later)
        before = self.commits.get(term, self.start_lsn)
        self.commits[term] = commit_lsn
        until = commit_lsn - self.start_lsn
        common = min(until, len(self.log))
        text = "%s commits %d over other committed bytes"
        holds = proposer.log[:common] == self.log[:common]
        self.require(holds, "committed bytes are kept", text, proposer, commit_lsn)
        self._quorum_holds(proposer, before, commit_lsn)
        if until > len(self.log):
            world.stats.committed_bytes += until - len(self.log)
            world.stats.commits += 1
            self.log += proposer.log[len(self.log) : until]

    def _quorum_holds(self, proposer: "SimulatedProposer", begin: Lsn, commit_lsn: Lsn) -> None:
        """The disks of a quorum hold what is committed, whatever happens to their power."""
        core = proposer.core
        if core.mconf.generation and self.world.controller.row.generation != core.mconf.generation:
            return  # a member of a former configuration may have deleted the timeline since it acknowledged
        wanted = proposer.log[begin - self.start_lsn : commit_lsn - self.start_lsn]
        holders = []
        for slot, node in enumerate(proposer.nodes):
            first = max(begin, node.storage.first_lsn)
            if first >= commit_lsn or node.storage.sure_bytes(first, commit_lsn) == wanted[first - begin :]:
                holders.append(node.node_id if core.mconf.generation else slot)
        text = "%s commits %d, which is durable on safekeepers %s only"
        everybody = (frozenset(range(len(proposer.nodes))),)
        holds = is_quorum(voter_sets(core.mconf) if core.mconf.generation else everybody, holders)
        self.require(holds, "commit is durable on a quorum", text, proposer, commit_lsn, holders)

    def synchronised(self, proposer: "SimulatedProposer", lsn: Lsn) -> None:
        """sync-safekeepers is about to print an LSN."""
        term = proposer.core.term
        lowest = max((commit for t, commit in self.commits.items() if t < term), default=0)
        text = "sync-safekeepers prints %d, but %d is committed"
        self.require(lsn >= lowest, "committed bytes are kept", text, lsn, lowest)
        text = "sync-safekeepers prints %d, which is not committed"
        self.require(lsn <= self.committed_lsn or not lsn, "commit is true", text, lsn)

    def final(self) -> None:
        """After everything has healed: all nodes hold the same log, and it begins with the committed one."""
        for node in self.world.addresses():
            holds = node.acceptor.flush_lsn >= self.committed_lsn
            self.require(holds, "committed bytes are kept", "%s lacks committed WAL in the end", node)
            self._same(node, self.start_lsn, self.committed_lsn)
            self._log_matches(node, whole=True)

"""The control plane of the simulation: drives the production's membership change while everything else goes on.

The stored row is compared and set; the process may die between any two steps, and the next one goes on from the row, or
aborts. Answers travel: a member may have changed by the time its answer is looked at.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from neon_services.consensus.migration import (
    BumpTerm,
    CompareAndSet,
    Effect,
    Exclude,
    Migration,
    MigrationConflict,
    PullTimeline,
    Row,
    Standing,
    SwitchMembership,
    TellCompute,
)
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId

if TYPE_CHECKING:
    from neon_services.simulation.safekeeper import SimulatedSafekeeper
    from neon_services.simulation.world import World

ABORTS = 0.1
LATE_ANSWERS = 0.3


class SimulatedController:
    """One store, and at most one process at a time."""

    #: The algorithm; planted bugs replace it.
    algorithm: type[Migration] = Migration

    def __init__(self, world: "World", row: MembershipConfiguration) -> None:
        self.world = world
        self.stored = Row(row)
        self.process: Iterator[int] | None = None

    @property
    def row(self) -> MembershipConfiguration:
        """The configuration in the store."""
        return self.stored.mconf

    # -- the process and its deaths

    def act(self) -> None:
        """Start a change, go on with the one in the row, or abort it; or die."""
        world = self.world
        if self.process is None:
            migration = self.algorithm(self._shuffled)
            if self.row.new_members is not None and world.random.random() < ABORTS:
                self._start(migration.abort(self.stored))
            else:
                self._start(migration.change(self.stored, None if self.row.new_members else self._draw()))
        elif world.random.random() < 0.3:
            world.trace("the controller dies")
            self.process = None

    def finish(self) -> None:
        """Only go on with a change that was begun, or with telling everybody of the last one."""
        if self.process is None:
            self._start(self.algorithm(self._shuffled).change(self.stored))

    def _draw(self) -> tuple[SafekeeperId, ...]:
        chosen = self.world.random.sample(range(len(self.world.nodes)), len(self.row.members))
        return tuple(SafekeeperId(i + 1, f"s{i + 1}", 5454) for i in sorted(chosen))

    def _shuffled(self, members: Sequence[SafekeeperId]) -> list[SafekeeperId]:
        found = list(members)
        self.world.random.shuffle(found)
        return found

    def _start(self, steps: Generator[Effect, Any, Row]) -> None:
        self.process = self._drive(steps)
        self._continue(self.process)

    def _continue(self, process: Iterator[int]) -> None:
        if process is self.process:
            delay_us = next(process, None)
            if delay_us is None:
                self.process = None
            else:
                self.world.after(delay_us, self._continue, process)

    def _drive(self, steps: Generator[Effect, Any, Row]) -> Iterator[int]:
        """Carry out one effect after another, with the delays of a network before each, and after some."""
        outcome: Any = None
        while True:
            try:
                effect = steps.send(outcome)
            except StopIteration:
                return
            except MigrationConflict as conflict:
                self.world.trace("the controller gives up: %s", conflict)
                return
            if not isinstance(effect, TellCompute):  # computes look at the row when they start
                yield self.world.delay_us()
            if isinstance(effect, PullTimeline):
                yield from self._pull(effect)
                outcome = self._has_joined(effect)
            else:
                outcome = self._perform(effect)
            if self.world.random.random() < LATE_ANSWERS:
                yield self.world.delay_us()

    # -- effects

    def _perform(self, effect: Effect) -> Any:
        if isinstance(effect, CompareAndSet):
            return self._store(effect)
        if isinstance(effect, SwitchMembership):
            return self._switch(self._node(effect.node), effect.mconf)
        if isinstance(effect, BumpTerm):
            node = self._node(effect.node)
            return node.up and node.present and node.bump(effect.term)
        if isinstance(effect, Exclude):
            return self._exclude(effect)
        return True  # waiting is the delay

    def _node(self, member: SafekeeperId) -> "SimulatedSafekeeper":
        return self.world.nodes[member.node_id - 1]

    def _store(self, effect: CompareAndSet) -> bool:
        if self.stored != effect.expected:
            return False
        before, self.stored = self.row, effect.row
        ids = [[m.node_id for m in members] for members in (self.row.members, self.row.new_members or ())]
        self.world.trace("configuration %d: %s -> %s", self.row.generation, *ids)
        if before.new_members is not None and self.row.members == before.new_members:
            self.world.stats.migrations += 1
        return True

    def _switch(self, node: "SimulatedSafekeeper", mconf: MembershipConfiguration) -> Standing | None:
        if not node.present or not node.switch(mconf) or not node.up:
            return None
        last_log_term, flush_lsn = node.position()
        return Standing(node.acceptor.term, last_log_term, Lsn(flush_lsn))

    def _pull(self, effect: PullTimeline) -> Iterator[int]:
        """pull_timeline from the best of the old members, which takes time."""
        node = self._node(effect.node)
        if not node.up or node.present:
            return
        known = [source for source in map(self._node, effect.sources) if source.up and source.present]
        if len(known) >= max(len(effect.sources) - 1, 1):
            donor = max(known, key=lambda source: (source.position(), source.acceptor.term, source.acceptor.commit_lsn))
            yield from node.pull(donor, effect.mconf, self._promised(known))

    def _promised(self, known: Sequence["SimulatedSafekeeper"]) -> int:
        """The term that a copy must keep: the highest of the members that were heard."""
        return max(source.acceptor.term for source in known)

    def _has_joined(self, effect: PullTimeline) -> bool:
        node = self._node(effect.node)
        return node.up and node.present and node.switch(effect.mconf)

    def _exclude(self, effect: Exclude) -> bool:
        node = self._node(effect.node)
        if not node.up:
            return False
        if node.present:
            if node.storage.state.mconf.generation > effect.mconf.generation:
                return False
            node.exclude()
        return True

"""The control plane of the simulation: moves a timeline from one set of safekeepers to another while everything else goes on.

Invariant of the algorithm: the final configuration is stored only when a quorum of the new set, under the joint configuration,
has at least the log and the term that some quorum of the old set had after it had joined. The stored row is compared and set;
the process may die after any step, and the next one goes on from the row.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from neon_services.consensus.membership import quorum_size
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId

if TYPE_CHECKING:
    from neon_services.simulation.safekeeper import SimulatedSafekeeper
    from neon_services.simulation.world import World

Position = tuple[int, int]  # (last_log_term, flush_lsn)


class SimulatedController:
    """One store, and at most one process at a time."""

    def __init__(self, world: "World", row: MembershipConfiguration) -> None:
        self.world = world
        self.row = row
        self.process: Iterator[int] | None = None

    # -- the process and its deaths

    def act(self) -> None:
        """Start a change or go on with the one in the row; or die."""
        if self.process is None:
            self.process = self._change()
            self._continue(self.process)
        elif self.world.random.random() < 0.3:
            self.world.trace("the controller dies")
            self.process = None

    def finish(self) -> None:
        """Only go on with a change that was begun, or with telling everybody of the last one."""
        if self.process is None:
            everybody = tuple(SafekeeperId(node.node_id, str(node), 5454) for node in self.world.nodes)
            self.process = self._spread(self.row, everybody) if self.row.new_members is None else self._change()
            self._continue(self.process)

    def _continue(self, process: Iterator[int]) -> None:
        if process is self.process:
            delay_us = next(process, None)
            if delay_us is None:
                self.process = None
            else:
                self.world.after(delay_us, self._continue, process)

    # -- steps

    def nodes(self, members: tuple[SafekeeperId, ...]) -> list["SimulatedSafekeeper"]:
        """The nodes of a set, in the order in which this round asks them."""
        found = [self.world.nodes[member.node_id - 1] for member in members]
        self.world.random.shuffle(found)
        return found

    def _store(self, expected: int, row: MembershipConfiguration) -> bool:
        """Compare and set."""
        if self.row.generation != expected:
            return False
        self.row = row
        ids = [[m.node_id for m in members] for members in (row.members, row.new_members or ())]
        self.world.trace("configuration %d: %s -> %s", row.generation, *ids)
        return True

    def _change(self) -> Iterator[int]:
        world, row = self.world, self.row
        if row.new_members is None:
            chosen = world.random.sample(range(len(world.nodes)), len(row.members))
            target = tuple(SafekeeperId(i + 1, f"s{i + 1}", 5454) for i in sorted(chosen))
            joint = MembershipConfiguration(row.generation + 1, row.members, target)
            if not self._store(row.generation, joint):
                return
        joint = self.row
        assert joint.new_members is not None
        yield from self._prepare(joint)
        final = MembershipConfiguration(joint.generation + 1, joint.new_members)
        if not self._store(joint.generation, final):
            return
        world.stats.migrations += 1
        yield from self._spread(final, joint.members)

    def _prepare(self, joint: MembershipConfiguration) -> Iterator[int]:
        """Make the new set fit to decide alone."""
        old, new = joint.members, joint.new_members or ()
        positions: list[Position] = []
        term = 0
        while len(positions) < quorum_size(len(old)):
            positions = []
            for node in self.nodes(old):
                yield self.world.delay_us()
                if node.present and node.switch(joint):
                    positions.append(node.position())
                    term = max(term, node.acceptor.term)
        wanted = sorted(positions)[quorum_size(len(old)) - 1]
        fit: set[int] = set()
        while len(fit) < quorum_size(len(new)):
            fit = set()
            for node in self.nodes(new):
                yield self.world.delay_us()
                yield from self._pull(node, joint)
                if node.present and node.switch(joint) and self._is_fit(node, wanted, term):
                    fit.add(node.node_id)

    def _is_fit(self, node: "SimulatedSafekeeper", wanted: Position, term: int) -> bool:
        """Its term is raised to what the old set promised, and it has the old set's log."""
        return node.bump(term) and node.position() >= wanted

    def _pull(self, node: "SimulatedSafekeeper", joint: MembershipConfiguration) -> Iterator[int]:
        """pull_timeline from the best of the old members."""
        if node.present or not node.up:
            return
        known = [source for source in self.nodes(joint.members) if source.up and source.present]
        if len(known) >= max(len(joint.members) - 1, 1):
            donor = max(known, key=lambda source: (source.position(), source.acceptor.term, source.acceptor.commit_lsn))
            yield from node.pull(donor, joint)

    def _spread(self, final: MembershipConfiguration, old: tuple[SafekeeperId, ...]) -> Iterator[int]:
        """Tell the new members, and let those that left forget."""
        told = 0
        while told < quorum_size(len(final.members)):
            told = 0
            for node in self.nodes(final.members):
                yield self.world.delay_us()
                told += node.present and node.switch(final)
        for node in self.nodes(old):
            yield self.world.delay_us()
            if (
                not final.contains(node.node_id)
                and node.up
                and node.present
                and node.storage.state.mconf.generation <= final.generation
            ):
                node.exclude()

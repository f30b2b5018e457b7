"""Moving a timeline from one set of safekeepers to another, without sockets, files or clocks.

There is one row per timeline: who votes now, who will, and who left and has not been told yet. Invariants:

1. The row changes only by compare-and-set of the whole row, and each change of the voters takes the next generation. So two
   configurations of one generation are equal, whoever works on the row, and at most one of finishing and aborting happens.
2. The final configuration is stored only when a quorum of the new set, under the joint configuration, has promised at least
   the terms and has at least the log that a quorum of the old set had after it had joined. From then on the new set alone
   decides, and it prefers every log that the old set may have committed.
3. Nobody is told to forget the timeline before a quorum of the set that stays works under the final configuration.
4. Every step may be repeated. Whoever dies after any step is succeeded by somebody who starts from the row alone.

Methods are generators: they yield effects and are sent the result of each. An effect that fails says so by its result
(False or None) and is asked for again after Wait; the caller ends the loop by dropping the generator.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neon_services.consensus.membership import quorum_size
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId

Members = tuple[SafekeeperId, ...]


class MigrationConflict(NeonError):
    """The row says something else than the caller believes, or the change that is asked for makes no sense."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is stored about a timeline. ``pending_exclude``: former members that have not yet forgotten the timeline."""

    mconf: MembershipConfiguration
    pending_exclude: Members = ()


@dataclass(frozen=True, slots=True)
class Standing:
    """A member that follows the configuration it was told: its promise, and how good its log is."""

    term: int
    last_log_term: int
    flush_lsn: Lsn

    @property
    def position(self) -> tuple[int, int]:
        """The higher, the more of the log."""
        return self.last_log_term, self.flush_lsn


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CompareAndSet:
    """Replace the stored row, durably, if it is still the expected one. Result: whether it was."""

    expected: Row
    row: Row


@dataclass(frozen=True, slots=True)
class TellCompute:
    """Let the compute connect to all members of this configuration. Result: whether it has been told, or nobody need be."""

    mconf: MembershipConfiguration


@dataclass(frozen=True, slots=True)
class SwitchMembership:
    """Let a member follow this configuration. Result: its Standing, read after the switch, or None."""

    node: SafekeeperId
    mconf: MembershipConfiguration


@dataclass(frozen=True, slots=True)
class PullTimeline:
    """Let a member that lacks the timeline become a copy of the best of the sources. Result: whether it has the timeline."""

    node: SafekeeperId
    sources: Members
    mconf: MembershipConfiguration


@dataclass(frozen=True, slots=True)
class BumpTerm:
    """Raise a member's term to at least this one. Result: whether that was done."""

    node: SafekeeperId
    term: int


@dataclass(frozen=True, slots=True)
class Exclude:
    """Let a former member forget the timeline, on its own disk only. Result: whether it has."""

    node: SafekeeperId
    mconf: MembershipConfiguration


@dataclass(frozen=True, slots=True)
class Wait:
    """Not enough members have answered, or the new ones lag: let time pass. ``text`` says for what. No result."""

    text: str


Effect = CompareAndSet | TellCompute | SwitchMembership | PullTimeline | BumpTerm | Exclude | Wait
Steps = Generator[Effect, Any, None]


class Migration:
    """The algorithm. ``order`` arranges the members before each round of questions; any order is right."""

    def __init__(self, order: Callable[[Sequence[SafekeeperId]], Sequence[SafekeeperId]] = list) -> None:
        self._order = order

    # -- the three things that can be asked for

    def change(self, row: Row, target: Members | None = None) -> Generator[Effect, Any, Row]:
        """Go on with the change in the row, or begin one to ``target``; returns the final row.

        Without anything to change it only repeats what comes last. Raises MigrationConflict.
        """
        joint = yield from self._begin(row, target)
        if joint.mconf.new_members is None:
            return (yield from self.spread(joint))
        yield from self._tell(joint.mconf)
        yield from self.prepare(joint.mconf)
        mconf = joint.mconf
        assert mconf.new_members is not None
        final = MembershipConfiguration(mconf.generation + 1, mconf.new_members)
        left = [*joint.pending_exclude, *mconf.members]
        return (yield from self.spread((yield from self._store(joint, final, left))))

    def abort(self, row: Row) -> Generator[Effect, Any, Row]:
        """Go back to the old set, which has decided together with the new one until now. Raises MigrationConflict."""
        mconf = row.mconf
        if mconf.new_members is None:
            raise MigrationConflict(f"generation {mconf.generation} is final: there is no change to abort")
        back = MembershipConfiguration(mconf.generation + 1, mconf.members)
        left = [*row.pending_exclude, *mconf.new_members]
        return (yield from self.spread((yield from self._store(row, back, left))))

    def spread(self, row: Row) -> Generator[Effect, Any, Row]:
        """Tell the members and the compute of the final configuration, then those that left: who is away stays pending."""
        mconf = row.mconf
        told: set[int] = set()
        while True:
            for node in self._order(mconf.members):
                if node.node_id not in told and (yield SwitchMembership(node, mconf)) is not None:
                    told.add(node.node_id)
            if len(told) >= quorum_size(len(mconf.members)):
                break
            yield Wait(f"{len(told)} of {len(mconf.members)} members follow generation {mconf.generation}")
        yield from self._tell(mconf)
        pending = []
        for node in self._order(row.pending_exclude):
            if not (yield Exclude(node, mconf)):
                pending.append(node)
        if len(pending) < len(row.pending_exclude):
            rest = replace(row, pending_exclude=tuple(sorted(pending)))
            yield from self._compare_and_set(row, rest)
            row = rest
        return row

    # -- steps

    def _begin(self, row: Row, target: Members | None) -> Generator[Effect, Any, Row]:
        mconf = row.mconf
        if not mconf.generation:
            raise MigrationConflict("a timeline without membership generation cannot be moved: give it generation 1 first")
        if mconf.new_members is not None:
            if target is not None and not _same(target, mconf.new_members):
                raise MigrationConflict(
                    f"generation {mconf.generation} is already changing to safekeepers {_ids(mconf.new_members)}, "
                    f"not to {_ids(target)}: finish that change or abort it first"
                )
            return row
        if target is None or _same(target, mconf.members):
            return row
        if not target or len({node.node_id for node in target}) != len(target):
            raise MigrationConflict(f"not a set of safekeepers: {_ids(target)}")
        joint = MembershipConfiguration(mconf.generation + 1, mconf.members, target)
        return (yield from self._store(row, joint, row.pending_exclude))

    def prepare(self, joint: MembershipConfiguration) -> Steps:
        """Make the new set fit to decide alone."""
        wanted, term = yield from self._join_old(joint)
        yield from self._fit_new(joint, wanted, term)

    def _join_old(self, joint: MembershipConfiguration) -> Generator[Effect, Any, tuple[tuple[int, int], int]]:
        """Bring a quorum of the old set under the joint configuration; the position and the term that the new set needs."""
        quorum = quorum_size(len(joint.members))
        standings: dict[int, Standing] = {}
        while True:
            for node in self._order(joint.members):
                standing = yield SwitchMembership(node, joint)
                if standing is not None:
                    standings[node.node_id] = standing
            if len(standings) >= quorum:
                # whatever was committed without the joint configuration is known to each quorum of the old set
                positions = sorted(standing.position for standing in standings.values())
                return positions[quorum - 1], max(standing.term for standing in standings.values())
            yield Wait(f"{len(standings)} of {len(joint.members)} old members follow generation {joint.generation}")

    def _fit_new(self, joint: MembershipConfiguration, wanted: tuple[int, int], term: int) -> Steps:
        new = joint.new_members or ()
        while True:
            fit: set[int] = set()
            for node in self._order(new):
                if not (yield PullTimeline(node, joint.members, joint)):
                    continue
                yield from self._raise_term(node, term)
                standing = yield SwitchMembership(node, joint)
                if standing is not None and self.is_fit(standing, wanted, term):
                    fit.add(node.node_id)
            if len(fit) >= quorum_size(len(new)):
                return
            yield Wait(
                f"{len(fit)} of {len(new)} new members have the log up to {wanted[1] >> 32:X}/{wanted[1] & 0xFFFFFFFF:X} "
                f"of term {wanted[0]}"
            )

    def _raise_term(self, node: SafekeeperId, term: int) -> Steps:
        yield BumpTerm(node, term)

    def is_fit(self, standing: Standing, wanted: tuple[int, int], term: int) -> bool:
        """Whether a new member keeps the old set's promises and has its log."""
        return standing.term >= term and standing.position >= wanted

    def _tell(self, mconf: MembershipConfiguration) -> Steps:
        while not (yield TellCompute(mconf)):
            yield Wait("the compute has not taken the list of safekeepers")

    def _store(self, row: Row, mconf: MembershipConfiguration, left: Sequence[SafekeeperId]) -> Generator[Effect, Any, Row]:
        pending = {node for node in left if not mconf.contains(node.node_id)}
        stored = Row(mconf, tuple(sorted(pending)))
        yield from self._compare_and_set(row, stored)
        return stored

    def _compare_and_set(self, expected: Row, row: Row) -> Steps:
        if not (yield CompareAndSet(expected, row)):
            raise MigrationConflict(
                f"the row is not at generation {expected.mconf.generation} as it was a moment ago: "
                f"somebody else is changing it; look at it and start again"
            )


def _same(one: Members, other: Members) -> bool:
    return {node.node_id for node in one} == {node.node_id for node in other}


def _ids(members: Members) -> str:
    return ", ".join(str(node.node_id) for node in members) or "none"

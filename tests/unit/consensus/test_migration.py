"""The membership change as a plan: cut off after every step and begun again it ends the same; and what it must wait for."""

from collections.abc import Generator
from typing import Any

import pytest

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
    Wait,
)
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId

NODES = {i: SafekeeperId(i, f"h{i}", 5454) for i in range(1, 7)}


def members(*ids: int) -> tuple[SafekeeperId, ...]:
    return tuple(NODES[i] for i in ids)


def ids(found: Any) -> list[int]:
    return [m.node_id for m in found]


class Cluster:
    """Safekeepers as numbers: a generation, a term and a position each; absent ones lack the timeline."""

    def __init__(self, row: Row, **standings: tuple[int, int, int]) -> None:
        self.row = row
        self.nodes = {int(name[1:]): Standing(term, last, Lsn(lsn)) for name, (term, last, lsn) in standings.items()}
        self.generation = dict.fromkeys(self.nodes, row.mconf.generation)
        self.down: set[int] = set()
        self.excluded: set[int] = set()
        self.told: list[int] = []
        self.trace: list[Effect] = []

    def perform(self, effect: Effect) -> Any:
        self.trace.append(effect)
        if isinstance(effect, CompareAndSet):
            if self.row != effect.expected:
                return False
            assert effect.row.mconf.generation in (self.row.mconf.generation, self.row.mconf.generation + 1)
            self.row = effect.row
            return True
        if isinstance(effect, TellCompute):
            self.told.append(effect.mconf.generation)
            return True
        if isinstance(effect, Wait):
            raise TimeoutError(effect.text)
        node = effect.node.node_id
        if node in self.down:
            return None
        if isinstance(effect, PullTimeline):
            known = [self.nodes[s.node_id] for s in effect.sources if s.node_id in self.nodes and s.node_id not in self.down]
            if node not in self.nodes:
                self.nodes[node] = max(known, key=lambda s: (s.position, s.term))
            return self._switch(node, effect.mconf) is not None
        if isinstance(effect, SwitchMembership):
            return self._switch(node, effect.mconf)
        if isinstance(effect, BumpTerm):
            standing = self.nodes[node]
            self.nodes[node] = Standing(max(standing.term, effect.term), standing.last_log_term, standing.flush_lsn)
            return True
        assert isinstance(effect, Exclude)
        assert not effect.mconf.contains(node) and effect.mconf.new_members is None
        stay = [m.node_id for m in effect.mconf.members if self.generation.get(m.node_id) == effect.mconf.generation]
        assert len(stay) > len(effect.mconf.members) // 2, "excluded before a quorum follows the final configuration"
        self.nodes.pop(node, None)
        self.excluded.add(node)
        return True

    def _switch(self, node: int, mconf: MembershipConfiguration) -> Standing | None:
        if node not in self.nodes:
            return None
        assert mconf.contains(node) and self.generation.get(node, 0) <= mconf.generation
        self.generation[node] = mconf.generation
        return self.nodes[node]

    def run(self, steps: Generator[Effect, Any, Row], limit: int = 1000) -> Row | None:
        """To the end, or until ``limit`` effects have been carried out (None)."""
        outcome: Any = None
        for _ in range(limit):
            try:
                effect = steps.send(outcome)
            except StopIteration as done:
                return done.value
            outcome = self.perform(effect)
        return None


def row(generation: int, *old: int, new: tuple[int, ...] | None = None, pending: tuple[int, ...] = ()) -> Row:
    return Row(MembershipConfiguration(generation, members(*old), None if new is None else members(*new)), members(*pending))


def three() -> Cluster:
    return Cluster(row(1, 1, 2, 3), n1=(5, 5, 300), n2=(5, 5, 300), n3=(5, 5, 200))


def test_a_change_goes_through_the_joint_configuration() -> None:
    cluster = three()
    final = cluster.run(Migration().change(cluster.row, members(2, 3, 4)))
    assert final == cluster.row == row(3, 2, 3, 4)
    assert cluster.told == [2, 3] and cluster.excluded == {1}
    assert {n: cluster.generation[n] for n in (2, 3, 4)} == {2: 3, 3: 3, 4: 3}
    stores = [e.row for e in cluster.trace if isinstance(e, CompareAndSet)]
    assert stores == [row(2, 1, 2, 3, new=(2, 3, 4)), row(3, 2, 3, 4, pending=(1,)), row(3, 2, 3, 4)]


@pytest.mark.parametrize("target", [(4, 5, 6), (2, 3, 4), (1, 2, 3, 4, 5), (1,)])
def test_cut_off_after_every_step_and_begun_again(target: tuple[int, ...]) -> None:
    whole = three()
    whole.run(Migration().change(whole.row, members(*target)))
    for limit in range(len(whole.trace) + 1):
        for again in (None, members(*target)):
            cluster = three()
            assert cluster.run(Migration().change(cluster.row, members(*target)), limit) in (None, whole.row)
            if limit == 0 and again is None:
                continue
            cluster.run(Migration().change(cluster.row, again))
            assert cluster.row == whole.row
            assert set(cluster.nodes) == set(target)


def test_aborted_after_every_step_before_the_final_one() -> None:
    whole = three()
    whole.run(Migration().change(whole.row, members(4, 5, 6)))
    aborted = 0
    for limit in range(len(whole.trace) + 1):
        cluster = three()
        cluster.run(Migration().change(cluster.row, members(4, 5, 6)), limit)
        if cluster.row.mconf.new_members is None:
            with pytest.raises(MigrationConflict, match="no change to abort"):
                cluster.run(Migration().abort(cluster.row))
            continue
        cluster.run(Migration().abort(cluster.row))
        assert cluster.row == row(3, 1, 2, 3) and set(cluster.nodes) == {1, 2, 3}
        aborted += 1
    assert aborted > 10


def test_the_new_set_needs_the_log_and_the_terms_of_a_quorum_of_the_old() -> None:
    def cluster(**nodes: tuple[int, int, int]) -> Cluster:
        return Cluster(row(1, 1, 2, 3), n1=(5, 4, 300), n2=(7, 4, 250), n3=(5, 4, 200), **nodes)

    lagging = cluster(n4=(0, 4, 249), n5=(0, 3, 900), n6=(0, 4, 250))
    with pytest.raises(TimeoutError, match="1 of 3 new members"):
        lagging.run(Migration().change(lagging.row, members(4, 5, 6)))
    assert lagging.row.mconf.new_members is not None, "finished although the new set lags"
    lagging.nodes[5] = Standing(9, 5, Lsn(100))  # a newer leader's log
    lagging.run(Migration().change(lagging.row))
    assert lagging.row.mconf == row(3, 4, 5, 6).mconf
    assert [lagging.nodes[n].term for n in (4, 5, 6)] == [7, 9, 7]

    class CannotBump(Cluster):
        def perform(self, effect: Effect) -> Any:
            return None if isinstance(effect, BumpTerm) else super().perform(effect)

    stuck = CannotBump(row(1, 1, 2, 3), n1=(5, 4, 300), n2=(7, 4, 300), n3=(5, 4, 300), n4=(0, 4, 300), n5=(0, 4, 300))
    with pytest.raises(TimeoutError, match="0 of 2 new members"):
        stuck.run(Migration().change(stuck.row, members(4, 5)))


def test_without_a_quorum_of_the_old_set_nothing_is_pulled() -> None:
    cluster = three()
    cluster.down = {1, 2}
    with pytest.raises(TimeoutError, match="1 of 3 old members"):
        cluster.run(Migration().change(cluster.row, members(4, 5, 6)))
    assert not any(isinstance(effect, PullTimeline) for effect in cluster.trace)


def test_a_dead_member_is_replaced_and_excluded_when_it_comes_back() -> None:
    cluster = three()
    cluster.down = {1}
    cluster.run(Migration().change(cluster.row, members(2, 3, 4)))
    assert cluster.row == row(3, 2, 3, 4, pending=(1,))
    cluster.run(Migration().change(cluster.row))
    assert ids(cluster.row.pending_exclude) == [1]
    cluster.down = set()
    cluster.run(Migration().change(cluster.row))
    assert cluster.row == row(3, 2, 3, 4) and cluster.excluded == {1}


def test_nobody_forgets_before_a_quorum_follows_the_final_configuration() -> None:
    cluster = Cluster(row(3, 2, 3, 4, pending=(1,)), n1=(5, 5, 300), n2=(5, 5, 300), n3=(5, 5, 300), n4=(5, 5, 300))
    cluster.generation = dict.fromkeys((1, 2, 3, 4), 2)
    cluster.down = {2, 3}
    with pytest.raises(TimeoutError, match="1 of 3 members follow generation 3"):
        cluster.run(Migration().change(cluster.row))
    assert 1 in cluster.nodes and not cluster.excluded
    cluster.down = {3}
    cluster.run(Migration().change(cluster.row))
    assert cluster.excluded == {1} and cluster.row == row(3, 2, 3, 4)


def test_who_comes_back_into_the_set_is_no_longer_to_be_excluded() -> None:
    cluster = three()
    cluster.down = {1}
    cluster.run(Migration().change(cluster.row, members(2, 3, 4)))
    cluster.down = set()
    cluster.run(Migration().change(cluster.row, members(1, 2, 3)))
    assert cluster.row == row(5, 1, 2, 3) and cluster.excluded == {4}


def test_two_who_change_the_same_row() -> None:
    cluster = three()
    first, second = (Migration().change(cluster.row, members(*target)) for target in ((2, 3, 4), (4, 5, 6)))
    assert cluster.run(first, 1) is None
    with pytest.raises(MigrationConflict, match="somebody else"):
        cluster.run(second)
    joint = cluster.row
    finishing = Migration().change(joint)
    cluster.run(Migration().abort(joint))
    with pytest.raises(MigrationConflict, match="somebody else"):
        # the aborted members refuse an older generation; a controller that does not notice fails at the store
        outcome: Any = None
        while True:
            effect = finishing.send(outcome)
            if isinstance(effect, CompareAndSet):
                outcome = cluster.perform(effect)
            elif isinstance(effect, SwitchMembership):
                outcome = Standing(9, 9, Lsn(999))
            else:
                outcome = True
    assert cluster.row == row(3, 1, 2, 3)


@pytest.mark.parametrize(
    ("stored", "target", "message"),
    [
        (row(0, 1, 2, 3), (2, 3, 4), "without membership generation"),
        (row(2, 1, 2, 3, new=(2, 3, 4)), (4, 5, 6), "already changing"),
        (row(1, 1, 2, 3), (), "not a set"),
        (row(1, 1, 2, 3), (4, 4), "not a set"),
    ],
)
def test_nonsense_is_refused_before_anything_happens(stored: Row, target: tuple[int, ...], message: str) -> None:
    with pytest.raises(MigrationConflict, match=message):
        next(Migration().change(stored, members(*target)))

"""Quorums, also of joint configurations."""

import itertools

import pytest

from neon_services.consensus.membership import is_quorum, quorum_lsn, quorum_size, voter_sets
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP, MembershipConfiguration, SafekeeperId


def members(*ids: int) -> tuple[SafekeeperId, ...]:
    return tuple(SafekeeperId(i, "h", 1) for i in ids)


@pytest.mark.parametrize(("voters", "least"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_size(voters: int, least: int) -> None:
    assert quorum_size(voters) == least
    assert 2 * least > voters


def test_joint_needs_both() -> None:
    sets = voter_sets(MembershipConfiguration(2, members(1, 2, 3), members(3, 4, 5)))
    assert not is_quorum(sets, {1, 2, 3})
    assert not is_quorum(sets, {3, 4, 5})
    assert is_quorum(sets, {1, 3, 4})
    assert is_quorum(sets, {1, 2, 4, 5})


def test_nobody_is_no_quorum() -> None:
    assert not is_quorum(voter_sets(NO_MEMBERSHIP), {1, 2, 3})
    assert quorum_lsn(voter_sets(NO_MEMBERSHIP), {1: Lsn(5)}, Lsn(0)) == 0


def test_lsn_is_what_a_quorum_has() -> None:
    """Against the definition: the greatest position for which those at or beyond it are a quorum."""
    for old, new in (((1, 2, 3), None), ((1, 2), (2, 3, 4)), ((1, 2, 3), (4, 5, 6))):
        sets = voter_sets(MembershipConfiguration(1, members(*old), None if new is None else members(*new)))
        nodes = sorted({*old, *(new or ())})
        for positions in itertools.product((0, 10, 20), repeat=len(nodes)):
            flushed = {node: Lsn(lsn) for node, lsn in zip(nodes, positions, strict=True)}
            for floor in (0, 15):
                counted = {node: lsn for node, lsn in flushed.items() if lsn >= floor}
                best = max(
                    (p for p in (0, 10, 20) if is_quorum(sets, {n for n, lsn in counted.items() if lsn >= p})), default=0
                )
                assert quorum_lsn(sets, flushed, Lsn(floor)) == best

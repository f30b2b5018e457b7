"""What a quorum is: more than half of a voter set; while the membership changes, more than half of the old AND of the new one.

Invariant: two quorums of one configuration, or of configurations that follow each other, share a member.
"""

from collections.abc import Collection, Mapping

from neon_services.ground.lsn import INVALID_LSN, Lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration

#: One set of voters, or two of them during a membership change.
VoterSets = tuple[frozenset[int], ...]


def quorum_size(voters: int) -> int:
    """The least number of voters that is more than half."""
    return voters // 2 + 1


def voter_sets(mconf: MembershipConfiguration) -> VoterSets:
    """The sets of node ids each of which must give a quorum."""
    sets = [frozenset(member.node_id for member in mconf.members)]
    if mconf.new_members is not None:
        sets.append(frozenset(member.node_id for member in mconf.new_members))
    return tuple(sets)


def is_quorum(sets: VoterSets, present: Collection[int]) -> bool:
    """Whether these nodes are a quorum of every set. An empty set has no quorum."""
    return all(len(voters.intersection(present)) >= quorum_size(len(voters)) for voters in sets)


def quorum_lsn(sets: VoterSets, flushed: Mapping[int, Lsn], floor: Lsn) -> Lsn:
    """The highest position that a quorum of every set has flushed; a flush position below ``floor`` counts as nothing."""
    lowest: Lsn | None = None
    for voters in sets:
        if not voters:
            return INVALID_LSN
        ranked = sorted([flushed.get(node, INVALID_LSN) for node in voters])
        reached = ranked[len(ranked) - quorum_size(len(ranked))]
        if reached < floor:
            return INVALID_LSN
        if lowest is None or reached < lowest:
            lowest = reached
    return lowest or INVALID_LSN

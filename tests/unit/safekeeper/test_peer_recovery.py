"""Which peer a lagging member may catch up from, and what it takes: the decisions."""

from dataclasses import replace

import pytest

from neon_services.consensus.acceptor import Acceptor, AcceptorState, PeerInfo
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId, TermLsn
from neon_services.safekeeper.connections import Peer
from neon_services.safekeeper.peer_client import PeerStatus
from neon_services.safekeeper.peer_recovery import RecoveryPlan, choose_peer, plan
from tests.unit.safekeeper.test_timelines import TTID

MCONF = MembershipConfiguration(3, (SafekeeperId(1, "h", 1), SafekeeperId(2, "h", 1)))


def history(*entries: tuple[int, int]) -> tuple[TermLsn, ...]:
    return tuple(TermLsn(term, Lsn(lsn)) for term, lsn in entries)


class Store:
    def __init__(self, lsn: int) -> None:
        self.write_lsn = self.write_record_lsn = self.flush_lsn = Lsn(lsn)


def acceptor(term: int, flush: int, *entries: tuple[int, int], commit: int = 0x100) -> Acceptor:
    state = AcceptorState(mconf=MCONF, term=term, term_history=history(*entries), commit_lsn=Lsn(commit))
    return Acceptor(1, TTID, state, Store(flush))


def peer(sk_id: int, term: int, last_log_term: int, flush: int) -> Peer:
    info = PeerInfo(last_log_term, Lsn(0), Lsn(0), Lsn(0), Lsn(0))
    return Peer(sk_id, term, Lsn(flush), Lsn(0), info, "h:1", "h:2", None, 0.0)


def test_the_best_peer_that_holds_the_newest_leaders_log() -> None:
    mine = acceptor(5, 0x300, (1, 0x100), (4, 0x200))
    ahead, further, newer = peer(2, 5, 5, 0x400), peer(3, 5, 5, 0x500), peer(4, 6, 6, 0x280)
    assert choose_peer(mine, [ahead, further]) is further
    assert choose_peer(mine, [ahead, newer, further]) is newer
    for unfit in (
        peer(1, 9, 9, 0x900),  # itself
        peer(2, 4, 4, 0x300),  # not ahead
        peer(2, 4, 4, 0x900),  # a leader of a term below the one promised here
        peer(2, 7, 5, 0x900),  # has promised a newer term than its log is of
    ):
        assert choose_peer(mine, [unfit]) is None, unfit


DONOR = PeerStatus(MCONF, 5, 5, Lsn(0x500), Lsn(0x400), history((1, 0x100), (5, 0x280)))


def test_what_is_taken() -> None:
    lagging = acceptor(5, 0x300, (1, 0x100), (4, 0x200), commit=0x200)
    assert plan(lagging, DONOR) == RecoveryPlan(3, 5, DONOR.term_history, Lsn(0x200), Lsn(0x500))
    assert plan(acceptor(0, 0, commit=0), DONOR) == RecoveryPlan(3, 5, DONOR.term_history, Lsn(0x100), Lsn(0x500))
    same_leader = acceptor(5, 0x300, (1, 0x100), (5, 0x280), commit=0x300)
    assert plan(same_leader, DONOR) == RecoveryPlan(3, 5, DONOR.term_history, Lsn(0x300), Lsn(0x500))


@pytest.mark.parametrize(
    "donor",
    [
        replace(DONOR, mconf=replace(MCONF, generation=2)),
        replace(DONOR, mconf=replace(MCONF, generation=4)),
        replace(DONOR, term=6),
        replace(DONOR, term=4, last_log_term=4, term_history=history((1, 0x100), (4, 0x280))),
        replace(DONOR, flush_lsn=Lsn(0x270)),
        replace(DONOR, term_history=()),
    ],
)
def test_nothing_is_taken(donor: PeerStatus) -> None:
    assert plan(acceptor(5, 0x300, (1, 0x100), (4, 0x200), commit=0x200), donor) is None


def test_nothing_committed_is_cut() -> None:
    assert plan(acceptor(5, 0x300, (1, 0x100), (4, 0x200), commit=0x208), DONOR) is None

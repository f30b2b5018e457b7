"""Peer recovery between real safekeepers, without a compute, under a membership generation."""

from collections.abc import Iterator

import pytest

from neon_services.protocols.safekeeper_messages import MembershipConfiguration
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, new_ttid, running_fleet, until
from tests.integration.test_pull_timeline import SEGMENT, START, create, members, proposer
from tests.unit.safekeeper.walmaker import WalMaker

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("recovery"), 3, "--peer-recovery", "true") as fleet:
        yield fleet


@pytest.mark.parametrize("new", [False, True], ids=["with a tail of its own", "that never heard of it"])
async def test_a_lagging_member_catches_up_without_a_compute(fleet: Fleet, new: bool) -> None:
    ttid, lagging = new_ttid(), fleet.nodes[2]
    mconf = MembershipConfiguration(4, members(*fleet.nodes))
    create(ttid, mconf, fleet.nodes)
    wal = WalMaker(START, SEGMENT).records(100)
    if not new:
        first = proposer(ttid, wal, mconf)
        await first.elect(fleet.nodes)
        common = wal.record_ends[50]
        await first.stream(common)
        first.send(first.members[2], wal.end)
        while first.members[2].flushed < wal.end:
            await first.answer(first.members[2])
        first.leave()
        assert lagging.lsn(ttid, "flush_lsn") == wal.end
        wal = WalMaker(START, SEGMENT, seed=9, data=wal.data[: common - START], record_ends=wal.record_ends[:51])
    wal.until(wal.end + 2 * SEGMENT, 30_000)
    second = proposer(ttid, wal, mconf)
    await second.elect(fleet.nodes[:2])
    await second.stream(wal.end)
    second.leave()
    await until(lambda: lagging.lsn(ttid, "commit_lsn") == wal.end, "the lagging member has and commits everything", 30)
    assert len({node.digest(ttid, START, wal.end) for node in fleet.nodes}) == 1
    states = [node.status(ttid)["acceptor_state"] for node in fleet.nodes]
    assert states[2] == states[0]
    # it is a member like the others: a new leader takes it, and while that one streams nobody interferes
    third = proposer(ttid, wal, mconf)
    await third.elect([fleet.nodes[1], lagging])
    wal.records(20)
    await third.stream(wal.end)
    third.leave()
    assert lagging.digest(ttid, START, wal.end) == fleet.nodes[1].digest(ttid, START, wal.end)
    await until(lambda: fleet.nodes[0].lsn(ttid, "commit_lsn") == wal.end, "the first member has caught up as well", 30)
    http("DELETE", lagging.timeline_url(ttid))

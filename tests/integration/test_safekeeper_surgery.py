"""Copying a timeline and patching a control file at a real safekeeper."""

from collections.abc import Iterator

import pytest

from neon_services.ground.ids import TenantTimelineId, TimelineId
from neon_services.ground.lsn import format_lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, dead, new_ttid, running_fleet
from tests.integration.test_pull_timeline import SEGMENT, START, create, members, present, proposer, refusal
from tests.unit.safekeeper.walmaker import WalMaker

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("surgery"), 1) as fleet:
        yield fleet


async def test_a_copy_ends_where_it_should_and_lives_on(fleet: Fleet) -> None:
    node, ttid = fleet.nodes[0], new_ttid()
    mconf = MembershipConfiguration(1, members(node))
    wal = WalMaker(START, SEGMENT).until(START + 3 * SEGMENT, 30_000)
    create(ttid, mconf, [node])
    leader = proposer(ttid, wal, mconf)
    await leader.elect([node])
    await leader.stream(wal.end)
    until = wal.last_record_end(START + 2 * SEGMENT)
    target = TenantTimelineId(ttid.tenant_id, TimelineId.generate())
    body = {"target_timeline_id": str(target.timeline_id), "until_lsn": format_lsn(until)}

    def copy(**changes: str) -> None:
        assert http("POST", node.timeline_url(ttid, "/copy"), {**body, **changes}) is None

    for changes, part in (
        ({"until_lsn": format_lsn(until - 8)}, "not the end of a record"),
        ({"until_lsn": format_lsn(wal.end + 8)}, "commit_lsn"),
        ({"until_lsn": format_lsn(START - 8)}, "beginning"),
        ({"target_timeline_id": "q"}, "target_timeline_id"),
    ):
        code, message = refusal(lambda changes=changes: copy(**changes))  # type: ignore[misc]
        assert code == 400 and part in message
        assert not present(node, target) and not list((node.directory / "tmp").glob("*"))
    copy()
    copy()  # an existing one is fine
    status = node.status(target)
    assert status["flush_lsn"] == status["commit_lsn"] == format_lsn(until)
    assert status["mconf"]["generation"] == 1 and status["acceptor_state"]["epoch"] == 1
    assert node.digest(target, START, until) == node.digest(ttid, START, until)
    node.kill()
    node.start()
    assert node.digest(target, START, until) == node.digest(ttid, START, until)
    leader.leave()
    branch = WalMaker(START, SEGMENT, data=wal.data[: until - START], seed=7).records(20)
    successor = proposer(target, branch, mconf)
    await successor.elect([node])
    await successor.stream(until)
    assert node.lsn(ttid, "flush_lsn") == wal.end
    successor.leave()


async def test_a_patched_control_file_is_in_force_and_survives(fleet: Fleet) -> None:
    node, ttid = fleet.nodes[0], new_ttid()
    mconf = MembershipConfiguration(1, members(node))
    wal = WalMaker(START, SEGMENT).records(30)
    create(ttid, mconf, [node])
    leader = proposer(ttid, wal, mconf)
    await leader.elect([node])
    await leader.stream(wal.end)
    url = node.timeline_url(ttid, "/control_file")
    before = http("PATCH", url, {"updates": {}, "apply_fields": []})
    assert before["old_control_file"] == before["new_control_file"]
    updates = {"remote_consistent_lsn": format_lsn(wal.record_ends[3]), "commit_lsn": "7/7", "backup_lsn": 3}
    answer = http("PATCH", url, {"updates": updates, "apply_fields": ["remote_consistent_lsn"]})
    assert answer["new_control_file"] == {
        **answer["old_control_file"],
        "remote_consistent_lsn": updates["remote_consistent_lsn"],
    }
    assert "replaced" in await dead(leader.members[0].client)
    for name in ("commit_lsn", "backup_lsn"):
        code, message = refusal(lambda name=name: http("PATCH", url, {"updates": updates, "apply_fields": [name]}))  # type: ignore[misc]
        assert code == 400 and name in message
    for _ in range(2):
        status = node.status(ttid)
        assert status["remote_consistent_lsn"] == updates["remote_consistent_lsn"]
        assert status["flush_lsn"] == status["commit_lsn"] == format_lsn(wal.end)
        node.kill()
        node.start()
    leader.leave()

"""Create, membership, exclude and delete at real safekeepers: statuses, and late messages that must not bring anything back."""

import asyncio
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from neon_services.ground.lsn import format_lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, ProposerGreeting
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, Node, dead, new_ttid, running_fleet
from tests.integration.test_pull_timeline import START, create, members, present, proposer, pull, refusal
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

pytestmark = pytest.mark.cluster
SEGMENT = 1 << 20


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("membership"), 3) as fleet:
        yield fleet


def excluding(node: Node, ttid: Any, mconf: MembershipConfiguration) -> Callable[[], Any]:
    return lambda: http("PUT", node.timeline_url(ttid, "/exclude"), mconf.to_json())


async def test_an_excluded_safekeeper_ends_its_connections_and_stays_excluded(fleet: Fleet) -> None:
    ttid, wal = new_ttid(), WalMaker(START, SEGMENT).records(50)
    old = MembershipConfiguration(1, members(*fleet.nodes))
    new = MembershipConfiguration(2, members(*fleet.nodes[1:]))
    create(ttid, old, fleet.nodes)
    leader = proposer(ttid, wal, old)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    leaver = fleet.nodes[0]
    assert refusal(excluding(leaver, ttid, old))[0] == 403
    assert refusal(excluding(fleet.nodes[1], ttid, new))[0] == 403
    assert refusal(lambda: http("PUT", leaver.timeline_url(ttid, "/membership"), new.to_json()))[0] == 403
    assert excluding(leaver, ttid, new)() == {"dir_existed": True}
    assert "deleted" in await dead(leader.members[0].client)
    assert excluding(leaver, ttid, new)() == {"dir_existed": False}
    assert not present(leaver, ttid)

    # late messages of generation 1: the controller's creation, a pull, and a compute without generations
    assert refusal(lambda: create(ttid, old, [leaver]))[0] == 409
    assert refusal(lambda: pull(leaver, ttid, [fleet.nodes[1].url("")], old))[0] == 409
    assert refusal(lambda: pull(leaver, ttid, [fleet.nodes[1].url("")]))[0] == 409
    client = await leaver.connect(ttid, "walproposer")
    await client.start_copy_both("START_WAL_PUSH (proto_version '3', allow_timeline_creation 'true')")
    client.send_copy_data(ProposerGreeting(ttid, MembershipConfiguration(), PG_VERSION, SYSTEM_ID, SEGMENT).pack())
    assert "was deleted" in await dead(client)
    assert not present(leaver, ttid)

    # generation 3 takes it back
    back = replace(old, generation=3)
    assert pull(leaver, ttid, [node.url("") for node in fleet.nodes[1:]], back) is not None
    assert leaver.lsn(ttid, "flush_lsn") == wal.end
    code, message = refusal(excluding(leaver, ttid, new))
    assert code == 409 and "newer" in message
    assert present(leaver, ttid)
    leader.leave()


async def test_a_creation_races_with_an_exclusion(fleet: Fleet) -> None:
    """Whichever comes first, a member of generation 1 does not outlive the exclusion of generation 2."""
    node = fleet.nodes[0]
    old = MembershipConfiguration(1, members(*fleet.nodes))
    new = MembershipConfiguration(2, members(*fleet.nodes[1:]))
    for _ in range(10):
        ttid = new_ttid()

        def late(ttid: Any = ttid) -> None:
            try:
                create(ttid, old, [node])
            except urllib.error.HTTPError as error:
                assert error.code == 409, error.msg

        await asyncio.gather(asyncio.to_thread(late), asyncio.to_thread(excluding(node, ttid, new)))
        assert not present(node, ttid)


def test_membership_statuses(fleet: Fleet) -> None:
    node, ttid = fleet.nodes[0], new_ttid()
    first = MembershipConfiguration(5, members(*fleet.nodes))
    assert refusal(lambda: create(ttid, replace(first, members=members(*fleet.nodes[1:])), [node]))[0] == 403
    assert refusal(lambda: http("PUT", node.timeline_url(ttid, "/membership"), first.to_json()))[0] == 404
    create(ttid, first, [node])
    create(ttid, first, [node])
    answer = http("PUT", node.timeline_url(ttid, "/membership"), replace(first, generation=6).to_json())
    assert (answer["previous_conf"]["generation"], answer["current_conf"]["generation"]) == (5, 6)
    assert (answer["last_log_term"], answer["flush_lsn"]) == (0, format_lsn(START))
    assert refusal(lambda: http("PUT", node.timeline_url(ttid, "/membership"), first.to_json()))[0] == 409
    for bad, name in (
        ({}, "generation"),
        ({"generation": 7}, "members"),
        ({"generation": 7, "members": [{"id": 1}]}, "pg_port"),
    ):
        for action in ("/membership", "/exclude"):
            code, message = refusal(lambda bad=bad, action=action: http("PUT", node.timeline_url(ttid, action), bad))  # type: ignore[misc]
            assert code == 400 and name in message
    assert http("DELETE", node.timeline_url(ttid)) == {"dir_existed": True}
    assert refusal(lambda: create(ttid, replace(first, generation=99), [node]))[0] == 409

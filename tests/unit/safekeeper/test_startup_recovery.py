"""What the control plane's answer may be, and what must not be made anew meanwhile."""

import copy
from pathlib import Path
from typing import Any

import pytest

from neon_services.consensus.acceptor import AcceptorState
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP
from neon_services.safekeeper.pull_timeline import PullRequest
from neon_services.safekeeper.startup_recovery import Assigned, StartupRecovery, parse_answer
from neon_services.safekeeper.timelines import TimelineAwaited, TimelineDeleted, Timelines

TTID = TenantTimelineId(TenantId.parse("1" * 32), TimelineId.parse("2" * 32))
GOOD: dict[str, Any] = {
    "timelines": [{"tenant_id": "1" * 32, "timeline_id": "2" * 32, "peers": [3, 1, 2]}],
    "safekeeper_peers": [
        {"node_id": 1, "listen_http_addr": "10.0.0.1", "http_port": 7676},
        {"node_id": 2, "listen_http_addr": "fe80::2", "http_port": 7677},
    ],
}


def test_the_other_members_by_their_addresses() -> None:
    assert parse_answer(GOOD, 3) == [Assigned(TTID, ("http://10.0.0.1:7676", "http://[fe80::2]:7677"))]
    assert parse_answer(GOOD, 1) == [Assigned(TTID, None)], "nobody knows where safekeeper 3 is"
    alone = {"timelines": [{**GOOD["timelines"][0], "peers": [3]}], "safekeeper_peers": []}
    assert parse_answer(alone, 3) == [Assigned(TTID, ())]
    assert parse_answer({"timelines": [], "safekeeper_peers": []}, 3) == []


def test_with_https_only_what_answers_there_is_an_address() -> None:
    assert parse_answer(GOOD, 3, use_https=True) == [Assigned(TTID, None)]
    peers = [{**peer, "https_port": 8000 + number} for number, peer in enumerate(GOOD["safekeeper_peers"])]
    found = parse_answer({**GOOD, "safekeeper_peers": peers}, 3, use_https=True)
    assert found == [Assigned(TTID, ("https://10.0.0.1:8000", "https://[fe80::2]:8001"))]
    with pytest.raises(ValueError, match="address"):
        parse_answer({**GOOD, "safekeeper_peers": [{**peers[0], "https_port": "8000"}]}, 3)


def test_any_other_shape_is_refused() -> None:
    """Every value replaced by every kind of wrong one, and every field taken away."""
    wrongs: list[Any] = [None, True, -1, 1 << 64, 1.5, "", "x", [], {}, [None], {"a": 1}]

    def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
        return [path, *(found for key, child in inside for found in places(child, (*path, key)))]

    refused = 0
    for path in places(GOOD)[1:]:
        for wrong in wrongs:
            changed = copy.deepcopy(GOOD)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = wrong
            try:
                parse_answer(changed, 3)
            except ValueError:
                refused += 1
        if isinstance(path[-1], str):
            changed = copy.deepcopy(GOOD)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            del parent[path[-1]]
            with pytest.raises(ValueError, match=path[-1]):
                parse_answer(changed, 3)
    assert refused > 100
    for wrong in wrongs:
        with pytest.raises(ValueError):
            parse_answer(wrong, 3)


def test_until_the_answer_nothing_is_made_anew_but_what_is_here_is_served(tmp_path: Path) -> None:
    timelines = Timelines(tmp_path, 3, sync=False)
    timelines.load()
    state = AcceptorState.create(
        NO_MEMBERSHIP, pg_version=150004, system_id=1, wal_seg_size=1 << 20, start_lsn=Lsn(0x2000), commit_lsn=Lsn(0x2000)
    )
    here = timelines.create(TTID, state)
    StartupRecovery(3, timelines, None, "http://control")  # type: ignore[arg-type]
    other = TenantTimelineId(TTID.tenant_id, TimelineId.parse("3" * 32))
    with pytest.raises(TimelineAwaited, match="http://control has not said yet"):
        timelines.create(other, state)
    assert timelines.create(TTID, state) is here


async def test_a_timeline_that_was_deleted_meanwhile_is_not_copied(tmp_path: Path) -> None:
    class Puller:
        async def pull(self, request: PullRequest) -> str | None:
            raise TimelineDeleted(f"timeline {request.ttid} was deleted here")

    timelines = Timelines(tmp_path, 3, sync=False)
    recovery = StartupRecovery(3, timelines, Puller(), "http://127.0.0.1:1")  # type: ignore[arg-type]
    assigned = Assigned(TTID, ("http://127.0.0.1:1",))  # nobody listens there, so nobody says that it has nothing
    recovery._awaited = {TTID: assigned}
    await recovery._try(assigned)
    assert recovery._awaited == {}

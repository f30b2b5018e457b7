"""The HTTP API of real safekeepers: timelines, memberships, deletions, wrong bodies."""

from collections.abc import Iterator

import pytest

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, format_lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, ProposerGreeting
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, dead, new_ttid, read_stream, running_fleet
from tests.integration.scripted_wal import START, error_of, members_of, proposer
from tests.unit.safekeeper.walmaker import PG_VERSION, WalMaker

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet"), 3, "--heartbeat-timeout", "3s") as fleet:
        yield fleet


async def test_timelines_made_by_the_api_with_generations(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(30)
    mconf = MembershipConfiguration(1, members_of(fleet))
    leader = proposer(wal, generation=1, mconf=mconf)
    body = {
        "tenant_id": str(leader.ttid.tenant_id),
        "timeline_id": str(leader.ttid.timeline_id),
        "mconf": mconf.to_json(),
        "pg_version": PG_VERSION,
        "start_lsn": format_lsn(START),
        "commit_lsn": format_lsn(START),
    }
    for node in fleet.nodes:
        assert http("POST", node.url("/v1/tenant/timeline"), body) is None
        assert http("POST", node.url("/v1/tenant/timeline"), body) is None, "an existing timeline is fine"
        assert {"tenant_id": body["tenant_id"], "timeline_id": body["timeline_id"]} in http(
            "GET", node.url("/v1/tenant/timeline")
        )
    await leader.elect(fleet.nodes)
    assert leader.term_start == START
    await leader.stream(wal.record_ends[9])
    # the membership moves on: the old generation is refused, the new one works
    newer = MembershipConfiguration(2, members_of(fleet)[:2], members_of(fleet))
    for node in fleet.nodes:
        url = node.timeline_url(leader.ttid, "/membership")
        answer = http("PUT", url, newer.to_json())
        assert (answer["previous_conf"]["generation"], answer["current_conf"]) == (1, newer.to_json())
        assert (answer["last_log_term"], answer["flush_lsn"]) == (1, format_lsn(wal.record_ends[9]))
        assert error_of("PUT", url, mconf.to_json())[0] == 409
        without_it = MembershipConfiguration(3, tuple(m for m in members_of(fleet) if m.node_id != node.id))
        assert error_of("PUT", url, without_it.to_json())[0] == 403
    leader.send(leader.members[0], wal.end)
    assert "generation" in await dead(leader.members[0].client)
    leader.leave()
    next_leader = proposer(wal, ttid=leader.ttid, generation=2)
    await next_leader.elect(fleet.nodes)
    await next_leader.stream(wal.end)
    next_leader.leave()


async def test_deleting_ends_streams_and_leaves_a_tombstone(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(5)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    node = fleet.nodes[0]
    reader = await node.connect(leader.ttid)
    await read_stream(reader, START, wal.end)
    assert http("DELETE", node.timeline_url(leader.ttid)) == {"dir_existed": True}
    assert http("DELETE", node.timeline_url(leader.ttid) + "?only_local=true") == {"dir_existed": False}
    assert "was deleted" in await dead(reader)
    assert "was deleted" in await dead(leader.members[0].client)
    assert not (node.directory / str(leader.ttid.tenant_id) / str(leader.ttid.timeline_id)).exists()
    assert error_of("GET", node.timeline_url(leader.ttid))[0] == 404
    client = await node.connect(leader.ttid)
    await client.start_copy_both("START_WAL_PUSH (proto_version '3', allow_timeline_creation 'true')")
    client.send_copy_data(ProposerGreeting(leader.ttid, leader.mconf, PG_VERSION, 0, WAL_SEGMENT_SIZE).pack())
    assert "was deleted" in await dead(client)
    body = {"tenant_id": str(leader.ttid.tenant_id), "timeline_id": str(leader.ttid.timeline_id)}
    body |= {"pg_version": PG_VERSION, "start_lsn": "0/1000028"}  # type: ignore[dict-item]
    assert error_of("POST", node.url("/v1/tenant/timeline"), body)[0] == 409
    tenant_url = fleet.nodes[1].url(f"/v1/tenant/{leader.ttid.tenant_id}")
    assert http("DELETE", tenant_url) == {str(leader.ttid.timeline_id): {"dir_existed": True}}
    leader.leave()


async def test_wrong_json_is_refused_by_field(fleet: Fleet) -> None:
    url = fleet.nodes[0].url("/v1/tenant/timeline")
    good = {"tenant_id": "1" * 32, "timeline_id": "2" * 32, "pg_version": 150004, "start_lsn": "0/1000028"}
    for change, field in (
        ({"tenant_id": "xyz"}, "tenant_id"),
        ({"timeline_id": None}, "timeline_id"),
        ({"pg_version": "15"}, "pg_version"),
        ({"pg_version": -1}, "pg_version"),
        ({"start_lsn": "1000028"}, "start_lsn"),
        ({"start_lsn": "0/0"}, "start_lsn"),
        ({"commit_lsn": "0/1"}, "commit_lsn"),
        ({"wal_seg_size": 1000}, "wal_seg_size"),
        ({"mconf": {"generation": 1, "members": []}}, "mconf"),
        ({"mconf": 7}, "mconf"),
    ):
        status, message = error_of("POST", url, {**good, **change})
        assert (status, field in message) == (400, True), message
    elsewhere = {"generation": 1, "members": [{"id": 99, "host": "h", "pg_port": 1}], "new_members": None}
    assert error_of("POST", url, {**good, "mconf": elsewhere})[0] == 403
    assert error_of("POST", url, b"{")[0] == 400
    assert error_of("POST", url, [1])[0] == 400
    ttid = new_ttid()
    assert error_of("GET", fleet.nodes[0].url(f"/v1/tenant/zzz/timeline/{ttid.timeline_id}"))[0] == 400
    assert error_of("POST", fleet.nodes[0].timeline_url(ttid, "/term_bump"), {"term": "1"})[0] == 400
    assert error_of("POST", fleet.nodes[0].timeline_url(ttid, "/term_bump"))[0] == 404


async def test_checkpoint_and_debug_dump(fleet: Fleet) -> None:
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(10)
    leader = proposer(wal)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    node = fleet.nodes[0]
    dump_url = node.url(f"/v1/debug_dump?dump_all=true&timeline_id={leader.ttid.timeline_id}")
    (before,) = http("GET", dump_url)["timelines"]
    assert before["memory"]["mem_state"]["commit_lsn"] == format_lsn(wal.end)
    assert before["control_file"]["commit_lsn"] != format_lsn(wal.end)
    assert http("POST", node.timeline_url(leader.ttid, "/checkpoint")) is None
    dump = http("GET", dump_url)
    (after,) = dump["timelines"]
    assert after["control_file"]["commit_lsn"] == format_lsn(wal.end)
    files = {file["name"]: file for file in after["disk_content"]["files"]}
    assert files["000000010000000000000001.partial"]["size"] == WAL_SEGMENT_SIZE
    assert files["000000010000000000000001.partial"]["end_zeroes"] >= 2 * WAL_SEGMENT_SIZE - wal.end
    assert dump["config"] == {
        "id": 1,
        "workdir": str(node.directory),
        "listen_pg_addr": f"127.0.0.1:{node.pg_port}",
        "listen_http_addr": f"127.0.0.1:{node.http_port}",
        "no_sync": False,
        "max_offloader_lag_bytes": 1 << 27,
        "wal_backup_enabled": False,
    }
    assert error_of("GET", node.url("/v1/debug_dump?dump_all=maybe"))[0] == 400
    assert http("GET", node.url("/v1/utilization"))["timeline_count"] >= 1
    leader.leave()

"""A safekeeper that lost its disk gets its timelines back from their members, and votes in no term of which they know."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    AcceptorGreeting,
    MembershipConfiguration,
    ProposerGreeting,
    VoteRequest,
    VoteResponse,
    parse_acceptor_message,
)
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, Node, ScriptedProposer, dead, new_ttid, running_fleet
from tests.integration.test_pull_timeline import create, members, present, proposer, refusal
from tests.integration.test_safekeeper_metrics import scrape
from tests.unit.safekeeper.walmaker import PG_VERSION, WalMaker
from tests.waiting import until

pytestmark = pytest.mark.cluster
SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)


@dataclass
class ControlPlane:
    """Answers what a safekeeper asks at its start, or that it cannot."""

    url: str = ""
    answer: Any = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    async def timelines(self, request: web.Request) -> web.Response:
        self.asked.append((request.path_qs, request.headers.get("Authorization")))
        if self.answer is None:
            return web.json_response({"msg": "not now"}, status=503)
        return web.json_response(self.answer)

    def assigns(self, ttids: list[TenantTimelineId], nodes: list[Node]) -> None:
        """From now on, these timelines belong on these nodes."""
        self.answer = {
            "timelines": [
                {"tenant_id": str(t.tenant_id), "timeline_id": str(t.timeline_id), "peers": [n.id for n in nodes]}
                for t in ttids
            ],
            "safekeeper_peers": [{"node_id": n.id, "listen_http_addr": "127.0.0.1", "http_port": n.http_port} for n in nodes],
        }


@pytest.fixture
async def control() -> AsyncIterator[ControlPlane]:
    plane = ControlPlane()
    application = web.Application()
    application.router.add_get("/{path:.*}", plane.timelines)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    plane.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    yield plane
    await runner.cleanup()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with running_fleet(tmp_path, 3, "--remote-storage", f"{{local_path='{tmp_path / 'bucket'}'}}") as fleet:
        yield fleet


async def written(fleet: Fleet, generation: int) -> tuple[ScriptedProposer, WalMaker]:
    """A timeline with some WAL on all nodes; its leader has left."""
    ttid, wal = new_ttid(), WalMaker(START, SEGMENT).until(START + SEGMENT, 20_000)
    mconf = MembershipConfiguration(1, members(*fleet.nodes)) if generation else NO_MEMBERSHIP
    if generation:
        create(ttid, mconf, fleet.nodes)
    leader = proposer(ttid, wal, mconf)
    await leader.elect(fleet.nodes)
    await leader.stream(wal.end)
    leader.leave()
    return leader, wal


def lose_disk(node: Node, control: ControlPlane) -> None:
    """Start again with nothing but the id, asking the control plane."""
    node.kill()
    shutil.rmtree(node.directory)
    node.directory.mkdir()
    node.argv += ["--enable-pull-timeline-on-startup", "--hcc-base-url", control.url]
    node.environment = {"HCC_AUTH_TOKEN": "a.b.c"}
    node.start()


async def greeted(node: Node, ttid: TenantTimelineId) -> Any:
    """The connection of a compute that may create the timeline, which has greeted."""
    client = await node.connect(ttid, "walproposer")
    await client.start_copy_both("START_WAL_PUSH (proto_version '3', allow_timeline_creation 'true')")
    client.send_copy_data(ProposerGreeting(ttid, NO_MEMBERSHIP, PG_VERSION, 0, SEGMENT).pack())
    return client


async def refused_greeting(node: Node, ttid: TenantTimelineId) -> str:
    return await dead(await greeted(node, ttid))


def timeline_body(ttid: TenantTimelineId) -> dict[str, Any]:
    ids = {"tenant_id": str(ttid.tenant_id), "timeline_id": str(ttid.timeline_id)}
    return {**ids, "pg_version": PG_VERSION, "start_lsn": "0/1002028"}


async def test_timelines_come_back_with_the_promises_of_all_the_others(fleet: Fleet, control: ControlPlane) -> None:
    old, _ = await written(fleet, 0)
    new, wal = await written(fleet, 1)
    unborn, strange = new_ttid(), new_ttid()
    a, b, lost = fleet.nodes
    # a leader was elected in term 7 by b and the lost one; a was not asked
    http("POST", b.timeline_url(new.ttid, "/term_bump"), {"term": 7})
    await asyncio.to_thread(lose_disk, lost, control)
    # as long as nobody says what should be here, nothing begins anew
    await until(lambda: len(control.asked) > 1, "the control plane to be asked again")
    assert control.asked[0] == (f"/control/v1/safekeeper/{lost.id}/timelines?id={lost.id}", "Bearer a.b.c")
    for ttid in (old.ttid, new.ttid, unborn, strange):
        assert "has not said yet which timelines should be" in await refused_greeting(lost, ttid)
        code, said = refusal(lambda ttid=ttid: http("POST", lost.url("/v1/tenant/timeline"), timeline_body(ttid)))
        assert (code, "not said yet" in said) == (412, True)
        assert not present(lost, ttid)
    control.assigns([old.ttid, new.ttid, unborn], fleet.nodes)
    await until(lambda: present(lost, old.ttid) and present(lost, new.ttid), "the copies", 30)
    assert lost.digest(new.ttid, START, wal.end) == a.digest(new.ttid, START, wal.end)
    assert lost.status(new.ttid)["acceptor_state"]["term"] == 7
    assert lost.status(new.ttid)["mconf"] == a.status(new.ttid)["mconf"]
    # neither copy votes in a term in which its predecessor may have
    for ttid, generation, term in ((new.ttid, 1, 7), (old.ttid, 0, 1)):
        client = await greeted(lost, ttid)
        assert isinstance(parse_acceptor_message(await client.next_copy_data() or b""), AcceptorGreeting)
        client.send_copy_data(VoteRequest(generation, term).pack())
        vote = parse_acceptor_message(await client.next_copy_data() or b"")
        assert isinstance(vote, VoteResponse) and not vote.vote_given and vote.term == term
        client.abort()
    # what no member has is new; so is what the control plane did not name
    await until(lambda: "it may be created as a new one" in lost.log.read_text(), "the timeline that nobody has")
    for ttid in (unborn, strange):
        assert http("POST", lost.url("/v1/tenant/timeline"), timeline_body(ttid)) is None
    found = scrape(lost.url("/metrics"))
    assert found["safekeeper_recovery_pull_timeline_oks"][0].value == 2
    # the next start finds everything here, even while the control plane is away
    control.answer = None
    assert await asyncio.to_thread(lost.stop) == 0
    await asyncio.to_thread(lost.start)
    successor = proposer(new.ttid, wal, MembershipConfiguration(1, members(*fleet.nodes)))
    await successor.elect([b, lost])
    assert successor.term == 8
    successor.leave()


async def test_without_one_of_the_others_there_is_no_copy(fleet: Fleet, control: ControlPlane) -> None:
    """The one that is away may be the only one that knows of a promise."""
    leader, wal = await written(fleet, 0)
    _, away, lost = fleet.nodes
    away.kill()
    control.assigns([leader.ttid], fleet.nodes)
    await asyncio.to_thread(lose_disk, lost, control)
    await until(lambda: "1 of 2 hosts gave its status, 2 are needed" in lost.log.read_text(), "the copy to fail")
    assert not present(lost, leader.ttid)
    assert "is to be copied here from its other members" in await refused_greeting(lost, leader.ttid)
    assert scrape(lost.url("/metrics"))["safekeeper_recovery_pull_timeline_errors"][0].value >= 1
    await asyncio.to_thread(away.start)
    await until(lambda: present(lost, leader.ttid), "the copy", 30)
    assert lost.digest(leader.ttid, START, wal.end) == away.digest(leader.ttid, START, wal.end)


async def test_what_all_members_lost_is_not_begun_anew(fleet: Fleet, control: ControlPlane) -> None:
    leader, wal = await written(fleet, 0)
    lone, _ = await written(fleet, 0)
    bucket = fleet.base / "bucket" / str(leader.ttid.tenant_id) / str(leader.ttid.timeline_id)
    await until(lambda: list(bucket.glob("0*1")), "a segment in the bucket")
    a, b, lost = fleet.nodes
    for node in (a, b):
        http("DELETE", node.timeline_url(leader.ttid, "?only_local=true"))
    control.assigns([leader.ttid, lone.ttid], fleet.nodes)
    control.answer["timelines"][1]["peers"] = [lost.id]
    await asyncio.to_thread(lose_disk, lost, control)
    await until(lambda: "all its members have lost it" in lost.log.read_text(), "the loss to be seen")
    await until(lambda: "it has no other members" in lost.log.read_text(), "the other loss to be seen")
    for ttid in (leader.ttid, lone.ttid):
        assert "is to be copied here" in await refused_greeting(lost, ttid)
    assert wal.end


async def test_wrong_answers_are_no_answer(fleet: Fleet, control: ControlPlane) -> None:
    lost = fleet.nodes[2]
    control.answer = {"timelines": [{"tenant_id": "x", "timeline_id": "y", "peers": []}], "safekeeper_peers": []}
    await asyncio.to_thread(lose_disk, lost, control)
    await until(lambda: len(control.asked) > 1, "the control plane to be asked again")
    assert "which timelines should be here is not known yet" in lost.log.read_text()
    assert "not said yet" in await refused_greeting(lost, new_ttid())
    control.answer = {"timelines": [], "safekeeper_peers": []}
    await until(lambda: "every timeline that should be here is here" in lost.log.read_text(), "the answer", 20)
    client = await greeted(lost, new_ttid())
    assert isinstance(parse_acceptor_message(await client.next_copy_data() or b""), AcceptorGreeting)
    client.abort()

"""pull_timeline between real safekeepers: while a proposer writes, cut off by kill -9 on either side, and its refusals."""

import asyncio
import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn, format_lsn, parse_lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId
from tests.integration.cluster import free_port, http
from tests.integration.safekeeper_support import Fleet, Node, ScriptedProposer, new_ttid, running_fleet, until
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

pytestmark = pytest.mark.cluster
SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)
Hook = Callable[[], Awaitable[None]]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("pull"), 4) as fleet:
        yield fleet


def members(*nodes: Node) -> tuple[SafekeeperId, ...]:
    return tuple(SafekeeperId(node.id, "127.0.0.1", node.pg_port) for node in nodes)


def create(ttid: TenantTimelineId, mconf: MembershipConfiguration, nodes: list[Node]) -> None:
    body = {
        "tenant_id": str(ttid.tenant_id),
        "timeline_id": str(ttid.timeline_id),
        "mconf": mconf.to_json(),
        "pg_version": PG_VERSION,
        "system_id": SYSTEM_ID,
        "wal_seg_size": SEGMENT,
        "start_lsn": format_lsn(START),
    }
    for node in nodes:
        node.http("POST", "/v1/tenant/timeline", body)


def proposer(ttid: TenantTimelineId, wal: WalMaker, mconf: MembershipConfiguration) -> ScriptedProposer:
    return ScriptedProposer(
        ttid, wal.start, wal.data, PG_VERSION, SYSTEM_ID, generation=mconf.generation, mconf=mconf, segment_size=SEGMENT
    )


def pull(node: Node, ttid: TenantTimelineId, hosts: list[str], mconf: MembershipConfiguration | None = None) -> Any:
    body = {"tenant_id": str(ttid.tenant_id), "timeline_id": str(ttid.timeline_id), "http_hosts": hosts}
    if mconf is not None:
        body["mconf"] = mconf.to_json()  # type: ignore[assignment]
    return node.http("POST", "/v1/pull_timeline", body)["safekeeper_host"]


def refusal(call: Callable[[], Any]) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as failure:
        call()
    return failure.value.code, failure.value.msg


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read()


def present(node: Node, ttid: TenantTimelineId) -> bool:
    try:
        node.status(ttid)
    except urllib.error.HTTPError as error:
        assert error.code == 404, error.msg
        return False
    return True


@contextlib.asynccontextmanager
async def relay(node: Node, after: int, hook: Hook) -> AsyncIterator[str]:
    """An address that gives the node's answers; when ``after`` bytes of a snapshot have passed, the hook runs."""

    async def forward(request: web.Request) -> web.StreamResponse:
        async with aiohttp.ClientSession() as session, session.get(node.url(request.path)) as answer:
            response = web.StreamResponse(status=answer.status)
            await response.prepare(request)
            passed, pending = 0, "/snapshot/" in request.path
            try:
                async for piece in answer.content.iter_any():
                    if pending and passed + len(piece) >= after:
                        await response.write(piece[: after - passed])
                        pending = False
                        await hook()
                        piece = piece[after - passed :]
                    passed += len(piece)
                    await response.write(piece)
            except (aiohttp.ClientError, OSError):
                assert request.transport is not None
                request.transport.abort()
            return response

    application = web.Application()
    application.router.add_get("/{path:.*}", forward)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    finally:
        await runner.cleanup()


async def prepared(fleet: Fleet) -> tuple[ScriptedProposer, WalMaker, MembershipConfiguration]:
    """A timeline of generation 1 on the first three nodes with some segments of committed WAL."""
    ttid, wal = new_ttid(), WalMaker(START, SEGMENT).until(START + 3 * SEGMENT, 20_000)
    mconf = MembershipConfiguration(1, members(*fleet.nodes[:3]))
    create(ttid, mconf, fleet.nodes[:3])
    leader = proposer(ttid, wal, mconf)
    await leader.elect(fleet.nodes[:3])
    await leader.stream(wal.end)
    return leader, wal, mconf


def joint(fleet: Fleet, generation: int = 2) -> MembershipConfiguration:
    a, b, c, d = fleet.nodes
    return MembershipConfiguration(generation, members(a, b, c), members(b, c, d))


async def test_a_timeline_is_pulled_while_a_proposer_appends(fleet: Fleet) -> None:
    leader, wal, _ = await prepared(fleet)
    joiner, ttid = fleet.nodes[3], leader.ttid
    committed = wal.end
    wal.until(wal.end + 8 * SEGMENT, 20_000)
    appended = 0

    async def append() -> None:
        nonlocal appended
        while leader.members[0].flushed < wal.end:
            await leader.stream(wal.last_record_end(leader.members[0].sent + 100_000))
            appended += 1

    # the donor is in mid-stream when the proposer begins, and goes on only after some appends
    writing: list[asyncio.Task[None]] = []

    async def begin() -> None:
        writing.append(asyncio.create_task(append()))
        await until(lambda: appended > 3, "appends during the copy")

    async with relay(fleet.nodes[0], 700_000, begin) as address:
        found = await asyncio.to_thread(pull, joiner, ttid, [address], joint(fleet))
    assert found == address
    await writing[0]
    status = joiner.status(ttid)
    assert status["mconf"] == joint(fleet).to_json()
    end = parse_lsn(status["flush_lsn"])
    assert committed <= end and parse_lsn(status["commit_lsn"]) <= end
    assert joiner.digest(ttid, START, end) == fleet.nodes[1].digest(ttid, START, end)
    assert status["acceptor_state"] == fleet.nodes[0].status(ttid)["acceptor_state"]
    assert await asyncio.to_thread(pull, joiner, ttid, [n.url("") for n in fleet.nodes[:3]], joint(fleet, 3)) is None
    assert joiner.status(ttid)["mconf"]["generation"] == 3
    metrics = (await asyncio.to_thread(get, joiner.url("/metrics"))).decode()
    assert "safekeeper_recovery_pull_timeline_oks 2.0" in metrics
    leader.leave()
    # the copy is a full member: elected together with another, it goes on
    for node in fleet.nodes[1:3]:
        http("PUT", node.timeline_url(ttid, "/membership"), joint(fleet, 3).to_json())
    successor = proposer(ttid, wal, joint(fleet, 3))
    await successor.elect([fleet.nodes[1], fleet.nodes[2], joiner])
    wal.until(wal.end + 300_000)
    await successor.stream(wal.end)
    assert joiner.digest(ttid, START, wal.end) == fleet.nodes[1].digest(ttid, START, wal.end)
    successor.leave()


@pytest.mark.parametrize("after", [100, 600, 1_000_000, 3_000_000, None], ids=str)
async def test_killing_the_destination_leaves_nothing_or_everything(fleet: Fleet, after: int | None) -> None:
    leader, wal, _ = await prepared(fleet)
    leader.leave()
    joiner, ttid = fleet.nodes[3], leader.ttid
    size = len(await asyncio.to_thread(get, fleet.nodes[0].timeline_url(ttid, "/snapshot/4")))

    async def kill() -> None:
        joiner.kill()

    async with relay(fleet.nodes[0], after or size, kill) as address:
        with pytest.raises(OSError):
            await asyncio.to_thread(pull, joiner, ttid, [address], joint(fleet))
    assert after is None or not (joiner.directory / str(ttid.tenant_id)).exists()
    await asyncio.to_thread(joiner.start)
    assert list((joiner.directory / "tmp").glob("*")) == []
    if not present(joiner, ttid):
        assert await asyncio.to_thread(pull, joiner, ttid, [fleet.nodes[0].url("")], joint(fleet)) == fleet.nodes[0].url("")
    assert joiner.status(ttid)["mconf"]["generation"] == 2
    assert joiner.digest(ttid, START, wal.end) == fleet.nodes[0].digest(ttid, START, wal.end)


@pytest.mark.parametrize("after", [100, 1_500_000])
async def test_killing_the_donor_leaves_nothing(fleet: Fleet, after: int) -> None:
    leader, wal, _ = await prepared(fleet)
    leader.leave()
    donor, joiner, ttid = fleet.nodes[0], fleet.nodes[3], leader.ttid

    async def kill() -> None:
        donor.kill()

    async with relay(donor, after, kill) as address:
        status, message = await asyncio.to_thread(refusal, lambda: pull(joiner, ttid, [address], joint(fleet)))
    assert status == 412, message
    assert not present(joiner, ttid) and list((joiner.directory / "tmp").glob("*")) == []
    others = [node.url("") for node in fleet.nodes[:3]]
    assert await asyncio.to_thread(pull, joiner, ttid, others, joint(fleet)) in others[1:]  # two of three are enough
    await asyncio.to_thread(donor.start)
    assert joiner.digest(ttid, START, wal.end) == donor.digest(ttid, START, wal.end)


async def test_a_new_leader_during_the_copy_aborts_it(fleet: Fleet) -> None:
    leader, wal, mconf = await prepared(fleet)
    joiner, ttid = fleet.nodes[3], leader.ttid
    successor = proposer(ttid, wal, mconf)

    async def depose() -> None:
        await successor.elect(fleet.nodes[:3])
        term = fleet.nodes[0].status(ttid)["acceptor_state"]["term"]
        await until(lambda: fleet.nodes[0].status(ttid)["acceptor_state"]["epoch"] == term, "the new leader is followed")

    wal.until(wal.end + 24 * SEGMENT, 60_000)  # more than sockets can swallow
    await leader.stream(wal.end)
    async with relay(fleet.nodes[0], 10_000, depose) as address:
        status, message = await asyncio.to_thread(refusal, lambda: pull(joiner, ttid, [address], joint(fleet)))
    assert status == 412, message
    assert not present(joiner, ttid)
    assert await asyncio.to_thread(pull, joiner, ttid, [fleet.nodes[0].url("")], joint(fleet)) == fleet.nodes[0].url("")
    leader.leave()
    successor.leave()


async def test_the_best_donor_is_chosen_and_bad_requests_are_refused(fleet: Fleet) -> None:
    leader, wal, mconf = await prepared(fleet)
    joiner, ttid = fleet.nodes[3], leader.ttid
    wal.records(3)
    leader.send(leader.members[2], wal.end)
    while leader.members[2].flushed < wal.end:
        await leader.answer(leader.members[2])
    leader.leave()
    hosts = [node.url("") for node in fleet.nodes[:3]]
    assert refusal(lambda: pull(joiner, ttid, hosts))[0] == 403  # without mconf: not a member of generation 1
    assert refusal(lambda: pull(joiner, ttid, hosts, mconf))[0] == 403
    stale = MembershipConfiguration(1, members(*fleet.nodes))
    for node in fleet.nodes[:2]:
        http("PUT", node.timeline_url(ttid, "/membership"), joint(fleet).to_json())
    code, message = refusal(lambda: pull(joiner, ttid, hosts, stale))
    assert code == 409 and "generation 2" in message
    code, message = refusal(lambda: pull(joiner, new_ttid(), hosts, joint(fleet)))
    assert code == 412 and "0 of 3" in message
    nobody = f"http://127.0.0.1:{free_port()}"
    body = {"tenant_id": str(ttid.tenant_id), "timeline_id": str(ttid.timeline_id), "mconf": joint(fleet).to_json()}
    body |= {"http_hosts": [*hosts, nobody], "require_all_hosts": True}
    code, message = refusal(lambda: http("POST", joiner.url("/v1/pull_timeline"), body))
    assert code == 412 and "3 of 4 hosts gave its status, 4 are needed" in message
    # one of the others has promised a higher term, perhaps together with the disk that this copy replaces
    http("POST", fleet.nodes[0].timeline_url(ttid, "/term_bump"), {"term": 77})
    assert pull(joiner, ttid, hosts, joint(fleet)) == hosts[2]
    assert joiner.lsn(ttid, "flush_lsn") == wal.end
    assert joiner.status(ttid)["acceptor_state"]["term"] == 77
    for body, part in (
        ({"http_hosts": []}, "http_hosts"),
        ({"http_hosts": ["ftp://x"]}, "http_hosts"),
        ({"http_hosts": [1]}, "http_hosts"),
        ({"http_hosts": hosts[:1], "tenant_id": "x"}, "tenant_id"),
        ({"http_hosts": hosts[:1], "mconf": {"generation": -1}}, "generation"),
    ):
        code, message = refusal(lambda body=body: http("POST", joiner.url("/v1/pull_timeline"), body))  # type: ignore[misc]
        assert code == 400 and part in message
    assert refusal(lambda: http("GET", joiner.timeline_url(ttid, "/snapshot/x")))[0] == 400
    assert refusal(lambda: http("GET", joiner.timeline_url(new_ttid(), "/snapshot/1")))[0] == 404


def test_a_body_beyond_the_limit_is_refused(fleet: Fleet) -> None:
    body = json.dumps({"http_hosts": ["x" * 5_000_000]}).encode()
    request = urllib.request.Request(fleet.nodes[0].url("/v1/pull_timeline"), data=body, method="POST")
    with pytest.raises(urllib.error.HTTPError) as failure:
        urllib.request.urlopen(request, timeout=30)
    assert failure.value.code == 413

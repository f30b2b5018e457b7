"""pull_timeline of an evicted timeline from a donor of Neon's kind: no WAL in the snapshot, its last segment in the bucket."""

import asyncio
import shutil
import urllib.error
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from neon_services.ground.lsn import Lsn, segment_file_name
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.snapshot_tar import END_OF_ARCHIVE, member_header, member_padding
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, Node, ScriptedProposer, new_ttid, running_fleet
from tests.integration.test_pull_timeline import present, pull
from tests.integration.test_safekeeper_offload import local_segments, objects, options, pageserver_has_everything, proposer
from tests.unit.safekeeper.walmaker import WalMaker
from tests.waiting import until

pytestmark = pytest.mark.cluster
SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)
EVICTING = [
    "--enable-offload",
    "--delete-offloaded-wal",
    "--eviction-min-resident",
    "300ms",
    "--partial-backup-timeout",
    "300ms",
]


class NeonDonor:
    """Answers as a safekeeper of Neon's with an evicted timeline; ``control`` is what it sends."""

    def __init__(self, node: Node, control: ControlFile) -> None:
        self.control = control
        self.more = b""
        self._status = node.status(control.ttid)
        self.url = ""

    async def status(self, _: web.Request) -> web.Response:
        return web.json_response(self._status)

    async def snapshot(self, _: web.Request) -> web.Response:
        content = self.control.encode()
        body = member_header("safekeeper.control", len(content)) + content + member_padding(len(content)) + self.more
        return web.Response(body=body + END_OF_ARCHIVE, content_type="application/octet-stream")


class Scene:
    """An evicted timeline on node 1, an imitated donor, and node 2 to pull it."""

    def __init__(self, fleet: Fleet, leader: ScriptedProposer, wal: WalMaker, donor: NeonDonor, bucket: Path) -> None:
        self.fleet, self.leader, self.wal, self.donor, self.bucket = fleet, leader, wal, donor, bucket
        self.joiner = fleet.nodes[1]

    @property
    def part(self) -> Path:
        """The object that the donor has copied for the joiner."""
        ttid = self.leader.ttid
        return self.bucket / str(ttid.tenant_id) / str(ttid.timeline_id) / self.donor.control.partial_backup[-1].name

    async def pull(self) -> str:
        return await asyncio.to_thread(pull, self.joiner, self.leader.ttid, [self.donor.url])


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    bucket = tmp_path / "bucket"
    with running_fleet(tmp_path, 2, *options(bucket, *EVICTING)) as fleet:
        node = fleet.nodes[0]
        wal = WalMaker(START, SEGMENT).until(START + 3 * SEGMENT + 300_000, 20_000)
        leader = proposer(wal, new_ttid())
        await leader.elect([node])
        await leader.stream(wal.end)
        await pageserver_has_everything(node, leader.ttid, wal.end)
        leader.leave()
        await until(lambda: local_segments(node, leader.ttid) == {}, "the eviction", 30)
        path = node.directory / str(leader.ttid.tenant_id) / str(leader.ttid.timeline_id) / "safekeeper.control"
        control = ControlFile.load(path)
        (part,) = control.partial_backup
        mine = replace(part, name=part.name.replace("_sk1.partial", "_sk2.partial"))
        donor = NeonDonor(node, replace(control, partial_backup=(mine,)))
        found = Scene(fleet, leader, wal, donor, bucket)
        shutil.copyfile(found.part.with_name(part.name), found.part)
        application = web.Application()
        application.router.add_get("/v1/tenant/{tenant}/timeline/{timeline}", donor.status)
        application.router.add_get("/v1/tenant/{tenant}/timeline/{timeline}/snapshot/2", donor.snapshot)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        donor.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
        yield found
        await runner.cleanup()


async def test_it_comes_whole_and_is_evicted_again(scene: Scene) -> None:
    joiner, wal, ttid = scene.joiner, scene.wal, scene.leader.ttid
    assert await scene.pull() == scene.donor.url
    status = joiner.status(ttid)
    source = scene.fleet.nodes[0].status(ttid)
    assert {name: status[name] for name in ("flush_lsn", "commit_lsn", "acceptor_state", "timeline_start_lsn")} == {
        name: source[name] for name in ("flush_lsn", "commit_lsn", "acceptor_state", "timeline_start_lsn")
    }
    # all of it is read: the last segment from here, those before from the bucket
    assert joiner.digest(ttid, START, wal.end) == scene.fleet.nodes[0].digest(ttid, START, wal.end)
    await until(lambda: local_segments(joiner, ttid) == {}, "the copy to be evicted, too", 30)
    assert scene.part.exists(), "the object that was made for it serves it"
    leader = proposer(wal, ttid)
    await leader.elect([joiner])
    assert leader.term_start == wal.end
    wal.until(wal.end + SEGMENT, 20_000)
    await leader.stream(wal.end)
    leader.leave()
    # what the donor made for it does not stay behind
    await until(lambda: not scene.part.exists(), "the old object to be deleted", 30)
    assert segment_file_name(wal.end // SEGMENT - 1, SEGMENT) in objects(scene.bucket, ttid)


def missing(scene: Scene) -> None:
    scene.part.unlink()


def cut(scene: Scene) -> None:
    scene.part.write_bytes(scene.part.read_bytes()[:-1])


def flipped(scene: Scene) -> None:
    content = bytearray(scene.part.read_bytes())
    content[len(content) // 2] ^= 1
    scene.part.write_bytes(content)


def for_another(scene: Scene) -> None:
    (part,) = scene.donor.control.partial_backup
    other = replace(part, name=part.name.replace("_sk2.", "_sk12."))
    scene.donor.control = replace(scene.donor.control, partial_backup=(other,))


def not_uploaded(scene: Scene) -> None:
    (part,) = scene.donor.control.partial_backup
    scene.donor.control = replace(scene.donor.control, partial_backup=(replace(part, status=0),))


def with_wal(scene: Scene) -> None:
    name = segment_file_name(scene.wal.end // SEGMENT, SEGMENT) + ".partial"
    scene.donor.more = member_header(name, SEGMENT) + bytes(SEGMENT) + member_padding(SEGMENT)


def further_committed(scene: Scene) -> None:
    state = replace(scene.donor.control.acceptor, commit_lsn=Lsn(scene.wal.end + 8))
    scene.donor.control = replace(scene.donor.control, acceptor=state)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (missing, "is missing"),
        (cut, "ends at byte"),
        (flipped, "object"),
        (for_another, "names no object there for safekeeper 2"),
        (not_uploaded, "names no object there for safekeeper 2"),
        (with_wal, "has WAL that is said to be in object storage only"),
        (further_committed, "before commit_lsn"),
    ],
)
async def test_what_is_not_whole_leaves_nothing(scene: Scene, spoil: Callable[[Scene], None], said: str) -> None:
    spoil(scene)
    with pytest.raises(urllib.error.HTTPError) as failure:
        await scene.pull()
    assert (failure.value.code, said in failure.value.msg) == (412, True), failure.value.msg
    nothing_left(scene)


async def test_without_object_storage_it_is_refused(scene: Scene) -> None:
    joiner = scene.joiner
    joiner.kill()
    kept: list[str] = []
    arguments: Any = iter(joiner.argv)
    for argument in arguments:
        if argument == "--remote-storage":
            next(arguments)
        elif argument not in EVICTING[:2]:
            kept.append(argument)
    joiner.argv = kept
    await asyncio.to_thread(joiner.start)
    with pytest.raises(urllib.error.HTTPError, match="this safekeeper has no --remote-storage"):
        await scene.pull()
    nothing_left(scene)


def nothing_left(scene: Scene) -> None:
    assert not present(scene.joiner, scene.leader.ttid)
    assert list((scene.joiner.directory / "tmp").glob("*")) == []
    assert http("GET", scene.joiner.url("/v1/utilization")) == {"timeline_count": 0}

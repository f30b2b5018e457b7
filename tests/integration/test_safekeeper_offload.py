"""Real safekeepers, a broker and a bucket in a directory: WAL arrives whole, leaves the disk, and reads the same as before."""

import asyncio
import random
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from neon_services.ground.errors import NeonError
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn, format_lsn, segment_file_name
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.replication_stream import pack_pageserver_feedback
from tests.integration.cluster import http
from tests.integration.safekeeper_support import (
    Fleet,
    Node,
    ScriptedProposer,
    new_ttid,
    read_stream,
    running_fleet,
    until,
)
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker
from tests.waiting import eventually

pytestmark = pytest.mark.cluster
SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)


def options(bucket: Path, *more: str) -> list[str]:
    return ["--remote-storage", f"{{local_path='{bucket}'}}", "--heartbeat-timeout", "2s", *more]


def proposer(wal: WalMaker, ttid: TenantTimelineId) -> ScriptedProposer:
    return ScriptedProposer(ttid, wal.start, wal.data, PG_VERSION, SYSTEM_ID, segment_size=SEGMENT)


def metric(node: Node, name: str) -> float:
    """The sum of a metric's samples."""
    with urllib.request.urlopen(node.url("/metrics"), timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def objects(bucket: Path, ttid: TenantTimelineId) -> dict[str, bytes]:
    """The timeline's objects by name."""
    directory = bucket / str(ttid.tenant_id) / str(ttid.timeline_id)
    found = directory.iterdir() if directory.is_dir() else []
    return {path.name: path.read_bytes() for path in found if not path.name.endswith(".___temp")}


def check_full_segments(found: dict[str, bytes], wal: WalMaker) -> int:
    """Every full segment in the bucket has the right bytes; how many there are."""
    count = 0
    for number in range(START // SEGMENT, wal.end // SEGMENT):
        content = found.get(segment_file_name(number, SEGMENT))
        if content is not None:
            count += 1
            assert len(content) == SEGMENT
            begin = max(START, number * SEGMENT)
            assert content[begin - number * SEGMENT :] == wal.slice(begin, (number + 1) * SEGMENT)
    return count


def local_segments(node: Node, ttid: TenantTimelineId) -> dict[str, bytes]:
    directory = node.directory / str(ttid.tenant_id) / str(ttid.timeline_id)
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name.startswith("0000")}


async def pageserver_has_everything(node: Node, ttid: TenantTimelineId, lsn: int) -> None:
    """A pageserver says that the WAL's effects are in the bucket."""
    reader = await node.connect(ttid, "pageserver-1")
    await reader.start_copy_both(f"START_REPLICATION PHYSICAL {format_lsn(lsn)}")
    reader.send_copy_data(pack_pageserver_feedback(PageserverFeedback(1, Lsn(lsn), Lsn(lsn), Lsn(lsn), 43)))
    await until(lambda: node.lsn(ttid, "remote_consistent_lsn") == lsn, "the feedback to arrive")
    reader.abort()


async def wait_for_backup(fleet: Fleet, ttid: TenantTimelineId, lsn: int) -> None:
    """All running safekeepers know that the full segments below are in the bucket."""
    running = [node for node in fleet.nodes if node.popen is not None and node.popen.poll() is None]
    end = lsn - lsn % SEGMENT
    await until(lambda: all(node.lsn(ttid, "backup_lsn") >= end for node in running), "all segments in the bucket", 30)


async def test_wal_reaches_the_bucket_leaves_the_disk_and_reads_the_same(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    with running_fleet(tmp_path, 3, *options(bucket)) as fleet:
        ttid = new_ttid()
        wal = WalMaker(START, SEGMENT)
        for victim in fleet.nodes:
            leader = proposer(wal, ttid)
            await leader.elect(fleet.nodes)
            wal.until(wal.end + 3 * SEGMENT, 60_000)
            await leader.stream(wal.end)
            victim.kill()
            wal.until(wal.end + 3 * SEGMENT, 60_000)
            await leader.stream(wal.end, members=[member for member in leader.members if member.node is not victim])
            await wait_for_backup(fleet, ttid, leader.commit)
            leader.leave()
            victim.start()
        leader = proposer(wal, ttid)
        await leader.elect(fleet.nodes)
        await leader.stream(wal.end)
        await wait_for_backup(fleet, ttid, wal.end)
        full = wal.end // SEGMENT - START // SEGMENT
        assert full >= 18
        assert check_full_segments(objects(bucket, ttid), wal) == full
        for node in fleet.nodes:
            for name, content in local_segments(node, ttid).items():
                assert name.endswith(".partial") or objects(bucket, ttid)[name] == content
        digests = [node.digest(ttid, START, wal.end) for node in fleet.nodes]
        assert len(set(digests)) == 1
        assert all(len(local_segments(node, ttid)) == full + 1 for node in fleet.nodes), "the pageserver has nothing yet"
        await pageserver_has_everything(fleet.nodes[0], ttid, wal.end)
        await until(lambda: all(len(local_segments(node, ttid)) == 1 for node in fleet.nodes), "the WAL to leave the disks", 30)
        for node in fleet.nodes:
            assert node.digest(ttid, START, wal.end) == digests[0]
        node = fleet.nodes[1]
        reader = await node.connect(ttid, "reader")
        assert await read_stream(reader, START, wal.end) == bytes(wal.data)
        reader.abort()
        # a member that lags so far is fed from the bucket, too
        donor = await node.connect(ttid, "safekeeper_9")
        command = f"START_REPLICATION PHYSICAL {format_lsn(START)} (term='{leader.term}')"
        assert await read_stream(donor, START, wal.end, command) == bytes(wal.data)
        donor.abort()
        assert metric(node, "safekeeper_removed_wal_segments_total") >= 1
        leader.leave()
        # and after a restart
        node.kill()
        node.start()
        assert node.digest(ttid, START, wal.end) == digests[0]
        memory = http("GET", node.url("/v1/debug_dump?dump_memory=true"))["timelines"][0]["memory"]
        assert memory["last_removed_segno"] == wal.end // SEGMENT - 1


async def test_a_store_that_fails_for_a_while(tmp_path: Path) -> None:
    bucket, away = tmp_path / "bucket", tmp_path / "away"
    with running_fleet(tmp_path, 3, *options(bucket)) as fleet:
        ttid = new_ttid()
        wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT, 60_000)
        leader = proposer(wal, ttid)
        await leader.elect(fleet.nodes)
        await leader.stream(wal.end)
        await wait_for_backup(fleet, ttid, wal.end)
        bucket.rename(away)
        bucket.write_text("this is no directory")
        before = wal.end
        wal.until(wal.end + 4 * SEGMENT, 60_000)
        await leader.stream(wal.end)
        assert leader.commit == wal.end, "commits go on"
        await until(lambda: sum(metric(n, "safekeeper_backup_errors_total") for n in fleet.nodes) > 5, "attempts to fail")
        await pageserver_has_everything(fleet.nodes[0], ttid, wal.end)
        for node in fleet.nodes:
            http("POST", node.timeline_url(ttid, "/checkpoint"))
            assert node.lsn(ttid, "backup_lsn") == before - before % SEGMENT
            assert len(local_segments(node, ttid)) >= 5, "what is not in the bucket stays"
        bucket.unlink()
        away.rename(bucket)
        await wait_for_backup(fleet, ttid, wal.end)
        assert check_full_segments(objects(bucket, ttid), wal) == wal.end // SEGMENT - START // SEGMENT
        await until(lambda: all(len(local_segments(node, ttid)) == 1 for node in fleet.nodes), "the WAL to leave the disks", 30)
        leader.leave()


async def test_a_store_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes requests and never answers: commits go on, and the process stops when it is told to."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    asked = asyncio.Event()
    connections: list[asyncio.StreamWriter] = []

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        asked.set()

    store = await asyncio.start_server(hang, "127.0.0.1", 0)
    endpoint = f"http://127.0.0.1:{store.sockets[0].getsockname()[1]}"
    table = f"{{bucket_name='b', bucket_region='r', endpoint='{endpoint}'}}"
    with running_fleet(tmp_path, 1, "--remote-storage", table) as fleet:
        ttid, (node,) = new_ttid(), fleet.nodes
        wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT, 60_000)
        leader = proposer(wal, ttid)
        await leader.elect([node])
        await leader.stream(wal.end)
        async with asyncio.timeout(20):
            await asked.wait()
        wal.until(wal.end + SEGMENT, 60_000)
        await leader.stream(wal.end)
        assert leader.commit == wal.end
        leader.leave()
        assert await asyncio.to_thread(node.stop) == 0
        node.start()
        assert node.lsn(ttid, "commit_lsn") == wal.end
    store.close()
    for writer in connections:
        writer.close()


async def test_kill_during_uploads(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with running_fleet(tmp_path, 1, *options(bucket, "--wal-backup-parallel-jobs", "3")) as fleet:
        ttid, (node,) = new_ttid(), fleet.nodes
        wal = WalMaker(START, SEGMENT)
        interrupted = 0
        for _ in range(4):
            leader = proposer(wal, ttid)
            await leader.elect([node])
            known = len(list_names(bucket, ttid))
            wal.until(wal.end + 5 * SEGMENT, 60_000)
            await leader.stream(wal.end)
            aim = known + rng.randrange(4)
            await until(lambda aim=aim: len(list_names(bucket, ttid)) >= aim, "some uploads to begin", 20)
            node.kill()
            leader.leave()
            found = check_full_segments(objects(bucket, ttid), wal)
            interrupted += found < wal.end // SEGMENT - START // SEGMENT
            node.start()
            assert node.lsn(ttid, "flush_lsn") == wal.end
        print(f"{interrupted} of 4 kills interrupted uploads")
        leader = proposer(wal, ttid)  # says again what is committed: that is not saved at once
        await leader.elect([node])
        await leader.stream(wal.end)
        await wait_for_backup(fleet, ttid, wal.end)
        assert check_full_segments(objects(bucket, ttid), wal) == wal.end // SEGMENT - START // SEGMENT
        leader.leave()


def list_names(bucket: Path, ttid: TenantTimelineId) -> list[str]:
    """Names of objects, also of those that are being written."""
    directory = bucket / str(ttid.tenant_id) / str(ttid.timeline_id)
    return [path.name for path in directory.iterdir()] if directory.is_dir() else []


async def test_an_idle_timeline_is_evicted_and_comes_back(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    evicting = ("--enable-offload", "--delete-offloaded-wal", "--eviction-min-resident", "1s", "--partial-backup-timeout", "1s")
    with running_fleet(tmp_path, 1, *options(bucket, *evicting)) as fleet:
        ttid, (node,) = new_ttid(), fleet.nodes
        wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT, 60_000)
        for round_number in range(2):
            leader = proposer(wal, ttid)
            await leader.elect([node])
            wal.records(30)
            await leader.stream(wal.end)
            digest = node.digest(ttid, START, wal.end)
            leader.leave()
            await pageserver_has_everything(node, ttid, wal.end)
            before = node.status(ttid)
            await until(lambda: not local_segments(node, ttid), "the timeline to be evicted", 40)
            assert metric(node, "safekeeper_evicted_timelines") == 1
            assert node.lsn(ttid, "flush_lsn") == wal.end and node.status(ttid)["acceptor_state"] == before["acceptor_state"]
            partial = [name for name in objects(bucket, ttid) if name.endswith(".partial")]
            assert len(partial) == 1 and partial[0].endswith("_sk1.partial")
            if round_number == 0:
                node.kill()
                node.start()
                assert node.lsn(ttid, "flush_lsn") == wal.end and not local_segments(node, ttid)
                assert node.digest(ttid, START, wal.end) == digest
                assert len(local_segments(node, ttid)) == 1, "brought back on demand"
        # a compute brings it back as well
        leader = proposer(wal, ttid)
        await leader.elect([node])
        assert leader.term_start == wal.end
        wal.until(wal.end + SEGMENT, 60_000)
        await leader.stream(wal.end)
        reader = await node.connect(ttid, "reader")
        assert await read_stream(reader, START, wal.end) == bytes(wal.data)
        reader.abort()
        removed = http("POST", node.timeline_url(ttid, "/backup_partial_reset"))
        assert partial[0] in removed
        assert not set(removed) & set(objects(bucket, ttid))
        leader.leave()


async def test_a_timeline_over_its_limit_is_refused_until_wal_left(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    limit = 3 * SEGMENT
    with running_fleet(tmp_path, 1, *options(bucket, "--max-timeline-disk-usage-bytes", str(limit))) as fleet:
        ttid, (node,) = new_ttid(), fleet.nodes
        wal = WalMaker(START, SEGMENT).until(START + 5 * SEGMENT, 60_000)
        leader = proposer(wal, ttid)
        await leader.elect([node])
        leader.commit = Lsn(0)
        for end in range(START + 50_000, wal.end, 50_000):
            try:
                await leader.stream(end if end in wal.record_ends else wal.last_record_end(end))
            except (NeonError, OSError):
                break  # its error is in its log: what is still unread may swallow it here
            await asyncio.sleep(0.05)  # the limit is looked at three times a second
        else:
            pytest.fail("never refused")
        said = f"WAL storage utilization exceeds configured limit of {limit} bytes: current disk usage: "
        assert said in node.log.read_text()
        leader.leave()
        end = node.lsn(ttid, "flush_lsn")
        assert metric(node, "safekeeper_wal_storage_limit_errors") >= 1
        await wait_for_backup(fleet, ttid, node.lsn(ttid, "commit_lsn"))
        await pageserver_has_everything(node, ttid, end)
        leader = proposer(wal, ttid)

        async def elected() -> bool:
            leader.leave()
            await leader.elect([node])
            return True

        await eventually(elected, "WAL to be accepted again", 20, interval=0.1, errors=(NeonError, OSError))
        assert leader.term_start == end
        await leader.stream(wal.last_record_end(end + SEGMENT // 2))
        leader.leave()


async def test_deleting_a_timeline_deletes_its_objects_unless_only_local(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    with running_fleet(tmp_path, 1, *options(bucket, "--partial-backup-timeout", "500ms")) as fleet:
        (node,) = fleet.nodes
        ttids = [new_ttid() for _ in range(4)]
        for ttid in ttids:
            wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT, 60_000)
            leader = proposer(wal, ttid)
            await leader.elect([node])
            await leader.stream(wal.end)
            leader.leave()
        await until(lambda: all(len(objects(bucket, ttid)) == 3 for ttid in ttids), "everything to be in the bucket", 30)
        assert http("DELETE", node.timeline_url(ttids[0]) + "?only_local=true") == {"dir_existed": True}
        assert http("DELETE", node.timeline_url(ttids[1])) == {"dir_existed": True}
        assert http("DELETE", node.timeline_url(ttids[0])) == {"dir_existed": False}
        await until(lambda: not objects(bucket, ttids[1]), "its objects to be deleted")
        # a bucket that is down delays it, also over a restart
        away = tmp_path / "away"
        bucket.rename(away)
        bucket.write_text("this is no directory")
        tenant = node.url(f"/v1/tenant/{ttids[2].tenant_id}")
        assert http("DELETE", tenant) == {str(ttids[2].timeline_id): {"dir_existed": True}}
        node.kill()
        bucket.unlink()
        away.rename(bucket)
        node.start()
        await until(lambda: not objects(bucket, ttids[2]), "the restarted process to delete them")
        await until(lambda: not list((node.directory / "deleting").iterdir()), "the work to be forgotten")
        # who only clears a broken copy does not delete what the members share
        control = node.directory / str(ttids[3].tenant_id) / str(ttids[3].timeline_id) / "safekeeper.control"
        node.kill()
        control.write_bytes(b"broken")
        node.start()
        assert http("DELETE", node.timeline_url(ttids[3])) == {"dir_existed": True}
        assert not list((node.directory / "deleting").iterdir())
        assert len(objects(bucket, ttids[0])) == 3 and len(objects(bucket, ttids[3])) == 3
        with pytest.raises(urllib.error.HTTPError):
            node.status(ttids[2])

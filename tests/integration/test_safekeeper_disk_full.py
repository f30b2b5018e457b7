"""A safekeeper whose disk gets full refuses WAL, stays up, and goes on by itself when there is room."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn
from tests.integration.cluster import free_port, http
from tests.integration.safekeeper_support import Node, ScriptedProposer, dead, new_ttid, read_stream, until
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

pytestmark = pytest.mark.cluster
START = Lsn(0x1002028)


def mount(target: Path, *options: str) -> bool:
    """A file system in memory of limited size."""
    argv = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(target)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """``sk1`` below the test's directory has room for a few segments; calling the fixture changes its size."""
    target = tmp_path / "sk1"
    target.mkdir()
    if not mount(target, "size=160m"):
        pytest.skip("this user cannot mount a file system")
    yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(target)], check=True)
    subprocess.run(["umount", "-l", str(target)], check=True)


def proposer(ttid: object, wal: WalMaker) -> ScriptedProposer:
    return ScriptedProposer(ttid, wal.start, wal.data, PG_VERSION, SYSTEM_ID)  # type: ignore[arg-type]


def fill(path: Path) -> None:
    """A file that takes all the room there is."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, bytes(65536))
    os.close(descriptor)


async def stream_until_refused(leader: ScriptedProposer, end: int) -> None:
    """Stream until the safekeeper ends the connection. Its error is in its log: what is still unread may swallow it here."""
    member = leader.members[0]
    leader.send(member, end)
    with contextlib.suppress(NeonError, OSError):
        while member.flushed < end:
            await leader.answer(member)
    assert member.flushed < end
    await dead(member.client)


def refused_by_disk(node: Node) -> str | None:
    return http("GET", node.url("/v1/status"))["wal_refused"]


async def test_a_disk_that_gets_full(tmp_path: Path, small_disk: Callable[[str], None]) -> None:
    """WAL is refused while control files can still be saved; when others fill the disk to the last byte, nothing breaks."""
    node = Node(tmp_path, 1, free_port())
    node.start()
    try:
        ttid = new_ttid()
        wal = WalMaker(START, WAL_SEGMENT_SIZE).until(START + 8 * WAL_SEGMENT_SIZE, 100_000)
        assert refused_by_disk(node) is None
        leader = proposer(ttid, wal)
        await leader.elect([node])
        await stream_until_refused(leader, wal.end)
        assert ": the disk is nearly full" in node.log.read_text()
        acknowledged = leader.members[0].flushed
        leader.leave()
        assert START + WAL_SEGMENT_SIZE < acknowledged < START + 7 * WAL_SEGMENT_SIZE
        assert "at least" in str(refused_by_disk(node))
        free = os.statvfs(node.directory)
        assert free.f_bavail * free.f_frsize > 2 * WAL_SEGMENT_SIZE, "it stopped before the disk was full"
        leader = proposer(ttid, wal)
        with pytest.raises(NeonError, match="the disk is nearly full"):  # also a new leader is refused, and told why
            await leader.elect([node])
        leader.leave()
        # what is there is still served
        command = f"START_REPLICATION PHYSICAL 0/{START:X} (term='{node.status(ttid)['acceptor_state']['term']}')"
        reader = await node.connect(ttid, "safekeeper_2")
        assert await read_stream(reader, START, acknowledged, command) == wal.slice(START, acknowledged)
        reader.abort()
        # a restart on a disk without one free byte keeps every acknowledged byte
        node.kill()
        fill(node.directory / "filler")
        node.start()
        assert node.lsn(ttid, "flush_lsn") >= acknowledged
        assert refused_by_disk(node) is not None
        (node.directory / "filler").unlink()
        small_disk("400m")
        await until(lambda: refused_by_disk(node) is None, "WAL to be accepted again")
        leader = proposer(ttid, wal)
        await leader.elect([node])
        assert leader.term_start >= acknowledged
        await leader.stream(wal.end)
        assert node.lsn(ttid, "flush_lsn") == wal.end
        reader = await node.connect(ttid)
        assert await read_stream(reader, START, wal.end) == bytes(wal.data)
        reader.abort()
        leader.leave()
    finally:
        node.kill()


async def test_a_disk_that_others_fill_at_once(tmp_path: Path, small_disk: Callable[[str], None]) -> None:
    """The safekeeper finds no room although it just looked: the connection ends, the process stays, and goes on later."""
    node = Node(tmp_path, 1, free_port())
    node.start()
    try:
        ttid = new_ttid()
        # small segments need little room to be accepted
        wal = WalMaker(START, 1 << 20).until(START + (6 << 20), 50_000)
        leader = ScriptedProposer(ttid, wal.start, wal.data, PG_VERSION, SYSTEM_ID, segment_size=1 << 20)
        await leader.elect([node])
        await leader.stream(wal.record_ends[5])
        fill(node.directory / "filler")
        await stream_until_refused(leader, wal.end)
        said = node.log.read_text()
        assert "No space left on device" in said or "the disk is nearly full" in said
        acknowledged = leader.members[0].flushed
        leader.leave()
        assert node.popen is not None and node.popen.poll() is None, "the process must stay up"
        assert node.lsn(ttid, "flush_lsn") >= acknowledged
        (node.directory / "filler").unlink()
        await until(lambda: refused_by_disk(node) is None, "WAL to be accepted again")
        leader = ScriptedProposer(ttid, wal.start, wal.data, PG_VERSION, SYSTEM_ID, segment_size=1 << 20)
        await leader.elect([node])
        await leader.stream(wal.end)
        reader = await node.connect(ttid)
        assert await read_stream(reader, START, wal.end) == bytes(wal.data)
        reader.abort()
        leader.leave()
    finally:
        node.kill()

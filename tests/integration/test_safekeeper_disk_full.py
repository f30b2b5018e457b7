"""A safekeeper whose disk is full refuses, stays up, and goes on by itself when there is room."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn
from tests.integration.cluster import free_port
from tests.integration.safekeeper_support import Node, ScriptedProposer, dead, new_ttid, read_stream
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

pytestmark = pytest.mark.cluster
START = Lsn(0x1002028)


def mount(target: Path, *options: str) -> bool:
    """A file system in memory of limited size."""
    argv = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(target)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """``sk1`` below the test's directory has room for two segments; calling the fixture changes its size."""
    target = tmp_path / "sk1"
    target.mkdir()
    if not mount(target, "size=40m"):
        pytest.skip("this user cannot mount a file system")
    yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(target)], check=True)
    subprocess.run(["umount", "-l", str(target)], check=True)


def proposer(ttid: object, wal: WalMaker) -> ScriptedProposer:
    return ScriptedProposer(ttid, wal.start, wal.data, PG_VERSION, SYSTEM_ID)  # type: ignore[arg-type]


async def test_a_full_disk(tmp_path: Path, small_disk: Callable[[str], None]) -> None:
    node = Node(tmp_path, 1, free_port())
    node.start()
    try:
        ttid = new_ttid()
        wal = WalMaker(START, WAL_SEGMENT_SIZE).until(START + 4 * WAL_SEGMENT_SIZE, 100_000)
        acknowledged = START
        for _ in range(3):  # also a new leader can do no more than the disk holds
            leader = proposer(ttid, wal)
            await leader.elect([node])
            member = leader.members[0]
            leader.send(member, wal.end)
            error = ""
            try:
                while member.flushed < wal.end:
                    await leader.answer(member)
            except (NeonError, OSError) as failure:
                error = str(failure)
            acknowledged = max(acknowledged, member.flushed)
            assert "No space left on device" in error + await dead(member.client)
            leader.leave()
            assert node.popen is not None and node.popen.poll() is None, "the process must stay up"
        assert WAL_SEGMENT_SIZE < acknowledged < START + 3 * WAL_SEGMENT_SIZE
        assert node.lsn(ttid, "flush_lsn") >= acknowledged
        # what is there is still served
        reader = await node.connect(ttid, "safekeeper_2")
        command = f"START_REPLICATION PHYSICAL 0/{START:X} (term='{node.status(ttid)['acceptor_state']['term']}')"
        assert await read_stream(reader, START, acknowledged, command) == wal.slice(START, acknowledged)
        reader.abort()
        # a restart on the full disk keeps every acknowledged byte
        node.kill()
        node.start()
        assert node.lsn(ttid, "flush_lsn") >= acknowledged
        small_disk("200m")
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

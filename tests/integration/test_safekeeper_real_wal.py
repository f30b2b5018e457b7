"""WAL that a real Postgres wrote: stored, recovered and read back byte for byte, also by Postgres's own receiver."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn, format_lsn
from neon_services.wal.scanner import WalScanner, find_end_of_wal
from tests.integration.safekeeper_support import ScriptedProposer, Service, new_ttid, read_stream, running_fleet, until

pytestmark = [pytest.mark.cluster, pytest.mark.postgres]
SQL = """
CREATE TABLE t AS SELECT g AS id, repeat(md5(g::text), 20) AS text FROM generate_series(1, 20000) g;
CREATE INDEX ON t (text);
SELECT pg_switch_wal();
UPDATE t SET text = 'x' || text WHERE id % 3 = 0;
CHECKPOINT;
INSERT INTO t SELECT g, repeat(md5(g::text), 100) FROM generate_series(1, 3000) g;
"""


def installed() -> Path:
    """The programs of the newest Postgres here."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    if not found:
        pytest.skip("no Postgres is installed")
    return found[-1].parent


@dataclass
class Source:
    """WAL from ``start`` on, and what wrote it."""

    start: Lsn
    end: Lsn
    data: bytes
    pg_version: int
    system_id: int


@pytest.fixture(scope="module")
def source() -> Iterator[Source]:
    programs = installed()
    base = Path(tempfile.mkdtemp(prefix="safekeeper-wal-", dir="/tmp"))  # the server's user must be able to enter it
    entry = pwd.getpwnam("postgres")
    os.chown(base, entry.pw_uid, entry.pw_gid)

    def run(*argv: str, text: str | None = None) -> str:
        done = subprocess.run(
            argv, input=text, capture_output=True, text=True, user="postgres", cwd=base, timeout=120, check=False
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    data = base / "data"
    try:
        run(f"{programs}/initdb", "-D", str(data), "-N", "-A", "trust")
        options = f"-c listen_addresses= -c unix_socket_directories={base} -c fsync=off -c wal_keep_size=1GB -c wal_recycle=off"
        run(f"{programs}/pg_ctl", "-D", str(data), "-w", "-l", str(base / "log"), "-o", options, "start")
        try:
            run(f"{programs}/psql", "-X", "-h", str(base), "-v", "ON_ERROR_STOP=1", "postgres", text=SQL)
            control = run(
                f"{programs}/psql",
                "-XAt",
                "-h",
                str(base),
                "-c",
                "SELECT system_identifier FROM pg_control_system()",
                "postgres",
            )
            version = run(f"{programs}/psql", "-XAt", "-h", str(base), "-c", "SHOW server_version_num", "postgres")
        finally:
            run(f"{programs}/pg_ctl", "-D", str(data), "-w", "-m", "fast", "stop")
        segments = sorted(path for path in (data / "pg_wal").iterdir() if len(path.name) == 24)
        content = b"".join(path.read_bytes() for path in segments)
        start = Lsn(int(segments[0].name[16:], 16) * WAL_SEGMENT_SIZE)
        end = find_end_of_wal(lambda lsn, count: content[lsn - start : lsn - start + count], start)
        assert end - start > 2 * WAL_SEGMENT_SIZE
        yield Source(start, end, content[: end - start], int(version), int(control))
    finally:
        shutil.rmtree(base)


async def test_real_wal_is_stored_recovered_and_read_back(source: Source, tmp_path: Path) -> None:
    with running_fleet(tmp_path) as fleet:
        ttid = new_ttid()
        leader = ScriptedProposer(ttid, source.start, source.data, source.pg_version, source.system_id)
        await leader.elect(fleet.nodes)
        middle = source.start + (source.end - source.start) // 2
        scanner = WalScanner(source.start)
        scanner.feed(source.data[: middle - source.start])
        for member in leader.members:  # half of it, cut anywhere
            leader.send(member, middle, 131072)
        for member in leader.members:
            while member.flushed < scanner.record_end_lsn:
                await leader.answer(member)
        leader.leave()
        for node in fleet.nodes:
            node.kill()
            node.start()
        leader = ScriptedProposer(ttid, source.start, source.data, source.pg_version, source.system_id)
        await leader.elect(fleet.nodes)
        # behind a switch of segments nothing but zeros follows: after a restart the log ends where the next one begins
        switched = Lsn(middle - middle % -WAL_SEGMENT_SIZE)
        assert leader.term_start in (scanner.record_end_lsn, switched)
        await leader.stream(source.end, chunk=70_000)
        assert len({node.digest(ttid, source.start, source.end) for node in fleet.nodes}) == 1
        reader = await fleet.nodes[1].connect(ttid, "pageserver-1")
        assert await read_stream(reader, source.start, source.end) == source.data
        reader.abort()
        fleet.nodes[0].kill()
        fleet.nodes[0].start()
        assert fleet.nodes[0].lsn(ttid, "flush_lsn") == source.end
        leader.leave()


async def test_postgres_own_receiver_follows_a_safekeeper(source: Source, tmp_path: Path) -> None:
    """pg_receivewal is a stock client of physical replication: the segments that it writes are the source's."""
    with running_fleet(tmp_path, 1) as fleet:
        node, ttid = fleet.nodes[0], new_ttid()
        leader = ScriptedProposer(ttid, source.start, source.data, source.pg_version, source.system_id)
        await leader.elect(fleet.nodes)
        await leader.stream(source.end)
        target = Path(tempfile.mkdtemp(prefix="safekeeper-receive-", dir="/tmp"))
        connection = f"host=127.0.0.1 port={node.pg_port} user=u dbname=replication "
        connection += f"options='-c tenant_id={ttid.tenant_id} -c timeline_id={ttid.timeline_id}'"
        argv = [f"{installed()}/pg_receivewal", "-D", str(target), "-d", connection, "--no-loop", "-v"]
        receiver = Service("pg_receivewal", argv, tmp_path / "receivewal.log")
        receiver.start()
        try:
            last = f"{1:08X}{0:08X}{(source.end - 1) // WAL_SEGMENT_SIZE:08X}.partial"

            def received() -> bool:
                assert receiver.popen is not None and receiver.popen.poll() is None, receiver.log.read_text()
                files = sorted(target.iterdir())
                if not files or files[-1].name != last:
                    return False
                begin = int(files[0].name[16:24], 16) * WAL_SEGMENT_SIZE
                content = b"".join(path.read_bytes() for path in files)
                return content[: source.end - begin] == source.data[begin - source.start :]

            # pg_receivewal begins at the segment of the position that IDENTIFY_SYSTEM gives
            await until(received, f"pg_receivewal to have everything up to {format_lsn(source.end)}", 30)
        finally:
            receiver.kill()
            shutil.rmtree(target)
        leader.leave()

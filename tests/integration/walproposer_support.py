"""For the walproposer's tests: a safekeeper of the real acceptor with its log in memory, and a plain Postgres 15+."""

import asyncio
import json
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from neon_services.consensus.acceptor import Acceptor, AcceptorState, ProposerConnection, run
from neon_services.ground.errors import NeonError, ProtocolViolation, StaleGeneration
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn, format_lsn, parse_lsn
from neon_services.protocols import pgwire
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.pgserver import EndConnection, PgServer, ServerConnection
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, parse_proposer_message
from neon_services.simulation.model_storage import ModelStorage, ModelWal
from tests.integration.cluster import USER, Process, free_port, make_directory, wait_until

SCRIPTS = Path(sys.executable).parent


class _ByteWal(ModelWal):
    """Every byte ends a record: real WAL without a record scanner."""

    def _scan(self) -> None:
        self.write_record_lsn = self.write_lsn


class MemorySafekeeper:
    """One safekeeper: the production acceptor, an in-memory log, a real port."""

    def __init__(
        self, node_id: int, ttid: TenantTimelineId, mconf: MembershipConfiguration, pg_version: int, start: Lsn
    ) -> None:
        self.node_id = node_id
        self.ttid = ttid
        state = AcceptorState.create(mconf, pg_version=pg_version, system_id=0, wal_seg_size=1 << 24, start_lsn=start)
        self.disk = ModelStorage(state, random.Random(node_id))
        self.disk.wal = _ByteWal()
        self.disk.wal.initialize(start)
        self.acceptor = Acceptor(node_id, ttid, state, self.disk.wal)
        self.port = free_port()
        self.server: PgServer | None = None
        self.pushers: dict[ServerConnection, ProposerConnection] = {}
        self.recovery_reads = 0

    async def start(self) -> None:
        """Listen."""
        self.server = PgServer(lambda connection: _Handler(self))
        await self.server.start("127.0.0.1", self.port)

    async def stop(self) -> None:
        """Be gone; what was flushed stays."""
        assert self.server is not None
        await self.server.stop()
        self.server = None
        self.acceptor = Acceptor(self.node_id, self.ttid, self.disk.state, self.disk.wal)

    @property
    def running(self) -> bool:
        return self.server is not None

    def give_feedback(self, feedback: PageserverFeedback) -> None:
        """As if a pageserver had reported."""
        for connection, proposer in self.pushers.items():
            answer = self.acceptor.feedback_response(proposer, feedback)
            if answer is not None:
                connection.send_copy_data(answer.pack())


class _Handler:
    def __init__(self, safekeeper: MemorySafekeeper) -> None:
        self.safekeeper = safekeeper

    async def startup(self, message: pgwire.StartupMessage) -> None:
        options = message.options()
        ttid = self.safekeeper.ttid
        if (options.get("tenant_id"), options.get("timeline_id")) != (str(ttid.tenant_id), str(ttid.timeline_id)):
            raise pgwire.ServerError("XX000", "wrong ids")

    def connection_lost(self) -> None:
        pass

    async def query(self, connection: ServerConnection, sql: str) -> None:
        if sql.startswith("START_WAL_PUSH"):
            await self._push(connection)
        elif sql.startswith("START_REPLICATION"):
            await self._read(connection, sql)
        else:
            raise pgwire.ServerError("42601", f"unknown {sql!r}")

    async def _push(self, connection: ServerConnection) -> None:
        safekeeper = self.safekeeper
        acceptor, disk = safekeeper.acceptor, safekeeper.disk
        proposer = safekeeper.pushers[connection] = ProposerConnection(connection.peer)

        def send(replies: list[Any]) -> None:
            for reply in replies:
                connection.send_copy_data(reply.pack())

        def on_message(body: memoryview) -> None:
            try:
                send(run(acceptor.handle(proposer, parse_proposer_message(body)), disk.perform))
            except (ProtocolViolation, StaleGeneration, NeonError) as error:
                connection.fail(str(error))

        connection.copy_sink = on_message
        connection.copy_batch_end = lambda: send(run(acceptor.flush_batch(proposer), disk.perform))
        connection.begin_copy_both()
        try:
            await connection.next_copy_data()
        finally:
            del safekeeper.pushers[connection]
        raise EndConnection

    async def _read(self, connection: ServerConnection, sql: str) -> None:
        found = re.fullmatch(r"START_REPLICATION PHYSICAL (\S+) \(term='(\d+)'\)", sql)
        assert found, sql
        acceptor, wal = self.safekeeper.acceptor, self.safekeeper.disk.wal
        position = parse_lsn(found[1])
        self.safekeeper.recovery_reads += 1
        connection.begin_copy_both()
        while not connection.closed:
            if acceptor.term != int(found[2]):
                raise pgwire.ServerError("XX000", f"failed to acquire term {found[2]}, current term {acceptor.term}")
            end = Lsn(min(acceptor.flush_lsn, position + 131072))
            if end > position:
                head = struct.pack("!cQQq", b"w", position, end, 0)
                connection.send_copy_data(head + wal.read(position, end))
                position = end
                await connection.drain()
            else:
                await asyncio.sleep(0.02)


class PlainPostgres:
    """A stock server whose commits wait for the walproposer."""

    def __init__(self, base: Path, major: int) -> None:
        self.bin = Path(f"/usr/lib/postgresql/{major}/bin")
        self.base = base
        self.data = base / "pgdata"
        self.port = free_port()
        make_directory(base)
        self._run("initdb", "-D", str(self.data), "-U", "cloud_admin", "--no-sync", "-A", "trust")
        settings = {
            "port": self.port,
            "listen_addresses": "'127.0.0.1'",
            "unix_socket_directories": f"'{base}'",
            "fsync": "off",
            "synchronous_standby_names": "walproposer",
            "wal_level": "logical",
            "max_wal_senders": 10,
            "shared_buffers": "32MB",
            "wal_sender_timeout": "5s",
            "restart_after_crash": "off",
            "wal_keep_size": "1GB",
        }
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = {value}\n" for name, value in settings.items())
        self.process = Process("postgres", [str(self.bin / "postgres"), "-D", str(self.data)], base / "run")

    def _run(self, program: str, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            [str(self.bin / program), *arguments],
            user=USER,
            group=USER,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    @property
    def dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=cloud_admin dbname=postgres connect_timeout=5"

    def end_of_wal(self) -> Lsn:
        """Of the stopped server: the end of its shutdown checkpoint, where the next WAL goes."""
        text = self._run("pg_controldata", str(self.data))
        redo = parse_lsn(next(line.split()[-1] for line in text.splitlines() if line.startswith("Latest checkpoint location")))
        segment = self._run("pg_waldump", "-s", format_lsn(redo), "-p", str(self.data / "pg_wal"), check=False)
        assert "CHECKPOINT_SHUTDOWN" in segment
        return redo

    def wal_bytes(self, begin: Lsn, end: Lsn) -> bytes:
        """From pg_wal."""
        size, out = 1 << 24, b""
        while begin < end:
            name = f"{1:08X}{begin // size // 256:08X}{begin // size % 256:08X}"
            until = min(end, (begin // size + 1) * size)
            with (self.data / "pg_wal" / name).open("rb") as file:
                file.seek(begin % size)
                out += file.read(until - begin)
            begin = Lsn(until)
        return out

    def start(self) -> None:
        self.process.start()
        wait_until(lambda: (self.data / "postmaster.pid").read_text().splitlines()[-1].strip() == "ready", "postgres", 30)


class WalProposerProcess:
    """The console script under test, with its events."""

    def __init__(self, config: dict[str, Any], base: Path, *options: str) -> None:
        make_directory(base)
        self.config = base / "walproposer.json"
        self.config.write_text(json.dumps(config))
        self.log = (base / "walproposer.log").open("ab")
        self.options = options
        self.events: list[dict[str, Any]] = []
        self._changed = asyncio.Condition()

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "neon_services.compute.walproposer_main",
            "--config",
            str(self.config),
            *self.options,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        if "--sync-safekeepers" not in self.options:
            self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            async with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()

    async def event(self, name: str, timeout: float = 20) -> dict[str, Any]:
        """Wait for the first event of this name."""

        def seen() -> dict[str, Any] | None:
            return next((event for event in self.events if event["event"] == name), None)

        async with asyncio.timeout(timeout), self._changed:
            while not (found := seen()):
                await self._changed.wait()
        return found

    def command(self, **command: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    async def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        self.log.close()

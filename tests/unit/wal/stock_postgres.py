"""A temporary stock Postgres for tests: initdb, start, psql, stop; Unix socket only, never as root."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn, parse_segment_file_name

PORT = 23001  # only names the socket file: nothing listens on TCP


def bin_dir(major: int = 15) -> Path:
    """Where the distribution keeps the server's programs."""
    return Path(f"/usr/lib/postgresql/{major}/bin")


class StockPostgres:
    """One server in a directory of its own. As root, everything of it runs as user postgres."""

    def __init__(self, base: Path, programs: Path) -> None:
        self.base = base
        self.programs = programs
        self.data = base / "data"
        self._user: dict[str, object] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres")
            self._user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        self._own(base)

    def _own(self, path: Path) -> None:
        if self._user:
            os.chown(path, int(str(self._user["user"])), int(str(self._user["group"])))

    def make_directory(self, name: str) -> Path:
        """A directory below the server's base that the server may write."""
        path = self.base / name
        path.mkdir()
        self._own(path)
        return path

    @property
    def connection(self) -> tuple[str, ...]:
        """Arguments that lead psql and pgbench here."""
        return ("-h", str(self.base), "-p", str(PORT), "-U", "postgres")

    def run(self, program: str, *arguments: str | Path, check: bool = True, **options: object) -> str:
        """Run one of the server's programs to its end; its output. Raises AssertionError with the output when it fails."""
        done = subprocess.run(  # type: ignore[call-overload]
            [self.programs / program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.base,
            timeout=300,
            **self._user,
            **options,
        )
        assert not check or done.returncode == 0, f"{program} {arguments}: {done.stdout[-3000:]}"
        return done.stdout

    def initdb(self, *arguments: str, settings: dict[str, str] | None = None) -> None:
        """Make the cluster, superuser `postgres`, with fsync off."""
        self.run(
            "initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8", *arguments
        )
        lines = {
            "port": str(PORT),
            "listen_addresses": "''",
            "unix_socket_directories": f"'{self.base}'",
            "fsync": "off",
            "synchronous_commit": "off",
            "wal_keep_size": "'4GB'",
            "max_wal_size": "'4GB'",
            "shared_buffers": "'64MB'",
            **(settings or {}),
        }
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in lines.items())

    def start(self) -> None:
        """Start and wait until it answers."""
        # its log goes to a file: a server that keeps our pipe open would keep run() waiting
        self.run("pg_ctl", "-D", self.data, "-w", "-l", self.base / "log", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop and wait."""
        self.run("pg_ctl", "-D", self.data, "-w", "-m", mode, "stop")

    def psql(self, sql: str, *arguments: str, database: str = "postgres", check: bool = True) -> str:
        """Run SQL from a script; unaligned output. Stops at the first error when `check` is set."""
        stop = "1" if check else "0"
        return self.run(
            "psql",
            *("-X", "-q", "-A", "-t", *self.connection, "-d", database),
            *("-v", f"ON_ERROR_STOP={stop}", *arguments, "-f", "-"),
            check=check,
            input=sql,
        )

    def wal_files(self) -> list[Path]:
        """The WAL files, oldest first."""
        return sorted(path for path in (self.data / "pg_wal").iterdir() if len(path.name) == 24)

    def wal(self) -> tuple[Lsn, bytes]:
        """(LSN of the first byte, all bytes of the WAL files)."""
        files = self.wal_files()
        first = parse_segment_file_name(files[0].name)
        return Lsn(first * WAL_SEGMENT_SIZE), b"".join(file.read_bytes() for file in files)


@contextlib.contextmanager
def stock_postgres(programs: Path | None = None) -> Iterator[StockPostgres]:
    """A server object on a fresh directory that user postgres can reach; stopped and removed at the end."""
    base = Path(tempfile.mkdtemp(prefix="neon-stock-postgres-"))
    server = StockPostgres(base, programs or bin_dir())
    try:
        yield server
    finally:
        if (server.data / "postmaster.pid").exists():
            server.stop("immediate")
        shutil.rmtree(base)


@dataclass(frozen=True)
class RealWal:
    """WAL of a stopped server."""

    start_lsn: Lsn
    data: bytes
    server: StockPostgres


_WORKLOAD = """
CREATE TABLE account (id int PRIMARY KEY, balance int, filler text) WITH (fillfactor = 70);
INSERT INTO account SELECT g, 0, repeat('x', 40) FROM generate_series(1, 20000) g;
CREATE INDEX ON account USING hash (balance);
CREATE INDEX ON account USING gin (filler gin_trgm_ops);
VACUUM FREEZE account;
CHECKPOINT;
UPDATE account SET balance = balance + 1 WHERE id % 3 = 0;
DELETE FROM account WHERE id % 7 = 0;
BEGIN; SELECT count(*) FROM (SELECT * FROM account WHERE id % 11 = 0 FOR UPDATE) x; COMMIT;
VACUUM account;
SELECT pg_logical_emit_message(false, 'big', repeat('y', 3000000));
SELECT pg_switch_wal();
BEGIN; INSERT INTO account SELECT g, 1, 'again' FROM generate_series(30001, 33000) g; SAVEPOINT s;
DELETE FROM account WHERE id > 32000; ROLLBACK TO s; COMMIT;
BEGIN; UPDATE account SET filler = 'prepared' WHERE id < 100; PREPARE TRANSACTION 'p'; COMMIT PREPARED 'p';
DELETE FROM account WHERE id > 10000; VACUUM (TRUNCATE on) account;
CREATE DATABASE copied STRATEGY = file_copy;
SELECT pg_switch_wal();
DROP TABLE account;
"""


@contextlib.contextmanager
def make_real_wal(base: Path, *, full_page_writes: str) -> Iterator[RealWal]:
    """Run the workload on a fresh server, stop it cleanly, and read its WAL."""
    with stock_postgres() as server:
        server.initdb(settings={"full_page_writes": full_page_writes, "max_prepared_transactions": "5"})
        server.start()
        server.psql("CREATE EXTENSION pg_trgm;" + _WORKLOAD)
        server.stop()
        start_lsn, data = server.wal()
        yield RealWal(start_lsn, data, server)

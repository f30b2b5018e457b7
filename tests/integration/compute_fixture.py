"""A stopped source database, its test pageserver, and computes made from it: what the tests of the library share.

Everything runs as the user ``postgres`` below one directory; every process started here is ended by pid.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from neon_services.ground.lsn import Lsn, format_lsn
from tests.integration.cluster import (
    LIBRARIES,
    REPOSITORY,
    USER,
    Process,
    free_port,
    installed_major,
    make_directory,
    wait_until,
)

TENANT, TIMELINE = "11" * 16, "22" * 16
SUPERUSER = "cloud_admin"


def run(*argv: str | Path, check: bool = True, timeout: float = 120.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program as the service user; its output as text."""
    done = subprocess.run(
        [str(part) for part in argv],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        cwd="/",
        user=USER,
        group=USER,
        extra_groups=[],
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **environment},
    )
    assert not check or done.returncode == 0, f"{argv} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


class Database:
    """One Postgres data directory and its server."""

    def __init__(self, pgdata: Path, *, port: int | None = None) -> None:
        self.major = installed_major()
        self.bin = Path(f"/usr/lib/postgresql/{self.major}/bin")
        self.pgdata = pgdata
        self.port = port or free_port()
        self.sockets = pgdata.parent
        self.log = pgdata.with_suffix(".log")

    def start(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """pg_ctl start; with ``check=False`` the failure is the caller's."""
        self.log.unlink(missing_ok=True)
        arguments = ["-o", " ".join(options)] if options else []
        done = run(self.bin / "pg_ctl", "-D", self.pgdata, "-l", self.log, "-w", "-t", "60", *arguments, "start", check=False)
        assert not check or done.returncode == 0, f"{self.pgdata} does not start:\n{self.log_text()}"
        return done

    def stop(self, mode: str = "fast") -> None:
        """pg_ctl stop."""
        run(self.bin / "pg_ctl", "-D", self.pgdata, "-m", mode, "-w", "stop")

    def log_text(self) -> str:
        """The server's log."""
        return self.log.read_text() if self.log.exists() else "(no log)"

    @property
    def postmaster_pid(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self.pgdata / "postmaster.pid").read_text().split()[0])
        return None

    def kill(self) -> None:
        """kill -9 of the postmaster; its children end by themselves."""
        pid = self.postmaster_pid
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not _descriptor_users(self.pgdata), f"the processes of {self.pgdata} to end", 20)
        # where nobody reaps it, the dead postmaster stays a zombie, which Postgres takes for a living one
        (self.pgdata / "postmaster.pid").unlink(missing_ok=True)
        (self.sockets / f".s.PGSQL.{self.port}.lock").unlink(missing_ok=True)

    def connect(self, database: str = "postgres", **options: Any) -> psycopg.Connection[Any]:
        """An autocommit session."""
        return psycopg.connect(
            host=str(self.sockets),
            port=self.port,
            user=SUPERUSER,
            dbname=database,
            autocommit=True,
            connect_timeout=10,
            **options,
        )

    def query(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Rows of one statement."""
        with self.connect(database) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def program(self, name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A client program of Postgres."""
        return run(
            self.bin / name, *arguments, check=check, PGHOST=str(self.sockets), PGPORT=str(self.port), PGUSER=SUPERUSER,
            PGDATABASE="postgres",
        )  # fmt: skip

    def dump(self, database: str) -> str:
        """pg_dump, without what differs between any two runs."""
        text = self.program("pg_dump", "--exclude-table-data=unlogged*", database).stdout
        return "\n".join(line for line in text.splitlines() if "restrict" not in line)


def _descriptor_users(pgdata: Path) -> list[int]:
    """Processes that run in this directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if (entry / "cwd").readlink() == pgdata:
                    found.append(int(entry.name))
    return found


SOURCE_SQL = """
create table big as select g as id, repeat(md5(g::text), 4) as filler from generate_series(1, 20000) g;
create index on big (id);
create table small (id int primary key, value text);
insert into small select g, 'row ' || g from generate_series(1, 1000) g;
create unlogged table unlogged_one (id int primary key);
insert into unlogged_one select generate_series(1, 100);
create extension amcheck;
create table changing (id int, value int);
insert into changing select g, 0 from generate_series(1, 5000) g;
"""


def make_source(base: Path) -> Database:
    """A cleanly stopped cluster with some tables in two databases."""
    source = Database(base / "source")
    run(source.bin / "initdb", "-D", source.pgdata, "-U", SUPERUSER, "-A", "trust", "--no-sync", "--locale=C.UTF-8")
    with (source.pgdata / "postgresql.conf").open("a") as conf:
        conf.write(f"port={source.port}\nunix_socket_directories='{source.sockets}'\nlisten_addresses=''\nfsync=off\n")
    source.start()
    with source.connect() as connection:
        for statement in SOURCE_SQL.split(";\n"):
            if statement.strip():
                connection.execute(statement)  # type: ignore[call-overload]
        connection.execute("create database other")
    source.query("create table only_there as select generate_series(1, 3000) g", "other")
    source.stop()
    return source


class SourceServer:
    """The test pageserver, as a process that can be killed and come back."""

    def __init__(self, source: Database, directory: Path) -> None:
        self.port = free_port()
        argv = [sys.executable, "-m", "tests.unit.compute.source_server", str(source.pgdata), str(self.port)]
        self.process = Process("source_server", argv, directory, {"PYTHONPATH": str(REPOSITORY)})

    @property
    def connstring(self) -> str:
        return f"postgresql://no_user@127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until it listens."""
        self.process.log.unlink(missing_ok=True)
        self.process.start()
        wait_until(lambda: self.process.running and "/" in self.process.tail(1), "the test pageserver to listen", 20)

    def stop(self) -> None:
        """kill -9."""
        self.process.kill()


def build_compute(base: Path, name: str, source: Database, server: SourceServer, *, gap: int = 0, **settings: str) -> Database:
    """A data directory made by production code, `gap` bytes behind the end of the source's WAL; not started."""
    compute = Database(base / name)
    lines = {
        "port": str(compute.port),
        "unix_socket_directories": str(compute.sockets),
        "listen_addresses": "",
        "fsync": "off",
        "restart_after_crash": "off",
        "dynamic_shared_memory_type": "mmap",  # goes with the directory when a test kills the server
        "shared_preload_libraries": str(LIBRARIES / f"pg{compute.major}" / "neon.so"),
        "neon.tenant_id": TENANT,
        "neon.timeline_id": TIMELINE,
        "neon.pageserver_connstring": server.connstring,
        **settings,
    }
    conf = "".join(f"{key} = '{value}'\n" for key, value in lines.items())
    run(
        sys.executable, "-m", "tests.integration.compute_fixture", source.pgdata, compute.pgdata, str(gap), conf,
        PYTHONPATH=str(REPOSITORY),
    )  # fmt: skip
    return compute


@contextlib.contextmanager
def compute_ground(base: Path) -> Iterator[tuple[Path, Database, SourceServer]]:
    """A directory, a source and its server."""
    shutil.rmtree(base, ignore_errors=True)
    make_directory(base)
    source = make_source(base)
    server = SourceServer(source, base / "server")
    server.start()
    try:
        yield base, source, server
    finally:
        server.stop()


def _build_as_user(source: Path, target: Path, gap: int, conf: str) -> Lsn:
    from neon_services.compute.datadir import build_data_directory
    from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
    from tests.unit.compute.source_server import Source

    image = Source(source)
    lsn = Lsn(image.end_lsn + gap)
    ttid = TenantTimelineId(TenantId.parse(TENANT), TimelineId.parse(TIMELINE))
    built = build_data_directory(target, image.basebackup(lsn), lsn, ttid)
    (target / "postgresql.conf").write_text(conf)
    return built.checkpoint_lsn


if __name__ == "__main__":
    print(format_lsn(_build_as_user(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))

"""compute_ctl with a real Postgres and a walproposer that needs no safekeepers: starts, ends, refusals."""

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from neon_services.ground.lsn import format_lsn, parse_lsn
from tests.integration.cluster import MD5_CLOUD_ADMIN, REPOSITORY, SCRIPTS, Process, free_port, http, make_directory, wait_until
from tests.integration.compute_fixture import TENANT, TIMELINE, Database, SourceServer, compute_ground
from tests.unit.compute.source_server import Source

pytestmark = pytest.mark.postgres

Ground = tuple[Path, Database, SourceServer]


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    base = Path(f"/tmp/neon-compute-ctl-{os.getpid()}")
    with compute_ground(base) as made:
        wrapper = base / "walproposer"
        wrapper.write_text(
            f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m tests.unit.compute.fake_proposer "$@"\n'
        )
        wrapper.chmod(0o755)
        yield made
    subprocess.run(["rm", "-rf", str(base)], check=True)


class ComputeCtl:
    """One compute_ctl."""

    def __init__(self, ground: Ground, name: str, **environment: str) -> None:
        self.base, source, self.server = ground
        if not self.server.process.running:
            self.server.start()
        self.directory = self.base / name
        self.port, self.http_port = free_port(), free_port()
        self.config = self.base / f"{name}.json"
        self.fatal_file = self.base / f"{name}.fatal"
        self.ready_lsn = format_lsn(Source(source.pgdata).end_lsn)
        self.bin = source.bin
        argv = [
            str(SCRIPTS / "compute_ctl"),
            "-D",
            str(self.pgdata),
            "-C",
            f"postgresql://cloud_admin@localhost:{self.port}/postgres",
        ]
        argv += [
            "-b",
            str(source.bin / "postgres"),
            "-i",
            name,
            "-c",
            str(self.config),
            "--walproposer",
            str(self.base / "walproposer"),
        ]
        argv += ["--external-http-port", str(self.http_port), "--internal-http-port", str(free_port())]
        steering = {"FAKE_READY_LSN": self.ready_lsn, "FAKE_FATAL_FILE": str(self.fatal_file), **environment}
        self.process = Process(name, argv, self.directory, steering)
        self.spec: dict[str, Any] = {
            "format_version": 1.0,
            "tenant_id": TENANT,
            "timeline_id": TIMELINE,
            "mode": "Primary",
            "pageserver_connstring": self.server.connstring,
            "safekeeper_connstrings": ["127.0.0.1:1"],
            "cluster": {
                "roles": [{"name": "cloud_admin", "encrypted_password": MD5_CLOUD_ADMIN, "options": None}],
                "databases": [],
                "settings": [
                    {"name": "listen_addresses", "value": "127.0.0.1", "vartype": "string"},
                    {"name": "unix_socket_directories", "value": str(self.base), "vartype": "string"},
                    {"name": "max_replication_write_lag", "value": "500MB", "vartype": "string"},
                ],
            },
        }

    @property
    def pgdata(self) -> Path:
        return self.directory / "pgdata"

    def start(self, status: str = "running") -> None:
        """Write the configuration, start, wait for a status."""
        self.config.write_text(json.dumps({"spec": self.spec, "compute_ctl_config": {"jwks": {"keys": []}}}))
        self.config.chmod(0o644)
        self.process.start()
        if status:
            self.wait_status(status)

    def wait_status(self, status: str) -> dict[str, Any]:
        """Wait until GET /status says so."""

        def reached() -> dict[str, Any] | None:
            assert self.process.running, self.process.tail()
            body = http("GET", f"{self.api}/status")
            return body if body["status"] == status else None

        return wait_until(reached, f"status {status}", 30)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def query(
        self, sql: str, user: str = "cloud_admin", password: str = "cloud_admin", database: str = "postgres"
    ) -> list[Any]:
        """Rows over TCP with a password."""
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=user, password=password, dbname=database, autocommit=True, connect_timeout=10
        ) as session:
            cursor = session.execute(sql)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    @property
    def postmaster_pid(self) -> int:
        return int((self.pgdata / "postmaster.pid").read_text().split()[0])

    def everything_ended(self) -> bool:
        """No process of ours is left, zombies aside."""
        uid = pwd.getpwnam("postgres").pw_uid
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and entry.stat().st_uid == uid:
                    text = (entry / "cmdline").read_bytes().decode()
                    if str(self.directory) in text or str(self.pgdata.with_name("pgdata.walproposer.json")) in text:
                        return False
        return True

    def close(self) -> None:
        """End whatever still runs."""
        if self.process.running:
            self.process.kill()
        with contextlib.suppress(OSError, ValueError):
            os.kill(self.postmaster_pid, signal.SIGQUIT)
        wait_until(self.everything_ended, "all processes to end", 20)
        with contextlib.suppress(OSError):
            shutil.rmtree((self.pgdata / "pg_dynshmem").readlink())


@pytest.fixture
def ctl(ground: Ground, request: pytest.FixtureRequest) -> Iterator[ComputeCtl]:
    made = ComputeCtl(ground, request.node.name.split("[")[0].removeprefix("test_")[:40])
    yield made
    made.close()


def test_start_roles_databases_and_terminate(ctl: ComputeCtl) -> None:
    ctl.spec["cluster"]["roles"].append({"name": "alice", "encrypted_password": MD5_CLOUD_ADMIN, "options": None})
    # md5("password" + "alice") differs from the administrator's: any 32 digits are a verifier
    ctl.spec["cluster"]["databases"].append({"name": "shop", "owner": "alice", "options": None})
    ctl.start()
    assert ctl.query("select count(*) from small") == [(1000,)]
    assert ctl.query("select rolname from pg_database join pg_roles r on r.oid = datdba where datname = 'shop'") == [("alice",)]
    assert ctl.query("select pg_has_role('alice', 'neon_superuser', 'member')") == [(True,)]
    assert ctl.query("show neon.max_replication_write_lag") == [("500MB",)]
    assert ctl.query("select application_name, sync_state from pg_stat_replication") == [("walproposer", "sync")]
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        ctl.query("select 1", password="wrong")
    assert http("POST", f"{ctl.api}/check_writability") is True
    times = http("GET", f"{ctl.api}/metrics.json")
    assert times["total_startup_ms"] > 0 and times["basebackup_bytes"] > 100_000

    answer = http("POST", f"{ctl.api}/terminate?mode=fast")
    assert parse_lsn(answer["lsn"]) > parse_lsn(ctl.ready_lsn)
    assert http("GET", f"{ctl.api}/status")["status"] == "terminated"
    assert ctl.process.stop() == 0, "a signal ends the time in which /status can be read"
    assert ctl.everything_ended()


def test_durability_settings_cannot_be_changed(ctl: ComputeCtl) -> None:
    ctl.start()
    for name in ("synchronous_standby_names", "restart_after_crash"):
        before = ctl.query(f"show {name}")
        ctl.query(f"alter system set {name} = {'on' if name == 'restart_after_crash' else repr('')}")
        ctl.query("alter system set work_mem = '7MB'")
        ctl.query("select pg_reload_conf()")
        wait_until(lambda: ctl.query("show work_mem") == [("7MB",)], "the reload")
        assert ctl.query(f"show {name}") == before
        ctl.query("alter system reset all")


def test_last_active(ctl: ComputeCtl) -> None:
    ctl.start()
    wait_until(lambda: ctl.query("select 1") and http("GET", f"{ctl.api}/status")["last_active"], "use to be noticed", 20)
    with psycopg.connect(
        host="127.0.0.1", port=ctl.port, user="cloud_admin", password="cloud_admin", dbname="postgres"
    ) as session:
        session.execute("select 1")  # idle in transaction is use
        first = http("GET", f"{ctl.api}/status")["last_active"]
        wait_until(lambda: http("GET", f"{ctl.api}/status")["last_active"] > first, "use to go on", 20)


def test_configure(ctl: ComputeCtl) -> None:
    ctl.start()
    ctl.spec["cluster"]["settings"].append({"name": "work_mem", "value": "5MB", "vartype": "string"})
    ctl.spec["cluster"]["databases"].append({"name": "later", "owner": "cloud_admin", "options": None})
    body = http("POST", f"{ctl.api}/configure", {"spec": ctl.spec})
    assert body["status"] == "running"
    wait_until(lambda: ctl.query("show work_mem") == [("5MB",)], "the setting")
    assert ctl.query("select current_database()", database="later") == [("later",)]
    with pytest.raises(urllib.error.HTTPError, match="another one needs another compute"):
        http("POST", f"{ctl.api}/configure", {"spec": ctl.spec | {"timeline_id": "33" * 16}})
    with pytest.raises(urllib.error.HTTPError, match="field 'spec' is missing"):
        http("POST", f"{ctl.api}/configure", {})
    assert http("GET", f"{ctl.api}/status")["status"] == "running"


def test_delta_operations(ctl: ComputeCtl) -> None:
    cluster = ctl.spec["cluster"]
    cluster["roles"] += [{"name": name, "encrypted_password": MD5_CLOUD_ADMIN} for name in ("ann", "bob")]
    cluster["databases"] += [{"name": name, "owner": "ann"} for name in ("keep", "gone", "old")]
    ctl.start()
    ctl.query("create table bobs (i int)", database="keep")
    ctl.query("alter table bobs owner to bob", database="keep")
    del cluster["roles"][2], cluster["databases"][1:]
    cluster["roles"][1]["name"] = "anna"
    cluster["databases"] = [{"name": "keep", "owner": "anna"}, {"name": "new", "owner": "anna"}]
    ctl.spec["delta_operations"] = [
        {"action": "rename_role", "name": "ann", "new_name": "anna"},
        {"action": "delete_db", "name": "gone"},
        {"action": "rename_db", "name": "old", "new_name": "new"},
        {"action": "delete_role", "name": "bob"},
    ]
    for _ in range(2):  # the second time there is nothing left to do
        http("POST", f"{ctl.api}/configure", {"spec": ctl.spec})
        names = "select array_agg(datname::text order by 1) from pg_database where datname in ('keep', 'gone', 'old', 'new')"
        assert ctl.query(names) == [(["keep", "new"],)]
        assert ctl.query("select array_agg(rolname::text) from pg_roles where rolname in ('ann', 'anna', 'bob')") == [
            (["anna"],)
        ]
        assert ctl.query("select tableowner from pg_tables where tablename = 'bobs'", database="keep") == [("anna",)]


def test_configure_follows_a_moved_pageserver(ctl: ComputeCtl, ground: Ground) -> None:
    """A session that waits for a page goes on when compute_ctl is told where the pageserver is now."""
    base, source, server = ground
    ctl.start()
    other = SourceServer(source, base / "server2")
    other.start()
    try:
        with psycopg.connect(
            host="127.0.0.1", port=ctl.port, user="cloud_admin", password="cloud_admin", dbname="postgres", autocommit=True
        ) as session:
            session.execute("select count(*) from small")
            server.stop()
            answers: list[Any] = []
            reader = threading.Thread(target=lambda: answers.append(session.execute("select count(*) from big").fetchone()))
            reader.start()
            ctl.spec["pageserver_connstring"] = other.connstring
            ctl.spec["skip_pg_catalog_updates"] = True
            http("POST", f"{ctl.api}/configure", {"spec": ctl.spec})
            reader.join(30)
            assert answers == [(20000,)]
    finally:
        other.stop()


def test_sigterm_is_a_fast_shutdown(ctl: ComputeCtl) -> None:
    ctl.start()
    ctl.query("create table t as select 1")
    assert ctl.process.stop() == 0
    assert "database system is shut down" in ctl.process.tail()
    assert ctl.everything_ended()


def test_sigterm_while_waiting_for_the_election(ground: Ground) -> None:
    ctl = ComputeCtl(ground, "silent", FAKE_SILENT="1")
    try:
        ctl.start("init")
        assert ctl.process.stop() == 0
        assert ctl.everything_ended()
    finally:
        ctl.close()


def test_deposed_stops_at_once_with_the_reason(ctl: ComputeCtl) -> None:
    ctl.start()
    ctl.fatal_file.write_text("term 7 of another compute has won")
    assert ctl.process.popen is not None
    assert ctl.process.popen.wait(20) == 1
    assert "term 7 of another compute has won" in ctl.process.tail()
    assert ctl.everything_ended()


def test_crash_of_postgres_ends_the_compute(ctl: ComputeCtl) -> None:
    ctl.start()
    with psycopg.connect(
        host="127.0.0.1", port=ctl.port, user="cloud_admin", password="cloud_admin", dbname="postgres"
    ) as session:
        os.kill(session.info.backend_pid, signal.SIGKILL)
    assert ctl.process.popen is not None
    assert ctl.process.popen.wait(30) != 0
    assert ctl.everything_ended()


def test_kill_of_compute_ctl_leaves_nothing_and_the_next_start_works(ctl: ComputeCtl) -> None:
    ctl.start()
    ctl.process.kill()
    wait_until(ctl.everything_ended, "the children to end with their parent", 20)
    ctl.start()
    assert ctl.query("select count(*) from small") == [(1000,)]


def test_kill_of_everything_leaves_no_shared_memory(ctl: ComputeCtl) -> None:
    """A data directory is new at each start, so Postgres does not find what a killed one has left."""
    ctl.start()
    assert ctl.query("show dynamic_shared_memory_type") == [("mmap",)]
    place = (ctl.pgdata / "pg_dynshmem").readlink()
    assert place.parent == Path("/dev/shm")
    left = set(place.iterdir())
    segment = (ctl.pgdata / "postmaster.pid").read_text().split("\n")[6].split()[1]
    assert left and segment in _system_v_segments()
    assert ctl.process.popen is not None
    for pid in (ctl.process.popen.pid, ctl.postmaster_pid):
        os.kill(pid, signal.SIGKILL)
    ctl.process.popen.wait(10)
    wait_until(ctl.everything_ended, "all processes to end", 20)
    ctl.start()
    assert not left & set(place.iterdir())
    assert segment not in _system_v_segments()


def _system_v_segments() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def test_an_orphan_postgres_is_fenced(ctl: ComputeCtl) -> None:
    """A Postgres that outlived its compute_ctl holds the port; the next start ends it."""
    ctl.start()
    settings = (ctl.pgdata / "postgresql.conf").read_text()
    ctl.process.kill()
    wait_until(ctl.everything_ended, "the children to end with their parent", 20)
    (ctl.pgdata / "postmaster.pid").unlink(missing_ok=True)
    (ctl.base / f".s.PGSQL.{ctl.port}.lock").unlink(missing_ok=True)
    (ctl.pgdata / "postgresql.conf").write_text(settings.replace("synchronous_standby_names = 'walproposer'", ""))
    orphan = Process("orphan", [str(ctl.bin / "postgres"), "-D", str(ctl.pgdata)], ctl.directory)
    orphan.start()
    wait_until(lambda: "ready" in (ctl.pgdata / "postmaster.pid").read_text(), "the orphan to serve", 30)
    ctl.start()
    assert ctl.query("select count(*) from small") == [(1000,)]
    assert orphan.popen is not None and orphan.popen.wait(5) is not None
    assert "stopping the Postgres (pid" in ctl.process.tail()


def test_a_second_compute_ctl_on_the_same_directory_is_refused(ctl: ComputeCtl) -> None:
    ctl.start()
    second = Process("second", ctl.process.argv, ctl.directory, ctl.process.environment)
    second.start()
    assert second.popen is not None and second.popen.wait(20) == 2
    assert "is locked by another process" in second.tail()
    assert ctl.query("select 1") == [(1,)]


def test_pageserver_away_at_the_start(ctl: ComputeCtl) -> None:
    """The basebackup is tried again until the pageserver is there."""
    ctl.server.stop()
    ctl.start("init")
    wait_until(lambda: "basebackup, attempt 1 of 10" in ctl.process.tail(), "the first attempt to fail", 20)
    ctl.server.start()
    ctl.wait_status("running")


@pytest.mark.parametrize(("change", "message"), [
    ({"tenant_id": "xyz"}, "not a tenant id: 'xyz'"),
    ({"tenant_id": None}, "spec.tenant_id: missing"),
    ({"pageserver_connstring": "nonsense"}, "spec.pageserver_connstring"),
    ({"safekeeper_connstrings": []}, "spec.safekeeper_connstrings"),
    ({"safekeeper_connstrings": ["a:1", "a:1"]}, "listed twice"),
    ({"mode": "Replica"}, "spec.mode"),
])  # fmt: skip
def test_bad_specifications_are_one_line(ctl: ComputeCtl, change: dict[str, Any], message: str) -> None:
    ctl.spec |= change
    ctl.start("")
    assert ctl.process.popen is not None and ctl.process.popen.wait(20) == 2
    lines = [line for line in ctl.process.tail().splitlines() if line.startswith("error:")]
    assert len(lines) >= 1 and message in lines[-1], ctl.process.tail()
    make_directory(ctl.directory)

"""A whole cluster of real service processes on loopback, for tests: start, kill, wipe, restart, ask.

All processes run as the unprivileged user ``postgres`` (the server refuses root) below one directory; every process that a
Cluster started is ended by ``close()``, by pid.
"""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from neon_services.ground.ids import TenantId, TimelineId
from neon_services.ground.lsn import Lsn, parse_lsn
from neon_services.ground.tls import client_context
from tests.waiting import wait_until as wait_until

USER = "postgres"
SCRIPTS = Path(sys.executable).parent
REPOSITORY = Path(__file__).resolve().parents[2]
LIBRARIES = Path(os.environ.get("NEON_LIB_DIR", REPOSITORY / "build" / "lib"))


def installed_major() -> int:
    """The newest Postgres major on this machine for which the libraries are built."""
    majors = [int(p.name) for p in Path("/usr/lib/postgresql").glob("*") if (p / "bin" / "postgres").exists()]
    built = [major for major in majors if (LIBRARIES / f"pg{major}" / "neon.so").exists()]
    if not built:
        raise RuntimeError(f"no compiled libraries below {LIBRARIES} for Postgres {majors}: run `make ext`")
    return max(built)


_handed_out: set[int] = set()


def free_port() -> int:
    """A TCP port that nobody listens on at the moment and that was not given out before."""
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port not in _handed_out:
            _handed_out.add(port)
            return port


def http(
    method: str, url: str, body: Any = None, timeout: float = 60.0, *, token: str | None = None, ca_file: Path | None = None
) -> Any:
    """One JSON request; its JSON answer. Raises urllib.error.HTTPError with the body in its message."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    context = None if ca_file is None else client_context(ca_file)
    try:
        with urllib.request.urlopen(request, timeout=timeout, context=context) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        error.msg = f"{error.msg}: {error.read().decode(errors='replace')[:500]}"
        raise
    return json.loads(text) if text.strip() else None


class Process:
    """One service process with its log file."""

    def __init__(self, name: str, argv: list[str], directory: Path, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self.argv = argv
        self.directory = directory
        self.log = directory.parent / f"{name}.log"
        self.environment = {
            "PATH": f"{SCRIPTS}:/usr/bin:/bin",
            "NEON_LIB_DIR": str(LIBRARIES),
            "LANG": "C.UTF-8",
            "AWS_ACCESS_KEY_ID": "unused",
            "AWS_SECRET_ACCESS_KEY": "unused",
            **(environment or {}),
        }
        self.popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; its output is appended to the log."""
        assert self.popen is None or self.popen.poll() is not None, f"{self.name} is already running"
        make_directory(self.directory)
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                self.argv,
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                user=USER,
                group=USER,
                extra_groups=[],
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.popen is not None and self.popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process only."""
        assert self.popen is not None
        self.popen.send_signal(number)

    def kill(self) -> None:
        """kill -9 and reap."""
        if self.running:
            assert self.popen is not None
            self.popen.kill()
            self.popen.wait(10)

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM and wait; the exit code."""
        assert self.popen is not None
        if self.running:
            self.popen.terminate()
        return self.popen.wait(timeout)

    def tail(self, lines: int = 60) -> str:
        """The end of the log, for failure messages."""
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def make_directory(path: Path) -> None:
    """Create a directory owned by the service user."""
    entry = pwd.getpwnam(USER)
    for part in [*reversed(path.parents), path]:
        if not part.exists():
            part.mkdir(mode=0o755)
            if os.geteuid() == 0:
                os.chown(part, entry.pw_uid, entry.pw_gid)


def descendants(pid: int) -> list[int]:
    """All living descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


@dataclass
class Safekeeper:
    """One safekeeper of the cluster."""

    id: int
    pg_port: int
    http_port: int
    process: Process
    token: str | None = None

    def status(self, tenant: TenantId, timeline: TimelineId) -> dict[str, Any]:
        """TimelineStatus."""
        return http("GET", f"http://127.0.0.1:{self.http_port}/v1/tenant/{tenant}/timeline/{timeline}", token=self.token)

    def digest(self, tenant: TenantId, timeline: TimelineId, from_lsn: str, until_lsn: str) -> str:
        """SHA-256 of the WAL bytes of a range."""
        query = f"from_lsn={from_lsn}&until_lsn={until_lsn}"
        url = f"http://127.0.0.1:{self.http_port}/v1/tenant/{tenant}/timeline/{timeline}/digest?{query}"
        return http("GET", url, token=self.token)["sha256"]


@dataclass
class Compute:
    """One compute_ctl with its Postgres."""

    name: str
    cluster: "Cluster"
    timeline: TimelineId
    port: int
    http_port: int
    process: Process
    settings: list[dict[str, str]] = field(default_factory=list)

    @property
    def pgdata(self) -> Path:
        return self.process.directory / "pgdata"

    @property
    def connstr(self) -> str:
        """A libpq connection string of the superuser."""
        return f"host=127.0.0.1 port={self.port} user=cloud_admin dbname=postgres password=cloud_admin"

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """A new psycopg connection, autocommit."""
        return psycopg.connect(self.connstr, autocommit=True, connect_timeout=10, **options)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of one statement."""
        with self.connect() as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def start(self, timeout: float = 90.0) -> None:
        """Start compute_ctl and wait until SQL answers."""
        self.process.start()
        self.wait_ready(timeout)

    def wait_ready(self, timeout: float = 90.0) -> None:
        """Wait until SQL answers; fails early with the log when compute_ctl has exited."""

        def ready() -> bool:
            if not self.process.running:
                raise AssertionError(f"compute_ctl of {self.name} exited:\n{self.process.tail()}")
            return self.query("select 1") == [(1,)]

        try:
            wait_until(ready, f"SQL at compute {self.name}", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.process.tail()}") from None

    def kill_everything(self) -> None:
        """SIGKILL compute_ctl, Postgres, walproposer: what a power cut of the compute does."""
        assert self.process.popen is not None
        pids = [self.process.popen.pid, *descendants(self.process.popen.pid)]
        postmaster = self.pgdata / "postmaster.pid"
        if postmaster.exists():
            pid = int(postmaster.read_text().split()[0])
            pids += [pid, *descendants(pid)]
        for pid in dict.fromkeys(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.popen.wait(10)

    def wipe(self) -> None:
        """Delete the compute's local disk."""
        shutil.rmtree(self.process.directory)

    def pgbench(self, *arguments: str, timeout: float = 300.0) -> str:
        """Run pgbench against this compute; its output. Raises AssertionError with the output when it fails."""
        command = [f"/usr/lib/postgresql/{self.cluster.major}/bin/pgbench", "-h", "127.0.0.1", "-p", str(self.port)]
        command += ["-U", "cloud_admin", *arguments, "postgres"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={"PGPASSWORD": "cloud_admin", "PATH": "/usr/bin:/bin"}
        )
        assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


class Cluster:
    """Broker, three safekeepers, a pageserver, and computes on demand."""

    def __init__(
        self,
        base: Path,
        *,
        safekeepers: int = 3,
        voters: int | None = None,
        remote_storage: str | None = None,
        major: int | None = None,
        safekeeper_options: Sequence[str] = ("--partial-backup-timeout", "5s"),
    ) -> None:
        self.base = base
        self.major = major or installed_major()
        self.pg_version = self._server_version()
        make_directory(base)
        self.tenant = TenantId.generate()
        self.timeline = TimelineId.generate()
        self.generation = 1
        self.computes: list[Compute] = []
        self.broker_port = free_port()
        self.broker = Process(
            "broker", [str(SCRIPTS / "storage_broker"), "--listen-addr", f"127.0.0.1:{self.broker_port}"], base / "broker"
        )
        self.remote_storage = remote_storage or f"{{ local_path = '{base}/remote' }}"
        self.voters = voters or safekeepers  # so many, the first ones, are members of new timelines
        self._safekeeper_options = safekeeper_options
        self.safekeepers = [self._make_safekeeper(i + 1) for i in range(safekeepers)]
        self.ps_pg_port, self.ps_http_port = free_port(), free_port()
        self.pageserver = Process(
            "pageserver", [str(SCRIPTS / "pageserver"), "-D", str(base / "pageserver")], base / "pageserver"
        )

    def _server_version(self) -> int:
        binary = f"/usr/lib/postgresql/{self.major}/bin/postgres"
        text = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
        major, minor = text.split(".")[:2]
        return int(major) * 10000 + int(minor)

    def _make_safekeeper(self, node_id: int) -> Safekeeper:
        pg_port, http_port = free_port(), free_port()
        directory = self.base / f"safekeeper{node_id}"
        argv = [str(SCRIPTS / "safekeeper"), "-D", str(directory), "--id", str(node_id)]
        argv += ["--listen-pg", f"127.0.0.1:{pg_port}", "--listen-http", f"127.0.0.1:{http_port}"]
        argv += ["--broker-endpoint", f"http://127.0.0.1:{self.broker_port}", "--availability-zone", f"az{node_id}"]
        remote = f"{{ local_path = '{self.base}/remote-wal' }}"
        argv += ["--remote-storage", remote, *self._safekeeper_options]
        return Safekeeper(node_id, pg_port, http_port, Process(f"safekeeper{node_id}", argv, directory))

    def write_pageserver_config(self) -> None:
        """Write the pageserver's identity and settings; done again after its disk was wiped."""
        directory = self.pageserver.directory
        make_directory(directory)
        (directory / "identity.toml").write_text("id = 1\n")
        (directory / "pageserver.toml").write_text(
            f"listen_pg_addr = '127.0.0.1:{self.ps_pg_port}'\n"
            f"listen_http_addr = '127.0.0.1:{self.ps_http_port}'\n"
            f"broker_endpoint = 'http://127.0.0.1:{self.broker_port}'\n"
            "pg_distrib_dir = '/usr/lib/postgresql'\n"
            f"remote_storage = {self.remote_storage}\n"
            "control_plane_emergency_mode = true\n"
            "[tenant_config]\n"
            "checkpoint_distance = 67108864\n"
        )

    # -- life

    def start(self) -> None:
        """Start everything but computes, and create the tenant and its first timeline."""
        self.broker.start()
        for safekeeper in self.safekeepers:
            safekeeper.process.start()
        self.write_pageserver_config()
        self.pageserver.start()
        self.wait_services()
        self.attach_tenant()
        self.create_timeline(self.timeline)

    def wait_services(self) -> None:
        """Wait until every running service answers /status."""
        ports = {f"http://127.0.0.1:{self.broker_port}/status": self.broker}
        for safekeeper in self.safekeepers:
            ports[f"http://127.0.0.1:{safekeeper.http_port}/v1/status"] = safekeeper.process
        ports[f"http://127.0.0.1:{self.ps_http_port}/v1/status"] = self.pageserver
        for url, process in ports.items():
            if process.running or process.popen is not None:

                def answers(url: str = url, process: Process = process) -> bool:
                    assert process.running, f"{process.name} exited:\n{process.tail()}"
                    with urllib.request.urlopen(url, timeout=2) as answer:
                        return answer.status == 200

                wait_until(answers, f"{process.name} to answer at {url}", 30)

    def attach_tenant(self, generation: int | None = None) -> None:
        """Attach the tenant to the pageserver with a generation."""
        self.generation = generation or self.generation
        body = {"mode": "AttachedSingle", "generation": self.generation, "tenant_conf": {}}
        http("PUT", f"{self.pageserver_api}/v1/tenant/{self.tenant}/location_config", body)

    @property
    def pageserver_api(self) -> str:
        return f"http://127.0.0.1:{self.ps_http_port}"

    def timeline_detail(self, timeline: TimelineId | None = None) -> dict[str, Any]:
        """The pageserver's TimelineInfo."""
        return http("GET", f"{self.pageserver_api}/v1/tenant/{self.tenant}/timeline/{timeline or self.timeline}")

    def create_timeline(self, timeline: TimelineId, *, ancestor: TimelineId | None = None, lsn: str | None = None) -> None:
        """Create a timeline at the pageserver (bootstrap, or a branch) and at every safekeeper."""
        body: dict[str, Any] = {"new_timeline_id": str(timeline), "pg_version": self.major}
        if ancestor is not None:
            body |= {"ancestor_timeline_id": str(ancestor)}
            if lsn is not None:
                body |= {"ancestor_start_lsn": lsn}
        http("POST", f"{self.pageserver_api}/v1/tenant/{self.tenant}/timeline", body)
        start = self.timeline_detail(timeline)["last_record_lsn"]
        voters = self.safekeepers[: self.voters]
        members = [{"id": s.id, "host": "127.0.0.1", "pg_port": s.pg_port} for s in voters]
        for safekeeper in voters:
            http(
                "POST",
                f"http://127.0.0.1:{safekeeper.http_port}/v1/tenant/timeline",
                {
                    "tenant_id": str(self.tenant),
                    "timeline_id": str(timeline),
                    "mconf": {"generation": 1, "members": members, "new_members": None},
                    "pg_version": self.pg_version,
                    "start_lsn": start,
                    "commit_lsn": start,
                },
                token=safekeeper.token,
            )

    def make_compute(
        self,
        name: str = "compute1",
        timeline: TimelineId | None = None,
        *,
        safekeeper_ports: list[int] | None = None,
        **settings: str,
    ) -> Compute:
        """A compute of a timeline, not started. ``safekeeper_ports``: where it reaches them, when not at their own ports."""
        port, http_port = free_port(), free_port()
        timeline = timeline or self.timeline
        directory = self.base / name
        config = self.base / f"{name}.json"
        argv = [str(SCRIPTS / "compute_ctl"), "-D", str(directory / "pgdata"), "-i", name, "-c", str(config)]
        argv += ["-C", f"postgresql://cloud_admin@localhost:{port}/postgres", "-b", self.binary("postgres")]
        argv += ["--external-http-port", str(http_port), "--internal-http-port", str(free_port())]
        compute = Compute(name, self, timeline, port, http_port, Process(name, argv, directory))
        ports = safekeeper_ports or [safekeeper.pg_port for safekeeper in self.safekeepers[: self.voters]]
        guc = {"port": str(port), "listen_addresses": "127.0.0.1", "unix_socket_directories": str(directory), **settings}
        spec = {
            "format_version": 1.0,
            "operation_uuid": "00000000-0000-0000-0000-000000000001",
            "suspend_timeout_seconds": -1,
            "tenant_id": str(self.tenant),
            "timeline_id": str(timeline),
            "mode": "Primary",
            "pageserver_connstring": f"postgresql://no_user@127.0.0.1:{self.ps_pg_port}",
            "safekeeper_connstrings": [f"127.0.0.1:{port}" for port in ports],
            "safekeepers_generation": 1,
            "skip_pg_catalog_updates": False,
            "cluster": {
                "roles": [{"name": "cloud_admin", "encrypted_password": MD5_CLOUD_ADMIN, "options": None}],
                "databases": [],
                "settings": [{"name": n, "value": v, "vartype": "string"} for n, v in guc.items()],
            },
        }
        config.write_text(json.dumps({"spec": spec, "compute_ctl_config": {"jwks": {"keys": []}}}))
        config.chmod(0o644)
        self.computes.append(compute)
        return compute

    def binary(self, name: str) -> str:
        """The path of one of Postgres's programs."""
        return f"/usr/lib/postgresql/{self.major}/bin/{name}"

    def flush_lsns(self, timeline: TimelineId | None = None) -> list[Lsn]:
        """flush_lsn of every running safekeeper."""
        running = [s for s in self.safekeepers if s.process.running]
        return [parse_lsn(s.status(self.tenant, timeline or self.timeline)["flush_lsn"]) for s in running]

    def wait_same_wal(self, timeout: float = 90.0) -> str:
        """Wait until all safekeepers have flushed to the same LSN, compare their WAL byte for byte; that LSN."""

        def aligned() -> str | None:
            seen = {member.status(self.tenant, self.timeline)["flush_lsn"] for member in self.safekeepers}
            return seen.pop() if len(seen) == 1 else None

        end = wait_until(aligned, "all safekeepers to reach the same flush_lsn", timeout)
        start = self.safekeepers[0].status(self.tenant, self.timeline)["timeline_start_lsn"]
        digests = {member.digest(self.tenant, self.timeline, start, end) for member in self.safekeepers}
        assert len(digests) == 1, f"WAL differs between safekeepers in {start}..{end}"
        return end

    def close(self) -> None:
        """End every process that this cluster started."""
        for compute in self.computes:
            started = compute.process.popen is not None
            if started and (compute.process.running or (compute.pgdata / "postmaster.pid").exists()):
                compute.kill_everything()
        for process in [self.pageserver, *(s.process for s in self.safekeepers), self.broker]:
            process.kill()

    def logs(self) -> str:
        """Tails of all logs, for failure messages."""
        processes = [self.broker, *(s.process for s in self.safekeepers), self.pageserver, *(c.process for c in self.computes)]
        return "\n".join(f"--- {p.name}\n{p.tail(25)}" for p in processes)


# md5("cloud_admin" + "cloud_admin"), without the "md5" prefix, as Neon's specs carry it
MD5_CLOUD_ADMIN = "b093c0d3b281ba6da1eacc608620abd8"


@contextlib.contextmanager
def running_cluster(base: Path, **options: Any) -> Iterator[Cluster]:
    """A started cluster that is closed at the end, whatever happened."""
    cluster = Cluster(base, **options)
    try:
        cluster.start()
        yield cluster
    except BaseException:
        sys.stderr.write(cluster.logs() + "\n")
        raise
    finally:
        cluster.close()


@contextlib.contextmanager
def temporary_cluster(prefix: str) -> Iterator[Cluster]:
    """A running cluster in a directory of its own, removed at the end.

    Not below pytest's directory: the services run as another user, who may not enter it.
    """
    with tempfile.TemporaryDirectory(prefix=prefix) as text:
        base = Path(text)
        base.chmod(0o755)
        shutil.chown(base, USER, USER)
        with running_cluster(base / "c") as running:
            yield running

"""A timeline moves to other safekeepers while clients write through a real compute: nothing acknowledged is lost."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import LIBRARIES, Cluster, Compute, make_directory, running_cluster
from tests.integration.histories import Clients
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.postgres]
SEED = int(os.environ.get("NEON_MIGRATE_SEED", time.time_ns() % 1_000_000))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="neon-migrate-") as text:
        base = Path(text)
        base.chmod(0o755)
        make_directory(base / "cluster")
        with running_cluster(base / "cluster", safekeepers=5, voters=3) as cluster:
            yield cluster


class Operator:
    """Does what systemd and a control plane do: starts a compute that has ended, and tells it who its safekeepers are.

    The hook is an HTTP server of its own; ``told`` is what it was told, in order.
    """

    def __init__(self, cluster: Cluster, compute: Compute) -> None:
        self._cluster = cluster
        self._compute = compute
        self._config = cluster.base / f"{compute.name}.json"
        self._lock = threading.Lock()  # one start at a time
        self._stop = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self.told: list[tuple[int, list[int]]] = []
        self.restarts = 0
        self.failure: BaseException | None = None
        operator = self

        class Hook(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                operator.tell(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/notify-safekeepers"

    @contextlib.contextmanager
    def at_work(self) -> Iterator["Operator"]:
        serving = threading.Thread(target=self._server.serve_forever, daemon=True)
        serving.start()
        self._supervisor.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            self._stop.set()
            self._supervisor.join(120)
            serving.join(10)
        assert not self._supervisor.is_alive()
        if self.failure is not None:
            raise self.failure

    def tell(self, body: dict[str, Any]) -> None:
        """Rewrite the compute's specification and start it again with that."""
        assert (body["tenant_id"], body["timeline_id"]) == (str(self._cluster.tenant), str(self._cluster.timeline))
        ids = sorted(member["id"] for member in body["safekeepers"])
        with self._lock:
            self.told.append((body["generation"], ids))
            config = json.loads(self._config.read_text())
            ports = [self._cluster.safekeepers[number - 1].pg_port for number in ids]
            config["spec"]["safekeeper_connstrings"] = [f"127.0.0.1:{port}" for port in ports]
            config["spec"]["safekeepers_generation"] = body["generation"]
            self._config.write_text(json.dumps(config))
            self._start_anew()

    def _start_anew(self) -> None:
        self._compute.kill_everything()
        self._compute.process.start()

    def _supervise(self) -> None:
        try:
            while not self._stop.wait(0.1):
                with self._lock:
                    if not self._compute.process.running:
                        self.restarts += 1
                        self._start_anew()
        except BaseException as error:
            self.failure = error


def write_row(cluster: Cluster) -> Path:
    path = cluster.base / "row.json"
    addresses = [
        {"id": s.id, "host": "127.0.0.1", "pg_port": s.pg_port, "http_url": f"http://127.0.0.1:{s.http_port}"}
        for s in cluster.safekeepers
    ]
    ids = {"tenant_id": str(cluster.tenant), "timeline_id": str(cluster.timeline)}
    sets = {"generation": 1, "sk_set": [1, 2, 3], "new_sk_set": None, "pending_exclude": []}
    path.write_text(json.dumps({**ids, **sets, "safekeepers": addresses}))
    return path


def migrate(row: Path, *options: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "neon_services.safekeeper.migrate", "--row", str(row), "--timeout", "120s", *options]
    environment = {**os.environ, "NEON_LIB_DIR": str(LIBRARIES)}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=240)
    return done.returncode, done.stdout + done.stderr


def present(cluster: Cluster, number: int) -> bool:
    try:
        cluster.safekeepers[number - 1].status(cluster.tenant, cluster.timeline)
    except urllib.error.HTTPError as error:
        assert error.code == 404
        return False
    return True


def test_a_timeline_moves_under_a_writing_compute_and_back(cluster: Cluster) -> None:
    print(f"NEON_MIGRATE_SEED={SEED}")
    compute = cluster.make_compute(max_connections="30", shared_buffers="32MB")
    compute.start()
    clients = Clients(compute.connect, SEED)
    clients.prepare()
    row = write_row(cluster)
    with Operator(cluster, compute).at_work() as operator:
        clients.start()
        for target, gone in (([3, 4, 5], [1, 2]), ([1, 2, 3], [4, 5])):
            before = clients.history.acknowledged
            wait_until(lambda before=before: clients.history.acknowledged > before + 100, "clients to write before the change")
            code, output = migrate(row, "--to", ",".join(map(str, target)), "--compute-hook", operator.url)
            assert code == 0, output
            before = clients.history.acknowledged
            wait_until(lambda before=before: clients.history.acknowledged > before + 100, "clients to write after the change")
            assert json.loads(row.read_text())["sk_set"] == target
            assert [present(cluster, number) for number in gone] == [False, False]
        clients.stop()
    print(f"told {operator.told}, {operator.restarts} restarts; clients' errors: {dict(clients.history.errors)}")
    assert operator.told[-1] == (5, [1, 2, 3]) and (2, [1, 2, 3, 4, 5]) in operator.told
    compute.wait_ready()
    assert clients.verdict() == []

    # and the same from storage alone
    compute.kill_everything()
    compute.wipe()
    compute.start()
    assert clients.verdict() == []
    assert compute.process.stop() == 0
    members = cluster.safekeepers[:3]

    def same_end() -> str | None:
        ends = {member.status(cluster.tenant, cluster.timeline)["flush_lsn"] for member in members}
        return ends.pop() if len(ends) == 1 else None

    end = wait_until(same_end, "all members to reach the same flush_lsn")
    start = max(member.status(cluster.tenant, cluster.timeline)["local_start_lsn"] for member in members)
    assert len({member.digest(cluster.tenant, cluster.timeline, start, end) for member in members}) == 1

"""The pageserver as a process: start, lock, signals; and a control plane that assigns generations."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground.ids import TenantId
from tests.integration.cluster import free_port, http, wait_until

pytestmark = pytest.mark.cluster

PAGESERVER = Path(sys.executable).parent / "pageserver"


class Node:
    """One pageserver process run by this user."""

    def __init__(self, directory: Path, settings: str) -> None:
        self.directory = directory
        self.http_port = free_port()
        directory.mkdir()
        (directory / "identity.toml").write_text("id = 9\n")
        (directory / "pageserver.toml").write_text(
            f"listen_pg_addr = '127.0.0.1:{free_port()}'\nlisten_http_addr = '127.0.0.1:{self.http_port}'\n"
            f"broker_endpoint = 'http://127.0.0.1:{free_port()}'\nremote_storage = {{ local_path = '../remote' }}\n{settings}\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen([PAGESERVER, "-D", self.directory], stdout=log, stderr=log)
        wait_until(lambda: self.call("GET", "/status") == {"id": 9}, "the pageserver to answer", 20)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        return http(method, f"http://127.0.0.1:{self.http_port}/v1{path}", body)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    made: list[Node] = []
    yield made
    for node in made:
        if node.process is not None:
            node.end(signal.SIGKILL)


def attach(node: Node, tenant: TenantId, generation: int) -> None:
    body = {"mode": "AttachedSingle", "generation": generation, "tenant_conf": {}}
    wait_until(lambda: node.call("PUT", f"/tenant/{tenant}/location_config", body) is not None, "the attachment", 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_it_starts_once_and_stops_on_signals(tmp_path: Path, nodes: list[Node], number: signal.Signals):
    node = Node(tmp_path / "ps", "control_plane_emergency_mode = true")
    nodes.append(node)
    node.start()
    second = subprocess.run([PAGESERVER, "-D", node.directory], capture_output=True, text=True, timeout=20)
    assert second.returncode == 2 and f"locked by another process (pid {node.process and node.process.pid})" in second.stderr
    tenant = TenantId.generate()
    attach(node, tenant, 4)
    assert node.end(number) == 0
    node.start()
    assert node.call("GET", f"/tenant/{tenant}")["generation"] == 4, "the generation on disk, in emergency mode"


class FakeControlPlane(ThreadingHTTPServer):
    """Answers re-attach and validate as it is told; refuses until ``tenants`` is set."""

    tenants: list[dict[str, Any]] | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, Any, str | None]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: FakeControlPlane

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        tenants = self.server.tenants
        self.send_response(503 if tenants is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"tenants": tenants or []}).encode())

    def log_message(self, *_: Any) -> None:
        pass


def test_generations_come_from_the_control_plane(tmp_path: Path, nodes: list[Node]):
    control = FakeControlPlane()
    control.tenants = []
    url = f"http://127.0.0.1:{control.server_address[1]}/upcall/v1/"
    node = Node(tmp_path / "ps", f"control_plane_api = '{url}'\ncontrol_plane_api_token = 'secret'")
    nodes.append(node)
    metadata = {"host": "h", "port": 1, "http_host": "g", "http_port": 2, "availability_zone_id": "a", "other": 0}
    (node.directory / "metadata.json").write_text(json.dumps(metadata))
    node.start()
    kept, lowered, gone = TenantId.generate(), TenantId.generate(), TenantId.generate()
    for tenant in (kept, lowered, gone):
        attach(node, tenant, 4)
    path, body, token = control.requests[0]
    assert (path, token) == ("/upcall/v1/re-attach", "Bearer secret")
    assert (
        body["node_id"] == 9 and body["register"]["listen_pg_addr"] == "h" and body["register"]["availability_zone_id"] == "a"
    )
    assert node.end() == 0

    # while the control plane does not answer the node must not act on an old generation, nor say that a tenant is not here
    control.tenants = None
    node.start()
    wait_until(lambda: len(control.requests) > 3, "re-attach to be tried again", 20)
    with pytest.raises(OSError, match="503"):
        node.call("GET", f"/tenant/{kept}")
    control.tenants = [
        {"id": str(kept), "gen": 7, "mode": "AttachedSingle"},
        {"id": str(lowered), "gen": 3, "mode": "AttachedSingle"},
        {"id": str(TenantId.generate()), "gen": 1, "mode": "AttachedSingle"},
    ]
    shown = wait_until(lambda: node.call("GET", f"/tenant/{kept}"), "the tenant", 20)
    assert shown["generation"] == 7
    locations = dict(node.call("GET", "/location_config")["tenant_shards"])
    assert {t: c["mode"] for t, c in locations.items()} == {str(kept): "AttachedSingle", str(lowered): "Secondary"}
    assert not (node.directory / "tenants" / str(gone)).exists()
    assert "generation = 7" in (node.directory / "tenants" / str(kept) / "config-v1").read_text()
    control.shutdown()
    assert (node.directory / "tenants" / str(lowered)).is_dir()

"""Safekeepers and a broker as real processes with everything closed: tokens on all ports, TLS on all ports."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neon_services.ground.tls import ClientTls, SslMode
from tests.credentials import Authority, TokenKey
from tests.integration.cluster import SCRIPTS, free_port
from tests.integration.safekeeper_support import Fleet, Node, Service

RELOAD = "100ms"


@dataclass
class SecureNode:
    """A safekeeper with its further ports; ``node`` presents itself with a token of scope safekeeperdata."""

    node: Node
    tenant_port: int
    https_port: int
    certificates: Path

    @property
    def https_url(self) -> str:
        return f"https://127.0.0.1:{self.https_port}"


@dataclass
class SecureFleet:
    """All of them. ``keys`` is the directory of public keys that every port uses."""

    base: Path
    key: TokenKey
    authority: Authority
    fleet: Fleet
    members: list[SecureNode]
    broker_https_port: int
    keys: Path


@contextlib.contextmanager
def secure_fleet(base: Path, count: int, *options: str, tls: bool = True) -> Iterator[SecureFleet]:
    """Everything started, everything killed at the end. ``tls``: the WAL service speaks only TLS, too."""
    key, authority, keys = TokenKey(), Authority(base), base / "keys"
    keys.mkdir()
    (keys / "first.pem").write_bytes(key.public_pem)
    (base / "token").write_text(key.token("safekeeperdata") + "\n")
    authority.install(base)
    plain, secure = free_port(), free_port()
    argv = [str(SCRIPTS / "storage_broker"), "-l", f"127.0.0.1:{plain}", "--listen-https-addr", f"127.0.0.1:{secure}"]
    argv += ["--ssl-key-file", str(base / "server.key"), "--ssl-cert-file", str(base / "server.crt")]
    broker = Service("broker", [*argv, "--ssl-cert-reload-period", RELOAD], base / "broker.log")
    members: list[SecureNode] = []
    for number in range(1, count + 1):
        tenant_port, https_port = free_port(), free_port()
        common = ["--broker-endpoint", f"https://127.0.0.1:{secure}", "--ssl-ca-file", str(authority.ca_file)]
        common += ["--listen-https", f"127.0.0.1:{https_port}", "--listen-pg-tenant-only", f"127.0.0.1:{tenant_port}"]
        for option in ("--pg-auth", "--pg-tenant-only-auth", "--http-auth"):
            common += [f"{option}-public-key-path", str(keys)]
        common += ["--auth-token-path", str(base / "token"), "--ssl-cert-reload-period", RELOAD, "--use-https-safekeeper-api"]
        if tls:
            common.append("--enable-tls-wal-service-api")
        node = Node(base, number, plain, *common, *options)
        node.token = key.token("safekeeperdata")
        node.pg_tls = ClientTls(SslMode.VERIFY_FULL, authority.ca_file) if tls else None
        authority.install(node.directory)  # where --ssl-key-file and --ssl-cert-file look by default
        members.append(SecureNode(node, tenant_port, https_port, node.directory))
    fleet = Fleet(base, broker, plain, [member.node for member in members])
    try:
        broker.start()
        for node in fleet.nodes:
            node.start()
        yield SecureFleet(base, key, authority, fleet, members, secure, keys)
    finally:
        fleet.close()

"""The whole system with tokens on every port of the storage and TLS between its parts: SQL commits, and nobody else gets in."""

import json
import shutil
import tempfile
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground.ids import TenantId, TimelineId
from tests.credentials import Authority, TokenKey
from tests.integration.cluster import USER, Cluster, Compute, free_port, http, make_directory, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.postgres]


class SecureCluster(Cluster):
    """A cluster whose safekeepers check tokens and speak only TLS, and whose broker is reached by TLS only."""

    def __init__(self, base: Path, **options: Any) -> None:
        super().__init__(base, **options)
        self.key, self.authority = TokenKey(), Authority(base)
        (base / "key.pem").write_bytes(self.key.public_pem)
        self._write("safekeeper.token", self.key.token("safekeeperdata"))
        self.compute_token = self.key.token("tenant", self.tenant)
        self.sslmode = "verify-full"
        secure = free_port()
        self.broker_endpoint = f"https://127.0.0.1:{secure}"
        self.broker.argv += ["--listen-https-addr", f"127.0.0.1:{secure}"]
        self._certify(self.broker.directory)
        for safekeeper in self.safekeepers:
            safekeeper.token = self.key.token("safekeeperdata")
            argv = safekeeper.process.argv
            for option in ("--pg-auth-public-key-path", "--http-auth-public-key-path"):
                argv += [option, str(base / "key.pem")]
            argv += ["--auth-token-path", str(base / "safekeeper.token"), "--ssl-ca-file", str(self.authority.ca_file)]
            argv += ["--broker-endpoint", self.broker_endpoint, "--enable-tls-wal-service-api"]
            self._certify(safekeeper.process.directory)
        self.pageserver.environment["NEON_AUTH_TOKEN"] = self.key.token("safekeeperdata")

    def _write(self, name: str, text: str) -> None:
        path = self.base / name
        path.write_text(text)
        path.chmod(0o600)
        shutil.chown(path, USER, USER)

    def _certify(self, directory: Path) -> None:
        make_directory(directory)
        self.authority.install(directory)
        for name in ("server.key", "server.crt"):
            shutil.chown(directory / name, USER, USER)

    def write_pageserver_config(self) -> None:
        super().write_pageserver_config()
        path = self.pageserver.directory / "pageserver.toml"
        secure = f"broker_endpoint = '{self.broker_endpoint}'\nssl_ca_file = '{self.authority.ca_file}'\n"
        plain = f"broker_endpoint = 'http://127.0.0.1:{self.broker_port}'\n"
        text = path.read_text()
        assert plain in text
        path.write_text(text.replace(plain, secure + f"safekeeper_sslmode = '{self.sslmode}'\n"))

    def make_secure_compute(self, name: str, token: str | None, conninfo: str) -> Compute:
        """A compute with this token and these options for its connections to safekeepers."""
        compute = self.make_compute(name, **({"neon.safekeeper_conninfo_options": conninfo} if conninfo else {}))
        config = self.base / f"{name}.json"
        document = json.loads(config.read_text())
        document["spec"]["storage_auth_token"] = token
        config.write_text(json.dumps(document))
        return compute


@pytest.fixture(scope="module")
def cluster() -> Iterator[SecureCluster]:
    with tempfile.TemporaryDirectory(prefix="neon-secure-") as text:
        base = Path(text)
        base.chmod(0o755)
        shutil.chown(base, USER, USER)
        running = SecureCluster(base)
        try:
            running.start()
            yield running
        except BaseException:
            print(running.logs())
            raise
        finally:
            running.close()


def test_sql_commits_and_reaches_the_pageserver(cluster: SecureCluster) -> None:
    conninfo = f"sslmode=verify-full sslrootcert={cluster.authority.ca_file}"
    compute = cluster.make_secure_compute("compute1", cluster.compute_token, conninfo)
    compute.start()
    compute.query("create table t as select g, repeat('x', 100) as filler from generate_series(1, 20000) g")
    (lsn,) = compute.query("select pg_current_wal_flush_lsn()::text")[0]
    wait_until(lambda: _lsn(cluster.timeline_detail()["last_record_lsn"]) >= _lsn(lsn), "the pageserver to have it all", 60)
    # a safekeeper that was away is caught up by the compute, from another one, with the same token and by TLS
    away = cluster.safekeepers[2].process
    away.kill()
    compute.query("insert into t select g, repeat('y', 100) from generate_series(20001, 60000) g")
    away.start()
    cluster.wait_same_wal()
    compute.kill_everything()
    compute.wipe()
    compute.start()
    assert compute.query("select count(*), sum(g) from t") == [(60000, 60000 * 60001 // 2)]
    # without any options the walproposer takes the TLS that the safekeepers insist on, as libpq does
    compute.kill_everything()
    again = cluster.make_secure_compute("compute2", cluster.compute_token, "")
    again.start()
    again.query("insert into t values (0, '')")
    assert again.query("select count(*) from t") == [(60001,)]
    again.kill_everything()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", "none was given"),
        ("stranger", "the token's signature is not of a known key"),
        ("other", "permission denied: the token is for another tenant"),
    ],
)
def test_a_compute_with_another_token_never_starts(cluster: SecureCluster, name: str, expected: str) -> None:
    tokens = {
        "none": None,
        "stranger": TokenKey().token("tenant", cluster.tenant),
        "other": cluster.key.token("tenant", TenantId.generate()),
    }
    terms = {s.status(cluster.tenant, cluster.timeline)["acceptor_state"]["term"] for s in cluster.safekeepers}
    compute = cluster.make_secure_compute(f"intruder-{name}", tokens[name], "")
    compute.process.start()
    try:
        wait_until(lambda: expected in compute.process.tail(400), "the compute to be told why", 30)
    finally:
        compute.kill_everything()
    assert {s.status(cluster.tenant, cluster.timeline)["acceptor_state"]["term"] for s in cluster.safekeepers} == terms


def test_a_compute_that_does_not_trust_the_safekeepers(cluster: SecureCluster) -> None:
    other = Authority(cluster.base, "other").ca_file
    options = f"sslmode=verify-full sslrootcert={other}"
    compute = cluster.make_secure_compute("mistrustful", cluster.compute_token, options)
    compute.process.start()
    try:
        wait_until(lambda: "its certificate is not trusted" in compute.process.tail(400), "the compute to say so", 30)
    finally:
        compute.kill_everything()


def test_the_tenant_asks_for_its_own_timeline_only(cluster: SecureCluster) -> None:
    member = cluster.safekeepers[0]
    url = f"http://127.0.0.1:{member.http_port}/v1/tenant"
    own = f"{url}/{cluster.tenant}/timeline/{cluster.timeline}"
    assert http("GET", own, token=cluster.compute_token)["tenant_id"] == str(cluster.tenant)
    for path in (f"{url}/{TenantId.generate()}/timeline/{TimelineId.generate()}", f"{url}/timeline"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            http("GET", path, token=cluster.compute_token)
        assert refused.value.code == 403


def test_no_log_contains_a_token(cluster: SecureCluster) -> None:
    header = cluster.compute_token.split(".")[0]
    logs = list(cluster.base.glob("*.log"))
    assert len(logs) >= 6
    for log in logs:
        assert header not in log.read_text(), log


def _lsn(text: str) -> int:
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)

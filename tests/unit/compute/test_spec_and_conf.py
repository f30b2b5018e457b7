"""Specifications and the configuration made from them; statuses; tokens."""

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from neon_services.compute.postgres_conf import PostgresSettings, make_postgres_settings
from neon_services.compute.proposer_child import config_of
from neon_services.compute.spec import ComputeSpec, parse_config, parse_spec, read_config
from neon_services.compute.status import ComputeStatus, Status, WrongStatus
from neon_services.compute.tokens import TokenError, TokenVerifier
from neon_services.compute.walproposer_config import parse_conninfo_options
from neon_services.ground.errors import ConfigError
from neon_services.ground.tls import ClientTls, SslMode
from tests.credentials import Authority

LIBRARY = Path("/usr/lib/neon/pg15/neon.so")


def make_spec(**changes: Any) -> dict[str, Any]:
    return {
        "tenant_id": "11" * 16,
        "timeline_id": "22" * 16,
        "mode": "Primary",
        "pageserver_connstring": "postgresql://no_user@ps:6400",
        "safekeeper_connstrings": ["sk1:5454", "sk2:5454", "sk3:5454"],
        "safekeepers_generation": 4,
        "unknown": {"ignored": True},
        "cluster": {"settings": []},
    } | changes


def settings_of(items: dict[str, str]) -> dict[str, Any]:
    return {"settings": [{"name": n, "value": v, "vartype": "string"} for n, v in items.items()]}


def conf_of(spec: ComputeSpec, port: int | None = 55433) -> tuple[PostgresSettings, dict[str, str]]:
    made = make_postgres_settings(spec, library=LIBRARY, pgdata=Path("/var/db"), connstr_port=port)
    effective: dict[str, str] = {}
    for line in made.text.splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition(" = ")
            effective[name] = value.strip("'")
    return made, effective


def test_the_last_lines_are_ours() -> None:
    cluster = settings_of({
        "fsync": "on", "synchronous_standby_names": "", "restart_after_crash": "on", "port": "5500",
        "wal_level": "logical", "shared_preload_libraries": "neon, pg_stat_statements", "max_replication_write_lag": "500MB",
        "neon.stripe_size": "2048",
        "application_name": "it's \\ here",
    })  # fmt: skip
    cluster["postgresql_conf"] = "# comment\nmax_connections = 42 # few\nmax_replication_flush_lag='10GB'\nfsync on\n"
    made, conf = conf_of(parse_spec(make_spec(cluster=cluster)))
    assert (
        conf["fsync"] == "off" and conf["restart_after_crash"] == "off" and conf["synchronous_standby_names"] == "walproposer"
    )
    assert conf["shared_preload_libraries"] == '"/usr/lib/neon/pg15/neon.so","pg_stat_statements"'
    assert conf["wal_level"] == "logical" and conf["max_connections"] == "42"
    assert conf["neon.max_replication_write_lag"] == "500MB" and conf["neon.max_replication_flush_lag"] == "10GB"
    assert "max_replication_write_lag" not in conf and "max_replication_flush_lag" not in conf
    assert conf["neon.safekeepers"] == "g#4:sk1:5454,sk2:5454,sk3:5454" and conf["neon.tenant_id"] == "11" * 16
    assert made.port == 5500 and made.socket_directory == "/var/db"
    assert "application_name = 'it''s \\\\ here'" in made.text


def test_port_of_the_connection_url_is_the_default() -> None:
    assert conf_of(parse_spec(make_spec()))[0].port == 55433
    assert conf_of(parse_spec(make_spec()), None)[0].port == 5432


@pytest.mark.parametrize(("setting", "message"), [
    ({"wal_level": "minimal"}, "wal_level 'minimal' is too low"),
    ({"port": "none"}, "port 'none'"),
    ({"a b": "1"}, "'a b' is not the name of a setting"),
])  # fmt: skip
def test_impossible_settings(setting: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conf_of(parse_spec(make_spec(cluster=settings_of(setting))))


def test_ids_and_servers_from_settings() -> None:
    """The docker-compose form of a specification has them nowhere else."""
    cluster = settings_of({
        "neon.tenant_id": "33" * 16, "neon.timeline_id": "44" * 16, "neon.pageserver_connstring": "host=ps port=6401",
        "neon.safekeepers": "g#7:sk1:5454,sk2:5454",
    })  # fmt: skip
    spec = parse_spec({"cluster": cluster})
    assert str(spec.ttid.tenant_id) == "33" * 16 and (spec.pageserver.host, spec.pageserver.port) == ("ps", 6401)
    assert spec.safekeepers == ("sk1:5454", "sk2:5454") and spec.safekeepers_generation == 7


def test_connection_info_of_one_shard() -> None:
    info = {"shard_count": 0, "shards": {"0000": {"pageservers": [{"id": 1, "libpq_url": "postgresql://no_user@p1:6400"}]}}}
    assert parse_spec(make_spec(pageserver_connection_info=info)).pageserver.host == "p1"
    info["shards"] = {"0002": {"pageservers": []}, "0102": {"pageservers": []}}
    with pytest.raises(ConfigError, match="sharded"):
        parse_spec(make_spec(pageserver_connection_info=info))


def test_role_passwords() -> None:
    roles = [
        {"name": "a", "encrypted_password": "b093c0d3b281ba6da1eacc608620abd8"},
        {"name": "b", "encrypted_password": "SCRAM-SHA-256$4096:x$y:z"},
        {"name": "c", "encrypted_password": None},
    ]
    spec = parse_spec(make_spec(cluster={"roles": roles}))
    assert [role.verifier for role in spec.roles] == ["md5b093c0d3b281ba6da1eacc608620abd8", "SCRAM-SHA-256$4096:x$y:z", None]
    with pytest.raises(ConfigError, match=r"roles\[0\].encrypted_password"):
        parse_spec(make_spec(cluster={"roles": [{"name": "a", "encrypted_password": "secret"}]}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"tenant_id": 5}, "spec.tenant_id: missing"),
    ({"timeline_id": "2"}, "not a timeline id: '2'"),
    ({"safekeeper_connstrings": ["sk1"]}, "spec.safekeeper_connstrings: 'sk1' is not HOST:PORT"),
    ({"safekeepers_generation": -1}, "spec.safekeepers_generation"),
    ({"pageserver_connstring": "a,b"}, "several shards"),
    ({"mode": {"Static": "0/1"}}, "spec.mode"),
    ({"cluster": []}, "spec.cluster"),
    ({"cluster": {"settings": [{"value": "1"}]}}, r"spec.cluster.settings\[0\]: field 'name' is missing"),
    ({"cluster": {"settings": [{"name": "x", "value": "a\nfsync=on"}]}}, "line break"),
    ({"cluster": {"databases": [{"name": "d"}]}}, r"spec.cluster.databases\[0\]: field 'owner' is missing"),
])  # fmt: skip
def test_wrong_fields_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(make_spec(**changes))


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(path)
    for text in ("", "{", "[]", '{"spec": 1}', '{"spec": {}, "compute_ctl_config": []}'):
        path.write_text(text)
        with pytest.raises(ConfigError):
            read_config(path)


def test_statuses() -> None:
    status = ComputeStatus()
    with pytest.raises(WrongStatus):
        status.change(Status.CONFIGURATION)
    for step in (Status.RUNNING, Status.CONFIGURATION_PENDING, Status.CONFIGURATION, Status.RUNNING):
        status.change(step)
    status.change(Status.TERMINATION_PENDING_FAST)
    with pytest.raises(WrongStatus):
        status.change(Status.RUNNING)
    status.change(Status.TERMINATED)
    for step in Status:
        with pytest.raises(WrongStatus):
            status.change(step)
    assert status.describe("t", "l")["status"] == "terminated"


# -- tokens


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Signer:
    def __init__(self) -> None:
        self.key = Ed25519PrivateKey.generate()

    @property
    def jwk(self) -> dict[str, str]:
        raw = self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return {"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": "1", "x": encode(raw)}

    def token(self, algorithm: str = "EdDSA", **claims: Any) -> str:
        signed = encode(json.dumps({"alg": algorithm, "typ": "JWT"}).encode()) + "." + encode(json.dumps(claims).encode())
        return f"Bearer {signed}.{encode(self.key.sign(signed.encode()))}"


def test_tokens() -> None:
    signer, stranger = Signer(), Signer()
    verifier = TokenVerifier((stranger.jwk, signer.jwk), "compute-1")
    verifier.check(signer.token(compute_id="compute-1"))
    verifier.check(signer.token(scope="compute_ctl:admin", aud=["compute"], exp=int(time.time()) + 60))
    refused = {
        400: [None, "Basic abc", "Bearer abc"],
        401: [
            Signer().token(compute_id="compute-1"),
            signer.token(compute_id="compute-1", exp=int(time.time()) - 1),
            signer.token("none", compute_id="compute-1"),
            signer.token(compute_id="compute-1")[:-2],
            "Bearer a.b.c",
        ],
        403: [signer.token(compute_id="compute-2"), signer.token(scope="compute_ctl:admin"), signer.token()],
    }
    for status, headers in refused.items():
        for header in headers:
            with pytest.raises(TokenError) as failure:
                verifier.check(header)
            assert failure.value.status == status, header
    with pytest.raises(ConfigError, match="Ed25519"):
        TokenVerifier(({"kty": "RSA"},), "compute-1")


def test_config_with_keys() -> None:
    config = parse_config({"spec": make_spec(), "compute_ctl_config": {"jwks": {"keys": [Signer().jwk]}}})
    assert len(config.jwks) == 1


def test_tls_of_the_walproposer(tmp_path: Path) -> None:
    ca_file = Authority(tmp_path).ca_file
    assert parse_conninfo_options("") == ClientTls(SslMode.PREFER, None)
    assert parse_conninfo_options(f"sslmode=verify-full sslrootcert='{ca_file}'") == ClientTls(SslMode.VERIFY_FULL, ca_file)
    assert parse_conninfo_options("sslmode=verify-full sslrootcert=system") == ClientTls(SslMode.VERIFY_FULL, None)
    assert parse_conninfo_options("sslrootcert=system") == ClientTls(SslMode.VERIFY_FULL, None)
    for wrong, expected in (
        ("sslmode=require sslrootcert=system", "needs sslmode=verify-full"),
        ("sslmode=allow", "'allow' is not one of"),
        ("keepalives=1", "keepalives is not supported"),
        ("password=secret", "password is not supported"),
        ("password=secret sslmode", "missing"),
        ("sslrootcert=/none", "/none: No such file"),
    ):
        with pytest.raises(ConfigError, match=expected) as failure:
            parse_conninfo_options(wrong)
        assert "secret" not in str(failure.value)
    settings = settings_of({"neon.safekeeper_conninfo_options": "sslmode=require"})
    assert config_of(parse_spec(make_spec(cluster=settings)), 150000)["safekeeper_conninfo_options"] == "sslmode=require"
    assert "safekeeper_conninfo_options" not in config_of(parse_spec(make_spec()), 150000)


def test_timeouts_of_the_walproposer() -> None:
    plain = config_of(parse_spec(make_spec()), 150000)
    assert "connect_timeout_ms" not in plain and "reconnect_timeout_ms" not in plain
    settings = {"neon.safekeeper_connect_timeout": "2500", "neon.safekeeper_reconnect_timeout": "2s"}
    config = config_of(parse_spec(make_spec(cluster=settings_of(settings))), 150000)
    assert (config["connect_timeout_ms"], config["reconnect_timeout_ms"]) == (2500, 2000)
    wrong = parse_spec(make_spec(cluster=settings_of({"neon.safekeeper_connect_timeout": "soon"})))
    with pytest.raises(ConfigError, match=r"neon\.safekeeper_connect_timeout: 'soon' is not a duration"):
        config_of(wrong, 150000)

"""pageserver.toml, identity.toml, config-v1 and index_part.json: what is accepted, and how the rest is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground.errors import ConfigError, CorruptionError
from neon_services.ground.ids import TenantId
from neon_services.ground.tls import ClientTls, SslMode
from neon_services.pageserver.index_part import IndexPart, LayerMetadata
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.location_config import LocationConf, TenantConf, parse_duration
from neon_services.pageserver.main import main
from neon_services.pageserver.remote_layout import parse_index_generation
from neon_services.pageserver.settings import load_settings
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.values import KEY_MAX, format_key, parse_key

GOOD = "remote_storage = { local_path = '../remote' }\ncontrol_plane_emergency_mode = true\n"


def write(tmp_path: Path, toml: str = GOOD, identity: str = "id = 3\n") -> Path:
    (tmp_path / "pageserver.toml").write_text(toml)
    (tmp_path / "identity.toml").write_text(identity)
    return tmp_path


def test_defaults_are_neons(tmp_path: Path):
    settings = load_settings(write(tmp_path))
    assert settings.node_id == 3
    assert settings.listen_pg == ("127.0.0.1", 64000) and settings.listen_http == ("127.0.0.1", 9898)
    assert settings.wait_lsn_timeout_s == 300 and settings.page_cache_bytes == 64 << 20
    assert Path(settings.remote_storage["local_path"]) == tmp_path / "../remote"


def test_protection_of_connections(tmp_path: Path):
    settings = load_settings(write(tmp_path))
    assert settings.ssl_ca_file is None and settings.safekeeper_tls == ClientTls(SslMode.PREFER, None)
    settings = load_settings(write(tmp_path, GOOD + "ssl_ca_file = 'ca.pem'\nsafekeeper_sslmode = 'verify-full'\n"))
    assert settings.ssl_ca_file == tmp_path / "ca.pem"
    assert settings.safekeeper_tls == ClientTls(SslMode.VERIFY_FULL, tmp_path / "ca.pem")
    with pytest.raises(ConfigError, match=r"pageserver\.toml: safekeeper_sslmode: 'allow' is not one of"):
        load_settings(write(tmp_path, GOOD + "safekeeper_sslmode = 'allow'\n"))


def test_unknown_keys_are_counted_not_fatal(tmp_path: Path):
    assert load_settings(write(tmp_path, GOOD + "something = 1\nmax_file_descriptors = 5\n")).ignored == ["something"]


@pytest.mark.parametrize(
    ("toml", "complaint"),
    [
        ("", "remote_storage is missing"),
        ("remote_storage = 5", "remote_storage must be a table"),
        ("remote_storage = { local_path = 'x' }", "control_plane_api must be set"),
        (GOOD + "listen_pg_addr = 5", "listen_pg_addr must be a string"),
        (GOOD + "listen_http_addr = 'nowhere'", "listen_http_addr: 'nowhere' is not HOST:PORT"),
        (GOOD + "page_cache_size = true", "page_cache_size must be a number"),
        (GOOD + "wait_lsn_timeout = 'soon'", "wait_lsn_timeout: not a duration: 'soon'"),
        (GOOD + "http_auth_type = 'NeonJWT'", "only 'Trust'"),
        (GOOD + "[tenant_config]\ngc_horizon = 'x'", r"\[tenant_config\]: gc_horizon must be a integer"),
        (GOOD + "[tenant_config]\nnonsense = 1", "unknown field 'nonsense'"),
        ("x = ", "is not valid TOML"),
    ],
)
def test_wrong_settings_end_with_one_line_and_exit_code_2(tmp_path: Path, toml: str, complaint: str, capfd: Any):
    write(tmp_path, toml)
    with pytest.raises(ConfigError, match=complaint) as error:
        load_settings(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert main(["-D", str(tmp_path)]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


def test_missing_files_and_identity_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"identity.toml does not exist"):
        load_settings(tmp_path)
    with pytest.raises(ConfigError, match="id is missing"):
        load_settings(write(tmp_path, identity=""))
    assert main(["-D", str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize(
    ("text", "seconds"), [("10s", 10), ("7 days", 604800), ("1hr", 3600), ("1h 30m", 5400), ("0s", 0), ("250ms", 0.25)]
)
def test_durations(text: str, seconds: float):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "s", "10 parsecs", "10s x", "-1s"])
def test_what_is_no_duration(text: str):
    with pytest.raises(ValueError, match=r"duration"):
        parse_duration(text)


def test_location_config_survives_the_disk(tmp_path: Path):
    overrides = {
        "gc_horizon": 5,
        "pitr_interval": "1 day",
        "eviction_policy": {"kind": "NoEviction"},
        "lazy_slru_download": True,
    }
    for conf in (
        LocationConf("AttachedMulti", 7, overrides, False, 1, 4, 2048),
        LocationConf("Secondary", None, {}, True),
    ):
        conf.save(tmp_path)
        assert LocationConf.load(tmp_path) == conf
    text = (tmp_path / "config-v1").read_bytes()
    for size in range(len(text) - 1):
        (tmp_path / "config-v1").write_bytes(text[:size])
        with pytest.raises(CorruptionError, match="config-v1"):
            LocationConf.load(tmp_path)


def test_effective_settings_take_the_nearest():
    conf = TenantConf({"gc_horizon": 1}, {"gc_horizon": 2, "gc_period": "5s"})
    assert (conf.integer("gc_horizon"), conf.seconds("gc_period"), conf.integer("checkpoint_distance")) == (1, 5.0, 256 << 20)


def make_index(**changes: Any) -> IndexPart:
    layers = {LayerName.level0(8, 20): LayerMetadata(100, 2), LayerName.image(5, KEY_MAX, 19): LayerMetadata(7, 1, "0102")}
    fields: dict[str, Any] = {"disk_consistent_lsn": 19, "prev_record_lsn": 12, "ancestor_timeline": None, "ancestor_lsn": 0}
    fields |= {"latest_gc_cutoff_lsn": 8, "initdb_lsn": 8, "pg_version": 15, "layers": layers}
    return IndexPart(**(fields | changes))


def test_index_survives_and_keeps_foreign_fields():
    index = make_index(deleted_at="2024-01-01T00:00:00.000000", extra={"archived_at": "x", "lineage": {"a": 1}})
    assert IndexPart.parse(index.to_json(), "here") == index
    body = json.loads(index.to_json())
    assert body["version"] == 15
    assert body["layer_metadata"][str(LayerName.level0(8, 20))] == {"file_size": 100, "generation": 2}
    body["metadata"] = body.pop("metadata_bytes")
    assert IndexPart.parse(json.dumps(body).encode(), "here") == index


def test_damaged_index_is_refused_by_name():
    content = make_index().to_json()
    for size in range(len(content)):
        with pytest.raises(CorruptionError, match="the object"):
            IndexPart.parse(content[:size], "the object")
    with pytest.raises(CorruptionError, match="no layers"):
        IndexPart.parse(make_index(layers={}).to_json(), "the object")
    for bad in (
        b"[]",
        b"null",
        b"{}",
        b'{"metadata_bytes": [1, 2]}',
        content.replace(b"0/13", b"zz"),
        content.replace(b"15", b'"x"'),
    ):
        with pytest.raises(CorruptionError, match="the object"):
            IndexPart.parse(bad, "the object")


def test_names_in_remote_storage():
    assert parse_index_generation("index_part.json-0000001f") == 31
    assert parse_index_generation("index_part.json") == -1
    for other in ("index_part.json-1", "index_part.json-0000001F", "xindex_part.json-0000001f", "heatmap"):
        assert parse_index_generation(other) is None


def test_shard_ids():
    tenant = TenantId.generate()
    assert str(TenantShardId(tenant)) == str(tenant)
    sharded = TenantShardId(tenant, 3, 10)
    assert str(sharded) == f"{tenant}-030a" and TenantShardId.parse(str(sharded)) == sharded
    for bad in (f"{tenant}-", f"{tenant}-3", f"{tenant}-zzzz", "x"):
        with pytest.raises(ValueError, match="not a tenant"):
            TenantShardId.parse(bad)


def test_keys_as_text():
    for text in ("000000067F00000001000004DF0000000006", "62000001017F8B83D94F7081693471ABF91C", "F" * 36, "0" * 36):
        assert format_key(parse_key(text)) == text
    for bad in ("", "0" * 35, "G" * 36, "80" + "0" * 34, "00FFFFFFFE" + "0" * 26):
        with pytest.raises(ValueError, match="key"):
            parse_key(bad)

"""The pageserver's settings: ``pageserver.toml`` and ``identity.toml`` in its working directory.

Unknown keys are warned about and counted, as in Neon; a key of the wrong type or without a needed value ends the start with one
line that names file, key and repair.
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from neon_services.ground.errors import ConfigError
from neon_services.ground.net import parse_host_port
from neon_services.ground.tls import ClientTls, SslMode
from neon_services.pageserver.location_config import check_tenant_conf, parse_duration

log = logging.getLogger(__name__)

DEFAULT_PG_LISTEN = "127.0.0.1:64000"
DEFAULT_HTTP_LISTEN = "127.0.0.1:9898"
DEFAULT_BROKER = "http://127.0.0.1:50051"
DEFAULT_PG_DISTRIB_DIR = "/usr/lib/postgresql"

#: Keys of Neon's pageserver.toml that are accepted and mean nothing here (yet).
_ACCEPTED_TEXT = (
    "listen_https_addr listen_grpc_addr ssl_key_file ssl_cert_file ssl_cert_reload_period"
    " enable_tls_page_service_api broker_keepalive_interval grpc_auth_type page_cache_size_index max_file_descriptors"
    " virtual_file_io_engine virtual_file_io_mode concurrent_tenant_warmup concurrent_tenant_size_logical_size_queries"
    " metric_collection_endpoint metric_collection_interval metric_collection_bucket synthetic_size_calculation_interval"
    " disk_usage_based_eviction background_task_maximum_delay ondemand_download_behavior_treat_error_as_warn"
    " heatmap_upload_concurrency secondary_download_concurrency ingest_batch_size max_vectored_read_bytes"
    " max_get_vectored_keys image_compression ephemeral_bytes_per_memory_kb l0_flush page_service_pipelining"
    " get_vectored_concurrent_io timeline_offloading validate_wal_contiguity load_previous_heatmap"
    " generate_unarchival_heatmap basebackup_cache_config timeline_import_config"
    " image_layer_generation_large_timeline_threshold test_remote_failures test_remote_failures_probability tracing"
    " posthog_config dev_mode auth_validation_public_key_path"
)
_ACCEPTED = frozenset(_ACCEPTED_TEXT.split())


@dataclass(slots=True)
class Settings:
    """What the process needs to know; durations in seconds, sizes in bytes."""

    workdir: Path
    node_id: int
    listen_pg: tuple[str, int]
    listen_http: tuple[str, int]
    broker_endpoint: str
    #: Authorities for the broker's and the safekeepers' certificates; None: the system's.
    ssl_ca_file: Path | None
    #: How connections to safekeepers are protected.
    safekeeper_tls: ClientTls
    pg_distrib_dir: Path
    remote_storage: dict[str, Any]
    control_plane_api: str | None
    control_plane_api_token: str | None
    control_plane_emergency_mode: bool
    availability_zone: str | None
    wait_lsn_timeout_s: float
    wal_redo_timeout_s: float
    superuser: str
    locale: str
    page_cache_bytes: int
    no_sync: bool
    log_format: str
    tenant_config: dict[str, Any]
    ignored: list[str] = field(default_factory=list)

    @property
    def tenants_dir(self) -> Path:
        return self.workdir / "tenants"


class _Table:
    """Typed access to a TOML table; errors name file, key, value and what is expected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.table = tomli.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: create it, or point -D at the pageserver's working directory") from None
        except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        self.seen: set[str] = set()

    def get(self, key: str, kind: type, expected: str, default: Any) -> Any:
        self.seen.add(key)
        value = self.table.get(key, default)
        if value is default:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.path}: {key} must be {expected}, not {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> Any:
        return self.get(key, str, "a string", default)

    def flag(self, key: str) -> bool:
        return self.get(key, bool, "true or false", False)

    def duration(self, key: str, default: str) -> float:
        try:
            return parse_duration(self.text(key, default))
        except ValueError as error:
            raise ConfigError(f"{self.path}: {key}: {error}") from error


def load_settings(workdir: Path) -> Settings:
    """Read and check both files. Raises ConfigError."""
    identity = _Table(workdir / "identity.toml")
    node_id = identity.get("id", int, "a number", None)
    if node_id is None or node_id < 0:
        raise ConfigError(f"{identity.path}: id is missing: write `id = <number>`, unique in the cluster")
    table = _Table(workdir / "pageserver.toml")
    remote = table.get("remote_storage", dict, "a table such as { local_path = '/srv/neon' }", None)
    if remote is None:
        raise ConfigError(f"{table.path}: remote_storage is missing: give a bucket or {{ local_path = '...' }}")
    if "local_path" in remote:
        remote = {**remote, "local_path": str(workdir / str(remote["local_path"]))}  # relative to the working directory
    emergency = table.flag("control_plane_emergency_mode")
    api = table.text("control_plane_api")
    if api is None and not emergency:
        raise ConfigError(
            f"{table.path}: control_plane_api must be set (or control_plane_emergency_mode = true to run without a controller)"
        )
    for key in ("http_auth_type", "pg_auth_type"):
        if table.text(key, "Trust") != "Trust":
            raise ConfigError(f"{table.path}: {key}: only 'Trust' is supported")
    ca_text = table.text("ssl_ca_file")
    ca_file = workdir / ca_text if ca_text else None
    sslmode = table.text("safekeeper_sslmode", SslMode.PREFER)
    cache_pages = table.get("page_cache_size", int, "a number of 8 KiB pages", 8192)
    distrib = table.text("pg_distrib_dir", DEFAULT_PG_DISTRIB_DIR)
    log_format = table.text("log_format", "plain")
    if log_format not in ("plain", "json"):
        raise ConfigError(f"{table.path}: log_format must be 'plain' or 'json', not {log_format!r}")
    settings = Settings(
        workdir=workdir,
        node_id=node_id,
        listen_pg=parse_host_port(table.text("listen_pg_addr", DEFAULT_PG_LISTEN), what=f"{table.path}: listen_pg_addr"),
        listen_http=parse_host_port(
            table.text("listen_http_addr", DEFAULT_HTTP_LISTEN), what=f"{table.path}: listen_http_addr"
        ),
        broker_endpoint=table.text("broker_endpoint", DEFAULT_BROKER),
        ssl_ca_file=ca_file,
        safekeeper_tls=ClientTls.parse(sslmode, ca_file, what=f"{table.path}: safekeeper_sslmode"),
        pg_distrib_dir=Path(distrib),
        remote_storage=remote,
        control_plane_api=api,
        control_plane_api_token=table.text("control_plane_api_token"),
        control_plane_emergency_mode=emergency,
        availability_zone=table.text("availability_zone"),
        wait_lsn_timeout_s=table.duration("wait_lsn_timeout", "300s"),
        wal_redo_timeout_s=table.duration("wal_redo_timeout", "60s"),
        superuser=table.text("superuser", "cloud_admin"),
        locale=table.text("locale", "C.UTF-8"),
        page_cache_bytes=cache_pages * 8192,
        no_sync=table.flag("no_sync"),
        log_format=log_format,
        tenant_config=check_tenant_conf(table.get("tenant_config", dict, "a table", {}), f"{table.path}: [tenant_config]"),
    )
    settings.ignored = sorted(set(table.table) - table.seen - _ACCEPTED)
    for key in settings.ignored:
        log.warning("%s: unknown key %r is ignored", table.path, key)
    if not os.access(workdir, os.W_OK):
        raise ConfigError(f"working directory {workdir} is not writable by this user")
    return settings

"""postgresql.conf, pg_hba.conf and pg_ident.conf of a compute.

Invariant: whatever the specification says, the last lines are ours, and they are what durability rests on: commits wait for
``walproposer``, a crashed server is not restarted on its own files, and the library comes first.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from neon_services.compute.spec import ComputeSpec
from neon_services.ground.errors import ConfigError

SUPERUSER = "cloud_admin"
DEFAULT_PORT = 5432

# what durability rests on also goes to the command line: there not even ALTER SYSTEM can change it
UNCHANGEABLE = {"synchronous_standby_names": "walproposer", "restart_after_crash": "off"}

# settings of Neon's patched server, which a stock one does not know: the library accepts them with its prefix
PATCHED_SETTINGS = frozenset(
    {
        "max_replication_write_lag",
        "max_replication_flush_lag",
        "max_replication_apply_lag",
        "enable_seqscan_prefetch",
        "enable_indexscan_prefetch",
        "enable_indexonlyscan_prefetch",
        "lsn_cache_size",
        "seqscan_prefetch_buffers",
    }
)
# decided here, or belonging to the read-only modes that do not exist yet
_OURS = frozenset(
    {
        "shared_preload_libraries",
        "neon.tenant_id",
        "neon.timeline_id",
        "neon.pageserver_connstring",
        "neon.safekeepers",
        "synchronous_standby_names",
        "fsync",
        "restart_after_crash",
        "dynamic_shared_memory_type",
        "data_directory",
        "hot_standby",
        "recovery_target_lsn",
        "primary_conninfo",
        "primary_slot_name",
        "recovery_prefetch",
    }
)
_LINE = re.compile(r"^\s*([A-Za-z_][\w.]*)\s*(?:=\s*|\s)\s*(.*)$")
_NAME = re.compile(r"^[A-Za-z_][\w.]*$")


@dataclass(frozen=True, slots=True)
class PostgresSettings:
    """The text of postgresql.conf, and the two values of it that compute_ctl itself needs."""

    text: str
    port: int
    socket_directory: str


def quote(value: str) -> str:
    """A value for postgresql.conf."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _unquoted(value: str) -> str:
    value = value.split(" #")[0].strip()
    return value[1:-1].replace("''", "'") if len(value) >= 2 and value[0] == value[-1] == "'" else value


def make_postgres_settings(spec: ComputeSpec, *, library: Path, pgdata: Path, connstr_port: int | None) -> PostgresSettings:
    """Write the configuration. Raises ConfigError when the specification asks for what a compute cannot do."""
    preload: list[str] = []
    values: dict[str, str] = {}
    lines: list[str] = []

    def take(name: str, value: str) -> None:
        name = name.lower()
        if not _NAME.match(name):
            raise ConfigError(f"spec.cluster.settings: {name!r} is not the name of a setting")
        if name == "shared_preload_libraries":
            preload[:] = [part.strip().strip('"') for part in value.split(",") if part.strip()]
        if name in _OURS:
            return
        values[name] = value
        lines.append(f"{'neon.' + name if name in PATCHED_SETTINGS else name} = {quote(value)}")

    for line in spec.postgresql_conf.splitlines():
        match = _LINE.match(line)
        if not match or line.lstrip().startswith("#"):
            continue
        name, value = match[1], match[2]
        if name.lower() in ("include", "include_if_exists", "include_dir"):
            lines.append(line.strip())
        else:
            take(name, _unquoted(value))
    for option in spec.settings:
        take(option.name, option.value)

    if values.get("wal_level", "replica") not in ("replica", "logical"):
        raise ConfigError(f"spec.cluster.settings: wal_level {values['wal_level']!r} is too low; use replica or logical")
    port = values.get("port") or str(connstr_port or DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"spec.cluster.settings: port {port!r} is not a port number")
    socket_directory = values.get("unix_socket_directories", "").split(",")[0].strip() or str(pgdata)
    text = "\n".join(_defaults() + lines + _forced(spec, library, preload, int(port), socket_directory)) + "\n"
    return PostgresSettings(text, int(port), socket_directory)


def _defaults() -> list[str]:
    return [
        "# Written by compute_ctl at each start.",
        "wal_level = replica",
        "max_wal_senders = 10",
        "max_replication_slots = 10",
        "wal_keep_size = 0",
        # they repair torn pages after a crash, and local files never outlive one; redo at the pageserver needs none
        "full_page_writes = off",
        "max_wal_size = 1GB",
        "wal_sender_timeout = 60s",
        "password_encryption = scram-sha-256",
        "lc_messages = 'C.UTF-8'",
        "lc_monetary = 'C.UTF-8'",
        "lc_numeric = 'C.UTF-8'",
        "lc_time = 'C.UTF-8'",
    ]


def _forced(spec: ComputeSpec, library: Path, preload: list[str], port: int, socket_directory: str) -> list[str]:
    safekeepers = ",".join(spec.safekeepers)
    if spec.safekeepers_generation:
        safekeepers = f"g#{spec.safekeepers_generation}:{safekeepers}"
    libraries = [str(library), *(name for name in preload if name != "neon")]
    forced = {
        "port": str(port),
        "unix_socket_directories": socket_directory,
        "shared_preload_libraries": ",".join(f'"{name}"' for name in libraries),
        "neon.tenant_id": str(spec.ttid.tenant_id),
        "neon.timeline_id": str(spec.ttid.timeline_id),
        "neon.pageserver_connstring": spec.pageserver.connstring,
        "neon.safekeepers": safekeepers,
        "neon.project_id": spec.project_id or "",
        "neon.branch_id": spec.branch_id or "",
        "neon.endpoint_id": spec.endpoint_id or "",
        # commits wait for the quorum of safekeepers; local files are disposable
        "fsync": "off",
        "dynamic_shared_memory_type": "mmap",  # in pg_dynshmem, a directory in memory
        **UNCHANGEABLE,
    }
    return [f"{name} = {quote(value)}" for name, value in forced.items()]


def make_pg_hba() -> str:
    """The system user that runs the compute is its superuser by socket; everybody else needs a password."""
    return (
        f"local all {SUPERUSER} peer map=neon\n"
        f"local replication {SUPERUSER} peer map=neon\n"
        "local all all md5\n"  # md5 takes SCRAM verifiers too
        "host all all all md5\n"
        "host replication all all md5\n"
    )


def make_pg_ident(system_user: str) -> str:
    """Which system user is the superuser."""
    return f"neon {system_user} {SUPERUSER}\n"

"""The configuration file and its specification: what the compute is to become.

Unknown fields are ignored, as everywhere in Neon. A required field that is missing or wrong is one ConfigError that names it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from neon_services.ground.errors import ConfigError
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.net import parse_host_port

PAGESERVER_PORT = 6400


@dataclass(frozen=True, slots=True)
class Option:
    """A name with a typed value, as Neon's specs write settings and options of roles and databases."""

    name: str
    value: str
    vartype: str


@dataclass(frozen=True, slots=True)
class Role:
    """A role that must exist. ``verifier`` is what pg_authid stores, None to leave the password alone."""

    name: str
    verifier: str | None
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Database:
    """A database that must exist."""

    name: str
    owner: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class DeltaOperation:
    """A rename or a deletion."""

    action: str
    name: str
    new_name: str | None


@dataclass(frozen=True, slots=True)
class PageserverAddress:
    """Where the page service listens, and the connection string that says so."""

    connstring: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class ComputeSpec:
    """A checked specification."""

    ttid: TenantTimelineId
    pageserver: PageserverAddress
    safekeepers: tuple[str, ...]
    safekeepers_generation: int
    project_id: str | None
    branch_id: str | None
    endpoint_id: str | None
    storage_auth_token: str | None
    postgresql_conf: str
    settings: tuple[Option, ...]
    roles: tuple[Role, ...]
    databases: tuple[Database, ...]
    skip_pg_catalog_updates: bool
    delta_operations: tuple[DeltaOperation, ...] = ()

    def setting(self, name: str) -> str | None:
        """The value of a setting of the specification; the last one counts."""
        return next((option.value for option in reversed(self.settings) if option.name == name), None)


@dataclass(frozen=True, slots=True)
class ComputeConfig:
    """The configuration file: the specification and the keys of those who may give orders."""

    spec: ComputeSpec
    jwks: tuple[dict[str, Any], ...]


def read_config(path: Path) -> ComputeConfig:
    """Read and check the file. Raises ConfigError."""
    try:
        return parse_config(json.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def parse_config(value: Any) -> ComputeConfig:
    """Check a configuration object. Raises ConfigError that names the field."""
    config = _object(value, "the configuration")
    spec = parse_spec(_required(config, "spec", dict, "the configuration"))
    own = _object(_or_empty(config.get("compute_ctl_config")), "compute_ctl_config")
    jwks = _object(_or_empty(own.get("jwks")), "compute_ctl_config.jwks")
    keys = _list(jwks, "keys", "compute_ctl_config.jwks.keys")
    return ComputeConfig(spec, tuple(_object(key, "compute_ctl_config.jwks.keys[]") for key in keys))


def parse_spec(spec: dict[str, Any]) -> ComputeSpec:
    """Check a specification object. Raises ConfigError that names the field."""
    cluster = _object(_or_empty(spec.get("cluster")), "spec.cluster")
    settings = _options(_list(cluster, "settings", "spec.cluster.settings"), "spec.cluster.settings")
    _check_mode(spec.get("mode"))

    def field(name: str, guc: str) -> str:
        """A field of the spec, or the setting that older specs have instead."""
        value = spec.get(name)
        if value is None:
            value = next((option.value for option in reversed(settings) if option.name == guc), None)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"spec.{name}: missing (nor is there a setting {guc} in spec.cluster.settings)")
        return value

    try:
        tenant = TenantId.parse(field("tenant_id", "neon.tenant_id"))
        timeline = TimelineId.parse(field("timeline_id", "neon.timeline_id"))
    except ValueError as error:
        raise ConfigError(f"spec: {error}") from None
    safekeepers, generation = _safekeepers(spec, settings)
    return ComputeSpec(
        ttid=TenantTimelineId(tenant, timeline),
        pageserver=_pageserver(spec, field),
        safekeepers=safekeepers,
        safekeepers_generation=generation,
        project_id=_text(spec, "project_id"),
        branch_id=_text(spec, "branch_id"),
        endpoint_id=_text(spec, "endpoint_id"),
        storage_auth_token=_text(spec, "storage_auth_token"),
        postgresql_conf=_text(cluster, "postgresql_conf") or "",
        settings=settings,
        roles=tuple(_role(item, i) for i, item in enumerate(_list(cluster, "roles", "spec.cluster.roles"))),
        databases=tuple(_database(item, i) for i, item in enumerate(_list(cluster, "databases", "spec.cluster.databases"))),
        skip_pg_catalog_updates=spec.get("skip_pg_catalog_updates") is True,
        delta_operations=tuple(
            _delta(item, i) for i, item in enumerate(_list(spec, "delta_operations", "spec.delta_operations"))
        ),
    )


def _check_mode(mode: Any) -> None:
    if mode not in (None, "Primary"):
        raise ConfigError(f"spec.mode: {json.dumps(mode)} is not supported yet; only Primary computes are")


def _pageserver(spec: dict[str, Any], field: Any) -> PageserverAddress:
    info = spec.get("pageserver_connection_info")
    if info is None:
        return parse_pageserver(field("pageserver_connstring", "neon.pageserver_connstring"), "spec.pageserver_connstring")
    where = "spec.pageserver_connection_info"
    shards = _required(_object(info, where), "shards", dict, where)
    if len(shards) != 1 or info.get("shard_count") not in (None, 0, 1):
        raise ConfigError(f"{where}: {len(shards)} shards; sharded tenants are not supported yet")
    shard = _object(next(iter(shards.values())), f"{where}.shards")
    servers = _list(shard, "pageservers", f"{where}.shards.pageservers")
    if not servers:
        raise ConfigError(f"{where}.shards: no pageserver is listed")
    url = _required(_object(servers[0], f"{where}.shards.pageservers[0]"), "libpq_url", str, f"{where}.shards.pageservers[0]")
    return parse_pageserver(url, f"{where}.shards.pageservers[0].libpq_url")


def parse_pageserver(connstring: str, what: str) -> PageserverAddress:
    """Check a pageserver connection string. Raises ConfigError naming the field."""
    if "," in connstring:
        raise ConfigError(f"{what}: {connstring!r} lists several shards; sharded tenants are not supported yet")
    try:
        parts = conninfo_to_dict(connstring)
    except ProgrammingError as error:
        raise ConfigError(f"{what}: {connstring!r} is not a connection string: {str(error).strip()}") from None
    host, port = str(parts.get("host") or ""), str(parts.get("port") or PAGESERVER_PORT)
    if not host or not port.isdecimal():
        raise ConfigError(
            f"{what}: {connstring!r} names no host (for example postgresql://no_user@127.0.0.1:{PAGESERVER_PORT})"
        )
    return PageserverAddress(connstring, host, int(port))


def _safekeepers(spec: dict[str, Any], settings: tuple[Option, ...]) -> tuple[tuple[str, ...], int]:
    listed = spec.get("safekeeper_connstrings")
    generation = spec.get("safekeepers_generation") or 0
    if listed is None or listed == []:
        text = next((option.value for option in reversed(settings) if option.name == "neon.safekeepers"), "")
        if text.startswith("g#"):
            number, _, text = text[2:].partition(":")
            generation = int(number) if number.isdecimal() else -1
        listed = [part.strip() for part in text.split(",") if part.strip()]
    if not isinstance(listed, list) or not listed or not all(isinstance(item, str) for item in listed):
        raise ConfigError("spec.safekeeper_connstrings: a primary compute needs a list of HOST:PORT")
    for item in listed:
        parse_host_port(item, what="spec.safekeeper_connstrings")
    if len(set(listed)) != len(listed):
        raise ConfigError(f"spec.safekeeper_connstrings: a safekeeper is listed twice: {', '.join(listed)}")
    if not isinstance(generation, int) or isinstance(generation, bool) or generation < 0:
        raise ConfigError(f"spec.safekeepers_generation: {generation!r} is not a generation number")
    return tuple(listed), generation


def _role(value: Any, index: int) -> Role:
    where = f"spec.cluster.roles[{index}]"
    role = _object(value, where)
    name = _required(role, "name", str, where)
    secret = role.get("encrypted_password")
    verifier: str | None = None
    if isinstance(secret, str) and secret:
        if len(secret) == 32 and not set(secret) - set("0123456789abcdef"):
            verifier = "md5" + secret
        elif secret.startswith("SCRAM-SHA-256$") or (secret.startswith("md5") and len(secret) == 35):
            verifier = secret
        else:
            raise ConfigError(f"{where}.encrypted_password: neither an md5 hash of 32 digits nor a SCRAM-SHA-256 verifier")
    elif secret is not None and secret != "":
        raise ConfigError(f"{where}.encrypted_password: must be a string or null")
    return Role(name, verifier, _options(_list(role, "options", f"{where}.options"), f"{where}.options"))


def _database(value: Any, index: int) -> Database:
    where = f"spec.cluster.databases[{index}]"
    database = _object(value, where)
    options = _options(_list(database, "options", f"{where}.options"), f"{where}.options")
    return Database(_required(database, "name", str, where), _required(database, "owner", str, where), options)


def _delta(value: Any, index: int) -> DeltaOperation:
    where = f"spec.delta_operations[{index}]"
    operation = _object(value, where)
    action = _required(operation, "action", str, where)
    if action not in ("delete_db", "rename_db", "delete_role", "rename_role"):
        raise ConfigError(f"{where}.action: {action!r} is none of delete_db, rename_db, delete_role, rename_role")
    new_name = _required(operation, "new_name", str, where) if action.startswith("rename") else None
    return DeltaOperation(action, _required(operation, "name", str, where), new_name)


def _options(items: list[Any], where: str) -> tuple[Option, ...]:
    options = []
    for index, item in enumerate(items):
        option = _object(item, f"{where}[{index}]")
        name = _required(option, "name", str, f"{where}[{index}]")
        value = option.get("value")
        if value is not None and not isinstance(value, str | int | float | bool):
            raise ConfigError(f"{where}[{index}].value: must be a string")
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value if value is not None else "")
        if any(character in text for character in "\0\r\n"):
            raise ConfigError(f"{where}[{index}].value: setting {name} has a line break")
        options.append(Option(name, text, str(option.get("vartype") or "string")))
    return tuple(options)


def _or_empty(value: Any) -> Any:
    return {} if value is None else value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, not {type(value).__name__}")
    return value


def _list(value: dict[str, Any], name: str, where: str) -> list[Any]:
    found = value.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise ConfigError(f"{where}: expected a list, not {type(found).__name__}")
    return found


def _required(value: dict[str, Any], name: str, kind: type, where: str) -> Any:
    found = value.get(name)
    if found is None or (kind is str and found == ""):
        raise ConfigError(f"{where}: field {name!r} is missing")
    if not isinstance(found, kind):
        raise ConfigError(f"{where}: field {name!r} must be {kind.__name__}, not {type(found).__name__}")
    return found


def _text(value: dict[str, Any], name: str) -> str | None:
    found = value.get(name)
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"spec.{name}: must be a string, not {type(found).__name__}")
    return found or None

"""The walproposer's configuration file: one JSON object written by compute_ctl or by an operator."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import psycopg.conninfo

from neon_services.consensus.proposer import ProposerConfig
from neon_services.ground.errors import ConfigError
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn, parse_lsn
from neon_services.ground.net import parse_host_port
from neon_services.ground.tls import ClientTls, SslMode
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP, MembershipConfiguration

MAX_SAFEKEEPERS = 31
KNOWN = {
    "tenant_id",
    "timeline_id",
    "safekeepers",
    "generation",
    "membership",
    "pg_version",
    "system_id",
    "wal_seg_size",
    "bootstrap_lsn",
    "reconnect_timeout_ms",
    "connect_timeout_ms",
    "lazy_ms",
    "gather_us",
    "ring_mb",
    "safekeeper_conninfo_options",
}


@dataclass(frozen=True, slots=True)
class WalProposerConfig:
    """What the process needs to know. ``generation`` 0 is the legacy mode without membership generations."""

    ttid: TenantTimelineId
    safekeepers: tuple[tuple[str, int], ...]
    generation: int
    membership: MembershipConfiguration
    pg_version: int
    system_id: int
    wal_seg_size: int
    bootstrap_lsn: Lsn
    #: Pause between attempts, heartbeat interval and tick; and how long a safekeeper may be silent.
    reconnect_timeout_s: float
    connect_timeout_s: float
    #: How late the member that the quorum does not need may get small appends; 0 = never late.
    lazy_s: float
    #: For so long after an append small WAL that came meanwhile may wait for more, while processors are short; 0 = not at all.
    gather_s: float
    ring_bytes: int
    #: How connections to safekeepers are protected: ``sslmode`` and ``sslrootcert`` of safekeeper_conninfo_options.
    tls: ClientTls = field(default_factory=ClientTls)

    def proposer(self) -> ProposerConfig:
        """What the state machine needs of it."""
        return ProposerConfig(
            ttid=self.ttid,
            safekeepers=len(self.safekeepers),
            pg_version=self.pg_version,
            use_generations=self.generation > 0,
            mconf=self.membership,
            system_id=self.system_id,
            wal_seg_size=self.wal_seg_size,
            bootstrap_lsn=self.bootstrap_lsn,
        )


def _number(value: dict[str, Any], name: str, low: int, high: int, default: int | None = None) -> int:
    found = value.get(name)
    if found is None and default is not None:
        return default
    if not isinstance(found, int) or isinstance(found, bool) or not low <= found <= high:
        raise ConfigError(f"walproposer config: {name} is a number from {low} to {high}, not {found!r}")
    return found


def parse_conninfo_options(text: str) -> ClientTls:
    """What Neon's setting neon.safekeeper_conninfo_options says, as far as it is about TLS. Raises ConfigError for the rest."""
    what = "safekeeper_conninfo_options"
    try:
        options = psycopg.conninfo.conninfo_to_dict(text)
    except psycopg.Error as error:
        raise ConfigError(f"{what}: {str(error).strip()}") from None
    mode, ca_file = options.pop("sslmode", None), options.pop("sslrootcert", None)
    if options:
        raise ConfigError(f"{what}: {min(options)} is not supported; known are sslmode and sslrootcert")
    if ca_file == "system":  # as in libpq, which knows no weaker way to use the system's authorities
        mode, ca_file = mode or SslMode.VERIFY_FULL, None
        if mode != SslMode.VERIFY_FULL:
            raise ConfigError(f"{what}: sslrootcert=system needs sslmode=verify-full, not {mode}")
    tls = ClientTls.parse(str(mode or SslMode.PREFER), None if ca_file is None else Path(str(ca_file)), what=what)
    tls.context()  # now, and not when the first connection is made
    return tls


def parse_config(value: Any) -> WalProposerConfig:
    """Check the object. Raises ConfigError that names the key and its value."""
    if not isinstance(value, dict):
        raise ConfigError("walproposer config: expected one JSON object")
    if unknown := sorted(set(value) - KNOWN):
        raise ConfigError(f"walproposer config: unknown key {unknown[0]!r}; known are {', '.join(sorted(KNOWN))}")
    try:
        ttid = TenantTimelineId(TenantId.parse(str(value.get("tenant_id"))), TimelineId.parse(str(value.get("timeline_id"))))
        bootstrap_lsn = parse_lsn(value["bootstrap_lsn"]) if value.get("bootstrap_lsn") else Lsn(0)
        membership = MembershipConfiguration.from_json(value["membership"]) if value.get("membership") else NO_MEMBERSHIP
    except ValueError as error:
        raise ConfigError(f"walproposer config: {error}") from None
    listed = value.get("safekeepers")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_SAFEKEEPERS:
        raise ConfigError(f"walproposer config: safekeepers is a list of 1 to {MAX_SAFEKEEPERS} HOST:PORT, not {listed!r}")
    safekeepers = tuple(parse_host_port(str(item), what="walproposer config: safekeepers") for item in listed)
    if len(set(safekeepers)) != len(safekeepers):
        raise ConfigError(f"walproposer config: a safekeeper is listed twice: {', '.join(map(str, listed))}")
    # On one host every flush costs the others; across hosts the quorum is better chosen by who answers first.
    one_host = len({host for host, _ in safekeepers}) == 1
    return WalProposerConfig(
        ttid=ttid,
        safekeepers=safekeepers,
        generation=_number(value, "generation", 0, (1 << 32) - 1, 0),
        membership=membership,
        pg_version=_number(value, "pg_version", 90000, 1_000_000),
        system_id=_number(value, "system_id", 0, (1 << 64) - 1, 0),
        wal_seg_size=_number(value, "wal_seg_size", 1 << 20, 1 << 30, WAL_SEGMENT_SIZE),
        bootstrap_lsn=bootstrap_lsn,
        reconnect_timeout_s=_number(value, "reconnect_timeout_ms", 10, 600_000, 1000) / 1000,
        connect_timeout_s=_number(value, "connect_timeout_ms", 100, 600_000, 10_000) / 1000,
        lazy_s=_number(value, "lazy_ms", 0, 1000, 10 if one_host else 0) / 1000,
        gather_s=_number(value, "gather_us", 0, 100_000, 400) / 1e6,
        ring_bytes=_number(value, "ring_mb", 8, 4096, 32) << 20,
        tls=parse_conninfo_options(str(value.get("safekeeper_conninfo_options") or "")),
    )


def read_config(path: Path) -> WalProposerConfig:
    """Read and check the file. Raises ConfigError."""
    try:
        return parse_config(json.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None

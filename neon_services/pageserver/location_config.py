"""How a tenant shard is attached to this node, and its settings: the API's JSON and the ``config-v1`` file.

Invariant: a generation never goes down: what is on disk was attached before, and a lower one is refused.
"""

import dataclasses
import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from neon_services.ground.durable import replace_durably
from neon_services.ground.errors import ConfigError, CorruptionError
from neon_services.ground.http import ApiError

ATTACH_MODES = ("AttachedSingle", "AttachedMulti", "AttachedStale")
CONFIG_NAME = "config-v1"

_UNITS = {
    "ms": 0.001, "s": 1, "sec": 1, "secs": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "mins": 60, "minute": 60,
    "minutes": 60, "h": 3600, "hr": 3600, "hrs": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400,
    "w": 604800, "week": 604800, "weeks": 604800, "us": 1e-6,
}  # fmt: skip

INT, DURATION, BOOL, ANY = "integer", "duration", "boolean", "any"

#: name -> (type, built-in default); None: not set.
TENANT_CONF: dict[str, tuple[str, Any]] = {
    "checkpoint_distance": (INT, 256 << 20),
    "checkpoint_timeout": (DURATION, "10m"),
    "compaction_target_size": (INT, 128 << 20),
    "compaction_period": (DURATION, "20s"),
    "compaction_threshold": (INT, 10),
    "compaction_upper_limit": (INT, 10),
    "compaction_algorithm": (ANY, {"kind": "legacy"}),
    "compaction_shard_ancestor": (BOOL, True),
    "compaction_l0_first": (BOOL, True),
    "compaction_l0_semaphore": (BOOL, True),
    "l0_flush_delay_threshold": (INT, None),
    "l0_flush_stall_threshold": (INT, None),
    "image_creation_threshold": (INT, 3),
    "image_layer_creation_check_threshold": (INT, 2),
    "image_creation_preempt_threshold": (INT, 3),
    "image_layer_force_creation_period": (DURATION, None),
    "gc_horizon": (INT, 64 << 20),
    "gc_period": (DURATION, "1hr"),
    "pitr_interval": (DURATION, "7 days"),
    "walreceiver_connect_timeout": (DURATION, "10s"),
    "lagging_wal_timeout": (DURATION, "10s"),
    "max_lsn_wal_lag": (INT, 1 << 30),
    "eviction_policy": (ANY, {"kind": "NoEviction"}),
    "min_resident_size_override": (INT, None),
    "evictions_low_residence_duration_metric_threshold": (DURATION, "24h"),
    "heatmap_period": (DURATION, "0s"),
    "lazy_slru_download": (BOOL, False),
    "timeline_get_throttle": (ANY, None),
    "lsn_lease_length": (DURATION, "10m"),
    "lsn_lease_length_for_ts": (DURATION, "1m"),
    "timeline_offloading": (BOOL, True),
    "rel_size_v2_enabled": (BOOL, False),
    "gc_compaction_enabled": (BOOL, True),
    "gc_compaction_verification": (BOOL, True),
    "gc_compaction_initial_threshold_kb": (INT, 5 << 20),
    "gc_compaction_ratio_percent": (INT, 100),
    "sampling_ratio": (ANY, None),
    "relsize_snapshot_cache_capacity": (INT, 1000),
    "basebackup_cache_enabled": (BOOL, False),
}


@functools.lru_cache(maxsize=256)
def parse_duration(text: str) -> float:
    """Seconds of a humantime string such as ``7 days`` or ``1h 30m``. Raises ValueError quoting the text."""
    parts = re.findall(r"(\d+)\s*([a-z]+)\s*", text)
    if not parts or "".join(number + unit for number, unit in parts) != re.sub(r"\s", "", text):
        raise ValueError(f"not a duration: {text!r} (expected for example '10s', '10m', '1hr', '7 days')")
    total = 0.0
    for number, unit in parts:
        if unit not in _UNITS:
            raise ValueError(f"unknown unit {unit!r} in duration {text!r}")
        total += int(number) * _UNITS[unit]
    return total


def check_tenant_conf(table: Any, where: str) -> dict[str, Any]:
    """The table without null values. Raises ConfigError naming the first unknown field or wrong type."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: must be a table of tenant settings, not {type(table).__name__}")
    kept = {}
    for name, value in table.items():
        if name not in TENANT_CONF:
            raise ConfigError(f"{where}: unknown field {name!r}")
        if value is None:
            continue
        kind, _ = TENANT_CONF[name]
        right = {
            INT: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
            BOOL: isinstance(value, bool),
            DURATION: isinstance(value, str),
            ANY: True,
        }[kind]
        if not right:
            raise ConfigError(f"{where}: {name} must be a {kind}, not {value!r}")
        if kind == DURATION:
            try:
                parse_duration(value)
            except ValueError as error:
                raise ConfigError(f"{where}: {name}: {error}") from error
        kept[name] = value
    return kept


class TenantConf:
    """The effective settings of a tenant: overrides, then the node's, then built-in ones. Durations are in seconds."""

    def __init__(self, overrides: dict[str, Any] | None = None, node: dict[str, Any] | None = None) -> None:
        self.values = {name: default for name, (_, default) in TENANT_CONF.items()} | (node or {}) | (overrides or {})

    def integer(self, name: str) -> int:
        return self.values[name]

    def seconds(self, name: str) -> float:
        return parse_duration(self.values[name])


@dataclass(frozen=True, slots=True)
class LocationConf:
    """One tenant shard on this node."""

    mode: str  #: one of ATTACH_MODES or "Secondary"
    generation: int | None
    tenant_conf: dict[str, Any] = field(default_factory=dict)
    warm: bool = False
    shard_number: int = 0
    shard_count: int = 0
    stripe_size: int = 0

    @property
    def attached(self) -> bool:
        return self.mode in ATTACH_MODES

    def with_overrides(self, overrides: dict[str, Any]) -> "LocationConf":
        """The same location with other settings."""
        return dataclasses.replace(self, tenant_conf=overrides)

    @classmethod
    def from_request(cls, body: dict[str, Any]) -> "LocationConf | None":
        """From the body of PUT location_config; None means Detached. Raises ApiError 400 saying what is wrong."""
        mode = body.get("mode")
        if mode not in (*ATTACH_MODES, "Secondary", "Detached"):
            raise ApiError(400, f"mode must be one of {', '.join(ATTACH_MODES)}, Secondary, Detached, not {mode!r}")
        if mode == "Detached":
            return None
        generation = body.get("generation")
        if mode in ATTACH_MODES:
            if isinstance(generation, bool) or not isinstance(generation, int) or not 0 <= generation < 1 << 32:
                raise ApiError(400, f"mode {mode} needs a generation (a number), not {generation!r}")
        elif generation is not None:
            raise ApiError(400, "a secondary location has no generation")
        if "tenant_conf" not in body:
            raise ApiError(400, "field 'tenant_conf' is missing (it may be {})")
        numbers = {}
        for name, default in (("shard_number", 0), ("shard_count", 0), ("shard_stripe_size", 0)):
            value = body.get(name, default)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ApiError(400, f"field {name!r} must be a number, not {value!r}")
            numbers[name] = value
        secondary = body.get("secondary_conf") or {}
        return cls(
            mode,
            generation,
            check_tenant_conf(body["tenant_conf"], "tenant_conf"),
            bool(secondary.get("warm", False)) if isinstance(secondary, dict) else False,
            numbers["shard_number"],
            numbers["shard_count"],
            numbers["shard_stripe_size"],
        )

    def to_response(self) -> dict[str, Any]:
        """The API's JSON."""
        return {
            "mode": self.mode,
            "generation": self.generation,
            "secondary_conf": None if self.attached else {"warm": self.warm},
            "shard_number": self.shard_number,
            "shard_count": self.shard_count,
            "shard_stripe_size": self.stripe_size,
            "tenant_conf": self.tenant_conf,
        }

    # -- config-v1

    def save(self, directory: Path, *, sync: bool = True) -> None:
        """Write ``config-v1`` atomically."""
        if self.attached:
            mode = {"Attached": {"generation": self.generation, "attach_mode": self.mode.removeprefix("Attached")}}
        else:
            mode = {"Secondary": {"warm": self.warm}}  # type: ignore[dict-item]
        shard = {"number": self.shard_number, "count": self.shard_count, "stripe_size": self.stripe_size, "layout": 1}
        text = (
            "# This file contains a specific per-tenant's config.\n"
            "#  It is read in case of pageserver restart.\n\n"
            f"mode = {_toml(mode)}\nshard = {_toml(shard)}\n\n[tenant_conf]\n"
        )
        text += "".join(f"{name} = {_toml(value)}\n" for name, value in sorted(self.tenant_conf.items()))
        replace_durably(directory / CONFIG_NAME, text.encode(), sync=sync)

    @classmethod
    def load(cls, directory: Path) -> "LocationConf":
        """Read ``config-v1``. Raises CorruptionError naming the file and what is wrong, FileNotFoundError."""
        path = directory / CONFIG_NAME
        try:
            table = tomli.loads(path.read_text())
            (kind, detail), shard = next(iter(table["mode"].items())), table["shard"]
            return cls(
                mode="Attached" + detail["attach_mode"] if kind == "Attached" else "Secondary",
                generation=int(detail["generation"]) if kind == "Attached" else None,
                tenant_conf=check_tenant_conf(table["tenant_conf"], str(path)),
                warm=bool(detail.get("warm", False)),
                shard_number=int(shard.get("number", 0)),
                shard_count=int(shard.get("count", 0)),
                stripe_size=int(shard.get("stripe_size", 0)),
            )
        except (
            tomli.TOMLDecodeError,
            UnicodeDecodeError,
            KeyError,
            TypeError,
            AttributeError,
            StopIteration,
            ConfigError,
        ) as error:
            raise CorruptionError(
                f"{path} is not a valid location config ({error}); remove the tenant's directory and attach the tenant again"
            ) from error


def _toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value)

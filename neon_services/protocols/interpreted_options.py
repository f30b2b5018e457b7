"""Which protocol a reader of WAL asks for, in the options of its startup packet.

``protocol`` is JSON: ``{"type":"vanilla"}`` (as when it is missing), or ``{"type":"interpreted","args":{"format":"protobuf" or
"bincode","compression":null or {"zstd":{"level":n}}}}``. The interpreted one needs ``shard_count``, ``shard_number`` and
``shard_stripe_size`` (a tenant that is not sharded: 0, 0 and any size); the vanilla one has no shards.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neon_services.ground.errors import NeonError
from neon_services.protocols.sharding import ShardIdentity

PROTOBUF, BINCODE = "protobuf", "bincode"
ZSTD_LEVEL_MAX = 22
_SHARD_OPTIONS = ("shard_count", "shard_number", "shard_stripe_size")


class BadProtocolOption(NeonError):
    """The options of a startup packet ask for something that there is not. The text names the option."""


@dataclass(frozen=True, slots=True)
class InterpretedProtocol:
    """What a reader of interpreted WAL asks for; ``zstd_level`` None is no compression."""

    format: str
    zstd_level: int | None
    shard: ShardIdentity


def parse_protocol_options(options: Mapping[str, str]) -> InterpretedProtocol | None:
    """What the options ask for; None is the vanilla protocol. Raises BadProtocolOption."""
    protocol = _parse_protocol(options["protocol"]) if "protocol" in options else None
    given = [name for name in _SHARD_OPTIONS if name in options]
    if protocol is None:
        if given:
            raise BadProtocolOption(f"{given[0]} belongs to the interpreted protocol: leave it out, or ask for that")
        return None
    missing = [name for name in _SHARD_OPTIONS if name not in options]
    if missing:
        raise BadProtocolOption(f"the interpreted protocol needs the option {missing[0]}")
    count, number, stripe_size = (_number(name, options[name]) for name in _SHARD_OPTIONS)
    try:
        shard = ShardIdentity.checked(number, count, stripe_size)
    except ValueError as error:
        raise BadProtocolOption(str(error)) from error
    return InterpretedProtocol(*protocol, shard)


def format_protocol(protocol: InterpretedProtocol) -> dict[str, str]:
    """The options that ask for it."""
    compression = None if protocol.zstd_level is None else {"zstd": {"level": protocol.zstd_level}}
    args = {"format": protocol.format, "compression": compression}
    shard = protocol.shard
    return {
        "protocol": json.dumps({"type": "interpreted", "args": args}, separators=(",", ":")),
        "shard_count": str(shard.count),
        "shard_number": str(shard.number),
        "shard_stripe_size": str(shard.stripe_size),
    }


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10):
        raise BadProtocolOption(f"{name} must be a number, not {text!r}")
    return int(text)


def _parse_protocol(text: str) -> tuple[str, int | None] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadProtocolOption(f"protocol {text[:200]!r} is not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("type") not in ("vanilla", "interpreted"):
        raise BadProtocolOption(f'protocol {text[:200]!r} must be an object whose "type" is "vanilla" or "interpreted"')
    if value["type"] == "vanilla":
        return None
    args = value.get("args")
    if not isinstance(args, dict) or args.get("format") not in (PROTOBUF, BINCODE):
        raise BadProtocolOption(f'protocol {text[:200]!r} must have "args" with a "format" of "protobuf" or "bincode"')
    return args["format"], _parse_compression(args.get("compression"), text)


def _parse_compression(value: Any, text: str) -> int | None:
    if value is None:
        return None
    level = value.get("zstd") if isinstance(value, dict) and len(value) == 1 else None
    level = level.get("level") if isinstance(level, dict) else None
    if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level <= ZSTD_LEVEL_MAX:
        expected = f'null or {{"zstd":{{"level":n}}}} with n from 0 to {ZSTD_LEVEL_MAX}'
        raise BadProtocolOption(f'protocol {text[:200]!r}: "compression" must be {expected}')
    return level

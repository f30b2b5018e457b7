"""What a pageserver reports about a timeline, as the key-value blob that safekeepers hand through to computes.

Layout: ``u8 number of keys``, then per key ``cstr name, i32 length, value``; integers are big-endian. Unknown keys are skipped
by their length, so that either side may be newer than the other.
"""

import struct
from dataclasses import dataclass

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.lsn import INVALID_LSN, Lsn

_U64 = struct.Struct("!Q")
_I64 = struct.Struct("!q")
_U32 = struct.Struct("!I")
_LENGTH = struct.Struct("!i")

# name on the wire -> (attribute, value width in bytes); the second half are the names that newer peers use
_FIELDS = {
    b"current_timeline_size": ("current_timeline_size", 8),
    b"ps_writelsn": ("last_received_lsn", 8),
    b"ps_flushlsn": ("disk_consistent_lsn", 8),
    b"ps_applylsn": ("remote_consistent_lsn", 8),
    b"ps_replytime": ("replytime_us", 8),
    b"shard_number": ("shard_number", 4),
    b"corruption_detected": ("corruption_detected", 1),
    b"last_received_lsn": ("last_received_lsn", 8),
    b"disk_consistent_lsn": ("disk_consistent_lsn", 8),
    b"remote_consistent_lsn": ("remote_consistent_lsn", 8),
    b"replytime": ("replytime_us", 8),
}


@dataclass(frozen=True, slots=True)
class PageserverFeedback:
    """One pageserver shard's progress. ``replytime_us`` counts microseconds since 2000-01-01 UTC."""

    current_timeline_size: int = 0
    last_received_lsn: Lsn = INVALID_LSN
    disk_consistent_lsn: Lsn = INVALID_LSN
    remote_consistent_lsn: Lsn = INVALID_LSN
    replytime_us: int = 0
    shard_number: int = 0
    corruption_detected: bool = False

    def pack(self) -> bytes:
        """The blob. ``shard_number`` and ``corruption_detected`` are written only when they say something."""
        pairs = [
            (b"current_timeline_size", _U64.pack(self.current_timeline_size)),
            (b"ps_writelsn", _U64.pack(self.last_received_lsn)),
            (b"ps_flushlsn", _U64.pack(self.disk_consistent_lsn)),
            (b"ps_applylsn", _U64.pack(self.remote_consistent_lsn)),
            (b"ps_replytime", _I64.pack(self.replytime_us)),
        ]
        if self.shard_number:
            pairs.append((b"shard_number", _U32.pack(self.shard_number)))
        if self.corruption_detected:
            pairs.append((b"corruption_detected", b"\x01"))
        body = b"".join(name + b"\0" + _LENGTH.pack(len(value)) + value for name, value in pairs)
        return bytes([len(pairs)]) + body

    @classmethod
    def parse(cls, blob: bytes | memoryview) -> "PageserverFeedback":
        """Read a blob that must end where its last value ends. Raises ProtocolViolation."""
        data = bytes(blob)
        if not data:
            raise ProtocolViolation("pageserver feedback is empty")
        values: dict[str, int] = {}
        offset = 1
        for _ in range(data[0]):
            end = data.find(b"\0", offset)
            if end < 0 or end + 5 > len(data):
                raise ProtocolViolation("pageserver feedback is cut off")
            name = data[offset:end]
            (width,) = _LENGTH.unpack_from(data, end + 1)
            offset = end + 5 + width
            if width < 0 or offset > len(data):
                raise ProtocolViolation(f"pageserver feedback: {name!r} has the impossible length {width}")
            if name in _FIELDS:
                attribute, expected = _FIELDS[name]
                if width != expected:
                    raise ProtocolViolation(f"pageserver feedback: {name!r} has {width} bytes instead of {expected}")
                signed = attribute == "replytime_us"
                values[attribute] = int.from_bytes(data[end + 5 : offset], "big", signed=signed)
        if offset != len(data):
            raise ProtocolViolation(f"pageserver feedback has {len(data) - offset} bytes too many")
        return cls(
            current_timeline_size=values.get("current_timeline_size", 0),
            last_received_lsn=Lsn(values.get("last_received_lsn", 0)),
            disk_consistent_lsn=Lsn(values.get("disk_consistent_lsn", 0)),
            remote_consistent_lsn=Lsn(values.get("remote_consistent_lsn", 0)),
            replytime_us=values.get("replytime_us", 0),
            shard_number=values.get("shard_number", 0),
            corruption_detected=bool(values.get("corruption_detected", 0)),
        )

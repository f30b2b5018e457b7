"""``safekeeper.control``: what a safekeeper remembers about one timeline, in Neon's binary form, version 9 or 10.

Invariant: the file is replaced whole, and a file that is cut, flipped or of another version is refused with CorruptionError;
it is never read half. Layout: ``u32 magic 0xCAFECEEF, u32 version, body, u32 CRC-32C of everything before``, all integers
little-endian, body as in ``_encode_body`` (strings and lists carry a u64 count, an optional value a u8 tag, an enumeration a
u32). A state without a membership generation is written as version 9, any other as version 10.
"""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from crc32c import crc32c

from neon_services.consensus.acceptor import AcceptorState
from neon_services.consensus.term_history import check
from neon_services.ground.disk import REAL_DISK, Disk, read_file
from neon_services.ground.durable import replace_durably
from neon_services.ground.errors import CorruptionError
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn, format_lsn
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP, MembershipConfiguration, SafekeeperId, TermLsn

FILE_NAME = "safekeeper.control"
STAGED_SUFFIX = ".partial"
MAGIC = 0xCAFECEEF
OLDEST_VERSION, NEWEST_VERSION = 9, 10
MAX_BYTES = 64 * 1024 * 1024

_LAST_SECOND = 253402300799 - 86400  # the year 9999, in any time zone
UPLOAD_STATES = ("InProgress", "Uploaded", "Deleting")

_U8, _U16, _U32, _U64 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class PartialSegment:
    """One uploaded part of the segment that is being written. ``status`` indexes UPLOAD_STATES."""

    status: int
    name: str
    commit_lsn: Lsn
    flush_lsn: Lsn
    term: int


@dataclass(frozen=True, slots=True)
class ControlFile:
    """The whole durable state of a timeline. ``offloaded_flush_lsn`` is set while its WAL is only in the bucket."""

    ttid: TenantTimelineId
    acceptor: AcceptorState
    partial_backup: tuple[PartialSegment, ...] = ()
    offloaded_flush_lsn: Lsn | None = None
    #: Nanoseconds since the Unix epoch; version 9 does not keep it.
    creation_ts_ns: int = field(default_factory=time.time_ns)

    # -- bytes

    def encode(self) -> bytes:
        """The file's content."""
        version = NEWEST_VERSION if self.acceptor.mconf.generation else OLDEST_VERSION
        head = _U32.pack(MAGIC) + _U32.pack(version) + self._encode_body(version)
        return head + _U32.pack(crc32c(head))

    def _encode_body(self, version: int) -> bytes:
        state = self.acceptor
        parts = [_string(str(self.ttid.tenant_id)), _string(str(self.ttid.timeline_id))]
        if version >= 10:
            parts.append(_encode_mconf(state.mconf))
        parts += [_U64.pack(state.term), _U64.pack(len(state.term_history))]
        parts += [_U64.pack(entry.term) + _U64.pack(entry.lsn) for entry in state.term_history]
        parts.append(_U32.pack(state.pg_version) + _U64.pack(state.system_id) + _U32.pack(state.wal_seg_size))
        parts.append(_string(state.proposer_uuid.hex()))
        lsns = (state.timeline_start_lsn, state.local_start_lsn, state.commit_lsn, state.backup_lsn, state.peer_horizon_lsn)
        parts += [_U64.pack(lsn) for lsn in (*lsns, state.remote_consistent_lsn)]
        if version == 9:
            parts.append(_U64.pack(0))  # peers: always empty
        parts.append(_U64.pack(len(self.partial_backup)))
        for part in self.partial_backup:
            parts.append(_U32.pack(part.status) + _string(part.name))
            parts += [_U64.pack(part.commit_lsn), _U64.pack(part.flush_lsn), _U64.pack(part.term)]
        if self.offloaded_flush_lsn is None:
            parts.append(_U32.pack(0))
        else:
            parts.append(_U32.pack(1) + _U64.pack(self.offloaded_flush_lsn))
        if version >= 10:
            seconds, nanoseconds = divmod(self.creation_ts_ns, 1_000_000_000)
            parts.append(_U64.pack(seconds) + _U32.pack(nanoseconds))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes, *, name: str = FILE_NAME) -> "ControlFile":
        """Read the file's content. Raises CorruptionError with ``name``."""
        if len(data) < 12:
            raise CorruptionError(f"{name}: only {len(data)} bytes: the file is cut; {_REPAIR}")
        magic, version = _U32.unpack_from(data)[0], _U32.unpack_from(data, 4)[0]
        if magic != MAGIC:
            raise CorruptionError(f"{name}: not a control file (magic {magic:#x} instead of {MAGIC:#x}); {_REPAIR}")
        if _U32.unpack_from(data, len(data) - 4)[0] != crc32c(data[:-4]):
            raise CorruptionError(f"{name}: checksum mismatch; {_REPAIR}")
        if not OLDEST_VERSION <= version <= NEWEST_VERSION:
            raise CorruptionError(f"{name}: version {version} is not supported, only {OLDEST_VERSION} and {NEWEST_VERSION}")
        try:
            reader = _Reader(data[8:-4])
            decoded = cls._decode_body(reader, version)
            check(decoded.acceptor.term_history)
            if reader.offset != len(reader.data):
                raise ValueError(f"{len(reader.data) - reader.offset} bytes too many")
        except (ValueError, CorruptionError) as error:
            raise CorruptionError(f"{name}: {error}; {_REPAIR}") from error
        return decoded

    @classmethod
    def _decode_body(cls, reader: "_Reader", version: int) -> "ControlFile":
        ttid = TenantTimelineId(TenantId.parse(reader.string()), TimelineId.parse(reader.string()))
        mconf = _decode_mconf(reader) if version >= 10 else NO_MEMBERSHIP
        term = reader.u64()
        history = reader.vector(lambda: TermLsn(reader.u64(), Lsn(reader.u64())))
        pg_version, system_id, wal_seg_size = reader.u32(), reader.u64(), reader.u32()
        proposer_uuid = bytes.fromhex(reader.string())
        lsns = [Lsn(reader.u64()) for _ in range(6)]
        if version == 9:
            reader.vector(lambda: [reader.u64() for _ in range(5)])
        partial_backup = reader.vector(
            lambda: PartialSegment(
                reader.variant(UPLOAD_STATES), reader.string(), Lsn(reader.u64()), Lsn(reader.u64()), reader.u64()
            )
        )
        offloaded = Lsn(reader.u64()) if reader.variant(("Present", "Offloaded")) else None
        creation_ts_ns = reader.timestamp_ns() if version >= 10 else 0
        if wal_seg_size and (wal_seg_size & (wal_seg_size - 1) or not 1 << 20 <= wal_seg_size <= 1 << 30):
            raise ValueError(f"impossible WAL segment size {wal_seg_size}")
        state = AcceptorState(mconf, term, history, pg_version, system_id, wal_seg_size, proposer_uuid, *lsns)
        return cls(ttid, state, partial_backup, offloaded, creation_ts_ns)

    # -- files

    def save(self, directory: Path, *, sync: bool = True, disk: Disk = REAL_DISK) -> None:
        """Replace the timeline's control file durably."""
        replace_durably(directory / FILE_NAME, self.encode(), staged_suffix=STAGED_SUFFIX, sync=sync, disk=disk)

    @classmethod
    def load(cls, path: Path, *, disk: Disk = REAL_DISK) -> "ControlFile":
        """Read a control file. Raises OSError or CorruptionError."""
        return cls.decode(read_file(disk, path, MAX_BYTES), name=str(path))

    # -- for people

    def to_json(self) -> dict[str, Any]:
        """The same fields as JSON values, with Neon's names."""
        state = self.acceptor
        created = datetime.fromtimestamp(self.creation_ts_ns / 1e9, tz=UTC)
        return {
            "tenant_id": str(self.ttid.tenant_id),
            "timeline_id": str(self.ttid.timeline_id),
            "mconf": state.mconf.to_json(),
            "acceptor_state": {
                "term": state.term,
                "term_history": [{"term": entry.term, "lsn": format_lsn(entry.lsn)} for entry in state.term_history],
            },
            "server": {"pg_version": state.pg_version, "system_id": state.system_id, "wal_seg_size": state.wal_seg_size},
            "proposer_uuid": state.proposer_uuid.hex(),
            "timeline_start_lsn": format_lsn(state.timeline_start_lsn),
            "local_start_lsn": format_lsn(state.local_start_lsn),
            "commit_lsn": format_lsn(state.commit_lsn),
            "backup_lsn": format_lsn(state.backup_lsn),
            "peer_horizon_lsn": format_lsn(state.peer_horizon_lsn),
            "remote_consistent_lsn": format_lsn(state.remote_consistent_lsn),
            "partial_backup": {
                "segments": [
                    {
                        "status": UPLOAD_STATES[part.status],
                        "name": part.name,
                        "commit_lsn": format_lsn(part.commit_lsn),
                        "flush_lsn": format_lsn(part.flush_lsn),
                        "term": part.term,
                    }
                    for part in self.partial_backup
                ]
            },
            "eviction_state": "Present"
            if self.offloaded_flush_lsn is None
            else {"Offloaded": format_lsn(self.offloaded_flush_lsn)},
            "creation_ts": created.isoformat().replace("+00:00", "Z"),
        }


_REPAIR = "remove the timeline's directory and pull the timeline from the other safekeepers"


def _string(text: str) -> bytes:
    encoded = text.encode()
    return _U64.pack(len(encoded)) + encoded


def _encode_members(members: tuple[SafekeeperId, ...]) -> bytes:
    packed = [_U64.pack(member.node_id) + _string(member.host) + _U16.pack(member.pg_port) for member in members]
    return _U64.pack(len(members)) + b"".join(packed)


def _encode_mconf(mconf: MembershipConfiguration) -> bytes:
    new_members = b"\0" if mconf.new_members is None else b"\1" + _encode_members(mconf.new_members)
    return _U32.pack(mconf.generation) + _encode_members(mconf.members) + new_members


def _decode_mconf(reader: "_Reader") -> MembershipConfiguration:
    def member() -> SafekeeperId:
        return SafekeeperId(reader.u64(), reader.string(), reader.u16())

    generation = reader.u32()
    members = reader.vector(member)
    return MembershipConfiguration(generation, members, reader.vector(member) if reader.flag() else None)


class _Reader:
    """A cursor over the body. Raises ValueError when it is cut or impossible."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def _take(self, layout: struct.Struct) -> int:
        if self.offset + layout.size > len(self.data):
            raise ValueError("the file is cut")
        (value,) = layout.unpack_from(self.data, self.offset)
        self.offset += layout.size
        return value

    def u16(self) -> int:
        return self._take(_U16)

    def u32(self) -> int:
        return self._take(_U32)

    def u64(self) -> int:
        return self._take(_U64)

    def flag(self) -> bool:
        value = self._take(_U8)
        if value > 1:
            raise ValueError(f"impossible tag {value} of an optional value")
        return bool(value)

    def variant(self, names: tuple[str, ...]) -> int:
        value = self.u32()
        if value >= len(names):
            raise ValueError(f"impossible variant {value} (known are {', '.join(names)})")
        return value

    def timestamp_ns(self) -> int:
        seconds, nanoseconds = self.u64(), self.u32()
        if seconds > _LAST_SECOND or nanoseconds >= 1_000_000_000:
            raise ValueError(f"impossible time {seconds}.{nanoseconds:09}")
        return seconds * 1_000_000_000 + nanoseconds

    def string(self) -> str:
        length = self.u64()
        if length > len(self.data) - self.offset:
            raise ValueError("the file is cut inside a string")
        text = self.data[self.offset : self.offset + length].decode()
        self.offset += length
        return text

    def vector(self, item: Callable[[], Value]) -> tuple[Value, ...]:
        count = self.u64()
        if count > len(self.data) - self.offset:
            raise ValueError("the file is cut inside a list")
        return tuple(item() for _ in range(count))

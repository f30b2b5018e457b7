"""pg_control and the CheckPoint struct in it, as bytes and as dataclasses, for Postgres 14 to 18 on 64-bit little-endian.

Invariant: `ControlFile.parse(data).to_bytes() == data` for every valid file whose padding is zero, and nothing is ever
returned from a file whose CRC is wrong.

CheckPoint (88 bytes; also the main data of XLOG_CHECKPOINT_* records): u64 redo; u32 tli, prev_tli; bool full_page_writes;
pad 3; i32 wal_level (17 and later, else padding); u64 nextXid; u32 nextOid, nextMulti, nextMultiOffset, oldestXid,
oldestXidDB, oldestMulti, oldestMultiDB; pad 4; i64 time; u32 oldestCommitTsXid, newestCommitTsXid, oldestActiveXid; pad 4.
"""

import dataclasses
import enum
import struct
from dataclasses import dataclass

import crc32c

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import Lsn

CONTROL_FILE_SIZE = 8192
CHECKPOINT_SIZE = 88
# Postgres major -> PG_CONTROL_VERSION
CONTROL_VERSIONS = {14: 1300, 15: 1300, 16: 1300, 17: 1700, 18: 1800}

_CHECKPOINT = struct.Struct("<QIIB3xiQIIIIIII4xqIII4x")
assert _CHECKPOINT.size == CHECKPOINT_SIZE

# system_identifier .. data_checksum_version: the same offsets in all versions
_HEAD = struct.Struct("<QIIi4xqQ88sQQI4xQQB3xiB3xiiiiiB3xIdIIIIIIIIB3xI")
_NONCE_SIZE = 32
_CRC = struct.Struct("<I")


class DBState(enum.IntEnum):
    """pg_control's `state`."""

    STARTUP = 0
    SHUTDOWNED = 1
    SHUTDOWNED_IN_RECOVERY = 2
    SHUTDOWNING = 3
    IN_CRASH_RECOVERY = 4
    IN_ARCHIVE_RECOVERY = 5
    IN_PRODUCTION = 6


@dataclass(frozen=True, slots=True)
class CheckPoint:
    """A checkpoint. `time` is seconds since 1970; `wal_level` is 0 (and not on disk) before Postgres 17."""

    redo: Lsn
    tli: int
    prev_tli: int
    full_page_writes: bool
    wal_level: int
    next_full_xid: int
    """Epoch in the high 32 bits, xid in the low ones."""
    next_oid: int
    next_multi: int
    next_multi_offset: int
    oldest_xid: int
    oldest_xid_db: int
    oldest_multi: int
    oldest_multi_db: int
    time: int
    oldest_commit_ts_xid: int
    newest_commit_ts_xid: int
    oldest_active_xid: int

    @classmethod
    def parse(cls, data: bytes | memoryview) -> "CheckPoint":
        """Read the first 88 bytes. Raises CorruptionError when there are fewer."""
        if len(data) < CHECKPOINT_SIZE:
            raise CorruptionError(f"a CheckPoint struct has {CHECKPOINT_SIZE} bytes, there are {len(data)}")
        redo, tli, prev_tli, full_page_writes, *rest = _CHECKPOINT.unpack_from(data)
        return cls(Lsn(redo), tli, prev_tli, bool(full_page_writes), *rest)

    def to_bytes(self) -> bytes:
        """The 88 bytes, with zeros as padding."""
        return _CHECKPOINT.pack(*(getattr(self, field.name) for field in dataclasses.fields(self)))


@dataclass(frozen=True, slots=True)
class ControlFile:
    """pg_control. LSN 0 means "none". Use `dataclasses.replace` and `to_bytes` to make another."""

    system_identifier: int
    pg_control_version: int
    catalog_version_no: int
    state: int
    """A DBState number."""
    time: int
    checkpoint_lsn: Lsn
    """Where the last checkpoint record begins."""
    checkpoint: CheckPoint
    unlogged_lsn: Lsn
    min_recovery_point: Lsn
    min_recovery_point_tli: int
    backup_start_point: Lsn
    backup_end_point: Lsn
    backup_end_required: bool
    wal_level: int
    wal_log_hints: bool
    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_xacts: int
    max_locks_per_xact: int
    track_commit_timestamp: bool
    max_align: int
    float_format: float
    blcksz: int
    relseg_size: int
    xlog_blcksz: int
    xlog_seg_size: int
    name_data_len: int
    index_max_keys: int
    toast_max_chunk_size: int
    loblksize: int
    float8_by_val: bool
    data_checksum_version: int
    """0 when data pages have no checksums."""
    default_char_signedness: bool | None
    """Postgres 18 and later, else None."""
    mock_authentication_nonce: bytes

    @classmethod
    def parse(cls, data: bytes | memoryview) -> "ControlFile":
        """Read a pg_control file (8192 bytes, or at least its used part).

        Raises CorruptionError on an unknown version, too few bytes or a wrong CRC.
        """
        view = memoryview(data)
        if len(view) < _HEAD.size:
            raise CorruptionError(f"pg_control has only {len(view)} bytes")
        head = list(_HEAD.unpack_from(view))
        has_signedness = _has_char_signedness(head[1])
        nonce_at = _HEAD.size + has_signedness
        crc_at = _crc_offset(has_signedness)
        if len(view) < crc_at + _CRC.size:
            raise CorruptionError(f"pg_control has only {len(view)} bytes")
        if crc32c.crc32c(bytes(view[:crc_at])) != _CRC.unpack_from(view, crc_at)[0]:
            raise CorruptionError("pg_control has a wrong checksum: restore it from a backup or take a new basebackup")
        head[6] = CheckPoint.parse(head[6])
        for index in _BOOLS:
            head[index] = bool(head[index])
        signedness = bool(view[_HEAD.size]) if has_signedness else None
        return cls(*head, signedness, bytes(view[nonce_at : nonce_at + _NONCE_SIZE]))  # type: ignore[call-arg]

    def to_bytes(self) -> bytes:
        """The whole file, 8192 bytes, with its CRC. Raises CorruptionError on an unknown version."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        signedness, nonce = values[-2:]
        values[6] = self.checkpoint.to_bytes()
        has_signedness = _has_char_signedness(self.pg_control_version)
        if len(nonce) != _NONCE_SIZE or (signedness is None) == has_signedness:
            raise ValueError("the nonce has 32 bytes, and default_char_signedness is there from Postgres 18 on")
        body = _HEAD.pack(*values[:-2]) + (bytes([signedness]) if has_signedness else b"") + nonce
        body += bytes(_crc_offset(has_signedness) - len(body))
        return (body + _CRC.pack(crc32c.crc32c(body))).ljust(CONTROL_FILE_SIZE, b"\0")


_BOOLS = [
    index
    for index, name in enumerate(field.name for field in dataclasses.fields(ControlFile))
    if name in ("backup_end_required", "wal_log_hints", "track_commit_timestamp", "float8_by_val")
]


def _has_char_signedness(version: int) -> bool:
    if version not in CONTROL_VERSIONS.values():
        raise CorruptionError(f"pg_control has version {version}: this is not Postgres 14 to 18, or the file is damaged")
    return version >= 1800


def _crc_offset(has_signedness: bool) -> int:
    return (_HEAD.size + has_signedness + _NONCE_SIZE + 3) & ~3

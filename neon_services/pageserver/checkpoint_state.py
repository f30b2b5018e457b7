"""The checkpoint value: what a compute that starts at an LSN must know (next xid, next oid, ...), kept up to date from WAL.

Layout: Postgres's CheckPoint struct, 88 bytes little-endian, the same offsets in 14 to 18. Two fields mean something else
than in Postgres: ``nextXid`` is rounded up to a multiple of 1024, so that the value changes rarely; ``redo`` is the end of
the record after a shutdown checkpoint and 0 after an online one.
"""

import struct

from neon_services.ground.errors import CorruptionError

CHECKPOINT_BYTES = 88
XID_ROUNDING = 1024
FIRST_NORMAL_XID = 3
_REDO, _WAL_LEVEL, _NEXT_XID, _NEXT_OID, _NEXT_MULTI, _NEXT_MULTI_OFFSET = 0, 20, 24, 32, 36, 40
_OLDEST_XID, _OLDEST_XID_DB, _OLDEST_MULTI, _OLDEST_MULTI_DB, _OLDEST_ACTIVE_XID = 44, 48, 52, 56, 80
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MASK32 = 0xFFFF_FFFF


class CheckpointState:
    """A CheckPoint that follows WAL. ``dirty`` says that it changed since ``take``."""

    def __init__(self, value: bytes) -> None:
        if len(value) != CHECKPOINT_BYTES:
            raise CorruptionError(f"the checkpoint value has {len(value)} bytes instead of {CHECKPOINT_BYTES}")
        self._bytes = bytearray(value)
        self.dirty = False

    def take(self) -> bytes:
        """The value, now considered written."""
        self.dirty = False
        return bytes(self._bytes)

    def _u32(self, offset: int) -> int:
        return _U32.unpack_from(self._bytes, offset)[0]

    def _set_u32(self, offset: int, value: int) -> None:
        if self._u32(offset) != value:
            _U32.pack_into(self._bytes, offset, value)
            self.dirty = True

    @property
    def redo(self) -> int:
        return _U64.unpack_from(self._bytes, _REDO)[0]

    @property
    def next_xid(self) -> int:
        """The next full transaction id: epoch in the high half."""
        return _U64.unpack_from(self._bytes, _NEXT_XID)[0]

    @property
    def next_oid(self) -> int:
        return self._u32(_NEXT_OID)

    @property
    def next_multi(self) -> int:
        return self._u32(_NEXT_MULTI)

    @property
    def next_multi_offset(self) -> int:
        return self._u32(_NEXT_MULTI_OFFSET)

    @property
    def oldest_xid(self) -> int:
        return self._u32(_OLDEST_XID)

    @property
    def oldest_active_xid(self) -> int:
        return self._u32(_OLDEST_ACTIVE_XID)

    def full_xid(self, xid: int) -> int:
        """The 64-bit id of a transaction that is in the past (or at most 2^31 ahead) of the next one."""
        next_xid = self.next_xid
        epoch = next_xid >> 32
        if xid > next_xid & _MASK32 and (xid - next_xid & _MASK32) >= 0x8000_0000:
            epoch -= 1
        elif xid < next_xid & _MASK32 and (xid - next_xid & _MASK32) < 0x8000_0000:
            epoch += 1
        return max(epoch, 0) << 32 | xid

    def saw_xid(self, xid: int) -> None:
        """A record of this transaction: the next one is later."""
        current = self.next_xid
        if xid == 0 or (xid - current & _MASK32) >= 0x8000_0000:
            return
        following = (xid + XID_ROUNDING) // XID_ROUNDING * XID_ROUNDING & _MASK32
        following = max(following, FIRST_NORMAL_XID)
        epoch = current >> 32
        if following < current & _MASK32:
            epoch += 1
        _U64.pack_into(self._bytes, _NEXT_XID, epoch << 32 | following)
        self.dirty = True

    def saw_next_oid(self, next_oid: int) -> None:
        """XLOG_NEXTOID."""
        self._set_u32(_NEXT_OID, next_oid)

    def saw_multixact(self, multi: int, offset: int, members: int, max_member_xid: int) -> None:
        """XLOG_MULTIXACT_CREATE_ID."""
        following = (multi + 1 & _MASK32) or 1
        if (following - self.next_multi & _MASK32) < 0x8000_0000:
            self._set_u32(_NEXT_MULTI, following)
        end = offset + members & _MASK32
        if (end - self.next_multi_offset & _MASK32) < 0x8000_0000:
            self._set_u32(_NEXT_MULTI_OFFSET, end)
        self.saw_xid(max_member_xid)

    def saw_multixact_truncate(self, oldest_multi: int, oldest_multi_db: int) -> None:
        """XLOG_MULTIXACT_TRUNCATE_ID."""
        self._set_u32(_OLDEST_MULTI, oldest_multi)
        self._set_u32(_OLDEST_MULTI_DB, oldest_multi_db)

    def saw_oldest_xid(self, oldest_xid: int, oldest_xid_db: int) -> None:
        """A checkpoint or CLOG_TRUNCATE: applied when it is newer."""
        if (oldest_xid - self.oldest_xid & _MASK32) < 0x8000_0000:
            self._set_u32(_OLDEST_XID, oldest_xid)
            self._set_u32(_OLDEST_XID_DB, oldest_xid_db)

    def saw_running_xacts(self, oldest_running_xid: int) -> None:
        """XLOG_RUNNING_XACTS."""
        self._set_u32(_OLDEST_ACTIVE_XID, oldest_running_xid)

    def saw_wal_level(self, wal_level: int) -> None:
        """XLOG_PARAMETER_CHANGE or XLOG_END_OF_RECOVERY; Postgres 17 and later keep it in the checkpoint."""
        self._set_u32(_WAL_LEVEL, wal_level)

    def saw_checkpoint(self, payload: bytes, *, shutdown: bool, end_lsn: int, oldest_prepared_xid: int | None) -> None:
        """XLOG_CHECKPOINT_SHUTDOWN or _ONLINE. nextXid, nextOid and nextMulti are not taken from it but from records."""
        if len(payload) < CHECKPOINT_BYTES - 4:
            raise CorruptionError(f"a checkpoint record of {len(payload)} bytes")
        self.saw_oldest_xid(_U32.unpack_from(payload, _OLDEST_XID)[0], _U32.unpack_from(payload, _OLDEST_XID_DB)[0])
        active = _U32.unpack_from(payload, _OLDEST_ACTIVE_XID)[0]
        if shutdown and active == 0:
            active = self.next_xid & _MASK32
            if oldest_prepared_xid is not None and (oldest_prepared_xid - active & _MASK32) >= 0x8000_0000:
                active = oldest_prepared_xid
        self._set_u32(_OLDEST_ACTIVE_XID, active)
        _U64.pack_into(self._bytes, _REDO, end_lsn if shutdown else 0)
        self.dirty = True

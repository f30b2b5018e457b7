"""Commit, abort and prepare records.

Main data, little-endian: ``xact_time i64``; with info bit 0x80 ``xinfo u32`` and, by its bits, in this order: database,
subtransactions, relation files to drop, dropped statistics, invalidations (commit only), two-phase xid and gid, origin.
"""

import struct
from dataclasses import dataclass

from neon_services.ground.errors import CorruptionError

COMMIT, PREPARE, ABORT, COMMIT_PREPARED, ABORT_PREPARED = 0x00, 0x10, 0x20, 0x30, 0x40
OPCODE_MASK, HAS_INFO = 0x70, 0x80
_DBINFO, _SUBXACTS, _RELATIONS, _INVALS, _TWOPHASE, _ORIGIN, _GID, _DROPPED_STATS = 1, 2, 4, 8, 16, 32, 128, 256
_BLOCK_ID_ORIGIN, _BLOCK_ID_TOPLEVEL_XID = 253, 252


@dataclass(frozen=True, slots=True)
class XactRecord:
    """A parsed commit or abort record. ``time_us`` counts from 2000-01-01; relations are (tablespace, database, relation)."""

    time_us: int
    subxacts: tuple[int, ...] = ()
    relations: tuple[tuple[int, int, int], ...] = ()
    twophase_xid: int = 0
    origin_lsn: int = 0
    xinfo: int = 0
    db: int = 0
    spc: int = 0


def parse_xact(info: int, main: bytes, pg_major: int) -> XactRecord:
    """Parse the main data of a commit or abort record. Raises CorruptionError when it is cut off."""
    try:
        (time_us,) = struct.unpack_from("<q", main)
        if not info & HAS_INFO:
            return XactRecord(time_us)
        (xinfo,) = struct.unpack_from("<I", main, 8)
        offset = 12
        subxacts: tuple[int, ...] = ()
        relations: tuple[tuple[int, int, int], ...] = ()
        twophase_xid = origin_lsn = 0
        db = spc = 0
        if xinfo & _DBINFO:
            db, spc = struct.unpack_from("<II", main, offset)
            offset += 8
        if xinfo & _SUBXACTS:
            (count,) = struct.unpack_from("<I", main, offset)
            subxacts = struct.unpack_from(f"<{count}I", main, offset + 4)
            offset += 4 + 4 * count
        if xinfo & _RELATIONS:
            (count,) = struct.unpack_from("<I", main, offset)
            flat = struct.unpack_from(f"<{3 * count}I", main, offset + 4)
            relations = tuple(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
            offset += 4 + 12 * count
        if xinfo & _DROPPED_STATS:
            offset += 4 + (16 if pg_major >= 18 else 12) * struct.unpack_from("<I", main, offset)[0]
        if xinfo & _INVALS and info & OPCODE_MASK in (COMMIT, COMMIT_PREPARED):
            offset += 4 + 16 * struct.unpack_from("<I", main, offset)[0]
        if xinfo & _TWOPHASE:
            (twophase_xid,) = struct.unpack_from("<I", main, offset)
            offset += 4
            if xinfo & _GID:
                offset = main.index(b"\0", offset) + 1
        if xinfo & _ORIGIN:
            (origin_lsn,) = struct.unpack_from("<Q", main, offset)
        return XactRecord(time_us, subxacts, relations, twophase_xid, origin_lsn, xinfo, db, spc)
    except (struct.error, ValueError) as error:
        raise CorruptionError(f"a transaction record is malformed: {error}") from error


def drops_relations(info: int, main: bytes) -> bool:
    """Whether a commit or abort record names relations to drop."""
    return bool(info & HAS_INFO and len(main) >= 12 and struct.unpack_from("<I", main, 8)[0] & _RELATIONS)


def record_origin(raw: bytes) -> int:
    """The replication origin in the header of a record without block references; 0 when there is none."""
    offset = 24
    while offset + 3 <= len(raw):
        if raw[offset] == _BLOCK_ID_ORIGIN:
            return int.from_bytes(raw[offset + 1 : offset + 3], "little")
        if raw[offset] != _BLOCK_ID_TOPLEVEL_XID:
            return 0
        offset += 5
    return 0

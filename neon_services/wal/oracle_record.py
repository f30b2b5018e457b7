"""One WAL record in plain Python: block references, main data, and the visibility map pages its redo changes unnamed.

Layouts are those of Postgres 15 to 18, which agree in everything that is read here.
"""

import struct
from dataclasses import dataclass, field

from neon_services.wal.framing import XLR_BLOCK_ID_DATA_LONG, XLR_BLOCK_ID_DATA_SHORT, RecordHeader
from neon_services.wal.records import IMPLIED_BLOCK_ID, REF_DATA, REF_FPI, REF_IMAGE, REF_IMPLIED_VM, REF_WILL_INIT

RM_SMGR, RM_HEAP2, RM_HEAP = 2, 9, 10
XLR_BLOCK_ID_ORIGIN, XLR_BLOCK_ID_TOPLEVEL_XID, XLR_MAX_BLOCK_ID = 253, 252, 32
BKPBLOCK_HAS_IMAGE, BKPBLOCK_HAS_DATA, BKPBLOCK_WILL_INIT, BKPBLOCK_SAME_REL = 0x10, 0x20, 0x40, 0x80
BKPIMAGE_HAS_HOLE, BKPIMAGE_APPLY, BKPIMAGE_COMPRESSED = 0x01, 0x02, 0x1C
MAIN_FORK, VM_FORK = 0, 2
HEAP_BLOCKS_PER_MAP_PAGE = (8192 - 24) * 4
SMGR_TRUNCATE, SMGR_TRUNCATE_VM = 0x20, 2

# (rmid, operation) -> (offset of the flags byte in the main data, length the main data must have)
_CLEARS_BLOCK_0 = {
    (RM_HEAP, 0x00): (2, 3),  # INSERT
    (RM_HEAP, 0x10): (7, 8),  # DELETE
    (RM_HEAP, 0x60): (7, 8),  # LOCK
    (RM_HEAP2, 0x50): (0, 4),  # MULTI_INSERT
    (RM_HEAP2, 0x60): (7, 8),  # LOCK_UPDATED
}
_UPDATES = {(RM_HEAP, 0x20), (RM_HEAP, 0x40)}
_UPDATE_FLAGS_AT, _UPDATE_LENGTH = 7, 14


@dataclass(slots=True)
class ParsedRecord:
    """`refs` are (spc, db, rel, blk, fork, flags, block_id)."""

    main_len: int = 0
    toplevel_xid: int = 0
    refs: list[tuple[int, int, int, int, int, int, int]] = field(default_factory=list)


def _take(raw: bytes, at: int, form: str, what: str) -> tuple:
    size = struct.calcsize(form)
    if at + size > len(raw):
        raise ValueError(what)
    return struct.unpack_from(form, raw, at)


def parse_record(raw: bytes, header: RecordHeader) -> ParsedRecord:
    """Parse a complete record. Raises ValueError with the C decoder's words when its lengths or ids make no sense."""
    parsed = ParsedRecord()
    relation: tuple[int, int, int] | None = None
    at, data = 24, 0
    while len(raw) - at > data:
        block_id = raw[at]
        at += 1
        if block_id == XLR_BLOCK_ID_DATA_SHORT:
            (parsed.main_len,) = _take(raw, at, "<B", "truncated main data header")
            at += 1
            data += parsed.main_len
            break
        if block_id == XLR_BLOCK_ID_DATA_LONG:
            (parsed.main_len,) = _take(raw, at, "<I", "truncated main data header")
            at += 4
            data += parsed.main_len
            break
        if block_id == XLR_BLOCK_ID_ORIGIN:
            _take(raw, at, "<H", "truncated replication origin")
            at += 2
        elif block_id == XLR_BLOCK_ID_TOPLEVEL_XID:
            (parsed.toplevel_xid,) = _take(raw, at, "<I", "truncated top-level transaction id")
            at += 4
        elif block_id > XLR_MAX_BLOCK_ID:
            raise ValueError("unknown block id")
        else:
            if parsed.refs and block_id <= parsed.refs[-1][6]:
                raise ValueError("block ids out of order")
            fork_flags, data_len = _take(raw, at, "<BH", "truncated block header")
            at += 3
            data += data_len
            flags = (fork_flags & BKPBLOCK_HAS_DATA and REF_DATA) | (fork_flags & BKPBLOCK_WILL_INIT and REF_WILL_INIT)
            if fork_flags & BKPBLOCK_HAS_IMAGE:
                image_len, _, image_info = _take(raw, at, "<HHB", "truncated image header")
                at += 5
                if image_info & BKPIMAGE_COMPRESSED and image_info & BKPIMAGE_HAS_HOLE:
                    _take(raw, at, "<H", "truncated image header")
                    at += 2
                data += image_len
                flags |= REF_IMAGE | (image_info & BKPIMAGE_APPLY and REF_FPI)
            if not fork_flags & BKPBLOCK_SAME_REL:
                relation = _take(raw, at, "<III", "truncated block header")
                at += 12
            elif not parsed.refs:
                raise ValueError("the first block refers to the relation of the one before")
            assert relation is not None
            (blk,) = _take(raw, at, "<I", "truncated block header")
            at += 4
            parsed.refs.append((*relation, blk, fork_flags & 15, flags, block_id))
    if len(raw) - at != data:
        raise ValueError("lengths in the headers do not add up")
    _add_implied(parsed, raw[len(raw) - parsed.main_len :], header)
    return parsed


def _add_implied(parsed: ParsedRecord, main: bytes, header: RecordHeader) -> None:
    kind = (header.rmid, header.info & 0x70)
    if header.rmid == RM_SMGR and header.info & 0xF0 == SMGR_TRUNCATE and len(main) >= 20:
        blkno, spc, db, rel, flags = struct.unpack_from("<IIIIi", main)
        if flags & SMGR_TRUNCATE_VM and blkno % HEAP_BLOCKS_PER_MAP_PAGE:
            _imply(parsed, (spc, db, rel), blkno)
        return
    if not parsed.refs:
        return
    relation = parsed.refs[0][:3]
    block_0 = parsed.refs[0][3]
    if kind in _CLEARS_BLOCK_0:
        at, needed = _CLEARS_BLOCK_0[kind]
        if len(main) >= needed and main[at] & 1:
            _imply(parsed, relation, block_0)
    elif kind in _UPDATES and len(main) >= _UPDATE_LENGTH:
        flags = main[_UPDATE_FLAGS_AT]
        old = next((ref[3] for ref in parsed.refs if ref[6] == 1 and ref[4] == MAIN_FORK), block_0)
        if flags & 1:
            _imply(parsed, relation, old)
        if flags & 2:
            _imply(parsed, relation, block_0)


def _imply(parsed: ParsedRecord, relation: tuple[int, int, int], heap_blk: int) -> None:
    map_blk = heap_blk // HEAP_BLOCKS_PER_MAP_PAGE
    if not any(ref[4] == VM_FORK and ref[3] == map_blk for ref in parsed.refs):
        parsed.refs.append((*relation, map_blk, VM_FORK, REF_IMPLIED_VM, IMPLIED_BLOCK_ID))

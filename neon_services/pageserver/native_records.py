"""Functional WAL records: changes that need no Postgres to apply, as Neon stores them.

Layout: Neon's bincode-BE ``NeonWalRecord``: u32 tag, then the fields, all big-endian; a list or option as bincode writes it.
SLRU pages carry no LSN; a clog page that a commit has touched is 8200 bytes: the page and the commit time (i64 big-endian,
microseconds since 2000-01-01), from which timestamps are mapped to LSNs. Visibility map pages get the record's LSN.
"""

import struct
from collections.abc import Sequence

from neon_services.ground.errors import CorruptionError
from neon_services.protocols.page_keys import HEAP_BLOCKS_PER_VM_PAGE, PAGE_SIZE

CLEAR_VISIBILITY_MAP_FLAGS, CLOG_SET_COMMITTED, CLOG_SET_ABORTED, MULTIXACT_OFFSET_CREATE = 1, 2, 3, 4
MULTIXACT_MEMBERS_CREATE, AUX_FILE, TRUNCATE_VISIBILITY_MAP = 5, 6, 7

CLOG_XIDS_PER_PAGE = PAGE_SIZE * 4
OFFSETS_PER_PAGE = PAGE_SIZE // 4
MEMBERS_PER_GROUP, MEMBER_GROUP_BYTES = 4, 20
MEMBERS_PER_PAGE = PAGE_SIZE // MEMBER_GROUP_BYTES * MEMBERS_PER_GROUP
ZERO_PAGE = bytes(PAGE_SIZE)
_PAGE_HEADER = 24
_COMMITTED, _ABORTED = 1, 2


def clog_set_committed(xids: Sequence[int], timestamp_us: int) -> bytes:
    """Mark transactions of one clog page as committed."""
    return struct.pack(f">IQ{len(xids)}Iq", CLOG_SET_COMMITTED, len(xids), *xids, timestamp_us)


def clog_set_aborted(xids: Sequence[int]) -> bytes:
    """Mark transactions of one clog page as aborted."""
    return struct.pack(f">IQ{len(xids)}I", CLOG_SET_ABORTED, len(xids), *xids)


def multixact_offset_create(multixact: int, offset: int) -> bytes:
    """Set where a multixact's members begin."""
    return struct.pack(">III", MULTIXACT_OFFSET_CREATE, multixact, offset)


def multixact_members_create(offset: int, members: Sequence[tuple[int, int]]) -> bytes:
    """Set the (xid, status) members from an offset on; all on one page."""
    flat = [value for member in members for value in member]
    return struct.pack(f">IIQ{len(flat)}I", MULTIXACT_MEMBERS_CREATE, offset, len(members), *flat)


def clear_visibility_map_flags(new_heap_block: int | None, old_heap_block: int | None, flags: int) -> bytes:
    """Clear bits of heap blocks on a visibility map page."""
    options = b"".join(b"\0" if block is None else struct.pack(">BI", 1, block) for block in (new_heap_block, old_heap_block))
    return struct.pack(">I", CLEAR_VISIBILITY_MAP_FLAGS) + options + bytes([flags])


def truncate_visibility_map(first_byte: int, kept_bits: int) -> bytes:
    """Clear the map from ``first_byte`` on, of which the lowest ``kept_bits`` stay."""
    return struct.pack(">IQQ", TRUNCATE_VISIBILITY_MAP, first_byte, kept_bits)


def apply(page: bytes | None, record: bytes, lsn: int, key: int) -> bytes:
    """Apply a record to its page. Raises CorruptionError when there is no page or the record makes no sense."""
    try:
        (tag,) = struct.unpack_from(">I", record)
        if page is None:
            raise CorruptionError(f"functional record {tag} has no page to be applied to")
        if tag in (CLOG_SET_COMMITTED, CLOG_SET_ABORTED):
            return _apply_clog(page, record, tag)
        changed = bytearray(page[:PAGE_SIZE])
        if tag == MULTIXACT_OFFSET_CREATE:
            multixact, offset = struct.unpack_from(">II", record, 4)
            struct.pack_into("<I", changed, multixact % OFFSETS_PER_PAGE * 4, offset)
        elif tag == MULTIXACT_MEMBERS_CREATE:
            _apply_members(changed, record)
        elif tag in (CLEAR_VISIBILITY_MAP_FLAGS, TRUNCATE_VISIBILITY_MAP):
            _apply_visibility_map(changed, record, tag, lsn)
        else:
            raise CorruptionError(f"functional record {tag} is unknown")
        return bytes(changed)
    except (struct.error, IndexError) as error:
        raise CorruptionError(f"functional record {record[:16].hex()} is malformed: {error}") from error


def apply_to_clog(changed: bytearray, xids: Sequence[int], status: int) -> None:
    """Set the status (1 committed, 2 aborted) of transactions on their clog page."""
    for xid in xids:
        at, shift = xid % CLOG_XIDS_PER_PAGE // 4, 2 * (xid % 4)
        changed[at] = changed[at] & ~(3 << shift) | status << shift


def _apply_clog(page: bytes, record: bytes, tag: int) -> bytes:
    (count,) = struct.unpack_from(">Q", record, 4)
    if count > CLOG_XIDS_PER_PAGE:
        raise CorruptionError(f"a clog record of {count} transactions")
    changed = bytearray(page)
    apply_to_clog(changed, struct.unpack_from(f">{count}I", record, 12), _COMMITTED if tag == CLOG_SET_COMMITTED else _ABORTED)
    if tag == CLOG_SET_COMMITTED:
        changed[PAGE_SIZE:] = record[12 + 4 * count : 20 + 4 * count]
    return bytes(changed)


def _apply_members(changed: bytearray, record: bytes) -> None:
    offset, count = struct.unpack_from(">IQ", record, 4)
    if count > MEMBERS_PER_PAGE:
        raise CorruptionError(f"a multixact record of {count} members on one page")
    for number in range(count):
        xid, status = struct.unpack_from(">II", record, 16 + 8 * number)
        member = (offset + number) % MEMBERS_PER_PAGE
        base = member // MEMBERS_PER_GROUP * MEMBER_GROUP_BYTES
        changed[base + member % MEMBERS_PER_GROUP] = status
        struct.pack_into("<I", changed, base + 4 + 4 * (member % MEMBERS_PER_GROUP), xid)


def _apply_visibility_map(changed: bytearray, record: bytes, tag: int, lsn: int) -> None:
    if tag == TRUNCATE_VISIBILITY_MAP:
        first_byte, kept_bits = struct.unpack_from(">QQ", record, 4)
        at = _PAGE_HEADER + first_byte
        changed[at] &= (1 << kept_bits) - 1
        changed[at + 1 :] = bytes(PAGE_SIZE - at - 1)
    else:
        offset, flags, blocks = 4, record[-1], []
        for _ in range(2):
            if record[offset]:
                blocks.append(struct.unpack_from(">I", record, offset + 1)[0])
            offset += 5 if record[offset] else 1
        for block in blocks:
            at = _PAGE_HEADER + block % HEAP_BLOCKS_PER_VM_PAGE // 4
            changed[at] &= ~(flags << 2 * (block % 4)) & 0xFF
    if changed[14] or changed[15]:  # pd_upper: 0 on a page that was never initialised
        struct.pack_into("<II", changed, 0, lsn >> 32, lsn & 0xFFFF_FFFF)

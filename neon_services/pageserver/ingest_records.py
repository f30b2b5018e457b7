"""Records that are not (only) about pages, one handler per resource manager.

Invariant: a handler puts rows at the record's end LSN and changes the tip accordingly; it awaits nothing. What it needs to know
of relations has been prefetched: ``relations_needed`` names them. Layouts are Postgres's, little-endian; page numbers of
SLRUs are 4 bytes up to 16 and 8 bytes from 17 on.
"""

import logging
import struct
from collections.abc import Callable

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import format_lsn
from neon_services.pageserver import ingest_xact, keys, native_records
from neon_services.pageserver.ingest_tip import TipState
from neon_services.pageserver.keys import RelTag
from neon_services.pageserver.native_records import (
    HEAP_BLOCKS_PER_VM_PAGE,
    MEMBERS_PER_PAGE,
    OFFSETS_PER_PAGE,
)
from neon_services.pageserver.relations import forks_of
from neon_services.pageserver.slru import clog_segments_before
from neon_services.pageserver.values import NATIVE
from neon_services.wal import xact
from neon_services.wal.raw_record import (
    CLOG,
    DBASE,
    LOGICAL_MESSAGE,
    MULTIXACT,
    RELMAP,
    REPLORIGIN,
    SMGR,
    STANDBY,
    XACT,
    XLOG,
    Record,
)

log = logging.getLogger(__name__)

_SMGR_CREATE, _SMGR_TRUNCATE = 0x10, 0x20
_TRUNCATE_HEAP, _TRUNCATE_VM, _TRUNCATE_FSM = 1, 2, 4
_FSM_SLOTS_PER_PAGE = 4069
_AUX_PREFIX = b"neon-file:"
_MASK32 = 0xFFFF_FFFF


def is_barrier(record: Record) -> bool:
    """Whether blocks of earlier and of later records must not be handled together with it."""
    if record.rmid == SMGR:
        return record.opcode == _SMGR_TRUNCATE
    if record.rmid == XACT:
        ends = record.opcode not in (xact.PREPARE, 0x50, 0x60)
        return ends and xact.drops_relations(record.info, record.main)
    return record.rmid == DBASE


def relations_needed(record: Record, pg_major: int) -> list[RelTag]:
    """The forks whose sizes the handler of the record looks at."""
    created = created_relation(record)
    if created is not None:
        return [created]
    if record.rmid == SMGR and record.opcode == _SMGR_TRUNCATE:
        _, spc, db, rel, _ = record.unpack("IIIIi")
        return list(forks_of(spc, db, rel))
    if record.rmid == XACT and is_barrier(record):
        relations = xact.parse_xact(record.info, record.main, pg_major).relations
        return [tag for relation in relations for tag in forks_of(*relation)]
    return []


def created_relation(record: Record) -> RelTag | None:
    """The fork that the record says to have made."""
    return _created(record) if record.rmid == SMGR and record.opcode == _SMGR_CREATE else None


def handle(tip: TipState, record: Record) -> None:
    """Carry out one record. CREATE and DROP DATABASE are not here: they read."""
    handler = _HANDLERS.get(record.rmid)
    if handler is not None:
        handler(tip, record)


def _page_number(tip: TipState, record: Record) -> tuple[int, int]:
    """(SLRU page number, bytes it takes) at the front of a record."""
    layout, width = ("q", 8) if tip.pg_major >= 17 else ("i", 4)
    return record.unpack(layout)[0], width


def _xlog(tip: TipState, record: Record) -> None:
    if record.opcode in (0x00, 0x10):  # CHECKPOINT_SHUTDOWN, CHECKPOINT_ONLINE
        tip.checkpoint.saw_checkpoint(
            record.main,
            shutdown=record.opcode == 0x00,
            end_lsn=record.end_lsn,
            oldest_prepared_xid=tip.oldest_prepared_xid(),
        )
    elif record.opcode == 0x30:  # NEXTOID
        tip.checkpoint.saw_next_oid(record.unpack("I")[0])
    elif record.opcode == 0x60 and tip.pg_major >= 17:  # PARAMETER_CHANGE: five limits come first
        tip.checkpoint.saw_wal_level(record.unpack("i", 20)[0] & _MASK32)
    elif record.opcode == 0x90 and tip.pg_major >= 17:  # END_OF_RECOVERY: time and two timeline ids come first
        tip.checkpoint.saw_wal_level(record.unpack("i", 16)[0] & _MASK32)


def _xact(tip: TipState, record: Record) -> None:
    if record.opcode == xact.PREPARE:
        xid = tip.checkpoint.full_xid(record.xid) if tip.pg_major >= 17 else record.xid
        tip.put_prepared(xid, record.main, record.end_lsn)
    elif record.opcode in (
        xact.COMMIT,
        xact.ABORT,
        xact.COMMIT_PREPARED,
        xact.ABORT_PREPARED,
    ):
        parsed = ingest_xact.put_xact(tip, record.info, record.xid, record.main, record.raw, record.end_lsn)
        for relation in parsed.relations:
            for tag in forks_of(*relation):
                tip.drop_relation(tag, record.end_lsn)


def _created(record: Record) -> RelTag:
    spc, db, rel, fork = record.unpack("IIIi")
    if not 0 <= fork <= 3:
        raise CorruptionError(f"the record that ends at {format_lsn(record.end_lsn)} creates relation fork {fork}")
    return RelTag(spc, db, rel, fork)


def _smgr(tip: TipState, record: Record) -> None:
    if record.opcode == _SMGR_CREATE:
        tag = _created(record)
        if tip.is_ours(tag.spc):
            tip.create_relation(tag, record.end_lsn)
    elif record.opcode == _SMGR_TRUNCATE:
        blocks, spc, db, rel, flags = record.unpack("IIIIi")
        if flags & _TRUNCATE_HEAP:
            tip.truncate_relation(RelTag(spc, db, rel, keys.MAIN_FORK), blocks, record.end_lsn)
        if flags & _TRUNCATE_FSM:
            _truncate_fsm(tip, RelTag(spc, db, rel, keys.FSM_FORK), blocks, record.end_lsn)
        if flags & _TRUNCATE_VM:
            # the bits of the last page that stays are cleared by the record itself, as an implied reference
            pages = -(-blocks // HEAP_BLOCKS_PER_VM_PAGE)
            tip.truncate_relation(RelTag(spc, db, rel, keys.VM_FORK), pages, record.end_lsn)


def _truncate_fsm(tip: TipState, tag: RelTag, heap_blocks: int, lsn: int) -> None:
    leaf, slot = divmod(heap_blocks, _FSM_SLOTS_PER_PAGE)
    pages, level_pages = 0, leaf
    for _ in range(3):
        pages += level_pages + 1
        level_pages //= _FSM_SLOTS_PER_PAGE
    pages -= 1
    size = tip.size_of(tag)
    if size is None or size <= pages:
        return
    if slot:
        # the free space map is only a hint: an empty page is right for whatever is left on the last one
        tip.rows.put_zero_page(keys.relation_block(tag, pages), lsn)
        pages += 1
    tip.truncate_relation(tag, pages, lsn)


def _clog(tip: TipState, record: Record) -> None:
    page, width = _page_number(tip, record)
    if record.opcode == 0x00:  # ZEROPAGE
        tip.zero_slru_page(keys.CLOG, page, record.end_lsn)
    elif record.opcode == 0x10:  # TRUNCATE
        oldest_xid, oldest_xid_db = record.unpack("II", width)
        tip.checkpoint.saw_oldest_xid(oldest_xid, oldest_xid_db)
        # never remove the page in use, which a wrapped-around comparison could hit
        current = (tip.checkpoint.next_xid & _MASK32) // native_records.CLOG_XIDS_PER_PAGE // keys.SLRU_PAGES_PER_SEGMENT
        doomed = clog_segments_before(tip.slru_segments(keys.CLOG), page) - {current}
        tip.drop_slru_segments(keys.CLOG, doomed, record.end_lsn)


def _multixact(tip: TipState, record: Record) -> None:
    lsn = record.end_lsn
    if record.opcode in (0x00, 0x10):  # ZERO_OFF_PAGE, ZERO_MEM_PAGE
        kind = keys.MULTIXACT_OFFSETS if record.opcode == 0x00 else keys.MULTIXACT_MEMBERS
        tip.zero_slru_page(kind, _page_number(tip, record)[0], lsn)
    elif record.opcode == 0x20:  # CREATE_ID
        multi, offset, count = record.unpack("IIi")
        flat = record.unpack(f"{2 * max(count, 0)}I", 12)
        members = list(zip(flat[::2], flat[1::2], strict=True))
        page = multi // OFFSETS_PER_PAGE
        tip.ensure_slru_page(keys.MULTIXACT_OFFSETS, page, lsn)
        value = native_records.multixact_offset_create(multi, offset)
        tip.rows.put(keys.slru_page(keys.MULTIXACT_OFFSETS, page), lsn, NATIVE, value)
        at = 0
        while at < len(members):
            start = offset + at & _MASK32
            page, within = divmod(start, MEMBERS_PER_PAGE)
            part = members[at : at + MEMBERS_PER_PAGE - within]
            tip.ensure_slru_page(keys.MULTIXACT_MEMBERS, page, lsn)
            value = native_records.multixact_members_create(start, part)
            tip.rows.put(keys.slru_page(keys.MULTIXACT_MEMBERS, page), lsn, NATIVE, value)
            at += len(part)
        xids = [tip.checkpoint.full_xid(xid) for xid, _ in members]
        tip.checkpoint.saw_multixact(multi, offset, len(members), max(xids, default=0) & _MASK32)
    elif record.opcode == 0x30:  # TRUNCATE_ID
        oldest_db, _, end_offset, start_member, end_member = record.unpack("IIIII")
        tip.checkpoint.saw_multixact_truncate(end_offset, oldest_db)
        per_segment = MEMBERS_PER_PAGE * keys.SLRU_PAGES_PER_SEGMENT
        doomed, segment, end = set(), start_member // per_segment, end_member // per_segment
        while segment != end:
            doomed.add(segment)
            segment = 0 if segment == _MASK32 // per_segment else segment + 1
        tip.drop_slru_segments(keys.MULTIXACT_MEMBERS, doomed, lsn)


def _relmap(tip: TipState, record: Record) -> None:
    if record.opcode == 0x00:
        db, spc, count = record.unpack("IIi")
        content = record.main[12 : 12 + count]
        if len(content) != count:
            raise CorruptionError(f"the relation map record that ends at {format_lsn(record.end_lsn)} is too short")
        if tip.is_ours(spc):
            tip.put_relation_map(spc, db, content, record.end_lsn)


def _standby(tip: TipState, record: Record) -> None:
    if record.opcode == 0x10:  # RUNNING_XACTS
        tip.checkpoint.saw_running_xacts(record.unpack("I", 16)[0])


def _replorigin(tip: TipState, record: Record) -> None:
    if record.opcode == 0x00:  # SET
        remote_lsn, origin = record.unpack("QH")
        tip.rows.put_image(keys.replication_origin(origin), record.end_lsn, remote_lsn.to_bytes(8, "big"))
    elif record.opcode == 0x10:  # DROP
        tip.rows.put_image(keys.replication_origin(record.unpack("H")[0]), record.end_lsn, bytes(8))


def encode_aux_file(path: str, content: bytes) -> bytes:
    """The value of an aux file key: version 1, then path and content, each with its u32 length."""
    name = path.encode()
    return b"\x01" + struct.pack(">I", len(name)) + name + struct.pack(">I", len(content)) + content


def decode_aux_files(value: bytes) -> list[tuple[str, bytes]]:
    """All (path, content) of an aux file value; several only when their hashes collide. Raises CorruptionError."""
    if not value:
        return []
    found, offset = [], 1
    try:
        while offset < len(value):
            (size,) = struct.unpack_from(">I", value, offset)
            path = value[offset + 4 : offset + 4 + size].decode()
            offset += 4 + size
            (size,) = struct.unpack_from(">I", value, offset)
            found.append((path, value[offset + 4 : offset + 4 + size]))
            offset += 4 + size
    except (struct.error, UnicodeDecodeError) as error:
        raise CorruptionError(f"an aux file value is malformed: {error}") from error
    if value[0] != 1 or offset != len(value):
        raise CorruptionError(f"an aux file value is malformed (version {value[0]}, {len(value)} bytes)")
    return found


def _logical_message(tip: TipState, record: Record) -> None:
    _, _, prefix_size, message_size = record.unpack("IIQQ")
    prefix = record.main[24 : 24 + prefix_size].rstrip(b"\0")
    if not prefix.startswith(_AUX_PREFIX):
        return
    content = record.main[24 + prefix_size : 24 + prefix_size + message_size]
    path = prefix.removeprefix(_AUX_PREFIX).decode("utf-8", "replace")
    value = encode_aux_file(path, content) if content else b""
    tip.rows.put_image(keys.aux_file(path), record.end_lsn, value)


_HANDLERS: dict[int, Callable[[TipState, Record], None]] = {
    XLOG: _xlog,
    XACT: _xact,
    SMGR: _smgr,
    CLOG: _clog,
    MULTIXACT: _multixact,
    RELMAP: _relmap,
    STANDBY: _standby,
    REPLORIGIN: _replorigin,
    LOGICAL_MESSAGE: _logical_message,
}

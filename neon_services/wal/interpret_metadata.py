"""Which metadata record a WAL record gives: one Python call for each record that is about more than pages.

Layouts are Postgres's, little-endian; page numbers of SLRUs have 4 bytes up to 16 and 8 bytes from 17 on. Which records there
are, and what they become, is Neon's; what it leaves to the pageserver (the XLOG resource manager) goes there raw. Tablespaces
whose oid has no place in a key are left out: there are no keys for what is in them.
"""

from collections.abc import Callable

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import format_lsn
from neon_services.protocols import interpreted_metadata as md
from neon_services.protocols.page_keys import TABLESPACE_MAX, RelTag
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

_PAGES_PER_SEGMENT = 32
_AUX_PREFIX = b"neon-file:"
_XACT_ENDS = {
    xact.COMMIT: md.Commit,
    xact.ABORT: md.Abort,
    xact.COMMIT_PREPARED: md.CommitPrepared,
    xact.ABORT_PREPARED: md.AbortPrepared,
}


def metadata_of(record: Record) -> md.MetadataRecord | None:
    """What the record says about other things than pages; None when nothing. Raises CorruptionError."""
    handler = _HANDLERS.get(record.rmid)
    return None if handler is None else handler(record)


def copies_database(rmid: int, info: int) -> bool:
    """Whether the record makes a database by copying files, so that its effect depends on all records before."""
    return rmid == DBASE and info & 0xF0 == 0x00


def _xlog(record: Record) -> md.XlogRaw:
    return md.XlogRaw(record.opcode, record.end_lsn, record.main)


def _xact(record: Record) -> md.XactEnd | md.Prepare | None:
    opcode = record.opcode
    if opcode == xact.PREPARE:
        return md.Prepare(record.xid, record.main)
    made = _XACT_ENDS.get(opcode)
    if made is None:
        return None
    parsed = xact.parse_xact(record.info, record.main, record.pg_major)
    return made(
        parsed.twophase_xid or record.xid,
        opcode,
        parsed.time_us,
        parsed.xinfo,
        parsed.db,
        parsed.spc,
        parsed.subxacts,
        tuple(relation for relation in parsed.relations if relation[0] <= TABLESPACE_MAX),
        parsed.origin_lsn,
        xact.record_origin(record.raw),
        record.xid,
        record.end_lsn,
    )


def _smgr(record: Record) -> md.SmgrCreate | md.SmgrTruncate | None:
    if record.opcode == 0x10:
        spc, db, rel, fork = record.unpack("IIIi")
        if not 0 <= fork <= 3:
            raise CorruptionError(f"the record that ends at {format_lsn(record.end_lsn)} creates relation fork {fork}")
        return md.SmgrCreate(RelTag(spc, db, rel, fork)) if spc <= TABLESPACE_MAX else None
    if record.opcode == 0x20:
        truncate = md.SmgrTruncate(*record.unpack("IIIII"))
        return truncate if truncate.spc <= TABLESPACE_MAX else None
    return None


def _page_number(record: Record) -> tuple[int, int]:
    """(SLRU page number, bytes it takes) at the front of a record."""
    width = 8 if record.pg_major >= 17 else 4
    return record.unpack("Q" if width == 8 else "I")[0] & 0xFFFF_FFFF, width


def _clog(record: Record) -> md.ClogZeroPage | md.ClogTruncate | None:
    page, width = _page_number(record)
    if record.opcode == 0x00:
        return md.ClogZeroPage(*divmod(page, _PAGES_PER_SEGMENT))
    return md.ClogTruncate(page, *record.unpack("II", width)) if record.opcode == 0x10 else None


def _dbase(record: Record) -> md.DatabaseCreate | md.DatabaseDrop | None:
    if copies_database(record.rmid, record.info):
        create = md.DatabaseCreate(*record.unpack("IIII"))
        return create if max(create.spc, create.source_spc) <= TABLESPACE_MAX else None
    if record.opcode == (0x20 if record.pg_major >= 15 else 0x10):
        db, count = record.unpack("II")
        spcs = record.unpack(f"{count}I", 8) if count <= len(record.main) else record.unpack("I", len(record.main))
        return md.DatabaseDrop(db, tuple(spc for spc in spcs if spc <= TABLESPACE_MAX))
    return None


def _multixact(record: Record) -> md.MetadataRecord | None:
    if record.opcode in (0x00, 0x10):
        kind = md.OFFSETS_KIND if record.opcode == 0x00 else md.MEMBERS_KIND
        return md.MultiXactZeroPage(kind, *divmod(_page_number(record)[0], _PAGES_PER_SEGMENT))
    if record.opcode == 0x20:
        multixact, offset, count = record.unpack("III")
        flat = record.unpack(f"{2 * min(count, len(record.main))}I", 12)
        return md.MultiXactCreate(multixact, offset, count, tuple(zip(flat[::2], flat[1::2], strict=True)))
    return md.MultiXactTruncate(*record.unpack("IIIII")) if record.opcode == 0x30 else None


def _relmap(record: Record) -> md.RelmapUpdate | None:
    if record.opcode != 0x00:
        return None
    db, spc, count = record.unpack("IIi")
    content = record.main[12:]
    if len(content) != count:
        raise CorruptionError(
            f"the relation map record that ends at {format_lsn(record.end_lsn)} has {len(content)} bytes instead of {count}"
        )
    return md.RelmapUpdate(db, spc, count, content) if spc <= TABLESPACE_MAX else None


def _standby(record: Record) -> md.RunningXacts | None:
    return md.RunningXacts(record.unpack("I", 16)[0]) if record.opcode == 0x10 else None


def _replorigin(record: Record) -> md.ReploriginSet | md.ReploriginDrop | None:
    if record.opcode == 0x00:
        return md.ReploriginSet(*record.unpack("QH"))
    return md.ReploriginDrop(*record.unpack("H")) if record.opcode == 0x10 else None


def _logical_message(record: Record) -> md.LogicalMessagePut | None:
    if record.opcode != 0x00:
        return None
    _, _, prefix_size, message_size = record.unpack("IIQQ")
    prefix = record.main[24 : 24 + prefix_size].rstrip(b"\0")
    if not prefix.startswith(_AUX_PREFIX):
        return None
    content = record.main[24 + prefix_size : 24 + prefix_size + message_size]
    if len(content) != message_size:
        raise CorruptionError(f"the logical message that ends at {format_lsn(record.end_lsn)} is too short")
    return md.LogicalMessagePut(prefix.removeprefix(_AUX_PREFIX).decode("utf-8", "replace"), content)


_HANDLERS: dict[int, Callable[[Record], md.MetadataRecord | None]] = {
    XLOG: _xlog,
    XACT: _xact,
    SMGR: _smgr,
    CLOG: _clog,
    DBASE: _dbase,
    MULTIXACT: _multixact,
    RELMAP: _relmap,
    STANDBY: _standby,
    REPLORIGIN: _replorigin,
    LOGICAL_MESSAGE: _logical_message,
}

"""What WAL says about other things than pages: the ``metadata_record`` of an interpreted WAL record.

Layout: Neon's ``MetadataRecord`` in bincode (see bincode.py): u32 kind, u32 variant within it, the variant's fields as listed
in the classes here, in that order. LSNs are u64, times Postgres microseconds, blocks, xids and oids u32.
"""

from typing import Any, NamedTuple

from neon_services.protocols.bincode import BLOB, I32, I64, TEXT, U8, U16, U32, U64, Cursor, Enum, List, Option, Struct
from neon_services.protocols.page_keys import RelTag

CLOG_KIND, MEMBERS_KIND, OFFSETS_KIND = range(3)  # SlruKind


class ClearVmBits(NamedTuple):
    """A heap record that clears bits of heap blocks in the visibility map (``vm_rel``) without naming the map's pages."""

    new_heap_block: int | None
    old_heap_block: int | None
    vm_rel: RelTag
    flags: int


class NeonClearVmBits(NamedTuple):
    """The same from a record of Neon's own resource manager."""

    new_heap_block: int | None
    old_heap_block: int | None
    vm_rel: RelTag
    flags: int


class SmgrCreate(NamedTuple):
    """A relation fork was made."""

    rel: RelTag


class SmgrTruncate(NamedTuple):
    """A relation keeps its first ``blocks``; ``flags``: 1 heap, 2 visibility map, 4 free space map."""

    blocks: int
    spc: int
    db: int
    rel: int
    flags: int


class DatabaseCreate(NamedTuple):
    """A database was made by copying the files of another one."""

    db: int
    spc: int
    source_db: int
    source_spc: int


class DatabaseDrop(NamedTuple):
    """A database is gone from these tablespaces."""

    db: int
    spcs: tuple[int, ...]


class ClogZeroPage(NamedTuple):
    """A page of transaction status begins; ``page`` counts within the segment."""

    segment: int
    page: int


class ClogTruncate(NamedTuple):
    """Transaction status before ``page`` is gone."""

    page: int
    oldest_xid: int
    oldest_xid_db: int


class XactEnd(NamedTuple):
    """How a transaction ended. ``xid`` is the one that ended; ``record_xid`` the record's, with the record's end ``lsn``."""

    xid: int
    info: int
    time_us: int
    xinfo: int
    db: int
    spc: int
    subxacts: tuple[int, ...]
    relations: tuple[tuple[int, int, int], ...]
    origin_lsn: int
    origin_id: int
    record_xid: int
    lsn: int


class Commit(XactEnd):
    """It committed."""


class Abort(XactEnd):
    """It was rolled back."""


class CommitPrepared(XactEnd):
    """It had been prepared, and committed."""


class AbortPrepared(XactEnd):
    """It had been prepared, and was rolled back."""


class Prepare(NamedTuple):
    """It was prepared; ``data`` is the state file without its checksum."""

    xid: int
    data: bytes


class MultiXactZeroPage(NamedTuple):
    """A page of multixact offsets or members begins; ``kind`` is a SlruKind."""

    kind: int
    segment: int
    page: int


class MultiXactCreate(NamedTuple):
    """A multixact; members are (xid, status)."""

    multixact: int
    offset: int
    member_count: int
    members: tuple[tuple[int, int], ...]


class MultiXactTruncate(NamedTuple):
    """Old multixacts are gone."""

    oldest_db: int
    start_offset: int
    end_offset: int
    start_member: int
    end_member: int


class RelmapUpdate(NamedTuple):
    """pg_filenode.map of a database has ``byte_count`` bytes of new content."""

    db: int
    spc: int
    byte_count: int
    content: bytes


class XlogRaw(NamedTuple):
    """A record of the XLOG resource manager: high half of its info, its end, its main data."""

    info: int
    lsn: int
    main: bytes


class LogicalMessagePut(NamedTuple):
    """A small file was written (empty: deleted)."""

    path: str
    content: bytes


class RunningXacts(NamedTuple):
    """The oldest transaction that runs."""

    oldest_xid: int


class ReploriginSet(NamedTuple):
    """A replication origin has advanced."""

    remote_lsn: int
    origin_id: int


class ReploriginDrop(NamedTuple):
    """A replication origin is gone."""

    origin_id: int


MetadataRecord = (
    ClearVmBits
    | NeonClearVmBits
    | SmgrCreate
    | SmgrTruncate
    | DatabaseCreate
    | DatabaseDrop
    | ClogZeroPage
    | ClogTruncate
    | XactEnd
    | Prepare
    | MultiXactZeroPage
    | MultiXactCreate
    | MultiXactTruncate
    | RelmapUpdate
    | XlogRaw
    | LogicalMessagePut
    | RunningXacts
    | ReploriginSet
    | ReploriginDrop
)

_REL_TAG = Struct(RelTag, U8, U32, U32, U32, order=(3, 0, 1, 2))
_PAIR = Struct(lambda *values: values, U32, U32)
_RELATION = Struct(lambda *values: values, U32, U32, U32)
_CLEAR = (Option(U32), Option(U32), _REL_TAG, U8)
_XACT_END = (U32, U8, I64, U32, U32, U32, List(U32), List(_RELATION), U64, U16, U32, U64)
_LAYOUTS: dict[type, Struct] = {
    ClearVmBits: Struct(ClearVmBits, *_CLEAR),
    NeonClearVmBits: Struct(NeonClearVmBits, *_CLEAR),
    SmgrCreate: Struct(SmgrCreate, _REL_TAG),
    SmgrTruncate: Struct(SmgrTruncate, U32, U32, U32, U32, U32),
    DatabaseCreate: Struct(DatabaseCreate, U32, U32, U32, U32),
    DatabaseDrop: Struct(DatabaseDrop, U32, List(U32)),
    ClogZeroPage: Struct(ClogZeroPage, U32, U32),
    ClogTruncate: Struct(ClogTruncate, U32, U32, U32),
    Commit: Struct(Commit, *_XACT_END),
    Abort: Struct(Abort, *_XACT_END),
    CommitPrepared: Struct(CommitPrepared, *_XACT_END),
    AbortPrepared: Struct(AbortPrepared, *_XACT_END),
    Prepare: Struct(Prepare, U32, BLOB),
    MultiXactZeroPage: Struct(MultiXactZeroPage, U32, U32, U32),
    MultiXactCreate: Struct(MultiXactCreate, U32, U32, U32, List(_PAIR)),
    MultiXactTruncate: Struct(MultiXactTruncate, U32, U32, U32, U32, U32),
    RelmapUpdate: Struct(RelmapUpdate, U32, U32, I32, BLOB),
    XlogRaw: Struct(XlogRaw, U8, U64, BLOB),
    LogicalMessagePut: Struct(LogicalMessagePut, TEXT, BLOB),
    RunningXacts: Struct(RunningXacts, U32),
    ReploriginSet: Struct(ReploriginSet, U64, U16),
    ReploriginDrop: Struct(ReploriginDrop, U16),
}
# the kinds in the order of their numbers, each with its variants in the order of theirs
_KINDS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("Heapam", (ClearVmBits,)),
    ("Neonrmgr", (NeonClearVmBits,)),
    ("Smgr", (SmgrCreate, SmgrTruncate)),
    ("Dbase", (DatabaseCreate, DatabaseDrop)),
    ("Clog", (ClogZeroPage, ClogTruncate)),
    ("Xact", (Commit, Abort, CommitPrepared, AbortPrepared, Prepare)),
    ("MultiXact", (MultiXactZeroPage, MultiXactCreate, MultiXactTruncate)),
    ("Relmap", (RelmapUpdate,)),
    ("Xlog", (XlogRaw,)),
    ("LogicalMessage", (LogicalMessagePut,)),
    ("Standby", (RunningXacts,)),
    ("Replorigin", (ReploriginSet, ReploriginDrop)),
)
_ENUMS = [Enum(name, *((made, _LAYOUTS[made]) for made in made_of)) for name, made_of in _KINDS]
_KIND_OF = {made: number for number, (_, made_of) in enumerate(_KINDS) for made in made_of}


def pack_metadata(record: MetadataRecord) -> bytes:
    """The bincode of a record."""
    kind = _KIND_OF[type(record)]
    out = bytearray(kind.to_bytes(4, "big"))
    _ENUMS[kind].pack(record, out)
    return bytes(out)


def take_metadata(cursor: Cursor) -> Any:
    """Read a record that more may follow. Raises ProtocolViolation."""
    kind = int.from_bytes(cursor.take(4), "big")
    if kind >= len(_ENUMS):
        raise cursor.fail(f"there is no kind {kind} of metadata records")
    return _ENUMS[kind].take(cursor)


def parse_metadata(data: bytes) -> Any:
    """Read a record that must end where the bytes end. Raises ProtocolViolation."""
    cursor = Cursor(data, "metadata record")
    record = take_metadata(cursor)
    cursor.finish()
    return record

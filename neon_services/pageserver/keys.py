"""Neon's key space: which key holds what.

Invariant: a key is Neon's (``field1 u8, field2 u32, field3 u32, field4 u32, field5 u8, field6 u32``), in the compact 128-bit
form of values.py, as its two halves ``(hi, lo)``. Metadata is laid out as Neon does with one difference: the relation
directory is not one value per database (``00|SPC|DB|0|0|1``, rewritten for every new relation) but one sparse key per relation
fork in the range that Neon reserves for its relation directory v2::

    65 | SPC | DB | REL | FORK | 1      b"r" = exists, tombstone = dropped

so that creating a relation costs one small value whatever the number of relations, and the list of a database's relations is a
range scan. A relation fork exists exactly when its size key has a value.
"""

from neon_services.protocols.page_keys import (
    FORK_SUFFIXES,
    FSM_FORK,
    INIT_FORK,
    MAIN_FORK,
    PAGE_SIZE,
    VM_FORK,
    Halves,
    RelTag,
    U64Array,
    block_keys,
    make_key,
    relation_block,
)

__all__ = [
    "FORK_SUFFIXES",
    "FSM_FORK",
    "INIT_FORK",
    "MAIN_FORK",
    "PAGE_SIZE",
    "VM_FORK",
    "Halves",
    "RelTag",
    "U64Array",
    "block_keys",
    "make_key",
    "relation_block",
]

CLOG, MULTIXACT_MEMBERS, MULTIXACT_OFFSETS = range(3)
SLRU_DIRECTORIES = ("pg_xact", "pg_multixact/members", "pg_multixact/offsets")
SLRU_PAGES_PER_SEGMENT = 32
DEFAULT_TABLESPACE, GLOBAL_TABLESPACE = 1663, 1664
SIZE_BLOCK = 0xFFFF_FFFF  # field 6 of the keys that hold the size of a relation or of an SLRU segment
RELATION_EXISTS = b"r"

_RELATION_DIRECTORY_V2 = 0x65
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF

DB_DIRECTORY = make_key(0, 0, 0, 0, 0, 0)
TWOPHASE_DIRECTORY = make_key(2, 0, 0, 0, 0, 0)
CONTROL_FILE = make_key(3, 0, 0, 0, 0, 0)
CHECKPOINT = make_key(3, 0, 0, 0, 0, 1)
AUX_FILES_RANGE = (make_key(0x62, 0, 0, 0, 0, 0), make_key(0x63, 0, 0, 0, 0, 0))
REPLICATION_ORIGINS_RANGE = (make_key(0x63, 0, 0, 0, 0, 0), make_key(0x64, 0, 0, 0, 0, 0))


def relation_map(spc: int, db: int) -> Halves:
    """pg_filenode.map of a database, or of the shared relations: (1664, 0)."""
    return make_key(0, spc, db, 0, 0, 0)


def relation_size(tag: RelTag) -> Halves:
    """The size of a relation fork: u32 little-endian blocks."""
    return make_key(0, tag.spc, tag.db, tag.rel, tag.fork, SIZE_BLOCK)


def relation_exists(tag: RelTag) -> Halves:
    """The entry of a relation fork in the relation directory."""
    return make_key(_RELATION_DIRECTORY_V2, tag.spc, tag.db, tag.rel, tag.fork, 1)


def relation_directory_range(spc: int | None = None, db: int | None = None) -> tuple[Halves, Halves]:
    """The range of the relation directory: of one database, or of all."""
    if spc is None or db is None:
        return make_key(_RELATION_DIRECTORY_V2, 0, 0, 0, 0, 0), make_key(_RELATION_DIRECTORY_V2 + 1, 0, 0, 0, 0, 0)
    first = make_key(_RELATION_DIRECTORY_V2, spc, db, 0, 0, 0)
    return first, (first[0] + 0x100, 0)


def relation_of(hi: int, lo: int) -> RelTag:
    """The relation fork that a block, size or directory key belongs to."""
    return RelTag(hi >> 40 & 0xFFFF, hi >> 8 & 0xFFFF_FFFF, (hi & 0xFF) << 24 | lo >> 40, lo >> 32 & 0xFF)


def slru_directory(kind: int) -> Halves:
    """The segment numbers of an SLRU."""
    return make_key(1, kind, 0, 0, 0, 0)


def slru_block(kind: int, segment: int, block: int) -> Halves:
    """One page of an SLRU; ``block`` counts within the segment."""
    return make_key(1, kind, 1, segment, 0, block)


def slru_page(kind: int, page: int) -> Halves:
    """One page of an SLRU by its number in the whole SLRU."""
    return slru_block(kind, page // SLRU_PAGES_PER_SEGMENT, page % SLRU_PAGES_PER_SEGMENT)


def slru_segment_size(kind: int, segment: int) -> Halves:
    """The size of an SLRU segment: u32 little-endian pages."""
    return make_key(1, kind, 1, segment, 0, SIZE_BLOCK)


def twophase_file(xid: int) -> Halves:
    """The state of a prepared transaction; a full xid from Postgres 17 on."""
    return make_key(2, 0, 0, xid >> 40, xid >> 32 & 0xFF, xid & 0xFFFF_FFFF)


def replication_origin(origin_id: int) -> Halves:
    """The remote LSN of a replication origin: u64 big-endian, 0 = dropped."""
    return make_key(0x63, 0, 0, 0, 0, origin_id)


_AUX_DIRECTORIES = (
    ("pg_logical/mappings/", 0x01, 0x01),
    ("pg_logical/snapshots/", 0x01, 0x02),
    ("pg_logical/replorigin_checkpoint", 0x01, 0x03),
    ("pg_logical/", 0x01, 0xFF),
    ("pg_replslot/", 0x02, 0x01),
    ("pg_stat/", 0x03, 0x01),
    ("", 0xFF, 0xFF),
)


def fnv1a_128(data: bytes) -> int:
    """The 128-bit FNV-1a hash."""
    value = 0x6C62_272E_07BB_0142_62B8_2175_6295_C58D
    for byte in data:
        value = (value ^ byte) * 0x0000_0000_0100_0000_0000_0000_0000_013B & (1 << 128) - 1
    return value


def aux_file(path: str) -> Halves:
    """The key of a small file outside of relations and SLRUs: directory code, then the low 13 bytes of the path's hash."""
    prefix, first, second = next(entry for entry in _AUX_DIRECTORIES if path.startswith(entry[0]))
    rest = path.removeprefix(prefix) if prefix else path
    value = 0x62 << 120 | first << 112 | second << 104 | fnv1a_128(rest.encode()) & (1 << 104) - 1
    return value >> 64, value & _MASK64

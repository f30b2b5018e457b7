"""Which catalog pages travel with the basebackup of a compute (``--skeleton``): those that a first connection reads.

Measured on Postgres 15: a backend that starts without pg_internal.init and runs ``SELECT 1`` reads about 75 pages of its
database and a dozen shared ones: the beginnings of pg_class, pg_attribute and pg_index (rows of the system catalogs come first)
and the indexes on them. The table below names them by catalog oid; a mapped catalog's file is looked up in the database's
pg_filenode.map, any other catalog has its oid as file number until it is rewritten. A wrong guess costs one page read later.
"""

import struct

from neon_services.ground.errors import CorruptionError
from neon_services.pageserver import keys
from neon_services.pageserver.keys import RelTag
from neon_services.pageserver.relations import Relations
from neon_services.pageserver.timeline import Timeline

DATABASES_MAX = 4
_TEMPLATE1, _TEMPLATE0 = 1, 4  # oids of the template databases: nobody connects there
_MAP_MAGIC = 0x592717

# catalog oid -> blocks from the front
_SHARED = {
    1260: 2,  # pg_authid
    1261: 1,  # pg_auth_members
    1262: 2,  # pg_database
    2671: 2,  # pg_database_datname_index
    2672: 2,  # pg_database_oid_index
    2676: 2,  # pg_authid_rolname_index
    2677: 2,  # pg_authid_oid_index
    2694: 2,  # pg_auth_members_role_member_index
    2695: 2,  # pg_auth_members_member_role_index
    2964: 1,  # pg_db_role_setting
    2965: 2,  # pg_db_role_setting_databaseid_rol_index
}
_LOCAL = {
    1247: 4,  # pg_type
    1249: 32,  # pg_attribute
    1259: 12,  # pg_class
    2601: 1,  # pg_am
    2603: 6,  # pg_amproc
    2610: 5,  # pg_index
    2615: 1,  # pg_namespace
    2616: 3,  # pg_opclass
    2655: 6,  # pg_amproc_fam_proc_index
    2659: 10,  # pg_attribute_relid_attnum_index
    2662: 4,  # pg_class_oid_index
    2679: 3,  # pg_index_indexrelid_index
    2684: 2,  # pg_namespace_nspname_index
    2685: 2,  # pg_namespace_oid_index
    2687: 3,  # pg_opclass_oid_index
    2703: 4,  # pg_type_oid_index
}


def parse_relation_map(content: bytes) -> dict[int, int]:
    """Catalog oid -> file number, from pg_filenode.map. Raises CorruptionError."""
    if len(content) < 8:
        raise CorruptionError(f"a relation map of {len(content)} bytes")
    magic, count = struct.unpack_from("<ii", content)
    if magic != _MAP_MAGIC or not 0 <= count <= (len(content) - 8) // 8:
        raise CorruptionError(f"a relation map with magic {magic:#x} and {count} entries")
    return dict(struct.iter_unpack("<II", content[8 : 8 + 8 * count]))


async def catalog_pages(timeline: Timeline, lsn: int, sizes: dict[RelTag, int]) -> bytes:
    """The content of ``neon.catalog_pages``: ``{u32 spc, db, rel, fork, blk; 8192 bytes}`` repeated, little-endian."""
    databases = await Relations.of(timeline).databases(lsn)
    own = sorted(db for (spc, db), mapped in databases.items() if spc == keys.DEFAULT_TABLESPACE and mapped)
    wanted: list[tuple[RelTag, int]] = []
    chosen = [(keys.GLOBAL_TABLESPACE, 0, _SHARED)]
    chosen += [(keys.DEFAULT_TABLESPACE, db, _LOCAL) for db in own if db not in (_TEMPLATE1, _TEMPLATE0)][:DATABASES_MAX]
    for spc, db, catalogs in chosen:
        files = parse_relation_map(await timeline.get(*keys.relation_map(spc, db), lsn))
        for oid, blocks in catalogs.items():
            tag = RelTag(spc, db, files.get(oid, oid), keys.MAIN_FORK)
            wanted += [(tag, block) for block in range(min(blocks, sizes.get(tag, 0)))]
    halves = [keys.relation_block(tag, block) for tag, block in wanted]
    pages = await timeline.get_many([hi for hi, _ in halves], [lo for _, lo in halves], lsn)
    parts = []
    for (tag, block), page in zip(wanted, pages, strict=True):
        if isinstance(page, Exception):
            raise page
        parts += [struct.pack("<5I", *tag, block), page]
    return b"".join(parts)

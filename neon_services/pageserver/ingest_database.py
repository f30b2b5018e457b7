"""CREATE and DROP DATABASE: the records whose effect depends on what the timeline already holds.

Invariant: all records before have been handed to the timeline, so a read at its last record is the state that Postgres copied.
"""

import struct

import numpy as np

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import format_lsn
from neon_services.pageserver import keys
from neon_services.pageserver.ingest_tip import TipState
from neon_services.pageserver.keys import RelTag
from neon_services.pageserver.relations import Relations
from neon_services.pageserver.timeline import Timeline
from neon_services.wal.raw_record import Record

_CREATE_FILE_COPY, _CREATE_WAL_LOG, _DROP = 0x00, 0x10, 0x20
_DROP_BEFORE_15 = 0x10
COPY_BATCH_PAGES = 1024


async def handle_database(tip: TipState, timeline: Timeline, record: Record) -> None:
    """Carry out one record of the database resource manager."""
    try:
        if record.opcode == _CREATE_FILE_COPY:
            db, spc, source_db, source_spc = struct.unpack_from("<IIII", record.main)
            if tip.is_ours(spc) and tip.is_ours(source_spc):
                await _copy(tip, timeline, (spc, db), (source_spc, source_db), record.end_lsn)
        elif record.opcode == (_DROP if tip.pg_major >= 15 else _DROP_BEFORE_15):
            db, count = struct.unpack_from("<Ii", record.main)
            for spc in struct.unpack_from(f"<{count}I", record.main, 8):
                await _drop(tip, timeline, spc, db, record.end_lsn)
        elif record.opcode == _CREATE_WAL_LOG and tip.pg_major >= 15:
            db, spc = struct.unpack_from("<II", record.main)
            if tip.is_ours(spc):
                tip.register_database(spc, db, record.end_lsn)
    except struct.error as error:
        raise CorruptionError(f"the database record that ends at {format_lsn(record.end_lsn)} is too short: {error}") from error


async def _drop(tip: TipState, timeline: Timeline, spc: int, db: int, lsn: int) -> None:
    # what the timeline lists is complete: relations made earlier in this batch have been handed over
    tags = await Relations.of(timeline).list_relations(timeline.last_record_lsn, spc, db)
    await tip.prefetch(tags)
    tip.drop_database(spc, db, tags, lsn)


async def _copy(tip: TipState, timeline: Timeline, target: tuple[int, int], source: tuple[int, int], lsn: int) -> None:
    """Every page of the new database is that of the source at the end of the previous record."""
    read_lsn = timeline.last_record_lsn
    relations = await Relations.of(timeline).relation_sizes(read_lsn, *source)
    if tip.databases.get(source):
        tip.put_relation_map(*target, await timeline.get(*keys.relation_map(*source), read_lsn), lsn)
    else:
        tip.register_database(*target, lsn)
    copies = {tag: RelTag(*target, tag.rel, tag.fork) for tag in relations}
    await tip.prefetch(copies.values())
    for tag, blocks in relations.items():
        copy = copies[tag]
        tip.create_relation(copy, lsn)
        if blocks:
            tip.set_size(copy, blocks, lsn)
        for first in range(0, blocks, COPY_BATCH_PAGES):
            numbers = np.arange(first, min(first + COPY_BATCH_PAGES, blocks), dtype=np.uint64)
            await _copy_pages(tip, timeline, tag, copy, numbers, read_lsn, lsn)


async def _copy_pages(
    tip: TipState, timeline: Timeline, tag: RelTag, copy: RelTag, numbers: np.ndarray, read_lsn: int, lsn: int
) -> None:
    def columns(of: RelTag) -> tuple[np.ndarray, np.ndarray]:
        spc, db, rel, fork = (np.full(len(numbers), field, np.uint64) for field in of)
        return keys.block_keys(spc, db, rel, fork, numbers)

    pages = await timeline.get_many(*columns(tag), read_lsn)
    for page in pages:
        if isinstance(page, Exception):
            raise page
    offset = tip.rows.add_data(b"".join(pages))
    hi, lo = columns(copy)
    tip.rows.put_columns(
        hi,
        lo,
        np.full(len(numbers), lsn, np.uint64),
        0,
        np.uint64(offset) + np.arange(len(numbers), dtype=np.uint64) * np.uint64(keys.PAGE_SIZE),
        keys.PAGE_SIZE,
    )

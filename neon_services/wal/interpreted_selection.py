"""What one shard gets of interpreted WAL: Neon's filter, on columns.

Invariant: a shard gets the bytes of exactly the pages that it holds. Shard 0 gets every record, as it must know where each
one ends, and every page of the others as an observed key, for the sizes of relations; other shards get the records in which
there is something for them. Metadata records go to all, but for visibility maps (to whom the map's page
belongs) and small files (shard 0).
"""

from dataclasses import dataclass

import numpy as np

from neon_services.protocols.interpreted_metadata import pack_metadata
from neon_services.protocols.page_keys import HEAP_BLOCKS_PER_VM_PAGE, PAGE_SIZE, VM_FORK, U64Array
from neon_services.protocols.sharding import ShardIdentity
from neon_services.wal.interpret import BoolArray, I64Array, InterpretedBatch

IMAGE_HEADER_BYTES = 12  # u32 0, u64 length
RECORD_HEADER_BYTES = 17  # u32 1, u32 0, u8 will_init, u64 length


@dataclass(frozen=True, slots=True)
class Selection:
    """Records and their entries in columns; an entry is a value with bytes or an observed key."""

    # one row per record
    end_lsn: U64Array
    xid: U64Array
    flush_uncommitted: BoolArray
    metadata: I64Array  #: offset in the data
    metadata_bytes: I64Array  #: -1: none
    raw_bytes: I64Array  #: of all values
    value_count: I64Array
    # one row per entry
    record: I64Array  #: number of its row above, ascending
    hi: U64Array
    lo: U64Array
    has_bytes: BoolArray
    will_init: BoolArray
    is_image: BoolArray
    raw_offset: I64Array  #: of the value among those of its record
    value_bytes: I64Array  #: with the value's own header
    body: I64Array  #: offset in the data
    data: bytes


def select(batch: InterpretedBatch, shard: ShardIdentity) -> Selection:
    """What the shard gets of a batch."""
    values = batch.values
    count = len(batch.end_lsn)
    local = shard.holds_blocks(values.rel, values.fork, values.block)
    metadata, metadata_bytes, data = _metadata_for(batch, shard)
    if shard.is_zero:
        kept = np.ones(count, bool)
        rows = np.arange(len(local)) if len(local) else np.empty(0, np.int64)
    else:
        kept = (metadata_bytes >= 0) | batch.flush_uncommitted
        kept[values.record[local]] = True
        rows = np.flatnonzero(local)
    renumbered = np.cumsum(kept) - 1
    record, has_bytes = renumbered[values.record[rows]], local[rows]
    is_image = values.is_image[rows]
    value_bytes = np.where(is_image, IMAGE_HEADER_BYTES + PAGE_SIZE, RECORD_HEADER_BYTES + values.length[rows])
    value_bytes[~has_bytes] = 0
    records = int(renumbered[-1]) + 1 if count else 0
    raw_bytes = _sum_by(record, value_bytes, records)
    before = np.cumsum(value_bytes) - value_bytes
    return Selection(
        end_lsn=batch.end_lsn[kept],
        xid=batch.xid[kept].astype(np.uint64),
        flush_uncommitted=batch.flush_uncommitted[kept],
        metadata=metadata[kept],
        metadata_bytes=metadata_bytes[kept],
        raw_bytes=raw_bytes,
        value_count=_sum_by(record, has_bytes, records),
        record=record,
        hi=values.hi[rows],
        lo=values.lo[rows],
        has_bytes=has_bytes,
        will_init=values.will_init[rows],
        is_image=is_image,
        raw_offset=before - (np.cumsum(raw_bytes) - raw_bytes)[record],
        value_bytes=value_bytes,
        body=values.offset[rows],
        data=data,
    )


def _sum_by(group: I64Array, amounts: np.ndarray, groups: int) -> I64Array:
    return np.bincount(group, amounts, groups).astype(np.int64)  # sums stay far below 2**53


def _metadata_for(batch: InterpretedBatch, shard: ShardIdentity) -> tuple[I64Array, I64Array, bytes]:
    own = _clears_for(batch, shard)
    if shard.is_zero:
        own += batch.for_shard_zero
    if not own:
        return batch.metadata_offset, batch.metadata_length, batch.data
    offset, length = batch.metadata_offset.copy(), batch.metadata_length.copy()
    at = len(batch.data)
    for record, packed in own:
        offset[record], length[record] = at, len(packed)
        at += len(packed)
    return offset, length, b"".join((batch.data, *(packed for _, packed in own)))


def _clears_for(batch: InterpretedBatch, shard: ShardIdentity) -> list[tuple[int, bytes]]:
    if shard.is_only_one:
        return [(record, packed) for record, _, packed in batch.clears]
    relations = np.array([cleared.vm_rel.rel for _, cleared, _ in batch.clears], np.uint32)
    forks = np.full(len(relations), VM_FORK, np.uint8)

    def held(heap_blocks: list[int | None]) -> list[bool]:
        pages = np.array([(block or 0) // HEAP_BLOCKS_PER_VM_PAGE for block in heap_blocks], np.uint32)
        return shard.holds_blocks(relations, forks, pages).tolist()

    new_held = held([cleared.new_heap_block for _, cleared, _ in batch.clears])
    old_held = held([cleared.old_heap_block for _, cleared, _ in batch.clears])
    found = []
    for (record, cleared, packed), new_is, old_is in zip(batch.clears, new_held, old_held, strict=True):
        new = cleared.new_heap_block if new_is else None
        old = cleared.old_heap_block if old_is else None
        if (new, old) == (cleared.new_heap_block, cleared.old_heap_block):
            found.append((record, packed))
        elif new is not None or old is not None:
            found.append((record, pack_metadata(cleared._replace(new_heap_block=new, old_heap_block=old))))
    return found

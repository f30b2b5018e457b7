"""The block references of a batch of WAL, in bulk: rows for the pages, growth of the relations.

Invariant: whenever a relation grows, every new block gets a base at that LSN: the record that initialises it or, for blocks in
the gap and for a record that initialises nothing (visibility map), a page of zeros. So a page's history never reaches behind a
truncation or a drop: what was cut off has no base that a later read could find first.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import format_lsn
from neon_services.pageserver import keys
from neon_services.pageserver.ingest_tip import TipState
from neon_services.pageserver.keys import RelTag
from neon_services.pageserver.values import IMAGE, WAL, WAL_INIT, IndexArray, U64Array, expand_ranges
from neon_services.wal.records import REF_FPI, REF_IMPLIED_VM, REF_WILL_INIT, WalBatch

GAP_BLOCKS_MAX = 1 << 22  # 32 GiB: a larger jump is a damaged record, not a relation that grows
_SHIFT = np.uint64(33)  # a block number and 1 fit below
_MASK = np.uint64((1 << 33) - 1)


@dataclass(slots=True)
class BlockRefs:
    """The references of a batch, grouped by relation fork."""

    tags: list[RelTag]  #: the distinct forks
    numbers: dict[RelTag, int]  #: their places in ``tags``
    group: IndexArray  #: per reference the number of its fork
    ours: npt.NDArray[np.bool_]  #: per fork: its tablespace is stored


def group_refs(tip: TipState, refs: np.ndarray) -> BlockRefs:
    """Find the distinct relation forks of a batch's references."""
    if not len(refs):
        return BlockRefs([], {}, np.empty(0, np.int64), np.empty(0, bool))
    place = refs["spc"].astype(np.uint64) << np.uint64(32) | refs["db"]
    packed = refs["rel"].astype(np.uint64) << np.uint64(2) | (refs["fork"] & np.uint8(3))
    if (place != place[0]).any():
        _, place_number = np.unique(place, return_inverse=True)
        packed |= place_number.astype(np.uint64) << np.uint64(34)
    _, first, group = np.unique(packed, return_index=True, return_inverse=True)
    rows = refs[first]
    columns = (rows[name].tolist() for name in ("spc", "db", "rel", "fork"))
    tags = [RelTag(*fields) for fields in zip(*columns, strict=True)]
    numbers = {tag: number for number, tag in enumerate(tags)}
    return BlockRefs(tags, numbers, group, np.array([tip.is_ours(tag.spc) for tag in tags], bool))


def put_blocks(tip: TipState, batch: WalBatch, blocks: BlockRefs, first: int, last: int) -> None:
    """Put the rows of the references ``[first, last)``; the forks must be prefetched."""
    if first == last:
        return
    refs, group = batch.refs[first:last], blocks.group[first:last]
    if not blocks.ours.all():
        kept = blocks.ours[group]
        refs, group = refs[kept], group[kept]
        if not len(refs):
            return
    implied = (refs["flags"] & REF_IMPLIED_VM) != 0
    sizes = np.zeros(len(blocks.tags), np.uint64)
    present = np.bincount(group, minlength=len(sizes)) > 0
    absent: list[int] = []
    for number in np.flatnonzero(present).tolist():
        size = tip.size_of(blocks.tags[number])
        if size is None:
            absent.append(number)
        else:
            sizes[number] = size
    for number in absent:
        explicit = np.flatnonzero((group == number) & ~implied)
        if len(explicit):
            tip.create_relation(blocks.tags[number], int(refs["end_lsn"][explicit[0]]))

    beyond = refs["blk"] >= sizes[group]
    growing = np.flatnonzero(beyond & ~implied)
    growth = _grow(tip, blocks.tags, refs, group, growing, sizes) if len(growing) else None
    lost = np.flatnonzero(beyond & implied)
    if len(lost):
        keep = np.ones(len(refs), bool)
        keep[lost] = [_exists_by_then(growth, int(group[row]), row, int(refs["blk"][row])) for row in lost.tolist()]
        refs, group, implied = refs[keep], group[keep], implied[keep]
    _put_page_rows(tip, batch, refs, implied)


def _put_page_rows(tip: TipState, batch: WalBatch, refs: np.ndarray, implied: npt.NDArray[np.bool_]) -> None:
    hi, lo = keys.block_keys(refs["spc"], refs["db"], refs["rel"], refs["fork"], refs["blk"])
    initialises = ((refs["flags"] & (REF_WILL_INIT | REF_FPI)) != 0) & ~implied
    records = batch.records[refs["rec"]]
    tip.rows.put_columns(
        hi,
        lo,
        refs["end_lsn"].astype(np.uint64),
        np.where(initialises, np.uint8(WAL_INIT), np.uint8(WAL)),
        records["blob_off"].astype(np.uint64),
        (records["tot_len"] + np.uint32(15)) & np.uint32(0xFFFF_FFF8),  # [u64 end_lsn][record] padded to 8
    )


@dataclass(slots=True)
class _Growth:
    row: IndexArray  # numbers of the references that made a relation larger, by relation, in WAL order
    group: IndexArray
    blocks: U64Array  # the size they made


def _grow(tip: TipState, tags: list[RelTag], refs: np.ndarray, group: IndexArray, rows: IndexArray, sizes: U64Array) -> _Growth:
    """Sizes after each reference by a running maximum per relation; puts sizes and zero pages."""
    rows = rows[np.argsort(group[rows], kind="stable")]
    owner = group[rows]
    packed = owner.astype(np.uint64) << _SHIFT
    wanted = packed | (refs["blk"][rows].astype(np.uint64) + np.uint64(1))
    running = np.maximum.accumulate(wanted)
    before = np.empty_like(running)
    before[1:] = running[:-1]
    starts = np.ones(len(rows), bool)
    starts[1:] = owner[1:] != owner[:-1]
    before[starts] = packed[starts] | sizes[owner[starts]]
    grows = wanted > before
    rows, owner = rows[grows], owner[grows]
    old, new = (before[grows] & _MASK).astype(np.int64), (wanted[grows] & _MASK).astype(np.int64)
    growing = refs[rows]
    lsn = growing["end_lsn"].astype(np.uint64)

    initialises = (growing["flags"] & (REF_WILL_INIT | REF_FPI)) != 0
    zero_until = new - initialises
    if int((zero_until - old).sum()) > GAP_BLOCKS_MAX:
        worst = int(np.argmax(zero_until - old))
        raise CorruptionError(
            f"the record that ends at {format_lsn(int(lsn[worst]))} extends relation {tags[int(owner[worst])]} from "
            f"{old[worst]} to {new[worst]} blocks: a gap this large means damaged WAL"
        )
    zero_of, zero_block = expand_ranges(old, zero_until)
    if len(zero_of):
        fresh = growing[zero_of]
        tip.rows.put_zero_pages(
            *keys.block_keys(fresh["spc"], fresh["db"], fresh["rel"], fresh["fork"], zero_block), lsn[zero_of]
        )
    at = tip.rows.add_data(new.astype("<u4").tobytes())
    size_hi, size_lo = keys.block_keys(
        growing["spc"], growing["db"], growing["rel"], growing["fork"], np.full(len(new), keys.SIZE_BLOCK, np.uint64)
    )
    tip.rows.put_columns(size_hi, size_lo, lsn, IMAGE, np.uint64(at) + np.arange(len(new), dtype=np.uint64) * np.uint64(4), 4)
    last = np.flatnonzero(np.append(owner[1:] != owner[:-1], True))
    for number, blocks, end_lsn in zip(owner[last].tolist(), new[last].tolist(), lsn[last].tolist(), strict=True):
        tip.size_was_put(tags[number], blocks, end_lsn)
    return _Growth(rows, owner, new.astype(np.uint64))


def _exists_by_then(growth: _Growth | None, group: int, row: int, block: int) -> bool:
    """Whether a block beyond the old size exists when the reference ``row`` is reached."""
    if growth is None:
        return False
    grown = (growth.group == group) & (growth.row < row) & (growth.blocks > np.uint64(block))
    return bool(grown.any())

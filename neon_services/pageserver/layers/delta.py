"""Delta layers: every value of a key range in an LSN range. A flush writes one from a frozen in-memory layer."""

from pathlib import Path

import numpy as np

from neon_services.ground.ids import TimelineId
from neon_services.pageserver.layers.format import LayerWriter
from neon_services.pageserver.layers.in_memory import InMemoryLayer
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.values import IndexArray, U32Array, U64Array

_ROWS_PER_PASS = 65536


def write_level0(
    layer: InMemoryLayer, directory: Path, generation: int, shard: TenantShardId, timeline_id: TimelineId, *, sync: bool = True
) -> tuple[LayerName, int]:
    """Write a frozen layer as one L0 delta file, in one pass over its rows sorted by (key, lsn). Returns name and size.

    Bytes that several rows share are written once per pass of 65,536 rows, at the place of the first row that uses them.
    Blocking; runs in a thread, since a frozen layer does not change.
    """
    assert layer.end_lsn is not None
    name = LayerName.level0(layer.start_lsn, layer.end_lsn)
    writer = LayerWriter(directory, name, generation, shard, timeline_id, sync=sync)
    try:
        key_hi, key_lo, lsn, kind, position, length = layer.sorted_rows()
        for begin in range(0, len(lsn), _ROWS_PER_PASS):
            rows = slice(begin, begin + _ROWS_PER_PASS)
            first, value = _distinct(position[rows], length[rows])
            by_first_use = np.argsort(first)
            number = np.empty(len(first), np.int64)
            number[by_first_use] = np.arange(len(first))
            used = first[by_first_use] + begin
            sizes = length[used]
            slices = [layer.slice_at(at, size) for at, size in zip(position[used].tolist(), sizes.tolist(), strict=True)]
            writer.add(key_hi[rows], key_lo[rows], lsn[rows], kind[rows], number[value], slices, sizes)
        return name, writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _distinct(position: U64Array, length: U32Array) -> tuple[IndexArray, IndexArray]:
    """The first row of each distinct slice, and for every row the number of its slice."""
    order = np.lexsort((length, position))
    at, size = position[order], length[order]
    new = np.ones(len(order), bool)
    new[1:] = (at[1:] != at[:-1]) | (size[1:] != size[:-1])
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(new) - 1
    return order[new], number

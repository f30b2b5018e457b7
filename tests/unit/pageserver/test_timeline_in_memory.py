"""Ingest and reads of a timeline whose values are all in memory."""

import asyncio
import random
from collections.abc import Sequence

import numpy as np
import pytest

from neon_services.pageserver.layers.in_memory import InMemoryLayer
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.timeline import LsnTimeout, in_memory_timeline
from neon_services.pageserver.values import IMAGE, NATIVE, TOMBSTONE, WAL, WAL_INIT, MissingKey, ValueBatch
from neon_services.wal.redo import RedoRequest, RedoResult, RedoStatus


class ConcatenatingRedo:
    """Stands in for the redo helper: a page is its base plus the records."""

    def __init__(self) -> None:
        self.pages = 0

    async def apply(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        self.pages += len(requests)
        return [RedoResult(RedoStatus.OK, (r.base or b"") + r.entries) for r in requests]


def concatenate(page: bytes | None, record: bytes, lsn: int, key: int) -> bytes:
    return (page or b"") + record


def timeline_with(rows: list[tuple[int, int, int, int, bytes]], redo: ConcatenatingRedo | None = None):
    timeline = in_memory_timeline(15, 10, reconstructor=Reconstructor(redo or ConcatenatingRedo(), concatenate))
    for row in rows:
        timeline.ingest(ValueBatch.build([row]), row[2], 0)
    return timeline


async def test_read_sees_records_that_end_at_or_before_its_lsn():
    redo = ConcatenatingRedo()
    rows = [
        (1, 2, 10, IMAGE, b"base"),
        (1, 2, 20, WAL, b"+a"),
        (1, 2, 30, NATIVE, b"+b"),
        (1, 2, 40, WAL_INIT, b"new"),
        (1, 2, 50, TOMBSTONE, b""),
    ]
    timeline = timeline_with(rows, redo)
    assert await timeline.get(1, 2, 19) == b"base"
    assert redo.pages == 0, "an image needs no redo"
    assert await timeline.get(1, 2, 20) == b"base+a"
    assert await timeline.get(1, 2, 39) == b"base+a+b"
    assert await timeline.get(1, 2, 40) == b"new"
    with pytest.raises(MissingKey):
        await timeline.get(1, 2, 50)
    with pytest.raises(MissingKey):
        await timeline.get(1, 2, 9)
    with pytest.raises(MissingKey):
        await timeline.get(2, 1, 50)


async def test_record_without_base_is_missing_not_garbage():
    timeline = timeline_with([(1, 2, 20, WAL, b"+a")])
    with pytest.raises(MissingKey, match="needs a page image"):
        await timeline.get(1, 2, 20)


async def test_later_row_of_one_lsn_wins():
    timeline = timeline_with([(1, 2, 20, IMAGE, b"first"), (1, 2, 20, IMAGE, b"second")])
    assert await timeline.get(1, 2, 20) == b"second"


async def test_branch_reads_its_ancestor_up_to_the_branch_point_except_aux_files():
    aux = 0x62 << 56
    parent = timeline_with(
        [(1, 1, 10, IMAGE, b"old"), (aux, 1, 10, IMAGE, b"slot"), (1, 2, 20, IMAGE, b"x"), (1, 1, 30, IMAGE, b"later")]
    )
    child = in_memory_timeline(15, 10, ancestor=parent, ancestor_lsn=20, reconstructor=Reconstructor())
    child.ingest(ValueBatch.build([(1, 2, 40, IMAGE, b"mine"), (1, 3, 40, TOMBSTONE, b"")]), 40, 0)
    values = await child.get_many([1, 1, aux], [1, 2, 1], 40)
    assert values[:2] == [b"old", b"mine"] and isinstance(values[2], MissingKey)
    assert await child.scan(0, 0, 2, 0, 40) == [(1, 1, b"old"), (1, 2, b"mine")]
    assert await child.scan(0, 0, 1 << 63, 0, 39) == [(1, 1, b"old"), (1, 2, b"x")]


async def test_wait_lsn_wakes_and_times_out():
    timeline = timeline_with([(1, 1, 10, IMAGE, b"")])
    waiter = asyncio.create_task(timeline.wait_lsn(20, 5))
    await asyncio.sleep(0)
    timeline.ingest(ValueBatch.build([]), 20, 10)
    await waiter
    with pytest.raises(LsnTimeout, match="did not reach 0/1E"):
        await timeline.wait_lsn(30, 0.01)


@pytest.mark.parametrize("seed", range(4))
async def test_in_memory_lookup_equals_brute_force(seed: int):
    rng = random.Random(seed)
    layer = InMemoryLayer(0)
    rows: list[tuple[int, int, int, int, bytes]] = []
    lsn = 0
    for _ in range(150):
        batch = []
        for _ in range(rng.choice([1, 3, 40, 400])):
            lsn += rng.randrange(2)
            batch.append((rng.randrange(2), rng.randrange(300), lsn, rng.randrange(4), rng.randbytes(rng.randrange(20))))
        layer.append(ValueBatch.build(batch))
        rows += batch
        count = rng.choice([1, 5, 100])
        hi = np.array([rng.randrange(2) for _ in range(count)], np.uint64)
        lo = np.array([rng.randrange(300) for _ in range(count)], np.uint64)
        floor = np.array([rng.randrange(lsn + 1) for _ in range(count)], np.uint64)
        ceiling = np.array([rng.randrange(lsn + 2) for _ in range(count)], np.uint64)
        hits = layer.find(hi, lo, floor, ceiling)
        values = await layer.fetch(hits.position, hits.length)
        found = list(zip(hits.owner.tolist(), hits.lsn.tolist(), hits.kind.tolist(), values, strict=True))
        if rng.random() < 0.2:
            expected = [
                (n, r[2], r[3], r[4]) for n in range(count) for r in rows
                if (r[0], r[1]) == (hi[n], lo[n]) and floor[n] <= r[2] < ceiling[n]
            ]  # fmt: skip
            assert found == expected

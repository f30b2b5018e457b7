"""Blocks, growth, truncation and drops: what a reader sees at every LSN, however the WAL is cut into batches."""

import gc
import random
import struct
import weakref

import pytest

from neon_services.ground.errors import CorruptionError
from neon_services.pageserver.ingest import WalIngest
from neon_services.pageserver.keys import RelTag
from neon_services.pageserver.relations import Relations
from tests.unit.pageserver_service.wal_builder import START, Wal, empty_timeline, ingest_all, page

REL = RelTag(1663, 5, 20000, 0)
VM = REL._replace(fork=2)


def commit_dropping(wal: Wal, *relations: tuple[int, int, int]) -> int:
    flat = [field for relation in relations for field in relation]
    main = struct.pack(f"<qII{len(flat)}I", 1, 4, len(relations), *flat)
    return wal.add(1, 0x80, main, xid=1030)


def truncate(wal: Wal, blocks: int, rel: int = REL.rel) -> int:
    return wal.add(2, 0x20, struct.pack("<IIIIi", blocks, 1663, 5, rel, 7))


async def sizes(timeline: object, tag: RelTag, lsns: list[int]) -> list[int | None]:
    """Uncached sizes."""
    return [await Relations(timeline).size(tag, lsn) for lsn in lsns]  # type: ignore[arg-type]


async def test_a_relation_appears_and_grows_at_the_records_that_do_it() -> None:
    timeline, wal = empty_timeline(), Wal()
    first, second, third = wal.touch(REL.rel, 0), wal.touch(REL.rel, 0, init=False), wal.touch(REL.rel, 3)
    await ingest_all(timeline, wal)
    assert timeline.last_record_lsn == third and timeline.prev_record_lsn == second
    assert await sizes(timeline, REL, [START, first - 1, first, second, third - 1, third]) == [None, None, 1, 1, 1, 4]
    assert await page(timeline, REL.rel, 0, first) == f"init+{first:x}"
    assert await page(timeline, REL.rel, 0, third) == f"init+{first:x}+{second:x}"
    assert [await page(timeline, REL.rel, block, third) for block in (1, 2)] == ["zero", "zero"]
    assert await Relations.of(timeline).databases(first) == {(1663, 5): False}
    assert await Relations.of(timeline).databases(START) == {}
    assert await Relations.of(timeline).list_relations(third) == [REL]


async def test_history_restarts_when_a_truncated_block_comes_back() -> None:
    timeline, wal = empty_timeline(), Wal()
    for block in range(4):
        wal.touch(REL.rel, block)
    before = wal.touch(REL.rel, 2, init=False)
    cut = truncate(wal, 1)
    back = wal.touch(REL.rel, 3, init=False)  # block 3 again, by a record that initialises nothing; 1 and 2 are a gap
    await ingest_all(timeline, wal)
    assert await sizes(timeline, REL, [before, cut, back]) == [4, 1, 4]
    assert await page(timeline, REL.rel, 3, back) == f"zero+{back:x}"
    assert [await page(timeline, REL.rel, block, back) for block in (1, 2)] == ["zero", "zero"]
    assert (await page(timeline, REL.rel, 2, before)).endswith(f"+{before:x}")


async def test_a_dropped_relation_is_gone_and_a_new_one_of_its_name_begins_empty() -> None:
    timeline, wal = empty_timeline(), Wal()
    made = wal.touch(REL.rel, 1)
    wal.touch(REL.rel, 0, fork=2)
    dropped = commit_dropping(wal, REL[:3])
    again = wal.add(2, 0x10, struct.pack("<IIIi", *REL))
    used = wal.touch(REL.rel, 0, init=False)
    await ingest_all(timeline, wal)
    assert await sizes(timeline, REL, [made, dropped, again, used]) == [2, None, 0, 1]
    assert await sizes(timeline, VM, [dropped - 1, dropped, used]) == [1, None, None]
    assert await Relations.of(timeline).list_relations(dropped) == []
    assert await Relations.of(timeline).list_relations(dropped - 1) == [REL, VM]
    assert await page(timeline, REL.rel, 0, used) == f"zero+{used:x}"


async def test_implied_visibility_map_blocks_count_only_when_the_map_exists() -> None:
    timeline, wal = empty_timeline(), Wal()
    wal.touch(REL.rel, 0)
    without = wal.touch(REL.rel, 0, init=False, implied=True)
    visible = wal.add(9, 0x40, refs=[(*VM, 0, 0), (*REL, 0, 0)])
    cleared = wal.touch(REL.rel, 0, init=False, implied=True)
    await ingest_all(timeline, wal)
    assert await sizes(timeline, VM, [without, visible, cleared]) == [None, 1, 1]
    assert await page(timeline, REL.rel, 0, cleared, fork=2) == f"zero+{visible:x}+{cleared:x}"


async def test_vm_truncation_keeps_the_last_page_and_fsm_gets_an_empty_one() -> None:
    timeline, wal = empty_timeline(), Wal()
    fsm = REL._replace(fork=1)
    wal.touch(REL.rel, 40000)
    wal.touch(REL.rel, 2, fork=2)
    wal.touch(REL.rel, 6, fork=1)
    cut = truncate(wal, 32672 + 5)
    await ingest_all(timeline, wal)
    assert await sizes(timeline, VM, [cut - 1, cut]) == [3, 2]
    assert await sizes(timeline, fsm, [cut - 1, cut]) == [7, 7]
    cut = truncate(wal, 10)
    await ingest_all(timeline, wal)
    assert await sizes(timeline, VM, [cut]) == [1]
    assert await sizes(timeline, fsm, [cut]) == [3]  # root, middle, first leaf
    assert await page(timeline, REL.rel, 2, cut, fork=1) == "zero"


async def test_a_damaged_record_that_would_make_a_huge_relation_is_refused() -> None:
    timeline, wal = empty_timeline(), Wal()
    wal.touch(REL.rel, 0)
    wal.touch(REL.rel, 0xFFFF_FF00)
    with pytest.raises(CorruptionError, match="gap"):
        await ingest_all(timeline, wal)
    assert timeline.last_record_lsn == START


async def test_user_defined_tablespaces_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    timeline, wal = empty_timeline(), Wal()
    end = wal.add(10, 0, refs=[(70000, 5, 9, 0, 0, 1), (*REL, 0, 1)])
    await ingest_all(timeline, wal)
    assert await Relations.of(timeline).list_relations(end) == [REL]
    assert caplog.text.count("tablespace 70000") == 1


async def test_what_is_cached_of_a_timeline_does_not_keep_it_alive() -> None:
    timeline, wal = empty_timeline(), Wal()
    wal.touch(REL.rel, 0)
    await ingest_all(timeline, wal)
    assert Relations.of(timeline) is Relations.of(timeline)
    watched = weakref.ref(timeline)
    del timeline
    gc.collect()
    assert watched() is None


def random_wal(rng: random.Random, records: int) -> tuple[Wal, dict[int, dict[RelTag, int]]]:
    """Random records, and after each of them the sizes that a simple model says."""
    wal, model, history = Wal(), dict[RelTag, int](), dict[int, dict[RelTag, int]]()
    for _ in range(records):
        tag = RelTag(1663, 5, rng.randrange(20000, 20004), 0)
        what = rng.random()
        if what < 0.8:
            block = rng.randrange(max(model.get(tag, 0), 1) + rng.choice([0, 0, 1, 3]))
            end = wal.touch(tag.rel, block, init=rng.random() < 0.5, xid=rng.randrange(1024, 5000))
            model[tag] = max(model.get(tag, 0), block + 1)
        elif what < 0.9:
            end = truncate(wal, blocks := rng.randrange(5), tag.rel)
            if tag in model:
                model[tag] = min(model[tag], blocks)
        elif what < 0.95:
            end = commit_dropping(wal, tag[:3])
            model.pop(tag, None)
        else:
            end = wal.add(2, 0x10, struct.pack("<IIIi", *tag))
            model.setdefault(tag, 0)
        history[end] = dict(model)
    return wal, history


@pytest.mark.parametrize("seed", range(8))
async def test_random_wal_in_random_batches_against_a_model(seed: int) -> None:
    rng = random.Random(seed)
    print("seed", seed)
    wal, history = random_wal(rng, 300)
    whole, pieces = empty_timeline(), empty_timeline()
    rows = list(wal._rows)
    await ingest_all(whole, wal)
    ingest, at = WalIngest(pieces), 0
    while at < len(rows):
        step = rng.choice([1, 1, 2, 7, 40])
        wal._rows = rows[at : at + step]
        await ingest.ingest(wal.batch())
        at += step
    assert whole.last_record_lsn == pieces.last_record_lsn
    for end in rng.sample(sorted(history), 40):
        for timeline in (whole, pieces):
            assert await Relations(timeline).relation_sizes(end) == history[end]
        for tag, blocks in history[end].items():
            for block in range(blocks):
                assert await page(whole, tag.rel, block, end) == await page(pieces, tag.rel, block, end)
    last = history[max(history)]
    assert await Relations.of(whole).relation_sizes(whole.last_record_lsn) == last
    assert await Relations.of(pieces).compute_logical_size() == 8192 * sum(last.values())

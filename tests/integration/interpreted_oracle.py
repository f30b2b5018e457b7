"""Compares interpreted WAL with what our own pageserver's ingest makes of the same WAL."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from neon_services.pageserver import keys
from neon_services.pageserver.ingest_records import decode_aux_files
from neon_services.pageserver.native_records import (
    CLOG_SET_ABORTED,
    CLOG_SET_COMMITTED,
    HEAP_BLOCKS_PER_VM_PAGE,
    MULTIXACT_MEMBERS_CREATE,
    MULTIXACT_OFFSET_CREATE,
)
from neon_services.pageserver.values import IMAGE, NATIVE, TOMBSTONE, WAL, WAL_INIT, ValueBatch
from neon_services.protocols import interpreted_metadata as md
from neon_services.protocols.bincode import I64, U32, Cursor, List
from neon_services.protocols.interpreted_wal import InterpretedRecord
from neon_services.protocols.page_keys import RelTag
from tests.integration.interpreted_support import RealWal

Place = tuple[int, int]  # key, LSN


class Ingested:
    """The rows of our ingest, by what they are."""

    def __init__(self, batches: Iterable[ValueBatch]) -> None:
        self.pages: dict[Place, tuple[bool, bytes]] = {}  # will_init, record
        self.native: list[tuple[Place, bytes]] = []
        self.images: dict[Place, bytes] = {}
        self.tombstones: set[Place] = set()
        for batch in batches:
            columns = (batch.key_hi, batch.key_lo, batch.lsn, batch.kind, batch.offset, batch.length)
            for hi, lo, lsn, kind, offset, length in zip(*(column.tolist() for column in columns), strict=True):
                place, data = (hi << 64 | lo, lsn), bytes(batch.data[offset : offset + length])
                if kind in (WAL, WAL_INIT):
                    self.pages[place] = kind == WAL_INIT, data
                elif kind == NATIVE:
                    self.native.append((place, data))
                elif kind == TOMBSTONE:
                    self.tombstones.add(place)
                else:
                    assert kind == IMAGE
                    self.images[place] = data


def record_of(entry: bytes) -> bytes:
    """The record in ``[u64 LE end_lsn][record][pad to 8]``."""
    length = int.from_bytes(entry[8:12], "little")
    assert len(entry) == (length + 15) & ~7
    return entry[8 : 8 + length]


async def compare_values(wal: RealWal, ours: Ingested, shards: list[list[InterpretedRecord]]) -> Counter[str]:
    """Every value on exactly one shard and as ours; shard 0 observes the others; what is counted must have been seen."""
    counts: Counter[str] = Counter()
    seen: dict[Place, Any] = {}
    for number, records in enumerate(shards):
        for record in records:
            for value in record.values:
                place = (value.key, value.lsn)
                if value.data is None:
                    assert number == 0, "only shard 0 observes"
                    counts["observed"] += 1
                    continue
                assert place not in seen, "a value on two shards"
                seen[place] = value
                counts[f"shard {number}"] += 1
    at_zero = {(value.key, value.lsn) for record in shards[0] for value in record.values}
    assert at_zero == set(seen), "shard 0 sees every key"
    images: list[tuple[Place, bytes]] = []
    for place, value in seen.items():
        will_init, entry = ours.pages[place]
        record = record_of(entry)
        if value.data[:4] == bytes(4):
            assert int.from_bytes(value.data[4:12], "big") == 8192 == len(value.data) - 12
            assert value.will_init and will_init
            assert record[17] == 0 and record[16] in (0xA0, 0xB0)  # rmid XLOG, FPI or FPI_FOR_HINT
            images.append((place, value.data[12:]))
        else:
            header = (1).to_bytes(4, "big") + bytes(4) + bytes([will_init]) + len(record).to_bytes(8, "big")
            assert value.data == header + record
            assert value.will_init == will_init
    counts["images"], counts["values"] = len(images), len(seen)
    await _compare_images(wal, images)
    for place in set(ours.pages) - set(seen):  # pages that a record changes without naming them
        tag = keys.relation_of(place[0] >> 64, place[0] & (1 << 64) - 1)
        assert tag.fork == keys.VM_FORK, f"{tag} at {place[1]:X} is missing"
        counts["implied map pages"] += 1
    return counts


async def _compare_images(wal: RealWal, images: list[tuple[Place, bytes]]) -> None:
    """An extracted image is the page that Postgres's own redo makes of the record."""
    for (key, lsn), page in images:
        (redone,) = await wal.timeline.get_many([key >> 64], [key & (1 << 64) - 1], lsn)
        assert isinstance(redone, bytes), redone
        assert page == redone


def compare_metadata(ours: Ingested, shards: list[list[InterpretedRecord]]) -> Counter[str]:
    """What the metadata records say is what our ingest did."""
    counts: Counter[str] = Counter()
    everywhere = _broadcast(shards)
    by_type: dict[type, list[tuple[int, Any]]] = {}
    for lsn, record in everywhere:
        by_type.setdefault(type(record), []).append((lsn, record))
        counts[type(record).__name__] += 1
    _compare_clog(ours, by_type)
    _compare_multixacts(ours, by_type)
    _compare_files(ours, by_type, shards)
    _compare_relations(ours, by_type)
    _compare_map_pages(ours, by_type, shards, counts)
    return counts


def _broadcast(shards: list[list[InterpretedRecord]]) -> list[tuple[int, Any]]:
    """The metadata records that all shards got, in one order."""
    own = (md.ClearVmBits, md.LogicalMessagePut)
    lists = [
        [(r.next_record_lsn, r.metadata) for r in records if r.metadata is not None and not isinstance(r.metadata, own)]
        for records in shards
    ]
    assert all(found == lists[0] for found in lists)
    assert all([type(r) for _, r in found] == [type(r) for _, r in lists[0]] for found in lists)
    assert not any(isinstance(r.metadata, md.LogicalMessagePut) for records in shards[1:] for r in records)
    return lists[0]


def _compare_clog(ours: Ingested, by_type: dict[type, list[tuple[int, Any]]]) -> None:
    mine: dict[tuple[int, int], tuple[set[int], int | None]] = {}
    for (_, lsn), data in ours.native:
        cursor = Cursor(data, "native record")
        tag = U32.take(cursor)
        if tag in (CLOG_SET_COMMITTED, CLOG_SET_ABORTED):
            xids = set(List(U32).take(cursor))
            time_us = I64.take(cursor) if tag == CLOG_SET_COMMITTED else None
            known = mine.setdefault((tag, lsn), (set(), time_us))
            known[0].update(xids)
    theirs = {}
    for made, tag in (
        (md.Commit, CLOG_SET_COMMITTED),
        (md.CommitPrepared, CLOG_SET_COMMITTED),
        (md.Abort, CLOG_SET_ABORTED),
        (md.AbortPrepared, CLOG_SET_ABORTED),
    ):
        for lsn, end in by_type.get(made, []):
            assert end.lsn == lsn
            theirs[tag, lsn] = ({end.xid, *end.subxacts}, end.time_us if tag == CLOG_SET_COMMITTED else None)
    assert mine == theirs
    assert any(len(xids) > 1 for xids, _ in theirs.values()), "no subtransactions in the workload"


def _compare_multixacts(ours: Ingested, by_type: dict[type, list[tuple[int, Any]]]) -> None:
    offsets, members = {}, {}
    for (_, lsn), data in ours.native:
        cursor = Cursor(data, "native record")
        tag = U32.take(cursor)
        if tag == MULTIXACT_OFFSET_CREATE:
            offsets[lsn] = (U32.take(cursor), U32.take(cursor))
        elif tag == MULTIXACT_MEMBERS_CREATE:
            U32.take(cursor)
            flat = np.frombuffer(data[16:], ">u4").tolist()
            members[lsn] = members.get(lsn, ()) + tuple(zip(flat[::2], flat[1::2], strict=True))
    created = by_type[md.MultiXactCreate]
    assert offsets == {lsn: (record.multixact, record.offset) for lsn, record in created}
    assert members == {lsn: record.members for lsn, record in created}
    assert all(record.member_count == len(record.members) for _, record in created)


def _whole(halves: tuple[int, int]) -> int:
    return halves[0] << 64 | halves[1]


def _compare_files(ours: Ingested, by_type: dict[type, list[tuple[int, Any]]], shards: list[list[InterpretedRecord]]) -> None:
    maps = {(_whole(keys.relation_map(r.spc, r.db)), lsn): r.content for lsn, r in by_type[md.RelmapUpdate]}
    assert any(r.db == 0 for _, r in by_type[md.RelmapUpdate]), "no map of the shared catalogs in the workload"
    assert maps.items() <= ours.images.items()
    prepared = {(_whole(keys.twophase_file(r.xid)), lsn): r.data for lsn, r in by_type[md.Prepare]}
    assert prepared.items() <= ours.images.items() and len(prepared) >= 3
    ended = {
        (_whole(keys.twophase_file(r.xid)), lsn) for made in (md.CommitPrepared, md.AbortPrepared) for lsn, r in by_type[made]
    }
    assert ended == {(key, lsn) for key, lsn in ours.tombstones if key >> 120 == 2} and len(ended) == 2
    puts = [(r.next_record_lsn, r.metadata) for r in shards[0] if isinstance(r.metadata, md.LogicalMessagePut)]
    assert [(put.path, put.content) for _, put in puts] == [("pg_logical/mappings/test1", b"kept")]
    assert decode_aux_files(ours.images[_whole(keys.aux_file(puts[0][1].path)), puts[0][0]]) == [(puts[0][1].path, b"kept")]
    origins = {place[1]: int.from_bytes(data, "big") for place, data in ours.images.items() if place[0] >> 120 == 0x63}
    theirs = {lsn: r.remote_lsn for lsn, r in by_type[md.ReploriginSet]}
    theirs |= {lsn: 0 for lsn, _ in by_type[md.ReploriginDrop]}
    theirs |= {lsn: r.origin_lsn for lsn, r in by_type[md.Commit] if r.origin_id and r.origin_lsn}
    assert origins == theirs and 0xAABBCC in theirs.values() and 0xDDEE00 in theirs.values()


def _compare_relations(ours: Ingested, by_type: dict[type, list[tuple[int, Any]]]) -> None:
    exists = {place[1]: set() for place in ours.images if place[0] >> 120 == 0x65}
    for (key, lsn), _ in ours.images.items():
        if key >> 120 == 0x65:
            exists[lsn].add(keys.relation_of(key >> 64, key & (1 << 64) - 1))
    created = [(lsn, record.rel) for lsn, record in by_type[md.SmgrCreate]]
    assert sum(tag in exists.get(lsn, ()) for lsn, tag in created) > len(created) // 2
    ever = {tag for tags in exists.values() for tag in tags}
    assert {tag for _, tag in created} <= ever
    dropped: dict[int, set[RelTag]] = {}
    for key, lsn in ours.tombstones:
        if key >> 120 == 0x65:
            dropped.setdefault(lsn, set()).add(keys.relation_of(key >> 64, key & (1 << 64) - 1))
    drops = {lsn for lsn, _ in by_type[md.DatabaseDrop]}
    how = (md.Commit, md.Abort, md.CommitPrepared, md.AbortPrepared)
    ends = {lsn: record for made in how for lsn, record in by_type[made]}
    for lsn, tags in dropped.items():
        if lsn not in drops:
            assert {(tag.spc, tag.db, tag.rel) for tag in tags} <= set(ends[lsn].relations)
    assert len(drops) == 1 and len(by_type[md.DatabaseCreate]) == 1 and any(record.relations for record in ends.values())


def _compare_map_pages(
    ours: Ingested,
    by_type: dict[type, list[tuple[int, Any]]],
    shards: list[list[InterpretedRecord]],
    counts: Counter[str],
) -> None:
    """Each map page that our ingest changes without its being named is explained, and each clearing has its page."""
    explained: set[Place] = set()
    for records in shards:
        for record in records:
            cleared = record.metadata
            if isinstance(cleared, md.ClearVmBits):
                counts["ClearVmBits"] += 1
                counts[f"ClearVmBits flags {cleared.flags}"] += 1
                for block in (cleared.new_heap_block, cleared.old_heap_block):
                    if block is not None:
                        page = keys.relation_block(cleared.vm_rel, block // HEAP_BLOCKS_PER_VM_PAGE)
                        explained.add((_whole(page), record.next_record_lsn))
    for lsn, truncate in by_type[md.SmgrTruncate]:
        tag = RelTag(truncate.spc, truncate.db, truncate.rel, keys.VM_FORK)
        explained.add((_whole(keys.relation_block(tag, truncate.blocks // HEAP_BLOCKS_PER_VM_PAGE)), lsn))
    named = {(value.key, value.lsn) for records in shards for record in records for value in record.values}
    implied = set(ours.pages) - named
    assert implied <= explained, "our ingest clears bits of which the metadata does not know"
    # the rest are maps that do not exist: the pageserver sees that, a safekeeper cannot
    assert len(explained - implied) < len(explained) // 2

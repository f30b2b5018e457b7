"""Records that are not about pages: layouts of Postgres 15, 17 and 18, and what readers see afterwards."""

import random
import struct

import numpy as np
import pytest

from neon_services.ground.errors import CorruptionError
from neon_services.pageserver import ingest_clog, keys, slru
from neon_services.pageserver.checkpoint_state import CheckpointState
from neon_services.pageserver.ingest import WalIngest
from neon_services.pageserver.ingest_records import decode_aux_files, encode_aux_file
from neon_services.pageserver.ingest_tip import decode_prepared
from neon_services.pageserver.ingest_xact import parse_xact, record_origin
from neon_services.pageserver.keys import RelTag
from neon_services.pageserver.read_path import search_timeline
from neon_services.pageserver.relations import Relations
from neon_services.pageserver.timeline import MissingKey, Timeline
from tests.unit.pageserver_service.wal_builder import FIRST_XID, START, Wal, empty_timeline, ingest_all, make_checkpoint, page

COMMIT, PREPARE, ABORT, COMMIT_PREPARED, ABORT_PREPARED = 0x00, 0x10, 0x20, 0x30, 0x40
HAS_INFO = 0x80


async def clog(timeline: Timeline, xid: int, lsn: int) -> int:
    content = await timeline.get(*keys.slru_page(keys.CLOG, xid // 32768), lsn)
    return content[xid % 32768 // 4] >> 2 * (xid % 4) & 3


async def checkpoint(timeline: Timeline, lsn: int) -> CheckpointState:
    return CheckpointState(await timeline.get(*keys.CHECKPOINT, lsn))


def xact_main(major: int, *, commit: bool = True) -> bytes:
    """A record with everything in it."""
    main = struct.pack("<qI", 77, 0x1FF if commit else 0x1F7)
    main += struct.pack("<II", 5, 1663)  # database
    main += struct.pack("<III", 2, 11, 12)  # subtransactions
    main += struct.pack("<IIII", 1, 1663, 5, 99)  # relations
    main += struct.pack("<I", 1) + bytes(16 if major >= 18 else 12)  # dropped statistics
    if commit:
        main += struct.pack("<I", 2) + bytes(32)  # invalidations
    main += struct.pack("<I", 4242) + b"a gid\0"
    return main + struct.pack("<Qq", 0xABC, 88)  # origin, unaligned


@pytest.mark.parametrize("major", [15, 17, 18])
def test_parse_xact(major: int) -> None:
    for commit, opcode in ((True, COMMIT_PREPARED), (False, ABORT_PREPARED)):
        main = xact_main(major, commit=commit)
        record = parse_xact(opcode | HAS_INFO, main, major)
        assert (record.time_us, record.subxacts, record.relations) == (77, (11, 12), ((1663, 5, 99),))
        assert (record.twophase_xid, record.origin_lsn) == (4242, 0xABC)
        for length in range(len(main) - 8):  # the origin's time is not read
            with pytest.raises(CorruptionError):
                parse_xact(opcode | HAS_INFO, main[:length], major)
    assert parse_xact(COMMIT, struct.pack("<q", 5), major).time_us == 5


def test_origin_in_the_record_header() -> None:
    assert record_origin(bytes(24) + b"\xfd\x07\x01" + b"\xff\x08") == 0x107
    assert record_origin(bytes(24) + b"\xfc\0\0\0\0" + b"\xfd\x02\0") == 2
    assert record_origin(bytes(24) + b"\xff\x08") == 0
    assert record_origin(bytes(24)) == 0


async def test_simple_commits_and_aborts() -> None:
    timeline, wal = empty_timeline(), Wal()
    committed = wal.add(1, COMMIT, struct.pack("<q", 1000), xid=1024)
    aborted = wal.add(1, ABORT, struct.pack("<q", 1001), xid=1025)
    last = wal.add(1, COMMIT, struct.pack("<q", 1002), xid=1027)
    wal.add(1, COMMIT, struct.pack("<q", 1003))  # without an xid
    await ingest_all(timeline, wal)
    assert [await clog(timeline, 1024, lsn) for lsn in (START, committed - 1, committed)] == [0, 0, 1]
    assert [await clog(timeline, 1025, lsn) for lsn in (committed, aborted)] == [0, 2]
    content = await timeline.get(*keys.slru_page(keys.CLOG, 0), last)
    assert struct.unpack(">q", content[8192:]) == (1002,)


@pytest.mark.parametrize("seed", range(4))
async def test_fresh_images_of_clog_pages_change_nothing_that_is_read(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_clog, "IMAGE_INTERVAL", 5)
    rng = random.Random(seed)
    print("seed", seed)
    timeline, wal, model, history = empty_timeline(), Wal(), dict[int, int](), dict[int, tuple[dict[int, int], int]]()
    wal.add(3, 0x00, struct.pack("<i", 1))
    newest, ingest = 0, WalIngest(timeline)
    xids = iter(rng.sample(range(32000, 34000), 1500))
    for number in range(400):
        top, subs = next(xids), [next(xids) for _ in range(rng.choice([0, 0, 0, 2]))]
        commit = rng.random() < 0.7
        if subs:
            main = struct.pack(f"<qII{len(subs)}I", number + 1, 2, len(subs), *subs)
            end = wal.add(1, (COMMIT if commit else ABORT) | HAS_INFO, main, xid=top)
        else:
            end = wal.add(1, COMMIT if commit else ABORT, struct.pack("<q", number + 1), xid=top)
        model |= dict.fromkeys([top, *subs], 1 if commit else 2)
        if commit and any(xid >= 32768 for xid in (top, *subs)):
            newest = number + 1
        history[end] = (dict(model), newest)
        if rng.random() < 0.1:
            await ingest.ingest(wal.batch())
            ingest = rng.choice([ingest, WalIngest(timeline)])
    await ingest.ingest(wal.batch())
    images = 0
    for end in rng.sample(sorted(history), 60):
        known, time_us = history[end]
        pages = [await timeline.get(*keys.slru_page(keys.CLOG, number), end) for number in (0, 1)]
        for xid in range(32000, 34000):
            status = pages[xid // 32768][xid % 32768 // 4] >> 2 * (xid % 4) & 3
            assert status == known.get(xid, 0), (xid, end)
        assert pages[1][8192:] == (struct.pack(">q", time_us) if time_us else b"")
        search = await search_timeline(timeline, *(np.array([half], np.uint64) for half in keys.slru_page(keys.CLOG, 1)), end)
        images += len((await search.histories())[0].kinds) < 20
    assert images > 20, "the history was not cut short"


async def test_commit_with_subtransactions_on_two_pages() -> None:
    timeline, wal = empty_timeline(), Wal()
    zeroed = wal.add(3, 0x00, struct.pack("<i", 1))
    main = struct.pack("<qIIII", 5, 2, 2, 32767, 32769)
    end = wal.add(1, COMMIT | HAS_INFO, main, xid=32768)
    simple = wal.add(1, COMMIT, struct.pack("<q", 6), xid=32770)
    await ingest_all(timeline, wal)
    assert [await clog(timeline, xid, end) for xid in range(32766, 32771)] == [0, 1, 1, 1, 0]
    assert await clog(timeline, 32770, simple) == 1
    assert await slru.list_segments(timeline, keys.CLOG, zeroed - 1) == [(0, 1)]
    assert await slru.list_segments(timeline, keys.CLOG, zeroed) == [(0, 2)]
    assert len(await slru.read_segment(timeline, keys.CLOG, 0, 2, simple)) == 2 * 8192


@pytest.mark.parametrize("major", [15, 17])
async def test_two_phase(major: int) -> None:
    timeline, wal = empty_timeline(major), Wal()
    prepared = wal.add(1, PREPARE, b"the state file", xid=1030)
    other = wal.add(1, PREPARE, b"another", xid=1031)
    done = wal.add(1, COMMIT_PREPARED | HAS_INFO, struct.pack("<qII", 5, 16, 1030), xid=1040)
    shutdown = wal.add(0, 0x00, make_checkpoint())
    undone = wal.add(1, ABORT_PREPARED | HAS_INFO, struct.pack("<qII", 5, 16, 1031), xid=1041)
    await ingest_all(timeline, wal)

    async def directory(lsn: int) -> set[int]:
        return decode_prepared(await timeline.get(*keys.TWOPHASE_DIRECTORY, lsn), major)

    assert [await directory(lsn) for lsn in (START, prepared, other, done, undone)] == [
        set(),
        {1030},
        {1030, 1031},
        {1031},
        set(),
    ]
    assert await timeline.get(*keys.twophase_file(1030), done - 1) == b"the state file"
    with pytest.raises(MissingKey):
        await timeline.get(*keys.twophase_file(1030), done)
    assert [await clog(timeline, xid, undone) for xid in (1030, 1031, 1040)] == [1, 2, 0]
    assert (await checkpoint(timeline, shutdown)).oldest_active_xid == 1031  # the oldest that is still prepared


async def test_next_xid_moves_in_steps_at_the_record_that_needs_it() -> None:
    timeline, wal = empty_timeline(), Wal()
    first = wal.touch(20000, 0, xid=FIRST_XID)
    wal.touch(20000, 0, xid=FIRST_XID + 500)
    second = wal.touch(20000, 0, xid=2048)
    third = wal.add(1, COMMIT, struct.pack("<q", 1), xid=5000)
    await ingest_all(timeline, wal)
    lsns = [START, first - 1, first, second - 1, second, third]
    assert [(await checkpoint(timeline, lsn)).next_xid for lsn in lsns] == [1024, 1024, 2048, 2048, 3072, 5120]


def test_next_xid_wraps_around() -> None:
    value = bytearray(make_checkpoint())
    struct.pack_into("<Q", value, 24, (3 << 32) | 0xFFFF_FF00)
    state = CheckpointState(bytes(value))
    state.saw_xid(0x9000_0000)  # far in the past
    assert not state.dirty
    assert state.full_xid(0xFFFF_0000) == (3 << 32) | 0xFFFF_0000
    assert state.full_xid(50) == (4 << 32) | 50
    state.saw_xid(0xFFFF_FFF0)
    assert state.next_xid == (4 << 32) | 3
    state.saw_xid(7)
    assert state.next_xid == (4 << 32) | 1024
    assert state.full_xid(0xFFFF_FFF0) == (3 << 32) | 0xFFFF_FFF0


async def test_checkpoint_records() -> None:
    timeline, wal = empty_timeline(), Wal()
    payload = bytearray(make_checkpoint())
    struct.pack_into("<QIII", payload, 24, 99999, 99999, 99, 99)  # next xid, oid, multi, offset: not taken over
    struct.pack_into("<II", payload, 44, 700, 5)  # oldest xid
    struct.pack_into("<I", payload, 80, 1001)  # oldest active xid
    online = wal.add(0, 0x10, bytes(payload))
    oid = wal.add(0, 0x30, struct.pack("<I", 24576))
    running = wal.add(8, 0x10, struct.pack("<iiIIII", 0, 0, 0, 1, 1022, 1))
    struct.pack_into("<II", payload, 44, 600, 6)
    struct.pack_into("<I", payload, 80, 0)
    shutdown = wal.add(0, 0x00, bytes(payload))
    await ingest_all(timeline, wal)
    state = await checkpoint(timeline, online)
    assert (state.next_xid, state.next_oid, state.next_multi, state.next_multi_offset) == (FIRST_XID, 16384, 1, 0)
    assert (state.oldest_xid, state.oldest_active_xid, state.redo) == (700, 1001, 0)
    assert [(await checkpoint(timeline, lsn)).next_oid for lsn in (online, oid)] == [16384, 24576]
    assert (await checkpoint(timeline, running)).oldest_active_xid == 1022
    state = await checkpoint(timeline, shutdown)
    assert (state.oldest_xid, state.oldest_active_xid, state.redo) == (700, FIRST_XID, shutdown)  # 600 is older: ignored


@pytest.mark.parametrize("major", [15, 17])
async def test_clog_pages_and_truncation(major: int) -> None:
    timeline, wal = empty_timeline(major), Wal()
    number = "<q" if major >= 17 else "<i"
    for pageno in (31, 32, 33, 64):
        wal.add(3, 0x00, struct.pack(number, pageno))
    wal.touch(20000, 0, xid=64 * 32768 + 5)
    before = wal.lsn
    cut = wal.add(3, 0x10, struct.pack(number, 33) + struct.pack("<II", 33 * 32768, 5))
    await ingest_all(timeline, wal)
    assert await slru.list_segments(timeline, keys.CLOG, before) == [(0, 32), (1, 2), (2, 1)]
    assert await slru.list_segments(timeline, keys.CLOG, cut) == [(1, 2), (2, 1)]
    assert (await checkpoint(timeline, cut)).oldest_xid == 33 * 32768


@pytest.mark.parametrize("major", [15, 17])
async def test_multixacts(major: int) -> None:
    timeline, wal = empty_timeline(major), Wal()
    number = "<q" if major >= 17 else "<i"
    wal.add(6, 0x10, struct.pack(number, 1))
    members = [(1030 + i, i % 6) for i in range(5)]
    flat = [value for member in members for value in member]
    made = wal.add(6, 0x20, struct.pack(f"<IIi{len(flat)}I", 7, 1634, 5, *flat))
    await ingest_all(timeline, wal)
    offsets = await slru.read_segment(timeline, keys.MULTIXACT_OFFSETS, 0, 1, made)
    assert struct.unpack_from("<I", offsets, 28) == (1634,)
    pages = await slru.read_segment(timeline, keys.MULTIXACT_MEMBERS, 0, 2, made)
    assert struct.unpack_from("<II", pages, 408 * 20 + 4 + 8) == (1030, 1031)  # the end of the first page
    assert struct.unpack_from("<III", pages, 8192 + 4) == (1032, 1033, 1034)  # and the second
    state = await checkpoint(timeline, made)
    assert (state.next_multi, state.next_multi_offset, state.next_xid) == (8, 1639, 2048)
    per_segment = 1636 * 32
    wal.add(6, 0x10, struct.pack(number, 32))
    wal.add(6, 0x10, struct.pack(number, 64))
    cut = wal.add(6, 0x30, struct.pack("<IIIII", 5, 1, 6, 0, 2 * per_segment))
    await ingest_all(timeline, wal)
    assert await slru.list_segments(timeline, keys.MULTIXACT_MEMBERS, cut - 1) == [(0, 2), (1, 1), (2, 1)]
    assert await slru.list_segments(timeline, keys.MULTIXACT_MEMBERS, cut) == [(2, 1)]


async def test_relation_maps_and_databases() -> None:
    timeline, wal = empty_timeline(), Wal()
    source = RelTag(1663, 5, 20000, 0)
    written = wal.touch(20000, 1)
    wal.add(7, 0x00, struct.pack("<IIi", 5, 1663, 512) + bytes(512))
    copied = wal.add(4, 0x00, struct.pack("<IIII", 6, 1663, 5, 1663))
    later = wal.touch(20000, 1, init=False)
    dropped = wal.add(4, 0x20, struct.pack("<IiI", 6, 1, 1663))
    registered = wal.add(4, 0x10, struct.pack("<II", 7, 1663))
    await ingest_all(timeline, wal)
    relations = Relations(timeline)
    assert await relations.databases(copied) == {(1663, 5): True, (1663, 6): True}
    assert await relations.relation_sizes(copied, 1663, 6) == {source._replace(db=6): 2}
    copy = await timeline.get(*keys.relation_block(source._replace(db=6), 1), later)
    assert copy.rstrip(b"\0").decode() == f"init+{written:x}"  # as of the copy
    assert await page(timeline, 20000, 1, later) == f"init+{written:x}+{later:x}"
    assert await timeline.get(*keys.relation_map(1663, 6), later) == bytes(512)
    assert await relations.databases(dropped) == {(1663, 5): True}
    assert await relations.relation_sizes(dropped) == {source: 2}
    assert await relations.databases(registered) == {(1663, 5): True, (1663, 7): False}


async def test_aux_files_and_replication_origins() -> None:
    timeline, wal = empty_timeline(), Wal()

    def message(prefix: bytes, content: bytes) -> int:
        return wal.add(21, 0x00, struct.pack("<IIQQ", 5, 0, len(prefix) + 1, len(content)) + prefix + b"\0" + content)

    put = message(b"neon-file:pg_replslot/a/state", b"content")
    message(b"other", b"ignored")
    removed = message(b"neon-file:pg_replslot/a/state", b"")
    set_ = wal.add(19, 0x00, struct.pack("<QH?", 0x1234, 7, False))
    gone = wal.add(19, 0x10, struct.pack("<H", 7))
    await ingest_all(timeline, wal)
    key = keys.aux_file("pg_replslot/a/state")
    assert decode_aux_files(await timeline.get(*key, put)) == [("pg_replslot/a/state", b"content")]
    assert decode_aux_files(await timeline.get(*key, removed)) == []
    origin = keys.replication_origin(7)
    assert [await timeline.get(*origin, lsn) for lsn in (set_, gone)] == [(0x1234).to_bytes(8, "big"), bytes(8)]


def test_aux_file_values() -> None:
    value = encode_aux_file("a/b", b"xyz")
    assert value.hex() == "01" + "00000003612f62" + "0000000378797a"
    assert decode_aux_files(value + encode_aux_file("c", b"")[1:]) == [("a/b", b"xyz"), ("c", b"")]
    for length in range(1, len(value)):
        if length not in (1,):
            with pytest.raises(CorruptionError):
                decode_aux_files(value[:length])


@pytest.mark.parametrize(
    ("rmid", "info"),
    [
        *((0, 0x00), (0, 0x30), (1, 0xA0), (2, 0x10), (2, 0x20), (3, 0x00), (3, 0x10), (4, 0x00), (4, 0x20)),
        *((6, 0x00), (6, 0x20), (6, 0x30), (7, 0x00), (8, 0x10), (19, 0x00), (19, 0x10), (21, 0x00)),
    ],
)
async def test_records_that_are_too_short_are_refused(rmid: int, info: int) -> None:
    timeline, wal = empty_timeline(), Wal()
    wal.touch(20000, 0)
    good = wal.lsn
    await ingest_all(timeline, wal)
    wal.add(rmid, info, b"\x01")
    with pytest.raises(CorruptionError):
        await ingest_all(timeline, wal)
    assert timeline.last_record_lsn == good

"""Interpreting WAL, piece by piece: columns against the plain codec, metadata of each record, map bits, images."""

import random
import struct
from typing import Any

import numpy as np
import pytest

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import Lsn
from neon_services.protocols import interpreted_metadata as md
from neon_services.protocols.interpreted_metadata import pack_metadata, parse_metadata
from neon_services.protocols.interpreted_options import BINCODE, PROTOBUF
from neon_services.protocols.interpreted_wal import InterpretedRecord, InterpretedRecords, InterpretedValue, decode, encode
from neon_services.protocols.page_keys import HEAP_BLOCKS_PER_VM_PAGE, PAGE_SIZE, VM_FORK, RelTag, block_keys
from neon_services.protocols.sharding import ShardIdentity
from neon_services.wal.block_images import applied_images
from neon_services.wal.framing import build_record
from neon_services.wal.interpret import InterpretedBatch, Values, interpret
from neon_services.wal.interpret_metadata import copies_database, metadata_of
from neon_services.wal.interpret_visibility import HEAP, HEAP2, NEON, cleared_bits
from neon_services.wal.interpreted_encoding import encode_batch
from neon_services.wal.oracle import OracleDecoder
from neon_services.wal.raw_record import TABLESPACE, Record
from tests.unit.wal.wal_builder import WalBuilder

SHARDS = [ShardIdentity(0, 0, 0), ShardIdentity(0, 1, 1), *(ShardIdentity(number, 3, 2) for number in range(3))]


def random_batch(rng: random.Random) -> InterpretedBatch:
    """Columns as nothing would make them: small and huge numbers, records with many blocks, one or none."""
    count = rng.choice((0, 1, 2, 7, 40))
    lsn, ends = rng.choice((8, 0x1000028, (1 << 63) + 8)), []
    for _ in range(count):
        lsn += rng.choice((8, 56, 1 << 20))
        ends.append(lsn)
    owner = sorted(rng.randrange(count) for _ in range(rng.choice((0, 3, 50)))) if count else []
    data = rng.randbytes(20_000)
    numbers = len(owner)

    def column(dtype: type, *choices: int) -> np.ndarray:
        return np.array([rng.choice(choices) for _ in range(numbers)], dtype)

    rel, fork = column(np.uint32, 1, 0xFF_FFFF, 0x100_0000, 0xFFFF_FFFF), column(np.uint8, 0, 1, 2, 3)
    block = column(np.uint32, 0, 1, 200, 0xFFFF_FFFE)
    spc, db = column(np.uint32, 0, 1663), column(np.uint32, 0, 5)
    hi, lo = block_keys(spc, db, rel, fork, block)
    if numbers:
        hi[0] = lo[0] = 0  # a number that protobuf leaves out
    is_image = column(bool, 0, 0, 1)
    length = np.where(is_image, PAGE_SIZE, column(np.int64, 24, 130, 8000))
    metadata = np.array([rng.choice((-1, -1, 0, 9, 400)) for _ in range(count)], np.int64)
    vm = RelTag(1663, 5, 5, VM_FORK)  # of three shards one has its first page, another one the fifth
    cleared = [md.ClearVmBits(3, None, vm, 3), md.ClearVmBits(3, 4 * HEAP_BLOCKS_PER_VM_PAGE, vm, 3)]
    special = rng.sample(range(count), min(count, 4))
    records = [parseable(rng, size) for size in metadata.tolist()]
    offsets, length_of = [], []
    for packed in records:
        offsets.append(len(data))
        length_of.append(-1 if packed is None else len(packed))
        data += packed or b""
    clears = tuple((row, what, pack_metadata(what)) for row, what in zip(special[:2], cleared, strict=False))
    files = tuple((row, pack_metadata(md.LogicalMessagePut("a", b"b"))) for row in special[2:])
    for row, *_ in (*clears, *files):
        length_of[row] = -1
    return InterpretedBatch(
        start_lsn=Lsn(lsn - (1 << 27) if lsn > 1 << 28 else 0),
        next_lsn=Lsn(lsn),
        end_lsn=np.array(ends, np.uint64),
        xid=np.array([rng.choice((0, 1, 700, 0xFFFF_FFFF)) for _ in range(count)], np.uint32),
        flush_uncommitted=np.array([rng.random() < 0.1 for _ in range(count)], bool),
        values=Values(
            np.array(owner, np.int64), hi, lo, rel, fork, block, column(bool, 0, 1) | is_image, is_image,
            column(np.int64, 0, 1, 10_000), length,
        ),
        metadata_offset=np.array(offsets, np.int64),
        metadata_length=np.array(length_of, np.int64),
        data=data,
        clears=clears,
        for_shard_zero=files,
        left_out_tablespaces=frozenset(),
    )  # fmt: skip


def parseable(rng: random.Random, size: int) -> bytes | None:
    return None if size < 0 else pack_metadata(md.Prepare(rng.randrange(1 << 32), rng.randbytes(size)))


def expected_records(batch: InterpretedBatch, shard: ShardIdentity) -> InterpretedRecords:
    """The same, one record after another."""
    values = batch.values
    local = shard.holds_blocks(values.rel, values.fork, values.block)
    found = []
    for row, end in enumerate(batch.end_lsn.tolist()):
        own = []
        for number in np.flatnonzero(values.record == row).tolist():
            key = int(values.hi[number]) << 64 | int(values.lo[number])
            if local[number]:
                body = batch.data[values.offset[number] : values.offset[number] + values.length[number]]
                will_init = bool(values.will_init[number])
                if values.is_image[number]:
                    header = struct.pack(">IQ", 0, len(body))
                else:
                    header = struct.pack(">IIBQ", 1, 0, will_init, len(body))
                own.append(InterpretedValue(key, end, header + body, will_init))
            elif shard.number == 0:
                own.append(InterpretedValue(key, end, None))
        metadata, size, offset = None, int(batch.metadata_length[row]), int(batch.metadata_offset[row])
        if size >= 0:
            metadata = parse_metadata(batch.data[offset : offset + size])
        for at, what, _ in batch.clears:
            if at == row:
                metadata = clears_on(what, shard)
        for at, packed in batch.for_shard_zero:
            if at == row and shard.number == 0:
                metadata = parse_metadata(packed)
        flush = bool(batch.flush_uncommitted[row])
        if shard.number == 0 or own or metadata is not None or flush:
            found.append(InterpretedRecord(end, int(batch.xid[row]), tuple(own), metadata, flush))
    return InterpretedRecords(tuple(found), batch.next_lsn, batch.start_lsn)


def clears_on(what: Any, shard: ShardIdentity) -> Any:
    def mine(heap_block: int | None) -> int | None:
        if heap_block is None:
            return None
        page = np.array([heap_block // HEAP_BLOCKS_PER_VM_PAGE], np.uint32)
        held = shard.holds_blocks(np.array([what.vm_rel.rel], np.uint32), np.array([VM_FORK], np.uint8), page)[0]
        return heap_block if held else None

    kept = what._replace(new_heap_block=mine(what.new_heap_block), old_heap_block=mine(what.old_heap_block))
    return None if kept.new_heap_block is None and kept.old_heap_block is None else kept


def test_columns_are_written_as_the_codec_writes_records() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    sizes = set()
    for _ in range(80):
        batch = random_batch(rng)
        for shard in SHARDS:
            expected = expected_records(batch, shard)
            sizes.add(len(expected.records))
            for payload_format in (PROTOBUF, BINCODE):
                payload = bytes(encode_batch(batch, shard, payload_format, None))
                assert payload == encode(expected, payload_format)
            compressed = bytes(encode_batch(batch, shard, BINCODE, 1))
            assert decode(compressed, BINCODE, compressed=True) == expected
    assert 0 in sizes and max(sizes) == 40


def test_all_records_of_decoded_wal_have_their_end() -> None:
    """With the decoder in Python, so that it needs no library; switches of segments included."""
    rng, wal = random.Random(3), WalBuilder()
    for number in range(300):
        if number % 60 == 59:
            wal.switch()
        else:
            wal.append(rng.randbytes(rng.choice((1, 30, 300, 20_000))), rmid=TABLESPACE)
    batch = OracleDecoder(wal.start, 15, segment_size=wal.segment_size).feed(wal.data)
    interpreted = interpret(batch, wal.start, 15)
    assert interpreted.end_lsn.tolist() == wal.ends
    records = decode(bytes(encode_batch(interpreted, SHARDS[0], BINCODE, None)), BINCODE, compressed=False)
    assert [record.next_record_lsn for record in records.records] == wal.ends
    raws = [record.metadata.info for record in records.records if isinstance(record.metadata, md.XlogRaw)]
    assert raws == [0x40] * len(wal.switches) and raws
    assert (records.raw_wal_start_lsn, records.next_record_lsn) == (wal.start, wal.end)


# --- metadata -------------------------------------------------------------------------------------------------------


def made(rmid: int, info: int, main: bytes, pg_major: int = 15) -> Any:
    return metadata_of(Record(0x1000028, 700, rmid, info, main, build_record(rmid, info, main, prev_lsn=0, xid=700), pg_major))


def words(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


MESSAGE = struct.pack("<IIQQ", 5, 1, 16, 3) + b"neon-file:a/b/c\0xyz"
EXAMPLES: list[tuple[int, int, bytes, int, Any]] = [
    (0, 0x10, b"checkpoint", 15, md.XlogRaw(0x10, 0x1000028, b"checkpoint")),
    (1, 0x10, b"state", 15, md.Prepare(700, b"state")),
    (2, 0x10, words(1663, 5, 6, 2), 15, md.SmgrCreate(RelTag(1663, 5, 6, 2))),
    (2, 0x20, words(9, 1663, 5, 6, 7), 15, md.SmgrTruncate(9, 1663, 5, 6, 7)),
    (3, 0x00, words(33), 15, md.ClogZeroPage(1, 1)),
    (3, 0x00, struct.pack("<q", 33), 17, md.ClogZeroPage(1, 1)),
    (3, 0x10, words(33, 740, 1), 16, md.ClogTruncate(33, 740, 1)),
    (3, 0x10, struct.pack("<qII", 33, 740, 1), 18, md.ClogTruncate(33, 740, 1)),
    (4, 0x00, words(16400, 1663, 1, 1664), 15, md.DatabaseCreate(16400, 1663, 1, 1664)),
    (4, 0x20, words(16400, 2, 1663, 1664), 15, md.DatabaseDrop(16400, (1663, 1664))),
    (4, 0x10, words(16400, 1, 1663), 14, md.DatabaseDrop(16400, (1663,))),
    (6, 0x00, words(65), 15, md.MultiXactZeroPage(md.OFFSETS_KIND, 2, 1)),
    (6, 0x10, struct.pack("<q", 65), 17, md.MultiXactZeroPage(md.MEMBERS_KIND, 2, 1)),
    (6, 0x20, words(4, 9, 2, 700, 1, 701, 5), 15, md.MultiXactCreate(4, 9, 2, ((700, 1), (701, 5)))),
    (6, 0x30, words(1, 2, 3, 4, 5), 15, md.MultiXactTruncate(1, 2, 3, 4, 5)),
    (7, 0x00, words(5, 1663, 4) + b"mapp", 15, md.RelmapUpdate(5, 1663, 4, b"mapp")),
    (8, 0x10, words(0, 0, 0, 800, 790, 799), 15, md.RunningXacts(790)),
    (19, 0x00, struct.pack("<QHB", 1 << 40, 3, 0), 15, md.ReploriginSet(1 << 40, 3)),
    (19, 0x10, struct.pack("<H", 3), 15, md.ReploriginDrop(3)),
    (21, 0x00, MESSAGE, 15, md.LogicalMessagePut("a/b/c", b"xyz")),
    (1, 0x00, struct.pack("<q", -9), 15, md.Commit(700, 0x00, -9, 0, 0, 0, (), (), 0, 0, 700, 0x1000028)),
    (1, 0x20, struct.pack("<q", 9), 15, md.Abort(700, 0x20, 9, 0, 0, 0, (), (), 0, 0, 700, 0x1000028)),
]
NOTHING = [
    (1, 0x50, b""), (1, 0x60, b""), (2, 0x30, b""), (4, 0x10, words(1, 2)), (5, 0x00, b""), (8, 0x00, b""), (8, 0x20, b""),
    (10, 0x00, b""), (11, 0x00, b""), (21, 0x00, struct.pack("<IIQQ", 5, 1, 2, 1) + b"p\0m"), (134, 0x00, b""),
]  # fmt: skip


@pytest.mark.parametrize(("rmid", "info", "main", "pg_major", "expected"), EXAMPLES)
def test_metadata_of_each_record(rmid: int, info: int, main: bytes, pg_major: int, expected: Any) -> None:
    found = made(rmid, info, main, pg_major)
    assert (found, type(found)) == (expected, type(expected))
    for cut in range(len(main)):
        try:
            shorter = made(rmid, info, main[:cut], pg_major)
        except CorruptionError as error:
            assert "0/1000028" in str(error) or "malformed" in str(error)
            continue
        # what is short by nature, or fields at the end that nobody reads
        assert rmid in (0, 1, 8, 19) or shorter is None or (rmid, cut) == (21, 24), (rmid, cut)
        assert rmid in (0, 1, 21) or shorter == expected


@pytest.mark.parametrize(("rmid", "info", "main"), NOTHING)
def test_records_without_metadata(rmid: int, info: int, main: bytes) -> None:
    assert made(rmid, info, main) is None


def test_a_prepared_transaction_that_commits() -> None:
    """With everything that a commit record can have, on 15 and on 18 (whose dropped statistics are longer)."""
    for pg_major, item in ((15, 12), (18, 16)):
        main = struct.pack("<qI", 5, 1 | 2 | 4 | 8 | 16 | 32 | 128 | 256) + words(5, 1663) + words(2, 701, 702)
        main += words(2, 1663, 5, 16400, 70000, 5, 16401) + words(1) + bytes(item) + words(1) + bytes(16)
        main += words(690) + b"gid\0" + struct.pack("<Qq", 0xAABB, 7)
        end = made(1, 0x30 | 0x80, main, pg_major)
        assert type(end) is md.CommitPrepared
        assert (end.xid, end.record_xid, end.info, end.time_us) == (690, 700, 0x30, 5)
        assert (end.db, end.spc, end.subxacts, end.origin_lsn) == (5, 1663, (701, 702), 0xAABB)
        assert end.relations == ((1663, 5, 16400),), "what has no key is left out"
        for cut in range(8, len(main) - 8):
            with pytest.raises(CorruptionError):
                made(1, 0x30 | 0x80, main[:cut], pg_major)


def test_tablespaces_without_a_key_are_left_out() -> None:
    far = 0x10000
    assert made(2, 0x10, words(far, 5, 6, 0)) is None
    assert made(2, 0x20, words(9, far, 5, 6, 7)) is None
    assert made(4, 0x00, words(16400, far, 1, 1663)) is None
    assert made(4, 0x20, words(16400, 2, 1663, far)) == md.DatabaseDrop(16400, (1663,))
    assert made(7, 0x00, words(5, far, 0)) is None
    assert made(2, 0x10, words(0xFFFF, 5, 6, 0)) is not None


def test_damaged_records_are_refused() -> None:
    for rmid, info, main in (
        (2, 0x10, words(1663, 5, 6, 4)),
        (4, 0x20, words(16400, 0xFFFF_FFFF, 1663)),
        (6, 0x20, words(4, 9, 0xFFFF_FFFF, 700, 1)),
        (7, 0x00, words(5, 1663, 400) + b"short"),
        (21, 0x00, struct.pack("<IIQQ", 5, 1, 16, 1 << 40) + b"neon-file:a/b/c\0xyz"),
    ):
        with pytest.raises(CorruptionError, match="0/1000028"):
            made(rmid, info, main)


def test_what_copies_a_database() -> None:
    assert copies_database(4, 0x00) and copies_database(4, 0x01)
    assert not copies_database(4, 0x10) and not copies_database(4, 0x20) and not copies_database(3, 0x00)


# --- visibility maps ------------------------------------------------------------------------------------------------

FAR = 5 * HEAP_BLOCKS_PER_VM_PAGE
FLAGS_AT_7 = bytes(7)


@pytest.mark.parametrize(
    ("rmid", "info", "main", "blocks", "new", "old", "flags"),
    [
        (HEAP, 0x00, b"\1\0\1", [(0, 0, 9)], 9, None, 3),
        (HEAP, 0x80, b"\1\0\1", [(0, 0, 9)], 9, None, 3),  # with INIT_PAGE
        (HEAP, 0x10, FLAGS_AT_7 + b"\1", [(0, 0, 9)], 9, None, 3),
        (HEAP, 0x20, FLAGS_AT_7 + b"\1", [(0, 0, 9), (1, 0, FAR)], None, FAR, 3),
        (HEAP, 0x20, FLAGS_AT_7 + b"\2", [(0, 0, 9), (1, 0, FAR)], 9, None, 3),
        (HEAP, 0x20, FLAGS_AT_7 + b"\3", [(0, 0, 9), (1, 0, FAR)], 9, FAR, 3),
        (HEAP, 0x40, FLAGS_AT_7 + b"\1", [(0, 0, 9)], None, 9, 3),
        (HEAP, 0x60, FLAGS_AT_7 + b"\1", [(0, 0, 9)], None, 9, 2),
        (HEAP2, 0x50, b"\1\0\2\0", [(0, 0, 9)], 9, None, 3),
        (HEAP2, 0x60, FLAGS_AT_7 + b"\1", [(0, 0, 9)], None, 9, 2),
        (NEON, 0x30, FLAGS_AT_7 + b"\3", [(0, 0, 9), (1, 0, FAR)], 9, FAR, 3),
        (NEON, 0x40, bytes(11) + b"\1", [(0, 0, 9)], None, 9, 2),
        (NEON, 0x50, b"\1", [(0, 0, 9)], 9, None, 3),
        # map pages that the record names are no business of ours
        (HEAP, 0x20, FLAGS_AT_7 + b"\3", [(0, 0, 9), (1, 0, FAR), (2, 2, 0)], None, FAR, 3),
        (HEAP, 0x20, FLAGS_AT_7 + b"\3", [(0, 0, 9), (1, 0, FAR), (3, 2, 5)], 9, None, 3),
    ],
)
def test_cleared_bits(
    rmid: int, info: int, main: bytes, blocks: list[tuple[int, int, int]], new: int | None, old: int | None, flags: int
) -> None:
    found = cleared_bits(rmid, info, main, (1663, 5, 16384), blocks)
    assert found == (new, old, RelTag(1663, 5, 16384, VM_FORK), flags)
    assert type(found) is (md.NeonClearVmBits if rmid == NEON else md.ClearVmBits)
    assert cleared_bits(rmid, info, main[:-1] + b"\0" if rmid != HEAP2 or info != 0x50 else bytes(4), (1, 2, 3), blocks) is None


def test_nothing_is_cleared() -> None:
    for rmid, info, main, blocks in (
        (HEAP, 0x30, FLAGS_AT_7 + b"\1", [(0, 0, 9)]),  # an operation that touches no map
        (HEAP2, 0x40, b"\1\1\1\1", [(0, 2, 0)]),  # VISIBLE names the map
        (HEAP, 0x00, b"\1\0", [(0, 0, 9)]),  # too short
        (HEAP, 0x00, b"\1\0\1", []),
        (HEAP, 0x20, FLAGS_AT_7 + b"\3", [(0, 0, 9), (1, 0, FAR), (2, 2, 0), (3, 2, 5)]),
    ):
        assert cleared_bits(rmid, info, main, (1663, 5, 16384), blocks) is None


# --- images ---------------------------------------------------------------------------------------------------------


def image_record(*blocks: tuple[int, bytes, int, int, bytes], same: bool = False, main: bytes = b"") -> bytes:
    """A record of (id, image, hole's offset, image info, data) blocks; ``same``: all but the first are of one relation."""
    headers, bodies = b"", b""
    for number, (block_id, image, hole_offset, info, data) in enumerate(blocks):
        again = same and number > 0
        headers += struct.pack("<BBH", block_id, 0x10 | (0x80 if again else 0), len(data))
        headers += struct.pack("<HHB", len(image), hole_offset, info) + (b"\0\1" if info & 0x1C and info & 1 else b"")
        headers += b"" if again else words(1663, 5, 16384)
        headers += words(number)
        bodies += image + data
    if main:
        headers += struct.pack("<BI", 254, len(main)) if len(main) > 255 else bytes([255, len(main)])
    return bytes(24) + headers + bodies + main


PAGE = random.Random(5).randbytes(14) + b"\x80\x1f" + random.Random(6).randbytes(PAGE_SIZE - 16)


def with_lsn(page: bytes, lsn: int) -> bytes:
    return struct.pack("<II", lsn >> 32, lsn & 0xFFFF_FFFF) + page[8:]


def test_images_become_pages() -> None:
    end, holey = 0x5_0000_0028, PAGE[:40] + PAGE[8000:]
    for main in (b"", b"m" * 9, b"m" * 300):
        record = image_record(
            (0, PAGE, 0, 2, b""), (1, holey, 40, 3, b"data"), (2, PAGE[:100], 0, 2 | 4, b""), (3, b"", 0, 2, b""),
            (4, PAGE, 0, 0, b"d"), (32, bytes(PAGE_SIZE), 0, 2, b""), same=len(main) == 9, main=main,
        )  # fmt: skip
        pages = applied_images(record, end)
        assert set(pages) == {0, 1, 32}, "compressed, empty and not applied ones are left out"
        assert pages[0] == with_lsn(PAGE, end)
        assert pages[1] == with_lsn(PAGE[:40] + bytes(8000 - 40) + PAGE[8000:], end)
        assert pages[32] == bytes(PAGE_SIZE), "a page that was never initialised keeps no LSN"
    assert applied_images(bytes(24) + b"\xfd\1\2" + b"\xfc\1\2\3\4" + image_record((0, PAGE, 0, 2, b""))[24:], end)


def test_damaged_images_are_refused() -> None:
    record = image_record((0, PAGE, 0, 2, b""), (1, PAGE[:40] + PAGE[8000:], 40, 3, b"data"))
    for cut in range(25, len(record) - 4, 97):
        with pytest.raises(CorruptionError, match="0/28"):
            applied_images(record[:cut], 0x28)
    for image, hole_offset, info in ((PAGE[:-1], 0, 2), (PAGE[:40], 41, 3), (PAGE + b"x", 0, 2)):
        with pytest.raises(CorruptionError, match="0/28"):
            applied_images(image_record((0, image, hole_offset, info, b"")), 0x28)

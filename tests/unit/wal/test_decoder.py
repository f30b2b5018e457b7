"""The C decoder against the Python oracle and pg_waldump: on synthetic WAL, on real WAL, at any chunking."""

import itertools
import random
import re
import struct

import numpy as np
import pytest

from neon_services.ground.lsn import Lsn, format_lsn
from neon_services.wal.decoder import (
    IMPLIED_BLOCK_ID,
    RECORD_DTYPE,
    REF_DTYPE,
    REF_IMPLIED_VM,
    WalBatch,
    WalDecodeError,
    WalDecoder,
)
from neon_services.wal.framing import parse_record_header
from neon_services.wal.libraries import load_waldec
from neon_services.wal.oracle import OracleDecoder
from neon_services.wal.scanner import WalScanner, find_end_of_wal
from tests.unit.wal.stock_postgres import RealWal
from tests.unit.wal.wal_builder import SMALL_SEGMENT, WalBuilder, random_chunks, random_wal

REF_IN_DUMP = re.compile(r"rel (\d+)/(\d+)/(\d+)(?: fork (\w+))? blk (\d+)")
RECORD_IN_DUMP = re.compile(
    r"len \(rec/tot\):\s*(\d+)/\s*(\d+), tx:\s*(\d+), lsn: ([0-9A-F]+)/([0-9A-F]+), prev ([0-9A-F]+)/([0-9A-F]+)"
)
FORKS = {None: 0, "main": 0, "fsm": 1, "vm": 2, "init": 3}


def join(batches: list[WalBatch]) -> WalBatch:
    """One batch out of many: indexes and offsets made relative to the whole."""
    records, refs, blob = [], [], b""
    count = ref_count = 0
    for batch in batches:
        rows, ref_rows = batch.records.copy(), batch.refs.copy()
        rows["blob_off"] += len(blob)
        rows["first_ref"] += ref_count
        ref_rows["rec"] += count
        count += len(rows)
        ref_count += len(ref_rows)
        records.append(rows)
        refs.append(ref_rows)
        blob += batch.blob
    empty = WalBatch(np.empty(0, RECORD_DTYPE), np.empty(0, REF_DTYPE), b"", Lsn(0))
    records, refs = records or [empty.records], refs or [empty.refs]
    return WalBatch(np.concatenate(records), np.concatenate(refs), blob, batches[-1].next_lsn)


def assert_same(left: WalBatch, right: WalBatch) -> None:
    """Equal in every field."""
    assert left.records.dtype == right.records.dtype and left.refs.dtype == right.refs.dtype
    assert np.array_equal(left.records, right.records)
    assert np.array_equal(left.refs, right.refs)
    assert left.blob == right.blob
    assert left.next_lsn == right.next_lsn


def test_row_layout_is_the_one_documented() -> None:
    assert RECORD_DTYPE.itemsize == 48 and REF_DTYPE.itemsize == 32


def test_crc_table_agrees_with_the_instruction() -> None:
    library = load_waldec(15)
    library.crc32c_init()
    for size in (0, 1, 7, 8, 9, 1000):
        data = random.Random(size).randbytes(size)
        answers = {
            function(0xFFFFFFFF, data, size) & 0xFFFFFFFF
            for function in (library.crc32c_extend, library.crc32c_extend_by_table)
        }
        assert len(answers) == 1


@pytest.mark.parametrize("seed", range(5))
def test_synthetic_wal_at_any_chunking(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    wal = random_wal(rng, 50)
    decoder = WalDecoder(wal.start, 15, segment_size=SMALL_SEGMENT)
    oracle = OracleDecoder(wal.start, 15, segment_size=SMALL_SEGMENT)
    batches = []
    for chunk in random_chunks(rng, wal.data):
        batch = decoder.feed(rng.choice((bytes, memoryview, bytearray))(chunk))
        assert_same(batch, oracle.feed(chunk))
        assert decoder.position == oracle.position
        batches.append(batch)
    whole = join(batches)
    assert whole.records["start_lsn"].tolist() == wal.starts
    assert whole.records["end_lsn"].tolist() == wal.ends
    assert whole.next_lsn == wal.end == decoder.next_lsn
    for row, record in zip(whole.records, wal.records, strict=True):
        entry = whole.blob[row["blob_off"] :]
        assert entry[:8] == struct.pack("<Q", row["end_lsn"]) and entry[8 : 8 + len(record)] == record
        prev = parse_record_header(record).prev
        assert struct.unpack_from("<Q", entry, 16)[0] == prev
        assert row["tot_len"] == len(record) and row["xid"] == 7
    decoder.close()
    decoder.close()
    with pytest.raises(ValueError, match="closed"):
        decoder.feed(b"")


def test_error_names_the_lsn_and_where_decoding_was() -> None:
    wal = WalBuilder()
    wal.append(b"good")
    good = wal.append(b"good too")
    wal.append(b"bad")
    data = bytearray(wal.data)
    data[good - wal.start + 27] ^= 1
    for make in (WalDecoder, OracleDecoder):
        decoder = make(wal.start, 15, segment_size=SMALL_SEGMENT)
        decoder.feed(data[: good - wal.start])
        with pytest.raises(WalDecodeError, match=f"CRC of the record at {format_lsn(good)}"):
            decoder.feed(bytes(data[good - wal.start :]))
        assert decoder.next_lsn == good
        unchecked = make(wal.start, 15, segment_size=SMALL_SEGMENT, verify_crc=False)
        assert len(unchecked.feed(data).records) == 3


def test_wal_of_another_major_is_refused() -> None:
    wal = WalBuilder(pg_major=17)
    wal.append(b"x")
    for make in (WalDecoder, OracleDecoder):
        with pytest.raises(WalDecodeError, match="another Postgres major"):
            make(wal.start, 15, segment_size=SMALL_SEGMENT).feed(wal.data)


def record_body(*parts: bytes) -> bytes:
    """The bytes between a record's header and its end."""
    return b"".join(parts)


BLOCK = struct.pack("<BBH", 0, 0, 0) + struct.pack("<IIII", 1663, 5, 16384, 9)
MALFORMED = {
    "unknown block id": b"\x21" + bytes(9),
    "block ids out of order": BLOCK + BLOCK + b"\xff\x01x",
    "the first block refers to the relation of the one before": struct.pack("<BBHI", 0, 0x80, 0, 1) + b"\xff\x01x",
    "truncated block header": b"\x00\x00",
    "truncated image header": struct.pack("<BBH", 0, 0x10, 0) + b"\x01",
    "truncated main data header": b"\xfe\x01\x02",
    "truncated replication origin": b"\xfd\x01",
    "truncated top-level transaction id": b"\xfc\x01\x02",
    "lengths in the headers do not add up": b"\xff\x09only",
}


@pytest.mark.parametrize("problem", MALFORMED)
def test_malformed_record_with_a_right_crc(problem: str) -> None:
    import crc32c

    body = MALFORMED[problem]
    head = struct.pack("<IIQBB2x", 24 + len(body), 0, 0, 0, 10)
    record = head + struct.pack("<I", crc32c.crc32c(head, crc32c.crc32c(body))) + body
    wal = WalBuilder()
    lsn = wal.append(b"before")
    data = wal.data + record + bytes(8)
    for make in (WalDecoder, OracleDecoder):
        with pytest.raises(WalDecodeError, match=f"{problem} at {format_lsn(lsn)}"):
            make(wal.start, 15, segment_size=SMALL_SEGMENT).feed(data)


@pytest.mark.postgres
def test_real_wal_equals_the_oracle_at_any_chunking(real_wal: RealWal) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    end = wal_end(real_wal)
    used = real_wal.data[: end - real_wal.start_lsn]
    one = WalDecoder(real_wal.start_lsn, 15).feed(used)
    assert_same(one, OracleDecoder(real_wal.start_lsn, 15).feed(used))
    decoder, scanner, at = WalDecoder(real_wal.start_lsn, 15), WalScanner(real_wal.start_lsn), 0
    batches = []
    chunks = itertools.chain.from_iterable(random_chunks(rng, used[i : i + (1 << 20)]) for i in range(0, len(used), 1 << 20))
    for chunk in chunks:
        batches.append(decoder.feed(chunk))
        scanner.feed(chunk)
        at += len(chunk)
        assert scanner.position == decoder.position == real_wal.start_lsn + at
        published = int(np.searchsorted(one.records["end_lsn"], scanner.position, "right"))
        assert scanner.record_end_lsn == (one.records["end_lsn"][published - 1] if published else real_wal.start_lsn)
    assert_same(join(batches), one)
    assert one.next_lsn == end == scanner.record_end_lsn
    implied = one.refs[one.refs["flags"] == REF_IMPLIED_VM]
    assert len(implied) and (implied["block_id"] == IMPLIED_BLOCK_ID).all(), "the workload clears visibility map bits"


def wal_end(wal: RealWal) -> Lsn:
    """The end of the WAL in the files of the stopped server."""

    def read(lsn: Lsn, n: int) -> bytes:
        return wal.data[lsn - wal.start_lsn : lsn - wal.start_lsn + n]

    return find_end_of_wal(read, wal.start_lsn)


@pytest.mark.postgres
def test_pg_waldump_agrees(real_wal: RealWal) -> None:
    end = wal_end(real_wal)
    batch = WalDecoder(real_wal.start_lsn, 15).feed(real_wal.data[: end - real_wal.start_lsn])
    server = real_wal.server
    dump = server.run(
        "pg_waldump", "-p", server.data / "pg_wal", "-s", format_lsn(int(batch.records["start_lsn"][0])), check=False
    )
    lines = [(RECORD_IN_DUMP.search(line), line) for line in dump.splitlines()]
    dumped = [(match, line) for match, line in lines if match]
    assert len(dumped) == len(batch.records) > 10000
    for index, (match, line) in enumerate(dumped):
        row = batch.records[index]
        assert int(match[4], 16) << 32 | int(match[5], 16) == row["start_lsn"], line
        assert (int(match[2]), int(match[3])) == (row["tot_len"], row["xid"]), line
        prev = struct.unpack_from("<Q", batch.blob, int(row["blob_off"]) + 16)[0]
        assert int(match[6], 16) << 32 | int(match[7], 16) == prev, line
        refs = batch.refs[row["first_ref"] : row["first_ref"] + row["nref"]]
        ours = [
            (int(r["spc"]), int(r["db"]), int(r["rel"]), int(r["fork"]), int(r["blk"]))
            for r in refs
            if r["block_id"] != IMPLIED_BLOCK_ID
        ]
        blocks = line.split("blkref", 1)[1] if "blkref" in line else ""
        theirs = [(int(a), int(b), int(c), FORKS[fork or None], int(e)) for a, b, c, fork, e in REF_IN_DUMP.findall(blocks)]
        assert ours == theirs, line


@pytest.mark.postgres
def test_end_of_wal_is_the_end_of_the_shutdown_checkpoint(real_wal: RealWal) -> None:
    from neon_services.wal.control_data import CheckPoint, ControlFile

    control = ControlFile.parse((real_wal.server.data / "global" / "pg_control").read_bytes())
    end = wal_end(real_wal)
    batch = WalDecoder(control.checkpoint_lsn, 15).feed(
        real_wal.data[control.checkpoint_lsn - real_wal.start_lsn : end - real_wal.start_lsn]
    )
    assert len(batch.records) == 1 and batch.next_lsn == end
    row = batch.records[0]
    main = int(row["blob_off"]) + 8 + int(row["main_off"])
    assert CheckPoint.parse(batch.blob[main : main + int(row["main_len"])]) == control.checkpoint

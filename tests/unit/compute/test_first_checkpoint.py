"""The first checkpoint: what stock Postgres and WAL readers will find, byte by byte."""

import dataclasses
import random
import struct

import pytest

from neon_services.compute.first_checkpoint import FirstCheckpoint, make_first_checkpoint, parse_previous_lsn
from neon_services.ground.errors import CorruptionError, NeonError, ProtocolViolation
from neon_services.ground.lsn import WAL_SEGMENT_SIZE, XLOG_BLCKSZ, Lsn, page_header_size, segment_file_name
from neon_services.wal.control_data import CheckPoint, ControlFile, DBState
from neon_services.wal.framing import parse_page_header, parse_record_header, record_crc

CHECKPOINT = CheckPoint(
    redo=Lsn(0), tli=1, prev_tli=1, full_page_writes=True, wal_level=0, next_full_xid=70000, next_oid=20000, next_multi=5000,
    next_multi_offset=9000, oldest_xid=700, oldest_xid_db=1, oldest_multi=1, oldest_multi_db=1, time=0, oldest_commit_ts_xid=0,
    newest_commit_ts_xid=0, oldest_active_xid=0,
)  # fmt: skip
CONTROL = ControlFile(
    system_identifier=7_000_000_000_000_000_001, pg_control_version=1300, catalog_version_no=202209061,
    state=DBState.IN_PRODUCTION,
    time=0, checkpoint_lsn=Lsn(0), checkpoint=CHECKPOINT, unlogged_lsn=Lsn(1000), min_recovery_point=Lsn(0),
    min_recovery_point_tli=0, backup_start_point=Lsn(0), backup_end_point=Lsn(0), backup_end_required=False, wal_level=1,
    wal_log_hints=False, max_connections=100, max_worker_processes=8, max_wal_senders=10, max_prepared_xacts=0,
    max_locks_per_xact=64, track_commit_timestamp=False, max_align=8, float_format=1234567.0, blcksz=8192, relseg_size=131072,
    xlog_blcksz=8192, xlog_seg_size=WAL_SEGMENT_SIZE, name_data_len=64, index_max_keys=32, toast_max_chunk_size=1996,
    loblksize=2048, float8_by_val=True, data_checksum_version=0, default_char_signedness=None,
    mock_authentication_nonce=bytes(32),
)  # fmt: skip


def wal_of(made: FirstCheckpoint) -> dict[int, bytes]:
    """The segments' whole content by their first LSN."""
    content = {}
    for name, writes in made.segments.items():
        image = bytearray(WAL_SEGMENT_SIZE)
        for offset, piece in writes:
            image[offset : offset + len(piece)] = piece
        content[(int(name[8:16], 16) * 256 + int(name[16:], 16)) * WAL_SEGMENT_SIZE] = bytes(image)
    return content


def read_record(wal: dict[int, bytes], at: int) -> bytes:
    """Follow a record over page headers, as a reader does; checks the continuation headers on the way."""

    def page(start: int) -> bytes:
        segment = start - start % WAL_SEGMENT_SIZE
        return wal[segment][start - segment : start - segment + XLOG_BLCKSZ]

    start = at - at % XLOG_BLCKSZ
    (length,) = struct.unpack_from("<I", page(start), at - start)  # records are aligned: the length is never split
    record = page(start)[at - start :][:length]
    while len(record) < length:
        start += XLOG_BLCKSZ
        header = parse_page_header(page(start))
        assert header.page_addr == start and header.info & 1 and header.remaining_len == length - len(record)
        record += page(start)[header.size :][: length - len(record)]
    return record


POSITIONS = [XLOG_BLCKSZ * 3 - back for back in (0, 8, 16, 24, 64, 112, 120, 128, 4096)]
POSITIONS += [WAL_SEGMENT_SIZE * 2 - back for back in (0, 8, 40, 112, 120, 128)] + [
    WAL_SEGMENT_SIZE + 8192,
    0x169AD58,
    0x5_0000_0028,
]


@pytest.mark.parametrize("base_lsn", POSITIONS)
def test_the_record_is_found_and_right(base_lsn: int) -> None:
    made = make_first_checkpoint(CONTROL.to_bytes(), Lsn(base_lsn), Lsn(base_lsn - 80), 15)
    position = made.checkpoint_lsn
    assert position >= base_lsn and position % 8 == 0 and position - base_lsn <= 40
    assert position % XLOG_BLCKSZ >= page_header_size(position - position % XLOG_BLCKSZ)
    record = read_record(wal_of(made), position)
    header = parse_record_header(record)
    assert (header.prev, header.rmid, header.info, header.tot_len) == (base_lsn - 80, 0, 0, len(record))
    assert header.crc == record_crc(record)
    checkpoint = CheckPoint.parse(record[26:])
    assert checkpoint.redo == position and checkpoint.next_full_xid == 70000
    stored = ControlFile.parse(made.control.to_bytes())
    assert stored.state == DBState.SHUTDOWNED and stored.checkpoint_lsn == position and stored.checkpoint == checkpoint


@pytest.mark.parametrize("base_lsn", POSITIONS)
def test_readers_that_look_for_the_first_record_land_on_it(base_lsn: int) -> None:
    """The page's header says that everything before the record is the rest of an earlier one."""
    made = make_first_checkpoint(CONTROL.to_bytes(), Lsn(base_lsn), Lsn(0), 15)
    position, wal = made.checkpoint_lsn, wal_of(made)
    page = position - position % XLOG_BLCKSZ
    segment = page - page % WAL_SEGMENT_SIZE
    header = parse_page_header(wal[segment][page - segment :][:40])
    assert header.page_addr == page and header.tli == 1 and header.magic == 0xD110
    assert page + header.size + header.remaining_len == position
    assert bool(header.info & 1) == (header.remaining_len > 0)
    first = parse_page_header(wal[segment][:40])
    assert first.system_identifier == CONTROL.system_identifier and first.segment_size == WAL_SEGMENT_SIZE


def test_the_segment_of_an_unaligned_start_exists() -> None:
    """The safekeepers get the stream from the base LSN on, padding included."""
    made = make_first_checkpoint(CONTROL.to_bytes(), Lsn(2 * WAL_SEGMENT_SIZE - 4), Lsn(0), 15)
    assert set(made.segments) == {segment_file_name(1), segment_file_name(2)}


def test_slru_pages_cover_what_startup_reads() -> None:
    made = make_first_checkpoint(CONTROL.to_bytes(), Lsn(0x2000028), Lsn(0), 15)
    assert made.slru_pages() == {"pg_xact": 2, "pg_multixact/offsets": 2, "pg_multixact/members": 5}


def test_damaged_and_unsupported_input_is_refused() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    control = bytearray(CONTROL.to_bytes())
    control[random.Random(seed).randrange(288)] ^= 0x10
    with pytest.raises(CorruptionError):
        make_first_checkpoint(bytes(control), Lsn(0x2000028), Lsn(0), 15)
    with pytest.raises(NeonError, match="Postgres 14"):
        make_first_checkpoint(CONTROL.to_bytes(), Lsn(0x2000028), Lsn(0), 14)
    assert dataclasses.is_dataclass(CONTROL)


def test_previous_lsn() -> None:
    assert parse_previous_lsn("PREV LSN: 0/169AD58\n") == 0x169AD58
    assert parse_previous_lsn("PREV LSN: none") == 0
    with pytest.raises(NeonError, match="read-only"):
        parse_previous_lsn("PREV LSN: invalid")
    for text in (None, "", "PREV LSN: ?", "LSN: 0/1"):
        with pytest.raises(ProtocolViolation):
            parse_previous_lsn(text)

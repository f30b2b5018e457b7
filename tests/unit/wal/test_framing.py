"""Page headers, record building and placing; pg_control as bytes."""

import dataclasses
import random

import pytest

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import Lsn
from neon_services.wal import framing
from neon_services.wal.control_data import CHECKPOINT_SIZE, CONTROL_FILE_SIZE, CheckPoint, ControlFile, DBState
from neon_services.wal.decoder import WalDecoder
from neon_services.wal.framing import PageHeader, build_page_header, parse_page_header
from tests.unit.wal.stock_postgres import RealWal

CHECKPOINT = CheckPoint(
    redo=Lsn(0x5000028),
    tli=1,
    prev_tli=1,
    full_page_writes=True,
    wal_level=1,
    next_full_xid=(3 << 32) | 900,
    next_oid=16500,
    next_multi=2,
    next_multi_offset=5,
    oldest_xid=700,
    oldest_xid_db=1,
    oldest_multi=1,
    oldest_multi_db=5,
    time=1700000000,
    oldest_commit_ts_xid=0,
    newest_commit_ts_xid=0,
    oldest_active_xid=0,
)
CONTROL = ControlFile(
    system_identifier=7711582034944757723,
    pg_control_version=1300,
    catalog_version_no=202209061,
    state=DBState.SHUTDOWNED,
    time=1700000001,
    checkpoint_lsn=Lsn(0x5000028),
    checkpoint=CHECKPOINT,
    unlogged_lsn=Lsn(1000),
    min_recovery_point=Lsn(0),
    min_recovery_point_tli=0,
    backup_start_point=Lsn(0),
    backup_end_point=Lsn(0),
    backup_end_required=False,
    wal_level=1,
    wal_log_hints=False,
    max_connections=100,
    max_worker_processes=8,
    max_wal_senders=10,
    max_prepared_xacts=0,
    max_locks_per_xact=64,
    track_commit_timestamp=True,
    max_align=8,
    float_format=1234567.0,
    blcksz=8192,
    relseg_size=131072,
    xlog_blcksz=8192,
    xlog_seg_size=16777216,
    name_data_len=64,
    index_max_keys=32,
    toast_max_chunk_size=1996,
    loblksize=2048,
    float8_by_val=True,
    data_checksum_version=1,
    default_char_signedness=None,
    mock_authentication_nonce=bytes(range(32)),
)


def test_page_header_round_trip() -> None:
    short = build_page_header(8192, pg_major=17, system_identifier=9, remaining_len=77)
    assert len(short) == 24
    assert parse_page_header(short) == PageHeader(0xD116, framing.XLP_FIRST_IS_CONTRECORD, 1, Lsn(8192), 77)
    long = build_page_header(32 << 20, pg_major=15, system_identifier=9)
    assert len(long) == 40
    assert parse_page_header(long) == PageHeader(0xD110, framing.XLP_LONG_HEADER, 1, Lsn(32 << 20), 0, 9, 16 << 20, 8192)
    for length in range(len(long)):
        with pytest.raises(CorruptionError):
            parse_page_header(long[:length])
    with pytest.raises(ValueError, match="not the start"):
        build_page_header(100, pg_major=15, system_identifier=9)
    with pytest.raises(ValueError, match="no WAL page magic"):
        build_page_header(8192, pg_major=12, system_identifier=9)


@pytest.mark.parametrize("start", [40, 24 + 8192, 8192 - 8, 8192 - 24, 8192 - 56, 100 * 8, (16 << 20) - 8, (16 << 20) + 40])
@pytest.mark.parametrize("size", [88, 0, 255, 256, 20000])
def test_placed_record_is_decoded_again(start: int, size: int) -> None:
    base = 64 << 20
    record = framing.build_record(0, 0x20, random.Random(size).randbytes(size), prev_lsn=base - 64, xid=3)
    writes = framing.place_record(Lsn(base + start), record, pg_major=15, system_identifier=5)
    end = framing.record_end(base + start, len(record))
    assert writes[-1][0] + len(writes[-1][1]) == end
    decoder = WalDecoder(writes[0][0], 15)
    at = writes[0][0]
    batches = []
    for lsn, data in writes:
        assert lsn == at, "the writes touch each other"
        batches.append(decoder.feed(data))
        at = lsn + len(data)
    records = [row for batch in batches for row in batch.records]
    assert [int(row["start_lsn"]) for row in records] == [base + start] and records[0]["main_len"] == size
    assert decoder.next_lsn == end
    if size == 88:
        assert len(record) == 114
        assert record == framing.build_record(0, 0x20, random.Random(88).randbytes(88), prev_lsn=base - 64, xid=3)


@pytest.mark.parametrize("start", [0, 8, 39, 41, 8192, 8192 + 16])
def test_record_cannot_start_inside_a_header_or_unaligned(start: int) -> None:
    with pytest.raises(ValueError, match="no record can start"):
        framing.place_record(Lsn(start), framing.build_record(0, 0x20, b"x", prev_lsn=0), pg_major=15, system_identifier=1)


@pytest.mark.parametrize(("lsn", "start"), [(0, 40), (8192, 8216), (8193, 8200 + 16 - 16), (8185, 8192 + 24), (100, 104)])
def test_record_start(lsn: int, start: int) -> None:
    assert framing.record_start(lsn) == start


def test_checkpoint_struct() -> None:
    data = CHECKPOINT.to_bytes()
    assert len(data) == CHECKPOINT_SIZE and CheckPoint.parse(data) == CHECKPOINT
    assert data[24:32] == CHECKPOINT.next_full_xid.to_bytes(8, "little") and data[64:72] == CHECKPOINT.time.to_bytes(
        8, "little"
    )
    for length in range(CHECKPOINT_SIZE):
        with pytest.raises(CorruptionError):
            CheckPoint.parse(data[:length])


@pytest.mark.parametrize(("version", "signedness", "crc_at"), [(1300, None, 288), (1700, None, 288), (1800, True, 292)])
def test_control_file_round_trip(version: int, signedness: bool | None, crc_at: int) -> None:
    control = dataclasses.replace(CONTROL, pg_control_version=version, default_char_signedness=signedness)
    data = control.to_bytes()
    assert len(data) == CONTROL_FILE_SIZE and not any(data[crc_at + 4 :]) and any(data[crc_at : crc_at + 4])
    assert ControlFile.parse(data) == control
    assert ControlFile.parse(data[: crc_at + 4]) == control
    for at in range(crc_at + 4):
        changed = bytearray(data)
        changed[at] ^= 4
        with pytest.raises(CorruptionError):
            ControlFile.parse(bytes(changed))
    for length in range(0, crc_at + 4, 7):
        with pytest.raises(CorruptionError):
            ControlFile.parse(data[:length])


@pytest.mark.postgres
def test_control_file_of_a_server(real_wal: RealWal) -> None:
    data = (real_wal.server.data / "global" / "pg_control").read_bytes()
    control = ControlFile.parse(data)
    assert control.to_bytes() == data
    shown = dict(
        line.split(":", 1)
        for line in real_wal.server.run("pg_controldata", "-D", real_wal.server.data).splitlines()
        if ":" in line
    )
    assert int(shown["Database system identifier"]) == control.system_identifier
    assert shown["Latest checkpoint's NextXID"].strip() == f"0:{control.checkpoint.next_full_xid}"
    assert int(shown["max_prepared_xacts setting"]) == control.max_prepared_xacts == 5
    assert shown["Mock authentication nonce"].strip() == control.mock_authentication_nonce.hex()
    assert control.state == DBState.SHUTDOWNED and control.checkpoint.redo == control.checkpoint_lsn


@pytest.mark.postgres
def test_shutdown_checkpoint_record_equals_the_servers(real_wal: RealWal) -> None:
    """Build again, from pg_control alone, the checkpoint record that the server wrote."""
    control = ControlFile.parse((real_wal.server.data / "global" / "pg_control").read_bytes())
    at = control.checkpoint_lsn - real_wal.start_lsn
    prev = framing.parse_record_header(real_wal.data[at : at + 24]).prev
    record = framing.build_shutdown_checkpoint_record(control.checkpoint.to_bytes(), prev_lsn=prev)
    writes = framing.place_record(control.checkpoint_lsn, record, pg_major=15, system_identifier=control.system_identifier)
    for lsn, data in writes:
        theirs = real_wal.data[lsn - real_wal.start_lsn : lsn - real_wal.start_lsn + len(data)]
        if len(writes) == 1:
            assert theirs == data
        assert theirs[-60:] == data[-60:]

"""The record scanner, compiled and in Python, on crafted WAL: every kind of boundary and every kind of end."""

import random
import struct
from collections.abc import Callable

import pytest

from neon_services.ground.lsn import Lsn
from neon_services.wal.framing import (
    XLP_FIRST_IS_OVERWRITE_CONTRECORD,
    build_page_header,
    build_record,
    place_record,
    record_end,
)
from neon_services.wal.oracle import OracleScanner
from neon_services.wal.records import (
    STOP_INVALID,
    STOP_STALE_PAGE,
    STOP_ZERO_LENGTH,
    STOP_ZERO_PAGE,
    WalDecodeError,
)
from neon_services.wal.scanner import WalScanner, _CompiledScanner, find_end_of_wal
from tests.unit.wal.wal_builder import SMALL_SEGMENT, WalBuilder, random_chunks, random_wal

Make = Callable[[int], "WalScanner | OracleScanner"]


@pytest.fixture(params=["compiled", "python"])
def make(request: pytest.FixtureRequest) -> Make:
    """A scanner of either kind, with small segments."""
    if request.param == "python":
        return lambda lsn: OracleScanner(lsn, segment_size=SMALL_SEGMENT)

    def compiled(lsn: int) -> WalScanner:
        scanner = WalScanner(lsn, segment_size=SMALL_SEGMENT)
        assert isinstance(scanner._scanner, _CompiledScanner), "run `make ext` first"
        return scanner

    return compiled


def expected_end(wal: WalBuilder, position: int, start: int) -> int:
    """The last record end at or below this position."""
    return max((end for end in wal.ends if start < end <= position), default=start)


def end_of(wal: WalBuilder, data: bytes, start: int | None = None) -> Lsn:
    """find_end_of_wal over these bytes, which are all there is."""

    def read(lsn: Lsn, n: int) -> bytes:
        return data[lsn - wal.start : lsn - wal.start + n]

    return find_end_of_wal(read, wal.start if start is None else start, segment_size=wal.segment_size)


@pytest.mark.parametrize("seed", range(8))
def test_any_chunking_gives_every_record_end(make: Make, seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    wal = random_wal(rng, 60)
    scanner = make(wal.start)
    consumed = 0
    for chunk in random_chunks(rng, wal.data):
        scanner.feed(rng.choice((bytes, bytearray, memoryview, lambda part: memoryview(bytearray(part))))(chunk))
        consumed += len(chunk)
        assert scanner.position == wal.start + consumed
        assert scanner.record_end_lsn == expected_end(wal, scanner.position, wal.start)
    assert scanner.record_end_lsn == wal.end and len(wal.ends) == 60


@pytest.mark.parametrize("major", [15, 16, 17, 18])
def test_every_major_is_known(make: Make, major: int) -> None:
    wal = random_wal(random.Random(major), 20, pg_major=major)
    scanner = make(wal.start)
    scanner.feed(wal.data)
    assert scanner.record_end_lsn == wal.end


def test_byte_by_byte_nothing_comes_early(make: Make) -> None:
    wal = WalBuilder()
    for size in (0, 9, 300, 8200, 5):
        wal.append(bytes([size % 251]) * size)
    scanner = make(wal.start)
    for at, byte in enumerate(wal.data):
        scanner.feed(bytes([byte]))
        assert scanner.record_end_lsn == expected_end(wal, wal.start + at + 1, wal.start)


def test_every_record_start_and_page_start_is_a_start_point(make: Make) -> None:
    wal = random_wal(random.Random(99), 40)
    points = [*wal.starts, *range(wal.start, wal.end, 8192)]
    for point in points:
        if any(switch < point < after for switch, after in wal.switches):
            continue  # the unused rest of a switched segment has no page headers
        scanner = make(point)
        assert scanner.record_end_lsn == point
        scanner.feed(wal.data[point - wal.start :])
        assert scanner.record_end_lsn == wal.end, hex(point)


def test_record_that_ends_with_its_page(make: Make) -> None:
    wal = WalBuilder()
    wal.append(b"first")
    wal.fill_page_to(8192)
    assert wal.end % 8192 == 0
    scanner = make(wal.start)
    scanner.feed(wal.data)
    assert scanner.record_end_lsn == wal.end == scanner.position
    wal.append(b"on the next page")
    scanner.feed(wal.data[scanner.position - wal.start :])
    assert scanner.record_end_lsn == wal.end


@pytest.mark.parametrize("left", [8, 16, 24, 32])
def test_record_header_that_straddles_pages(make: Make, left: int) -> None:
    wal = WalBuilder()
    wal.append(b"first")
    wal.fill_page_to(8192 - left)
    wal.append(b"straddles" * 10)
    wal.append(b"after")
    for step in (1, 5, 100000):
        scanner = make(wal.start)
        for at in range(0, len(wal.data), step):
            scanner.feed(wal.data[at : at + step])
        assert scanner.record_end_lsn == wal.end


def test_switch_counts_when_the_rest_of_its_segment_is_there(make: Make) -> None:
    wal = WalBuilder()
    before = wal.append(b"before")
    after_switch = wal.switch()
    wal.append(b"in the next segment")
    scanner = make(wal.start)
    scanner.feed(wal.data[: after_switch - wal.start - 1])
    assert scanner.record_end_lsn == before
    scanner.feed(wal.data[after_switch - wal.start - 1 : after_switch - wal.start])
    assert scanner.record_end_lsn == after_switch == scanner.position
    scanner.feed(wal.data[after_switch - wal.start :])
    assert scanner.record_end_lsn == wal.end


def test_overwritten_record_is_forgotten(make: Make) -> None:
    wal = WalBuilder()
    wal.append(b"kept")
    kept = wal.end
    lost = build_record(21, 0, bytes(20000), prev_lsn=wal.starts[-1])
    for lsn, part in place_record(kept, lost, pg_major=15, system_identifier=42, segment_size=SMALL_SEGMENT)[:2]:
        wal.put(lsn, part)
    page = wal.start + 2 * 8192  # the writer died here and began anew on this page
    header = build_page_header(
        page, pg_major=15, system_identifier=42, segment_size=SMALL_SEGMENT, info=XLP_FIRST_IS_OVERWRITE_CONTRECORD
    )
    again = build_record(0, 0xD0, struct.pack("<Qq", kept, 0), prev_lsn=wal.starts[-1])
    wal.put(page, header + again)
    wal.end = record_end(page + len(header), len(again), SMALL_SEGMENT)
    data = wal.data.ljust(wal.end - wal.start, b"\0")
    for step in (1, 999, 100000):
        scanner = make(wal.start)
        for at in range(0, len(data), step):
            scanner.feed(data[at : at + step])
        assert scanner.record_end_lsn == wal.end


def flip(data: bytes, at: int) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    changed[at] ^= 0x10
    return bytes(changed)


def damaged(kind: str, wal: WalBuilder) -> tuple[bytes, int]:
    """(the WAL with this damage after its third record, the reason it must be given)."""
    good = wal.ends[2]
    at = good - wal.start
    data = wal.data
    page = -(-at // 8192) * 8192
    if kind == "zero length":
        return data[:at] + bytes(5000), STOP_ZERO_LENGTH
    if kind == "body bit":
        return flip(data, at + 40), STOP_INVALID
    if kind == "crc bit":
        return flip(data, at + 21), STOP_INVALID
    if kind == "prev bit":
        return flip(data, at + 9), STOP_INVALID
    if kind == "length too small":
        return data[:at] + struct.pack("<I", 23) + data[at + 4 :], STOP_INVALID
    if kind == "length too large":
        return data[:at] + struct.pack("<I", 0x7FFFFFFF) + data[at + 4 :], STOP_INVALID
    if kind == "zero page":
        return data[:page] + bytes(8192), STOP_ZERO_PAGE
    if kind == "page of another place":
        return data[: page + 8] + struct.pack("<Q", 12345 * 8192) + data[page + 16 :], STOP_STALE_PAGE
    if kind == "page magic":
        return flip(data, page), STOP_INVALID
    if kind == "continuation length":
        return flip(data, page + 16), STOP_INVALID
    if kind == "continuation flag":
        return flip(data, page + 2)[: page + 2] + b"\0\0" + data[page + 4 :], STOP_INVALID
    raise AssertionError(kind)


KINDS = [
    "zero length",
    "body bit",
    "crc bit",
    "prev bit",
    "length too small",
    "length too large",
    "zero page",
    "page of another place",
    "page magic",
    "continuation length",
    "continuation flag",
]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_and_wal_ends_before_it(make: Make, kind: str) -> None:
    wal = WalBuilder()
    for size in (100, 2000, 5, 9000, 17):
        wal.append(b"r" * size)
    data, reason = damaged(kind, wal)
    for step in (1, 64, 1 << 20):
        scanner = make(wal.start)
        with pytest.raises(WalDecodeError, match=r" at 0/[0-9A-F]+") as caught:
            for at in range(0, len(data), step):
                scanner.feed(data[at : at + step])
        assert caught.value.reason == reason
        assert caught.value.natural_end == (reason != STOP_INVALID)
        assert scanner.record_end_lsn == wal.ends[2]
        with pytest.raises(WalDecodeError):
            scanner.feed(b"x")
    assert end_of(wal, data) == wal.ends[2]
    assert end_of(wal, data, wal.ends[1]) == wal.ends[2]


def test_end_of_wal_where_the_bytes_end() -> None:
    wal = WalBuilder()
    for size in (3000, 9000, 40):
        wal.append(b"e" * size)
    for length in range(0, len(wal.data) + 1, 97):
        assert end_of(wal, wal.data[:length]) == expected_end(wal, wal.start + length, wal.start)
    assert end_of(wal, wal.data, wal.end) == wal.end


def test_long_header_must_name_the_segment_size(make: Make) -> None:
    wal = WalBuilder(segment_size=2 * SMALL_SEGMENT, segment=2)
    wal.append(b"x")
    with pytest.raises(WalDecodeError, match="another WAL segment size"):
        make(wal.start).feed(wal.data)


def test_python_takes_over_without_the_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    monkeypatch.setenv("NEON_LIB_DIR", str(tmp_path))
    monkeypatch.setattr("neon_services.wal.scanner._fallback_reported", False)
    wal = random_wal(random.Random(1), 5)
    for _ in range(2):
        scanner = WalScanner(wal.start, segment_size=SMALL_SEGMENT)
        scanner.feed(wal.data)
        assert scanner.record_end_lsn == wal.end and isinstance(scanner._scanner, OracleScanner)
    assert [record.levelname for record in caplog.records] == ["WARNING"]

"""Ids, LSNs, durations, addresses and timestamps: texts in and out, and errors that quote what was wrong."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neon_services.ground import lsn as lsns
from neon_services.ground.errors import ConfigError
from neon_services.ground.ids import TenantId, TimelineId
from neon_services.ground.lsn import Lsn, format_lsn, parse_lsn
from neon_services.ground.net import Endpoint, parse_endpoint, parse_host_port
from neon_services.ground.pgtime import to_datetime, to_postgres_us
from neon_services.ground.units import parse_duration_ms


def test_ids() -> None:
    text = "0123456789abcdef0123456789ABCDEF"
    tenant = TenantId.parse(text)
    assert str(tenant) == text.lower()
    assert tenant == TenantId(bytes.fromhex(text))
    assert tenant != TimelineId.parse(text), "ids of different kinds are never equal"
    assert len({TenantId.generate() for _ in range(10)}) == 10


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "g" * 32, "0x" + "0" * 30, " " + "0" * 31])
def test_wrong_ids_are_quoted(text: str) -> None:
    with pytest.raises(ValueError, match="not a tenant id: ") as failure:
        TenantId.parse(text)
    assert repr(text) in str(failure.value)
    with pytest.raises(ValueError, match="timeline id"):
        TimelineId(b"short")


@given(st.integers(0, (1 << 64) - 1))
def test_lsn_round_trip(value: int) -> None:
    assert parse_lsn(format_lsn(value)) == value
    assert parse_lsn(format_lsn(value).lower()) == value


def test_lsn_text() -> None:
    assert format_lsn(0x1_0169AD58) == "1/169AD58"
    assert format_lsn(0) == "0/0"


@pytest.mark.parametrize(
    "text", ["", "0", "/", "0/", "/0", "1/2/3", "0/123456789", "g/0", "-1/0", "+1/0", "0x1/0", " 0/0", "1_0/0"]
)
def test_wrong_lsns_are_quoted(text: str) -> None:
    with pytest.raises(ValueError, match="not an LSN: ") as failure:
        parse_lsn(text)
    assert repr(text) in str(failure.value)


@given(st.integers(0, (1 << 40) - 1), st.sampled_from([1 << 20, 1 << 24, 1 << 26, 1 << 30]))
def test_segment_names_round_trip(segment: int, size: int) -> None:
    segment %= (1 << 64) // size
    assert lsns.parse_segment_file_name(lsns.segment_file_name(segment, size), size) == segment


def test_segment_names() -> None:
    assert lsns.segment_file_name(0x1FF) == "0000000100000001000000FF"
    for wrong in ("", "0000000100000001000000F", "0000000100000001000000ff", "0000000100000001000000FF.partial"):
        with pytest.raises(ValueError, match="not a WAL segment"):
            lsns.parse_segment_file_name(wrong)


def test_page_headers() -> None:
    assert lsns.skip_page_header(0x1000000) == 0x1000028
    assert lsns.skip_page_header(0x1002000) == 0x1002018
    assert lsns.skip_page_header(0x1002008) == 0x1002008
    assert [lsns.align_lsn(n) for n in (0, 1, 7, 8, 9)] == [0, 8, 8, 8, 16]
    assert lsns.segment_number(Lsn(0x1FFFFFF)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5s", 5000),
        ("5000ms", 5000),
        ("15m", 900_000),
        ("1h 30m", 5_400_000),
        ("1h30min", 5_400_000),
        ("0s", 0),
        ("1.5 s", 1500),
    ],
)
def test_durations(text: str, expected: int) -> None:
    assert parse_duration_ms(text, what="--x") == expected


@pytest.mark.parametrize("text", ["", " ", "5", "s", "5 parsecs", "-5s", "5s x", "1h,2m"])
def test_wrong_durations_are_quoted(text: str) -> None:
    with pytest.raises(ConfigError, match="--x: ") as failure:
        parse_duration_ms(text, what="--x")
    assert repr(text) in str(failure.value)


def test_addresses() -> None:
    assert parse_host_port("127.0.0.1:5454", what="x") == ("127.0.0.1", 5454)
    assert parse_host_port("[::1]:0", what="x") == ("::1", 0)
    assert parse_host_port("host", what="x", default_port=7) == ("host", 7)
    assert parse_endpoint("http://b:50051/", what="x") == Endpoint("b", 50051)
    assert parse_endpoint("b:50051", what="x") == Endpoint("b", 50051)
    assert parse_endpoint("https://[::1]:50051/", what="x") == Endpoint("::1", 50051, tls=True)
    assert parse_endpoint("https://[::1]:50051/", what="x").url == "https://[::1]:50051"
    assert parse_endpoint("b:50051", what="x").url == "http://b:50051"


@pytest.mark.parametrize(
    "text", ["", "host", ":1", "host:", "host:x", "host:65536", "host:-1", "/tmp/x:1", "a@b:1", "a/b?c=:1"]
)
def test_wrong_addresses_name_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--listen-pg: "):
        parse_host_port(text, what="--listen-pg")


def test_postgres_time() -> None:
    assert to_postgres_us(946_684_800_000_001) == 1
    assert to_datetime(0) == datetime(2000, 1, 1, tzinfo=UTC)

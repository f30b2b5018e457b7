"""Small decisions of the WAL service: how a stream is cut, what feedback adds up to, how commands are read."""

import pytest

from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.pgwire import ServerError
from neon_services.protocols.replication_stream import StandbyStatus
from neon_services.protocols.safekeeper_messages import NO_STANDBY_FEEDBACK, HotStandbyFeedback
from neon_services.safekeeper.connections import WalSenderState, aggregate_standby_feedback, standby_horizon
from neon_services.safekeeper.wal_service import parse_wal_push_options
from neon_services.safekeeper.walsender import next_chunk_end

SEGMENT = 1 << 24
TTID = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"l" * 16))


@pytest.mark.parametrize(
    ("position", "end", "expected"),
    [
        (0x1000000, 0x1000100, 0x1000100),  # the end, wherever it is
        (0x1000010, 0x1100000, 0x1020000),  # 128 KiB, cut down to a page
        (0x1000000, 0x1020000, 0x1020000),
        (0x1000000, 0x1020001, 0x1020000),
        (0x1FFFFF0, 0x2000100, 0x2000000),  # never over the end of a segment
        (0x1FF0000, 0x3000000, 0x2000000),
        (0x1000001, 0x1000002, 0x1000002),
    ],
)
def test_chunks(position: int, end: int, expected: int) -> None:
    assert next_chunk_end(position, end, SEGMENT) == expected


def test_chunks_always_make_progress() -> None:
    for position in range(0x1FFE000, 0x2001000, 7):
        for ahead in (1, 8191, 8192, 131071, 131072, 131073, 1 << 30):
            assert position < next_chunk_end(position, position + ahead, SEGMENT) <= position + min(ahead, 131072)


def sender(feedback: HotStandbyFeedback = NO_STANDBY_FEEDBACK, applied: int | None = None) -> WalSenderState:
    made = WalSenderState(TTID, "a:1", None, wake=lambda: None, close=lambda _: None)
    made.standby_feedback = feedback
    if applied is not None:
        made.standby_status = StandbyStatus(Lsn(9), Lsn(9), Lsn(applied), 1)
    return made


def test_standby_feedback() -> None:
    assert aggregate_standby_feedback([]) == (0, 0, 0)
    assert aggregate_standby_feedback([sender(), sender(HotStandbyFeedback(5, 700, 0))]) == (5, 700, 0)
    several = [HotStandbyFeedback(5, 700, 0), HotStandbyFeedback(9, 0, 650), HotStandbyFeedback(7, 1 << 32, 651)]
    assert aggregate_standby_feedback([sender(feedback) for feedback in several]) == (9, 700, 650)


def test_standby_horizon() -> None:
    assert standby_horizon([sender(), sender(applied=0)]) == 0
    assert standby_horizon([sender(), sender(applied=70), sender(applied=60), sender(applied=0)]) == 60


def test_json_of_a_reader() -> None:
    standby = sender(HotStandbyFeedback(5, 700, 0), applied=0x10)
    assert standby.to_json()["Vanilla"]["feedback"]["Standby"]["reply"]["apply_lsn"] == "0/10"
    standby.pageserver = PageserverFeedback(replytime_us=0, last_received_lsn=Lsn(0x20))
    shown = standby.to_json()["Vanilla"]["feedback"]["Pageserver"]
    assert (shown["last_received_lsn"], shown["replytime"]) == ("0/20", "2000-01-01T00:00:00Z")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("START_WAL_PUSH", (2, True)),
        ("START_WAL_PUSH (proto_version '2', allow_timeline_creation 'false')", (2, False)),
        ("START_WAL_PUSH (proto_version '3')", (3, True)),
        ("START_WAL_PUSH (proto_version '3', allow_timeline_creation 'false')", (3, False)),
        ("START_WAL_PUSH (allow_timeline_creation 'true' proto_version '3' later_option 'x')", (3, True)),
    ],
)
def test_wal_push_options(command: str, expected: tuple[int, bool]) -> None:
    assert parse_wal_push_options(command) == expected


@pytest.mark.parametrize(
    "command",
    [
        "START_WAL_PUSH (proto_version '1')",
        "START_WAL_PUSH (proto_version '4')",
        "START_WAL_PUSH (proto_version '3', allow_timeline_creation 'maybe')",
    ],
)
def test_wrong_wal_push_options(command: str) -> None:
    with pytest.raises(ServerError):
        parse_wal_push_options(command)

"""Protocol version 2: layouts byte for byte, and every prefix and every extension of every message is refused."""

import struct

import pytest

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.safekeeper_messages import (
    MAX_APPEND_BYTES,
    NO_MEMBERSHIP,
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    MembershipConfiguration,
    ProposerElected,
    ProposerGreeting,
    SafekeeperId,
    TermLsn,
    VoteRequest,
    VoteResponse,
)
from neon_services.protocols.safekeeper_messages_v2 import pack_acceptor_message, parse_proposer_message

TTID = TenantTimelineId(TenantId(b"T" * 16), TimelineId(b"L" * 16))
UUID = bytes(range(16))


def tag(letter: str) -> bytes:
    return letter.encode() + bytes(7)


GREETING = tag("g") + struct.pack("<II", 2, 160004) + UUID + struct.pack("<Q", 77) + b"L" * 16 + b"T" * 16
GREETING += struct.pack("<II", 1, 1 << 24)
VOTE = tag("v") + struct.pack("<Q", 9) + UUID
ELECTED = tag("e") + struct.pack("<QQI", 9, 0x300, 2) + struct.pack("<QQQQ", 1, 0x100, 9, 0x300) + struct.pack("<Q", 0x100)
APPEND = tag("a") + struct.pack("<QQQQQQ", 9, 0, 0x300, 0x305, 0x300, 0x200) + UUID + b"bytes"

MESSAGES = [
    (GREETING, ProposerGreeting(TTID, NO_MEMBERSHIP, 160004, 77, 1 << 24)),
    (VOTE, VoteRequest(0, 9)),
    (ELECTED, ProposerElected(0, 9, Lsn(0x300), (TermLsn(1, Lsn(0x100)), TermLsn(9, Lsn(0x300))))),
    (APPEND, AppendRequest(0, 9, Lsn(0x300), Lsn(0x305), Lsn(0x300), Lsn(0x200), b"bytes")),
]


@pytest.mark.parametrize(("data", "message"), MESSAGES, ids=["greeting", "vote", "elected", "append"])
def test_proposer_messages(data: bytes, message: object) -> None:
    assert parse_proposer_message(data) == message
    assert parse_proposer_message(memoryview(data)) == message
    for length in range(len(data)):
        with pytest.raises(ProtocolViolation):
            parse_proposer_message(data[:length])
    if data is VOTE:
        assert parse_proposer_message(data + b"what older proposers add") == message
    else:
        with pytest.raises(ProtocolViolation):
            parse_proposer_message(data + b"x")


def test_sizes() -> None:
    assert (len(GREETING), len(VOTE), len(APPEND) - 5) == (80, 32, 72)


def test_wal_is_a_view_of_the_receive_buffer() -> None:
    buffer = bytearray(APPEND)
    message = parse_proposer_message(memoryview(buffer))
    assert isinstance(message, AppendRequest)
    buffer[-5:] = b"BYTES"
    assert bytes(message.wal_data) == b"BYTES"


@pytest.mark.parametrize(
    "data",
    [
        tag("z") + bytes(60),
        b"v" + b"\1" + bytes(30),
        GREETING[:8] + struct.pack("<I", 3) + GREETING[12:],
        tag("e") + struct.pack("<QQI", 9, 0x300, 0) + bytes(8),
        tag("e") + struct.pack("<QQI", 8, 0x300, 1) + struct.pack("<QQQ", 9, 1, 0),
        tag("e") + struct.pack("<QQI", 9, 0x300, 2) + struct.pack("<QQQQQ", 9, 1, 9, 1, 0),
        tag("e") + struct.pack("<QQI", 9, 0x300, 2) + struct.pack("<QQQQQ", 1, 5, 9, 1, 0),
        tag("e") + struct.pack("<QQI", 9, 0x300, 0xFFFFFFFF) + bytes(100),
        tag("a") + struct.pack("<QQQQQQ", 9, 0, 0x305, 0x300, 0, 0) + UUID,
        tag("a") + struct.pack("<QQQQQQ", 9, 0, 0, MAX_APPEND_BYTES + 1, 0, 0) + UUID + bytes(MAX_APPEND_BYTES + 1),
    ],
)
def test_impossible_messages(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        parse_proposer_message(data)


def test_answers() -> None:
    mconf = MembershipConfiguration(4, (SafekeeperId(1, "h", 1),))
    assert pack_acceptor_message(AcceptorGreeting(3, mconf, 8)) == tag("g") + struct.pack("<QQ", 8, 3)
    vote = VoteResponse(0, 9, True, Lsn(0x539), Lsn(0x500), (TermLsn(2, Lsn(0x400)), TermLsn(5, Lsn(0x410))))
    expected = tag("v") + struct.pack("<QQQQI", 9, 1, 0x539, 0x500, 2) + struct.pack("<QQQQ", 2, 0x400, 5, 0x410) + bytes(8)
    assert pack_acceptor_message(vote) == expected
    response = AppendResponse(0, 9, Lsn(0x600), Lsn(0x500), HotStandbyFeedback(-5, 700, 600))
    head = tag("a") + struct.pack("<QQQqQQ", 9, 0x600, 0x500, -5, 700, 600)
    assert pack_acceptor_message(response) == head
    response.pageserver_feedback = PageserverFeedback(last_received_lsn=Lsn(0x600))
    assert pack_acceptor_message(response) == head + response.pageserver_feedback.pack()

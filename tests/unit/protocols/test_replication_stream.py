"""Replication messages: exact bytes, every prefix, tails."""

import struct

import pytest

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.lsn import Lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.replication_stream import (
    Keepalive,
    StandbyStatus,
    XLogData,
    pack_hot_standby_feedback,
    pack_pageserver_feedback,
    parse_receiver_message,
    parse_sender_message,
)
from neon_services.protocols.safekeeper_messages import HotStandbyFeedback

XLOG_DATA = XLogData(Lsn(0x1000028), Lsn(0x2000000), -5, b"wal bytes")
KEEPALIVE = Keepalive(Lsn(0x1122334455667788), 7, True)
STATUS = StandbyStatus(Lsn(3), Lsn(2), Lsn(1), 1234567, True)
STANDBY = HotStandbyFeedback(99, 5 << 32 | 700, 4 << 32 | 800)
FEEDBACK = PageserverFeedback(10, Lsn(0x30), Lsn(0x20), Lsn(0x10), 77, shard_number=2)


def test_bytes_of_the_sender() -> None:
    assert XLOG_DATA.pack() == b"w" + struct.pack("!QQq", 0x1000028, 0x2000000, -5) + b"wal bytes"
    assert KEEPALIVE.pack() == b"k" + struct.pack("!QqB", 0x1122334455667788, 7, 1)


def test_bytes_of_the_receiver() -> None:
    assert STATUS.pack() == b"r" + struct.pack("!QQQqB", 3, 2, 1, 1234567, 1)
    assert pack_hot_standby_feedback(STANDBY) == b"h" + struct.pack("!qIIII", 99, 700, 5, 800, 4)
    blob = FEEDBACK.pack()
    assert pack_pageserver_feedback(FEEDBACK) == b"z" + struct.pack("!Q", len(blob)) + blob


def test_round_trips() -> None:
    assert parse_sender_message(XLOG_DATA.pack()) == XLOG_DATA
    assert parse_sender_message(KEEPALIVE.pack()) == KEEPALIVE
    assert parse_receiver_message(STATUS.pack()) == STATUS
    assert parse_receiver_message(pack_hot_standby_feedback(STANDBY)) == STANDBY
    assert parse_receiver_message(pack_pageserver_feedback(FEEDBACK)) == FEEDBACK


def test_xlog_data_keeps_a_view() -> None:
    message = parse_sender_message(memoryview(XLOG_DATA.pack()))
    assert isinstance(message, XLogData)
    assert isinstance(message.data, memoryview)
    assert bytes(message.data) == b"wal bytes"


def test_xlog_data_may_be_empty() -> None:
    message = parse_sender_message(XLogData(Lsn(1), Lsn(1), 0, b"").pack())
    assert isinstance(message, XLogData) and not message.data


@pytest.mark.parametrize("data", [STATUS.pack(), pack_hot_standby_feedback(STANDBY), pack_pageserver_feedback(FEEDBACK)])
def test_receiver_messages_of_wrong_length(data: bytes) -> None:
    for length in range(len(data)):
        with pytest.raises(ProtocolViolation):
            parse_receiver_message(data[:length])
    with pytest.raises(ProtocolViolation):
        parse_receiver_message(data + b"\0")


def test_sender_messages_of_wrong_length() -> None:
    for length in range(25):
        with pytest.raises(ProtocolViolation):
            parse_sender_message(XLOG_DATA.pack()[:length])
    for length in (0, 1, 17, 19):
        with pytest.raises(ProtocolViolation):
            parse_sender_message((KEEPALIVE.pack() + b"\0")[:length])


def test_unknown_messages() -> None:
    with pytest.raises(ProtocolViolation, match="b'x'"):
        parse_sender_message(b"x")
    with pytest.raises(ProtocolViolation, match="b'w'"):
        parse_receiver_message(XLOG_DATA.pack())

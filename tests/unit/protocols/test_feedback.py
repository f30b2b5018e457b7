"""PageserverFeedback against its byte layout."""

import struct

import pytest

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.lsn import Lsn
from neon_services.protocols.feedback import PageserverFeedback

PLAIN = PageserverFeedback(12345678, Lsn(0x30), Lsn(0x20), Lsn(0x10), 987654321)


def key(name: bytes, value: bytes) -> bytes:
    return name + b"\0" + struct.pack("!i", len(value)) + value


def test_layout() -> None:
    expected = b"\x05" + b"".join(
        key(name, struct.pack("!q", value))
        for name, value in (
            (b"current_timeline_size", 12345678),
            (b"ps_writelsn", 0x30),
            (b"ps_flushlsn", 0x20),
            (b"ps_applylsn", 0x10),
            (b"ps_replytime", 987654321),
        )
    )
    assert PLAIN.pack() == expected
    assert PageserverFeedback.parse(memoryview(expected)) == PLAIN


def test_optional_keys() -> None:
    told = PageserverFeedback(shard_number=3, corruption_detected=True)
    assert told.pack()[0] == 7
    assert PageserverFeedback.parse(told.pack()) == told


def test_unknown_and_new_names() -> None:
    blob = b"\x03" + key(b"tomorrow", b"abc") + key(b"last_received_lsn", bytes(7) + b"\x09") + key(b"replytime", b"\xff" * 8)
    assert PageserverFeedback.parse(blob) == PageserverFeedback(last_received_lsn=Lsn(9), replytime_us=-1)


def test_every_prefix_and_a_tail_are_refused() -> None:
    packed = PLAIN.pack()
    for bad in [packed[:n] for n in range(len(packed))] + [packed + b"\0"]:
        with pytest.raises(ProtocolViolation):
            PageserverFeedback.parse(bad)


def test_wrong_widths() -> None:
    for bad in (key(b"ps_writelsn", b"1234"), b"ps_writelsn\0" + struct.pack("!i", -1), b"x\0" + struct.pack("!i", 1 << 30)):
        with pytest.raises(ProtocolViolation):
            PageserverFeedback.parse(b"\x01" + bad)

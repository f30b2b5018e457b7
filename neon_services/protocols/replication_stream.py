"""Physical replication inside CopyData: what Postgres's walsender and walreceiver say, and Neon's pageserver feedback.

Layouts, big-endian: ``'w' u64 start, u64 wal_end, i64 time, bytes`` and ``'k' u64 wal_end, i64 time, u8 reply_requested``
from the sender, ``'0' u64 streaming_lsn, u64 commit_lsn, payload`` instead of 'w' when WAL is interpreted (interpreted_wal.py);
``'r' u64 write, u64 flush, u64 apply, i64 time, u8 reply``, ``'h' i64 time, u32 xmin, u32 xmin_epoch, u32 catalog_xmin,
u32 catalog_epoch`` and ``'z' u64 length, PageserverFeedback blob`` from the receiver. Times are Postgres microseconds. What is
cut off, too long or unknown raises ProtocolViolation.
"""

import struct
from dataclasses import dataclass

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.lsn import Lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.safekeeper_messages import HotStandbyFeedback

MAX_XLOG_DATA_BYTES = 128 * 1024

_XLOG_DATA = struct.Struct("!cQQq")
_INTERPRETED = struct.Struct("!cQQ")
_KEEPALIVE = struct.Struct("!cQqB")
_STANDBY_STATUS = struct.Struct("!cQQQqB")
_HOT_STANDBY = struct.Struct("!cqIIII")
_LENGTH = struct.Struct("!Q")

XLOG_DATA_HEADER_BYTES = _XLOG_DATA.size
INTERPRETED_HEADER_BYTES = _INTERPRETED.size


@dataclass(frozen=True, slots=True)
class XLogData:
    """WAL bytes from ``start_lsn`` on. ``data`` may view the buffer that was parsed."""

    start_lsn: Lsn
    wal_end_lsn: Lsn
    send_time_us: int
    data: memoryview | bytes

    def pack(self) -> bytes:
        """The message."""
        return pack_xlog_data_header(self.start_lsn, self.wal_end_lsn, self.send_time_us) + bytes(self.data)


@dataclass(frozen=True, slots=True)
class InterpretedWal:
    """Interpreted records of WAL up to ``streaming_lsn``, while WAL is committed up to ``commit_lsn``."""

    streaming_lsn: Lsn
    commit_lsn: Lsn
    payload: memoryview | bytes

    def pack(self) -> bytes:
        """The message."""
        return pack_interpreted_header(self.streaming_lsn, self.commit_lsn) + bytes(self.payload)


@dataclass(frozen=True, slots=True)
class Keepalive:
    """Nothing new: where the sender's WAL ends, and whether it wants a status at once."""

    wal_end_lsn: Lsn
    send_time_us: int
    reply_requested: bool

    def pack(self) -> bytes:
        """The message."""
        return _KEEPALIVE.pack(b"k", self.wal_end_lsn, self.send_time_us, self.reply_requested)


@dataclass(frozen=True, slots=True)
class StandbyStatus:
    """A walreceiver's progress."""

    write_lsn: Lsn
    flush_lsn: Lsn
    apply_lsn: Lsn
    reply_time_us: int
    reply_requested: bool = False

    def pack(self) -> bytes:
        """The message."""
        return _STANDBY_STATUS.pack(
            b"r", self.write_lsn, self.flush_lsn, self.apply_lsn, self.reply_time_us, self.reply_requested
        )


SenderMessage = XLogData | Keepalive
ReceiverMessage = StandbyStatus | HotStandbyFeedback | PageserverFeedback


def pack_xlog_data_header(start_lsn: int, wal_end_lsn: int, send_time_us: int) -> bytes:
    """The 25 bytes in front of the WAL of an XLogData."""
    return _XLOG_DATA.pack(b"w", start_lsn, wal_end_lsn, send_time_us)


def pack_interpreted_header(streaming_lsn: int, commit_lsn: int) -> bytes:
    """The 17 bytes in front of the payload of an InterpretedWal."""
    return _INTERPRETED.pack(b"0", streaming_lsn, commit_lsn)


def pack_hot_standby_feedback(feedback: HotStandbyFeedback) -> bytes:
    """An 'h' message; the 64-bit transaction ids are split into epoch and id."""
    xmin, catalog_xmin = feedback.xmin, feedback.catalog_xmin
    return _HOT_STANDBY.pack(
        b"h", feedback.ts_us, xmin & 0xFFFF_FFFF, xmin >> 32, catalog_xmin & 0xFFFF_FFFF, catalog_xmin >> 32
    )


def pack_pageserver_feedback(feedback: PageserverFeedback) -> bytes:
    """A 'z' message."""
    blob = feedback.pack()
    return b"z" + _LENGTH.pack(len(blob)) + blob


def _exact(body: memoryview | bytes, layout: struct.Struct, what: str) -> tuple:
    if len(body) != layout.size:
        raise ProtocolViolation(f"{what} has {len(body)} bytes instead of {layout.size}")
    return layout.unpack(body)


def parse_sender_message(body: memoryview | bytes) -> SenderMessage:
    """What a walsender sent. XLogData keeps a view of ``body``."""
    tag = bytes(body[:1])
    if tag == b"w":
        if len(body) < _XLOG_DATA.size:
            raise ProtocolViolation(f"XLogData is cut off at {len(body)} bytes")
        _, start_lsn, wal_end_lsn, send_time_us = _XLOG_DATA.unpack_from(body)
        return XLogData(start_lsn, wal_end_lsn, send_time_us, body[_XLOG_DATA.size :])
    if tag == b"k":
        _, wal_end_lsn, send_time_us, reply_requested = _exact(body, _KEEPALIVE, "keepalive")
        return Keepalive(wal_end_lsn, send_time_us, bool(reply_requested))
    raise ProtocolViolation(f"unknown message {tag!r} from the WAL sender")


def parse_interpreted_message(body: memoryview | bytes) -> InterpretedWal | Keepalive:
    """What a sender of interpreted WAL sent. InterpretedWal keeps a view of ``body``."""
    if bytes(body[:1]) == b"0":
        if len(body) < _INTERPRETED.size:
            raise ProtocolViolation(f"interpreted WAL is cut off at {len(body)} bytes")
        _, streaming_lsn, commit_lsn = _INTERPRETED.unpack_from(body)
        return InterpretedWal(streaming_lsn, commit_lsn, body[_INTERPRETED.size :])
    message = parse_sender_message(body)
    if isinstance(message, XLogData):
        raise ProtocolViolation("vanilla WAL in a stream of interpreted WAL")
    return message


def parse_receiver_message(body: memoryview | bytes) -> ReceiverMessage:
    """What a walreceiver, a replica or a pageserver sent."""
    tag = bytes(body[:1])
    if tag == b"r":
        _, write_lsn, flush_lsn, apply_lsn, reply_time_us, reply = _exact(body, _STANDBY_STATUS, "standby status")
        return StandbyStatus(write_lsn, flush_lsn, apply_lsn, reply_time_us, bool(reply))
    if tag == b"h":
        _, ts_us, xmin, xmin_epoch, catalog_xmin, catalog_epoch = _exact(body, _HOT_STANDBY, "hot standby feedback")
        return HotStandbyFeedback(ts_us, xmin_epoch << 32 | xmin, catalog_epoch << 32 | catalog_xmin)
    if tag == b"z":
        if len(body) < 9:
            raise ProtocolViolation(f"pageserver feedback is cut off at {len(body)} bytes")
        (length,) = _LENGTH.unpack_from(body, 1)
        if length != len(body) - 9:
            raise ProtocolViolation(f"pageserver feedback claims {length} bytes and has {len(body) - 9}")
        return PageserverFeedback.parse(body[9:])
    raise ProtocolViolation(f"unknown message {tag!r} from the WAL receiver")

"""The start of a stateless compute: a shutdown checkpoint record at the first legal position at or after the base LSN.

Invariant: the record and everything before it in its page are what stock Postgres would accept as the end of a clean
shutdown, so it starts without recovery, on the same system identifier and timeline, with a correct chain of ``xl_prev``.
The record is real WAL: it is the first thing that the compute proposes to the safekeepers.
"""

import struct
import time
from dataclasses import dataclass

import crc32c

from neon_services.ground.errors import NeonError, ProtocolViolation
from neon_services.ground.lsn import (
    TLI,
    XLOG_BLCKSZ,
    Lsn,
    page_header_size,
    parse_lsn,
    segment_file_name,
    segment_number,
)
from neon_services.wal.framing import build_page_header, build_shutdown_checkpoint_record, place_record, record_start

SUPPORTED_MAJORS = (15, 16, 17)  # the layout of pg_control and CheckPoint below was checked for these
CONTROL_FILE_SIZE = 8192
_CONTROL_CRC_OFFSET = 288
_STATE_OFFSET, _TIME_OFFSET, _CHECKPOINT_OFFSET, _COPY_OFFSET = 16, 24, 32, 40
_SEGMENT_SIZE_OFFSET, _CHECKSUMS_OFFSET = 228, 252
_CHECKPOINT_SIZE = 88
_STATE_SHUTDOWNED = 1


@dataclass(frozen=True, slots=True)
class FirstCheckpoint:
    """pg_control and the WAL segments (by file name) with the record."""

    checkpoint_lsn: Lsn
    system_id: int
    data_checksums: int
    control: bytes
    segment_size: int
    #: (offset, bytes) to write, by the segment's file name; all else in a segment is zero.
    segments: dict[str, list[tuple[int, bytes]]]
    next_xid: int
    next_multi: int
    next_multi_offset: int

    def slru_pages(self) -> dict[str, int]:
        """The last SLRU page that startup may read, per directory."""
        return {
            "pg_xact": (self.next_xid & 0xFFFF_FFFF) // 32768,
            "pg_multixact/offsets": self.next_multi // 2048,
            "pg_multixact/members": self.next_multi_offset // 1636,
        }


def parse_previous_lsn(signal: str | None) -> Lsn:
    """The start of the record before the base LSN, from ``neon.signal``; 0 when there is none.

    Raises NeonError when the pageserver does not know it: a compute that writes cannot start there.
    """
    if signal is None:
        raise ProtocolViolation("the basebackup has no neon.signal")
    label, _, value = signal.strip().partition(": ")
    if label != "PREV LSN":
        raise ProtocolViolation(f"neon.signal in the basebackup is not understood: {signal[:80]!r}")
    if value == "none":
        return Lsn(0)
    if value == "invalid":
        raise NeonError(
            "the pageserver does not know the record before the start LSN: only a read-only compute can start there"
        )
    try:
        return parse_lsn(value)
    except ValueError as error:
        raise ProtocolViolation(f"neon.signal in the basebackup: {error}") from error


def make_first_checkpoint(control: bytes, base_lsn: Lsn, previous_lsn: Lsn, major: int) -> FirstCheckpoint:
    """Place the record after ``base_lsn``, with ``xl_prev`` = ``previous_lsn``, from the basebackup's pg_control."""
    if major not in SUPPORTED_MAJORS:
        raise NeonError(f"the timeline is of Postgres {major}; computes of {SUPPORTED_MAJORS} are supported")
    if len(control) != CONTROL_FILE_SIZE:
        raise ProtocolViolation(f"pg_control in the basebackup has {len(control)} bytes, not {CONTROL_FILE_SIZE}")
    if crc32c.crc32c(control[:_CONTROL_CRC_OFFSET]) != struct.unpack_from("<I", control, _CONTROL_CRC_OFFSET)[0]:
        raise ProtocolViolation("pg_control in the basebackup fails its checksum")
    changed = bytearray(control)
    (system_id,) = struct.unpack_from("<Q", control, 0)
    (segment_size,) = struct.unpack_from("<I", control, _SEGMENT_SIZE_OFFSET)
    position = record_start(base_lsn, segment_size)
    (data_checksums,) = struct.unpack_from("<I", control, _CHECKSUMS_OFFSET)

    checkpoint = bytearray(control[_COPY_OFFSET : _COPY_OFFSET + _CHECKPOINT_SIZE])
    struct.pack_into("<QII", checkpoint, 0, position, TLI, TLI)
    struct.pack_into("<q", checkpoint, 64, int(time.time()))
    next_xid, _, next_multi, next_multi_offset = struct.unpack_from("<QIII", checkpoint, 24)

    struct.pack_into("<I", changed, _STATE_OFFSET, _STATE_SHUTDOWNED)
    struct.pack_into("<qQ", changed, _TIME_OFFSET, int(time.time()), position)
    changed[_COPY_OFFSET : _COPY_OFFSET + _CHECKPOINT_SIZE] = checkpoint
    struct.pack_into("<I", changed, _CONTROL_CRC_OFFSET, crc32c.crc32c(bytes(changed[:_CONTROL_CRC_OFFSET])))

    record = build_shutdown_checkpoint_record(bytes(checkpoint), prev_lsn=previous_lsn)
    segments = _segments(record, position, system_id, segment_size, major)
    return FirstCheckpoint(
        Lsn(position),
        system_id,
        data_checksums,
        bytes(changed),
        segment_size,
        segments,
        next_xid,
        next_multi,
        next_multi_offset,
    )


def _segments(
    record: bytes, position: Lsn, system_id: int, segment_size: int, major: int
) -> dict[str, list[tuple[int, bytes]]]:
    """The one or two segments with the record at ``position``, all else before it zero except page headers."""
    writes: dict[str, list[tuple[int, bytes]]] = {}

    def put(lsn: int, content: bytes) -> None:
        name = segment_file_name(segment_number(lsn, segment_size), segment_size)
        writes.setdefault(name, []).append((lsn % segment_size, content))

    def header(page: int, remaining: int) -> bytes:
        return build_page_header(
            page, pg_major=major, system_identifier=system_id, remaining_len=remaining, segment_size=segment_size
        )

    segment_start = position - position % segment_size
    page = position - position % XLOG_BLCKSZ
    put(segment_start, header(segment_start, 0))
    # what precedes the record on its page is declared the rest of a record, so that readers find this one first
    put(page, header(page, position - page - page_header_size(page, segment_size)))
    for lsn, content in place_record(position, record, pg_major=major, system_identifier=system_id, segment_size=segment_size):
        put(lsn, content)
    return writes

"""The start of a stateless compute: a shutdown checkpoint record at the first legal position at or after the base LSN.

Invariant: the record and everything before it in its page are what stock Postgres would accept as the end of a clean
shutdown, so it starts without recovery, on the same system identifier and timeline, with a correct chain of ``xl_prev``.
The record is real WAL: it is the first thing that the compute proposes to the safekeepers.
"""

import time
from dataclasses import dataclass, replace

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
from neon_services.wal.control_data import ControlFile, DBState
from neon_services.wal.framing import build_page_header, build_shutdown_checkpoint_record, place_record, record_start

SUPPORTED_MAJORS = (15, 16, 17)  # those that the library is verified with


@dataclass(frozen=True, slots=True)
class FirstCheckpoint:
    """pg_control and the WAL segments (by file name) with the record."""

    checkpoint_lsn: Lsn
    control: ControlFile
    #: (offset, bytes) to write, by the segment's file name; all else in a segment is zero.
    segments: dict[str, list[tuple[int, bytes]]]

    def slru_pages(self) -> dict[str, int]:
        """The last SLRU page that startup may read, per directory."""
        return {
            "pg_xact": (self.control.checkpoint.next_full_xid & 0xFFFF_FFFF) // 32768,
            "pg_multixact/offsets": self.control.checkpoint.next_multi // 2048,
            "pg_multixact/members": self.control.checkpoint.next_multi_offset // 1636,
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
    stored = ControlFile.parse(control)
    position = record_start(base_lsn, stored.xlog_seg_size)
    now = int(time.time())
    checkpoint = replace(stored.checkpoint, redo=position, tli=TLI, prev_tli=TLI, time=now)
    changed = replace(stored, state=DBState.SHUTDOWNED, time=now, checkpoint_lsn=position, checkpoint=checkpoint)
    record = build_shutdown_checkpoint_record(checkpoint.to_bytes(), prev_lsn=previous_lsn)
    segments = _segments(record, position, stored.system_identifier, stored.xlog_seg_size, major)
    if segment_number(base_lsn, stored.xlog_seg_size) != segment_number(position, stored.xlog_seg_size):
        # the stream to the safekeepers begins in the padding at the end of the segment before
        segments.setdefault(segment_file_name(segment_number(base_lsn, stored.xlog_seg_size), stored.xlog_seg_size), [])
    return FirstCheckpoint(position, changed, segments)


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

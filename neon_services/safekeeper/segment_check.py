"""What is uploaded is checked first: a segment that is short, or whose bytes are not WAL, never becomes an object.

The bytes that are checked are the bytes that are sent: they are read once, into memory.
"""

from pathlib import Path

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import format_lsn, segment_file_name
from neon_services.safekeeper.segments import SegmentDirectory
from neon_services.wal.records import WalDecodeError
from neon_services.wal.scanner import WalScanner


def read_segment(directory: Path, segment: int, segment_size: int, start_lsn: int, end_lsn: int) -> bytes:
    """The bytes of a segment up to ``end_lsn``, checked to be WAL from ``start_lsn`` or the segment's begin on.

    ``start_lsn`` is where the timeline begins: what lies before it in its first segment is not WAL. The log must go on
    without a break up to ``end_lsn``; the record that is cut by the segment's begin is checked by its page headers only.
    Blocking. Raises CorruptionError naming the file, OSError.
    """
    begin = segment * segment_size
    count = min(end_lsn - begin, segment_size)
    name = segment_file_name(segment, segment_size)
    path = SegmentDirectory(directory, segment_size).find(segment)
    if path is None:
        raise CorruptionError(f"{directory}: WAL segment {name} is missing, {_REPAIR}")
    with path.open("rb") as file:
        content = file.read(count)
    if len(content) < count:
        raise CorruptionError(f"{path}: only {len(content)} bytes instead of {count}: the file is short, {_REPAIR}")
    check_wal(content, begin, max(begin, start_lsn), segment_size, str(path))
    return content


def check_wal(content: bytes, begin: int, scan_from: int, segment_size: int, name: str) -> None:
    """Decode the bytes, which begin at ``begin``, from ``scan_from`` on. Raises CorruptionError with the name."""
    scanner = WalScanner(scan_from, segment_size=segment_size)
    try:
        scanner.feed(memoryview(content)[scan_from - begin :])
    except WalDecodeError as error:
        raise CorruptionError(f"{name}: not WAL behind {format_lsn(scanner.record_end_lsn)}: {error}; {_REPAIR}") from error


_REPAIR = "remove the timeline's directory here and pull the timeline from another safekeeper"

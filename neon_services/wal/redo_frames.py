"""The frames between the service and a WAL redo helper, and the requests and results in them.

Invariant: the layouts are those of postgres_ext/redo/redo.h. All numbers are little-endian. A frame is a header
{u32 magic, op, n, body length} and a body of n requests or answers; answers have a fixed stride.
"""

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_SIZE = 8192
FRAME_PAGES = 64
FRAME_BYTES = 8 * 1024 * 1024
MAGIC = 0x314F4452
OP_REDO, OP_VERIFY, OP_MASK, OP_PING = 1, 2, 3, 4
FRAME = struct.Struct("<IIII")
_REQUEST = struct.Struct("<IIIIBBHIII")  # spc, db, rel, blk, fork, has_base, 0, nrecords, entries length, 0
_ANSWER = struct.Struct("<IIII")  # status, compared, mismatches, first mismatch; then a page or the text of an error
_MASK = struct.Struct("<II")  # rmid, blk; then a page
ANSWER_SIZE = _ANSWER.size + PAGE_SIZE
MASK_SIZE = _MASK.size + PAGE_SIZE


class RedoStatus(enum.IntEnum):
    """What became of one page; the helper's own numbers."""

    OK = 0
    ERROR = 1
    MISSING_BASE = 2


@dataclass(frozen=True, slots=True)
class RedoRequest:
    """One page to reconstruct.

    `base` is the 8192-byte page to start from, None when the first record makes the page. `entries` are `nrecords` entries
    [u64 end_lsn][raw record][zeros to 8], ascending by LSN, as they are in `WalBatch.blob`.
    """

    spc: int
    db: int
    rel: int
    fork: int
    blk: int
    base: bytes | None
    entries: bytes
    nrecords: int

    def describe(self) -> str:
        """The page's name for logs and errors."""
        return f"{self.spc}/{self.db}/{self.rel} fork {self.fork} block {self.blk}"

    @property
    def size(self) -> int:
        """Bytes of this request in a frame."""
        return _REQUEST.size + (0 if self.base is None else PAGE_SIZE) + len(self.entries)


@dataclass(frozen=True, slots=True)
class RedoResult:
    """The page, or why there is none. `page` has no valid checksum in its header: whoever stores it adds one."""

    status: RedoStatus
    page: bytes | None = None
    error: str = ""
    compared: int = 0
    """When verifying: consistency images compared with the page after their record."""
    mismatches: int = 0
    first_mismatch: int = 0
    """When verifying and mismatches > 0: index of the first record after which the page differed."""


def frame_parts(op: int, n: int, parts: list[bytes]) -> list[bytes]:
    """The buffers of one frame, in order."""
    return [FRAME.pack(MAGIC, op, n, sum(map(len, parts))), *parts]


def encode_requests(requests: Sequence[RedoRequest]) -> list[bytes]:
    """The body of a REDO or VERIFY frame. Raises ValueError when a base is not a page."""
    parts = []
    for request in requests:
        base = request.base
        if base is not None and len(base) != PAGE_SIZE:
            raise ValueError(f"the base page of {request.describe()} has {len(base)} bytes")
        parts.append(
            _REQUEST.pack(
                request.spc,
                request.db,
                request.rel,
                request.blk,
                request.fork,
                base is not None,
                0,
                request.nrecords,
                len(request.entries),
                0,
            )
        )
        if base is not None:
            parts.append(base)
        parts.append(request.entries)
    return parts


def decode_answers(body: bytes | bytearray, count: int) -> list[RedoResult]:
    """The results in the body of a REDO or VERIFY answer."""
    results = []
    ok, pages_only = RedoStatus.OK, (0, 0, 0, 0)
    for offset in range(0, count * ANSWER_SIZE, ANSWER_SIZE):
        head = _ANSWER.unpack_from(body, offset)
        content = bytes(body[offset + _ANSWER.size : offset + ANSWER_SIZE])
        if head == pages_only:
            results.append(RedoResult(ok, content))
        elif head[0] == ok:
            results.append(RedoResult(ok, content, "", *head[1:]))
        else:
            results.append(RedoResult(RedoStatus(head[0]), None, content.partition(b"\0")[0].decode(errors="replace")))
    return results


def encode_masks(pages: Sequence[tuple[int, int, bytes]]) -> list[bytes]:
    """The body of a MASK frame for (rmid, block number, page)."""
    return [part for rmid, blk, page in pages for part in (_MASK.pack(rmid, blk), page)]


def cut_into_frames(requests: Sequence[RedoRequest]) -> list[range]:
    """Ranges of requests for frames of at most 64 pages and about 8 MiB; one larger request is a frame of its own."""
    cuts, start, size = [], 0, 0
    for index, request in enumerate(requests):
        if index > start and (index - start == FRAME_PAGES or size + request.size > FRAME_BYTES):
            cuts.append(range(start, index))
            start, size = index, 0
        size += request.size
    if start < len(requests):
        cuts.append(range(start, len(requests)))
    return cuts

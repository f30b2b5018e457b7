"""Full-page images inside a WAL record, as the pages that redo makes of them.

Layout of a record: header (24 bytes), the headers of its blocks and of its main data, then per block image and data, then the
main data; little-endian. A block header is ``id u8, flags u8, data_len u16``, with flag 0x10 ``image_len u16, hole_offset u16,
image_info u8`` (and ``hole_len u16`` when compressed with a hole), without flag 0x80 ``tablespace, database, relation u32``,
and ``block u32``. Bits of ``image_info``: 1 hole, 2 apply, 4, 8 and 16 ways of compression (from Postgres 15 on).
"""

import struct

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import format_lsn
from neon_services.protocols.page_keys import PAGE_SIZE
from neon_services.wal.framing import RECORD_HEADER_SIZE

_BLOCK = struct.Struct("<BBH")
_IMAGE = struct.Struct("<HHB")
_BLOCK_ID_MAX = 32
_ORIGIN, _TOPLEVEL_XID = 253, 252
_HAS_IMAGE, _SAME_RELATION = 0x10, 0x80
_HOLE, _APPLY, _COMPRESSED = 1, 2, 4 | 8 | 16
_PD_UPPER = slice(14, 16)


def applied_images(record: bytes | memoryview, end_lsn: int) -> dict[int, bytes]:
    """Per block id the page that redo of this record installs, with the record's end as its LSN.

    Left out are images that are compressed, empty, or only for consistency checking. Raises CorruptionError.
    """
    try:
        return _parse(memoryview(record), end_lsn)
    except struct.error as error:
        raise CorruptionError(f"the record that ends at {format_lsn(end_lsn)} is too short: {error}") from error


def _parse(record: memoryview, end_lsn: int) -> dict[int, bytes]:
    at, behind = RECORD_HEADER_SIZE, 0  # ``behind``: bytes of images and data that follow the headers
    blocks: list[tuple[int, int, int, int, int]] = []  # id, bytes of data, and of the image: bytes, hole's offset, info
    while at < len(record):
        if record[at] > _BLOCK_ID_MAX:
            if record[at] not in (_ORIGIN, _TOPLEVEL_XID):
                at += 5 if record[at] == 254 else 2
                break  # the main data's header is the last one
            at += 3 if record[at] == _ORIGIN else 5
            continue
        block_id, flags, data_len = _BLOCK.unpack_from(record, at)
        at += _BLOCK.size
        image_len = hole_offset = info = 0
        if flags & _HAS_IMAGE:
            image_len, hole_offset, info = _IMAGE.unpack_from(record, at)
            at += _IMAGE.size + (2 if info & _COMPRESSED and info & _HOLE else 0)
        at += 4 if flags & _SAME_RELATION else 16
        blocks.append((block_id, data_len, image_len, hole_offset, info))
        behind += image_len + data_len
        if at + behind == len(record):
            break  # a record without main data has no header for it
    pages: dict[int, bytes] = {}
    for block_id, data_len, image_len, hole_offset, info in blocks:
        if image_len and info & _APPLY and not info & _COMPRESSED:
            pages[block_id] = _page(record[at : at + image_len], hole_offset, info, end_lsn)
        at += image_len + data_len
    if at > len(record):
        raise CorruptionError(f"the record that ends at {format_lsn(end_lsn)} is shorter than its images")
    return pages


def _page(image: memoryview, hole_offset: int, info: int, end_lsn: int) -> bytes:
    hole = PAGE_SIZE - len(image) if info & _HOLE else 0
    if len(image) + hole != PAGE_SIZE or hole_offset > len(image):
        raise CorruptionError(
            f"the record that ends at {format_lsn(end_lsn)} has an image of {len(image)} bytes with a hole at {hole_offset}"
        )
    page = bytearray(image[:hole_offset]) + bytes(hole) + image[hole_offset:]
    if page[_PD_UPPER] != b"\0\0":  # a page that was never initialised stays without an LSN
        struct.pack_into("<II", page, 0, end_lsn >> 32, end_lsn & 0xFFFF_FFFF)
    return bytes(page)

"""The block map: every entry is found by the library's own search, bits are right, bad input is refused."""

import itertools
import random
import struct

import crc32c
import numpy as np
import pytest

from neon_services.compute import block_map
from neon_services.compute.block_map import PAGE_ROW, SIZE_ROW, MapIdentity, build_map, parse_relation_sizes
from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn

IDENTITY = MapIdentity(42, Lsn(0x169AD58), TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"l" * 16)))
MASK = 0xFFFF_FFFF


def lookup(content: bytes, spc: int, db: int, rel: int, fork: int) -> tuple[int, int, int] | None:
    """neon_map_lookup() of the library: (base_nblocks, state, bitmap_offset)."""
    slots, home = struct.unpack_from("<QQ", content, 40)
    mixed = (spc * 0x9E3779B1 ^ db * 0x85EBCA6B ^ rel * 0xC2B2AE35 ^ fork * 0x27D4EB2F) & MASK
    mixed ^= mixed >> 15
    for slot in range(mixed & (home - 1), slots):
        entry = struct.unpack_from("<6IQ", content, 4096 + 32 * slot)
        if entry[5] == 0:
            return None
        if entry[:4] == (spc, db, rel, fork):
            return entry[4], entry[5], entry[6]
    raise AssertionError("the table has no end")


def test_every_fork_is_found_and_no_other() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    keys = {(1663, rng.choice([1, 5, 16384, MASK]), rng.randrange(1, 1 << 32), rng.randrange(3)) for _ in range(3000)}
    keys |= {(1664, 0, rel, 0) for rel in range(1260, 1300)}
    rows = [(*key, rng.choice([0, 1, 7, 8, 64, 65, 100_000])) for key in sorted(keys)]
    sizes = np.array(rows, dtype=SIZE_ROW)
    content = build_map(IDENTITY, sizes, np.empty(0, dtype=PAGE_ROW))
    used = []
    for *key, nblocks in rows:
        found = lookup(content, *key)
        assert found is not None and found[:2] == (nblocks, block_map.STATE_NO_FILE), key
        used.append((found[2], found[2] + (nblocks + 7) // 8))
    used.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(used)), "bitmaps overlap"
    assert used[-1][1] <= len(content) == struct.unpack_from("<Q", content, 32)[0]
    for _ in range(1000):
        other = (1663, rng.randrange(20000), rng.randrange(1 << 20), rng.randrange(4))
        assert (lookup(content, *other) is None) == (other not in keys)


def test_header() -> None:
    content = build_map(IDENTITY, np.empty(0, dtype=SIZE_ROW), np.empty(0, dtype=PAGE_ROW))
    assert content[:8] == b"NEONMAP1"
    version, checksum, system_id, base_lsn = struct.unpack_from("<IIQQ", content, 8)
    assert (version, system_id, base_lsn) == (1, 42, 0x169AD58)
    assert checksum == crc32c.crc32c(content[16:96])
    assert content[64:96] == b"t" * 16 + b"l" * 16
    assert lookup(content, 1663, 5, 1259, 0) is None


def pages(*keys: tuple[int, int, int, int, int]) -> np.ndarray:
    return np.array([(*key, b"x") for key in keys], dtype=PAGE_ROW)


def test_pushed_pages_are_present_and_their_forks_have_files() -> None:
    sizes = np.array([(1663, 5, 1259, 0, 20), (1663, 5, 1249, 0, 100), (1664, 0, 1260, 0, 1)], dtype=SIZE_ROW)
    content = build_map(IDENTITY, sizes, pages((1663, 5, 1259, 0, 0), (1663, 5, 1259, 0, 17), (1664, 0, 1260, 0, 0)))
    nblocks, state, offset = lookup(content, 1663, 5, 1259, 0) or (0, 0, 0)
    assert (nblocks, state) == (20, block_map.STATE_FILE)
    assert content[offset : offset + 3] == bytes([1, 0, 2])
    _, state, offset = lookup(content, 1663, 5, 1249, 0) or (0, 0, 0)
    assert state == block_map.STATE_NO_FILE and not any(content[offset : offset + 13])


@pytest.mark.parametrize("page", [(1663, 5, 1259, 0, 20), (1663, 5, 1260, 0, 0), (1663, 6, 1259, 0, 0)])
def test_a_page_that_is_not_in_the_image_is_refused(page: tuple[int, int, int, int, int]) -> None:
    sizes = np.array([(1663, 5, 1259, 0, 20)], dtype=SIZE_ROW)
    with pytest.raises(ProtocolViolation, match="does not list"):
        build_map(IDENTITY, sizes, pages(page))


def test_bad_rows_are_refused() -> None:
    with pytest.raises(ProtocolViolation, match="multiple of 20"):
        parse_relation_sizes(bytes(21))
    twice = np.array([(1663, 5, 1259, 0, 20), (1663, 5, 1259, 0, 21)], dtype=SIZE_ROW)
    with pytest.raises(ProtocolViolation, match="twice"):
        build_map(IDENTITY, twice, pages())

"""Write the block map (``neon.map``) that the ``neon`` library maps into all processes of a compute.

Layout, little-endian, as in ``postgres_ext/neon/neon.h``: a header of 4096 bytes, an open-addressed table of 32-byte entries,
the presence bitmaps. Invariant: every relation fork that exists at the base LSN has an entry, because a fork without one is
taken for a local one.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import crc32c
import numpy as np

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn

MAP_FILE = "neon.map"
MAGIC = int.from_bytes(b"NEONMAP1", "little")
VERSION = 1
HEADER_SIZE = 4096
BLOCK_SIZE = 8192

_FIXED = struct.Struct("<QQQQQQ16s16s")  # system_identifier .. timeline_id: what the header's checksum covers
_PREFIX = struct.Struct("<QII")  # magic, version, checksum
_ENTRY = np.dtype(
    [
        ("spc", "<u4"),
        ("db", "<u4"),
        ("rel", "<u4"),
        ("fork", "<u4"),
        ("base_nblocks", "<u4"),
        ("state", "<u4"),
        ("bitmap_offset", "<u8"),
    ]
)
STATE_FILE = 1
STATE_NO_FILE = 2

SIZE_ROW = np.dtype([("spc", "<u4"), ("db", "<u4"), ("rel", "<u4"), ("fork", "<u4"), ("nblocks", "<u4")])
PAGE_ROW = np.dtype([("spc", "<u4"), ("db", "<u4"), ("rel", "<u4"), ("fork", "<u4"), ("block", "<u4"), ("page", "V8192")])


@dataclass(frozen=True, slots=True)
class MapIdentity:
    """What a map belongs to; the library refuses it anywhere else."""

    system_id: int
    base_lsn: Lsn
    ttid: TenantTimelineId


def parse_relation_sizes(content: bytes) -> np.ndarray:
    """The rows of ``neon.relation_sizes``. Raises ProtocolViolation."""
    return _rows(content, SIZE_ROW, "neon.relation_sizes")


def parse_catalog_pages(content: bytes) -> np.ndarray:
    """The rows of ``neon.catalog_pages``. Raises ProtocolViolation."""
    return _rows(content, PAGE_ROW, "neon.catalog_pages")


def _rows(content: bytes, dtype: np.dtype, name: str) -> np.ndarray:
    if len(content) % dtype.itemsize:
        raise ProtocolViolation(f"{name} in the basebackup has {len(content)} bytes, not a multiple of {dtype.itemsize}")
    return np.frombuffer(content, dtype=dtype)


def _hashes(rows: np.ndarray) -> np.ndarray:
    """The library's hash of (spc, db, rel, fork), 32 bits."""
    mixed = rows["spc"] * np.uint32(0x9E3779B1) ^ rows["db"] * np.uint32(0x85EBCA6B)
    mixed ^= rows["rel"] * np.uint32(0xC2B2AE35) ^ rows["fork"] * np.uint32(0x27D4EB2F)
    return mixed ^ (mixed >> np.uint32(15))


def _fork_keys(rows: np.ndarray, databases: np.ndarray) -> np.ndarray:
    """One sortable number per relation fork; ``databases`` (sorted) tell the tablespace too, as only 0 is the shared one."""
    rank = np.searchsorted(databases, rows["db"]).astype(np.uint64)
    return (rank << np.uint64(34)) ^ (rows["rel"].astype(np.uint64) << np.uint64(2)) ^ rows["fork"]


def build_map(identity: MapIdentity, sizes: np.ndarray, present: np.ndarray) -> bytes:
    """The content of the map file.

    ``sizes`` are the forks of the base image (SIZE_ROW), ``present`` the blocks that are in local files already (PAGE_ROW or
    its key fields); the files of their forks must exist. All other forks are marked as still without files.
    """
    count = len(sizes)
    home_count = 16
    while home_count < 2 * count:
        home_count *= 2
    home = (_hashes(sizes) & np.uint32(home_count - 1)).astype(np.int64)
    order = np.argsort(home, kind="stable")
    steps = np.arange(count, dtype=np.int64)
    # linear probing of all entries at once: each goes to its home or right behind its predecessor
    slots = np.maximum.accumulate(home[order] - steps) + steps if count else steps
    slot_count = max(home_count, int(slots[-1]) + 1 if count else 0) + 1

    bitmap_bytes = (sizes["nblocks"].astype(np.int64) + 63) // 64 * 8
    bitmaps_start = HEADER_SIZE + slot_count * _ENTRY.itemsize
    offsets = bitmaps_start + np.concatenate(([0], np.cumsum(bitmap_bytes)))
    total_size = int(offsets[-1])

    databases = np.unique(sizes["db"])
    keys = _fork_keys(sizes, databases)
    by_key = np.argsort(keys)
    sorted_keys = keys[by_key]
    if count > 1 and (sorted_keys[1:] == sorted_keys[:-1]).any():
        raise ProtocolViolation("neon.relation_sizes in the basebackup lists a relation fork twice")
    content = bytearray(total_size)
    states = np.full(count, STATE_NO_FILE, dtype=np.uint32)
    if len(present):
        wanted = _fork_keys(present, databases)
        forks = by_key[np.minimum(np.searchsorted(sorted_keys, wanted), count - 1)] if count else np.empty(0, dtype=np.int64)
        if (
            not count
            or not np.isin(present["db"], databases).all()
            or (keys[forks] != wanted).any()
            or (present["block"] >= sizes["nblocks"][forks]).any()
        ):
            raise ProtocolViolation("neon.catalog_pages in the basebackup has a block that neon.relation_sizes does not list")
        states[forks] = STATE_FILE
        bits = np.frombuffer(content, dtype=np.uint8)
        positions = offsets[forks] + (present["block"] >> np.uint32(3)).astype(np.int64)
        np.bitwise_or.at(bits, positions, (1 << (present["block"] & np.uint32(7))).astype(np.uint8))
        del bits

    table = np.zeros(slot_count, dtype=_ENTRY)
    for name in ("spc", "db", "rel", "fork"):
        table[name][slots] = sizes[name][order]
    table["base_nblocks"][slots] = sizes["nblocks"][order]
    table["state"][slots] = states[order]
    table["bitmap_offset"][slots] = offsets[:-1][order]
    content[HEADER_SIZE:bitmaps_start] = table.tobytes()

    fixed = _FIXED.pack(
        identity.system_id,
        identity.base_lsn,
        total_size,
        slot_count,
        home_count,
        count,
        identity.ttid.tenant_id.raw,
        identity.ttid.timeline_id.raw,
    )
    header = _PREFIX.pack(MAGIC, VERSION, crc32c.crc32c(fixed)) + fixed
    content[: len(header)] = header
    return bytes(content)


def write_map(path: Path, content: bytes) -> None:
    """Write the map, leaving its zero pages as holes: the bitmaps of a large database are mostly zero."""
    zero = bytes(BLOCK_SIZE)
    with path.open("xb") as file:
        for start in range(0, len(content), BLOCK_SIZE):
            page = content[start : start + BLOCK_SIZE]
            if page != zero[: len(page)]:
                file.seek(start)
                file.write(page)
        file.truncate(len(content))

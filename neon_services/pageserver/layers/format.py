"""The layer file: immutable, sorted, columnar, every byte under a checksum.

::

    header     128 B   magic, version, kind, ids, key range, LSN range, CRC32C
    data       blocks of concatenated value bytes, each stored raw or as one zstd frame
    index      blocks of up to 4096 rows: the columns key_hi u64, key_lo u64, lsn u64, block u32, offset u32, length u32,
               kind u8, one after the other, as one zstd frame; rows are in (key, lsn, ingest) order over the whole file
    directory  one zstd frame: per data block stored and raw length and CRC32C (u32 each), per index block the same and
               its row count, then first key and last key of each index block (u64 halves)
    footer     64 B    magic, counts, place and CRC32C of the directory, length of the file, CRC32C

All integers are little-endian. Checksums are over the stored bytes and start from the block's number, so a block that is read
from the wrong place fails too. A value is (block, offset, length); rows may share one. Data blocks follow the order of the
first row that uses them, so the history of one key lies together.

Invariant: the file appears under its name only when whole and synced.
"""

import contextlib
import itertools
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from crc32c import crc32c

from neon_services.ground.durable import sync_directory
from neon_services.ground.errors import CorruptionError
from neon_services.ground.ids import TimelineId
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.values import IndexArray, U8Array, U32Array, U64Array, split_key

FORMAT_VERSION = 1
INDEX_BLOCK_ROWS = 4096
DELTA_BLOCK_BYTES = 32 * 1024
IMAGE_BLOCK_BYTES = 8 * 1024  # a page of its own: a random page read decompresses nothing else
TEMP_SUFFIX = ".___temp"

HEADER_MAGIC = b"NEONLYR1"
FOOTER_MAGIC = b"1RYLNOEN"
_HEADER = struct.Struct("<8sHBxBB2x16s16sQQQQQQ28x")
_FOOTER = struct.Struct("<8sQQIIIIIQ8x")
HEADER_SIZE = _HEADER.size + 4
FOOTER_SIZE = _FOOTER.size + 4
assert (HEADER_SIZE, FOOTER_SIZE) == (128, 64)

#: Columns of an index block, in order.
COLUMNS: tuple[tuple[str, type[Any]], ...] = (
    ("key_hi", np.uint64),
    ("key_lo", np.uint64),
    ("lsn", np.uint64),
    ("block", np.uint32),
    ("offset", np.uint32),
    ("length", np.uint32),
    ("kind", np.uint8),
)
ROW_BYTES = sum(np.dtype(kind).itemsize for _, kind in COLUMNS)


def pack_header(name: LayerName, shard: TenantShardId, timeline_id: TimelineId) -> bytes:
    """The header with its checksum."""
    packed = _HEADER.pack(
        HEADER_MAGIC,
        FORMAT_VERSION,
        2 if name.is_image else 1,
        shard.number,
        shard.count,
        shard.tenant_id.raw,
        timeline_id.raw,
        *split_key(name.key_start),
        *split_key(name.key_end),
        name.lsn_start,
        name.lsn_end,
    )
    return packed + crc32c(packed).to_bytes(4, "little")


def check_header(data: bytes, name: LayerName, timeline_id: TimelineId, where: str) -> None:
    """Raise CorruptionError unless these bytes are the header of the layer that the file's name claims."""
    if len(data) != HEADER_SIZE or crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise corrupt(where, "the header fails its checksum")
    magic, version, kind, _, _, _, timeline, k1, k2, k3, k4, lsn_start, lsn_end = _HEADER.unpack(data[:-4])
    if magic != HEADER_MAGIC or version != FORMAT_VERSION:
        raise corrupt(where, f"not a layer file of format version {FORMAT_VERSION}")
    inside = LayerName(k1 << 64 | k2, k3 << 64 | k4, lsn_start, lsn_end, kind == 2)
    if inside != name or timeline != timeline_id.raw:
        raise corrupt(where, f"the header is that of layer {inside} of timeline {timeline.hex()}")


class Footer:
    """The fixed end of the file."""

    __slots__ = ("data_blocks", "directory_crc", "directory_offset", "directory_stored", "file_size", "index_blocks", "rows")

    def __init__(self, data: bytes, actual_size: int, where: str) -> None:
        if len(data) != FOOTER_SIZE or crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise corrupt(where, "the footer fails its checksum (is the file cut off?)")
        (magic, self.rows, self.directory_offset, self.directory_stored, self.directory_crc, self.data_blocks,
         self.index_blocks, _, self.file_size) = _FOOTER.unpack(data[:-4])  # fmt: skip
        if magic != FOOTER_MAGIC or self.file_size != actual_size:
            raise corrupt(where, f"the footer says {self.file_size} bytes, the file has {actual_size}")


class Directory:
    """Where the blocks are, as arrays; and the key fences of the index blocks."""

    def __init__(self, raw: bytes, footer: Footer, where: str) -> None:
        n, m = footer.data_blocks, footer.index_blocks
        if len(raw) != 12 * n + 16 * m + 32 * m:
            raise corrupt(where, "the directory has the wrong size")
        table = np.frombuffer(raw, np.uint32, 3 * n + 4 * m)
        self.data_stored, self.data_raw, self.data_crc = table[: 3 * n].reshape(3, n)
        self.index_stored, self.index_raw, self.index_crc, self.index_rows = table[3 * n :].reshape(4, m)
        self.data_offset = _starts(self.data_stored, HEADER_SIZE)
        self.index_offset = _starts(self.index_stored, HEADER_SIZE + int(self.data_stored.sum(dtype=np.uint64)))
        fences = np.frombuffer(raw, np.uint64, 4 * m, offset=table.nbytes).reshape(4, m).tolist()
        self.first_key = [hi << 64 | lo for hi, lo in zip(fences[0], fences[1], strict=True)]
        self.last_key = [hi << 64 | lo for hi, lo in zip(fences[2], fences[3], strict=True)]


def _starts(lengths: U32Array, base: int) -> U64Array:
    starts = np.full(len(lengths), base, np.uint64)
    starts[1:] += np.cumsum(lengths[:-1], dtype=np.uint64)
    return starts


def corrupt(where: str, what: str) -> CorruptionError:
    """The error for a damaged layer file, with the repair."""
    return CorruptionError(
        f"layer file {where}: {what}; without a copy in remote storage, restore it from a backup of the bucket"
    )


class LayerWriter:
    """Writes one layer file. Rows come in final order, in as many calls of ``add`` as the caller likes; blocking."""

    def __init__(
        self,
        directory: Path,
        name: LayerName,
        generation: int,
        shard: TenantShardId,
        timeline_id: TimelineId,
        *,
        sync: bool = True,
    ) -> None:
        self.name = name
        self.path = directory / name.local(generation)
        self._temp = self.path.with_name(self.path.name + TEMP_SUFFIX)
        self._sync = sync
        self._file = self._temp.open("wb", buffering=1 << 20)
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._target = IMAGE_BLOCK_BYTES if name.is_image else DELTA_BLOCK_BYTES
        self._blocks: list[tuple[int, int, int]] = []  # stored, raw, crc
        self._columns: dict[str, list[Any]] = {column: [] for column, _ in COLUMNS}
        self.rows = 0
        self._file.write(pack_header(name, shard, timeline_id))

    def add(
        self,
        key_hi: U64Array,
        key_lo: U64Array,
        lsn: U64Array,
        kind: U8Array,
        value: IndexArray,
        slices: Sequence[bytes | memoryview],
        lengths: U32Array,
    ) -> None:
        """Add rows; ``value[i]`` is the number, in ``slices``, of row i's bytes. ``lengths`` are those of the slices."""
        ends = np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths
        _, first, number = np.unique(starts // self._target, return_index=True, return_inverse=True)
        edges = [*first.tolist(), len(slices)]
        block = number + len(self._blocks)
        offset = starts - starts[first][number]
        for begin, end in itertools.pairwise(edges):
            self._write_data_block(slices[begin] if end - begin == 1 else b"".join(slices[begin:end]))
        for column, values in (("key_hi", key_hi), ("key_lo", key_lo), ("lsn", lsn), ("kind", kind)):
            self._columns[column].append(np.asarray(values))
        self._columns["block"].append(block[value].astype(np.uint32))
        self._columns["offset"].append(offset[value].astype(np.uint32))
        self._columns["length"].append(np.asarray(lengths, np.uint32)[value])
        self.rows += len(value)

    def _write_data_block(self, raw: bytes | memoryview) -> None:
        stored: bytes | memoryview = self._compressor.compress(raw)
        if len(stored) >= len(raw):
            stored = raw  # stored length equal to raw length marks an uncompressed block
        self._blocks.append((len(stored), len(raw), crc32c(stored, len(self._blocks))))
        self._file.write(stored)

    def finish(self) -> int:
        """Write index, directory and footer; sync; rename. Returns the size of the file."""
        columns = {
            c: np.concatenate(v) if v else np.empty(0, t) for (c, t), v in zip(COLUMNS, self._columns.values(), strict=True)
        }
        edges = [*range(0, self.rows, INDEX_BLOCK_ROWS), self.rows] if self.rows else []
        index: list[tuple[int, int, int, int]] = []
        for begin, end in itertools.pairwise(edges):
            raw = b"".join(np.ascontiguousarray(columns[c][begin:end], t).tobytes() for c, t in COLUMNS)
            stored = self._compressor.compress(raw)
            index.append((len(stored), len(raw), crc32c(stored, len(index)), end - begin))
            self._file.write(stored)
        firsts, lasts = np.array(edges[:-1], np.int64), np.array(edges[1:], np.int64) - 1
        raw = np.array(self._blocks, np.uint32).T.tobytes() + np.array(index, np.uint32).T.tobytes()
        for rows in (firsts, lasts):
            raw += columns["key_hi"][rows].tobytes() + columns["key_lo"][rows].tobytes()
        offset = self._file.tell()
        directory = self._compressor.compress(raw)
        self._file.write(directory)
        size = self._file.tell() + FOOTER_SIZE
        footer = _FOOTER.pack(
            FOOTER_MAGIC, self.rows, offset, len(directory), crc32c(directory), len(self._blocks), len(index), 0, size
        )
        self._file.write(footer + crc32c(footer).to_bytes(4, "little"))
        self._file.flush()
        if self._sync:
            os.fsync(self._file.fileno())
        self._file.close()
        self._temp.rename(self.path)
        if self._sync:
            sync_directory(self.path.parent)
        return size

    def abandon(self) -> None:
        """Drop the unfinished file."""
        with contextlib.suppress(OSError):  # closing writes what is buffered; on a full disk that fails again
            self._file.close()
        self._temp.unlink(missing_ok=True)

"""Reading a layer file: checked, block by block, without stalling the event loop.

A read is first tried with ``RWF_NOWAIT``: what is in the page cache is taken inline, which costs less than handing it to a
thread; only what would wait for the disk goes to one. Every block is checked against its checksum before use.

Invariant: nothing that failed a check is ever returned or cached.
"""

import asyncio
import itertools
import os
from bisect import bisect_left, bisect_right
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import zstandard
from crc32c import crc32c

from neon_services.ground.ids import TimelineId
from neon_services.pageserver.layers.block_cache import BlockCache
from neon_services.pageserver.layers.format import (
    COLUMNS,
    FOOTER_SIZE,
    HEADER_SIZE,
    ROW_BYTES,
    Directory,
    Footer,
    check_header,
    corrupt,
)
from neon_services.pageserver.layers.hits import Hits
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.values import IndexArray, U64Array, expand_ranges

_DATA, _INDEX = 0, 1
_READ_BYTES_MAX = 1 << 20  # neighbouring blocks are read together up to this
_file_numbers = itertools.count()

IndexBlock = dict[str, np.ndarray]


class LayerFile:
    """An open layer file. Close it when the last reader is gone (the garbage collector does, too)."""

    def __init__(
        self, descriptor: int, path: Path, name: LayerName, directory: Directory, rows: int, cache: BlockCache
    ) -> None:
        self.path = path
        self.name = name
        self.rows = rows
        self._descriptor = descriptor
        self._directory = directory
        self._cache = cache
        self._number = next(_file_numbers)
        self._decompressor = zstandard.ZstdDecompressor()

    def __del__(self) -> None:
        os.close(self._descriptor)

    @classmethod
    def open(cls, path: Path, name: LayerName, timeline_id: TimelineId, cache: BlockCache) -> "LayerFile":
        """Open and check header, footer and directory (blocking). Raises CorruptionError naming the file, or OSError."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            where, size = str(path), os.fstat(descriptor).st_size
            if size < HEADER_SIZE + FOOTER_SIZE:
                raise corrupt(where, f"only {size} bytes long")
            check_header(os.pread(descriptor, HEADER_SIZE, 0), name, timeline_id, where)
            footer = Footer(os.pread(descriptor, FOOTER_SIZE, size - FOOTER_SIZE), size, where)
            stored = os.pread(descriptor, footer.directory_stored, footer.directory_offset)
            if len(stored) != footer.directory_stored or crc32c(stored) != footer.directory_crc:
                raise corrupt(where, "the directory fails its checksum")
            directory = Directory(zstandard.ZstdDecompressor().decompress(stored), footer, where)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, path, name, directory, footer.rows, cache)

    # -- lookups

    async def find(self, key_hi: U64Array, key_lo: U64Array, floor: U64Array, ceiling: U64Array, threads: Executor) -> Hits:
        """Rows of the keys with ``floor <= lsn < ceiling`` (per key), in file order within a key."""
        wanted: dict[int, list[int]] = {}
        first_key, last_key = self._directory.first_key, self._directory.last_key
        for number, (hi, lo) in enumerate(zip(key_hi.tolist(), key_lo.tolist(), strict=True)):
            for holder in range(bisect_left(last_key, hi << 64 | lo), bisect_right(first_key, hi << 64 | lo)):
                wanted.setdefault(holder, []).append(number)
        if not wanted:
            return Hits.none()
        parts: list[tuple[IndexArray, IndexArray, IndexBlock]] = []
        numbers = sorted(wanted)
        for number, block in zip(numbers, await self._index_blocks(numbers, threads), strict=True):
            keys = np.array(wanted[number])
            owner, row = _lookup(block, key_hi[keys], key_lo[keys])
            owner = keys[owner]
            lsn = block["lsn"][row]
            keep = (lsn >= floor[owner]) & (lsn < ceiling[owner])
            parts.append((owner[keep], row[keep], block))
        owner = np.concatenate([p[0] for p in parts])
        order = np.argsort(owner, kind="stable")  # blocks were visited in file order, which stays the order within a key

        def column(name: str) -> np.ndarray:
            return np.concatenate([block[name][row] for _, row, block in parts])[order]

        position = column("block").astype(np.uint64) << np.uint64(32) | column("offset")
        return Hits(owner[order], column("lsn"), column("kind"), position, column("length"))

    async def keys(
        self, start: tuple[int, int], end: tuple[int, int], floor: int, ceiling: int, threads: Executor
    ) -> tuple[U64Array, U64Array]:
        """Keys with ``start <= key < end`` that have rows with ``floor <= lsn < ceiling``; with repetitions."""
        first = bisect_left(self._directory.last_key, start[0] << 64 | start[1])
        last = bisect_left(self._directory.first_key, end[0] << 64 | end[1])
        his, los = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for block in await self._index_blocks(list(range(first, last)), threads):
            hi, lo, lsn = block["key_hi"], block["key_lo"], block["lsn"]
            inside = (hi > start[0]) | ((hi == start[0]) & (lo >= start[1]))
            inside &= (hi < end[0]) | ((hi == end[0]) & (lo < end[1]))
            inside &= (lsn >= floor) & (lsn < ceiling)
            his.append(hi[inside])
            los.append(lo[inside])
        return np.concatenate(his), np.concatenate(los)

    async def fetch(self, position: U64Array, length: np.ndarray, threads: Executor) -> list[bytes]:
        """The bytes of rows that ``find`` named."""
        block = (position >> np.uint64(32)).astype(np.int64)
        numbers = np.unique(block).tolist()
        blocks = dict(zip(numbers, await self._data_blocks(numbers, threads), strict=True))
        offsets = (position & np.uint64(0xFFFF_FFFF)).tolist()
        return [
            blocks[number][offset : offset + size]
            for number, offset, size in zip(block.tolist(), offsets, length.tolist(), strict=True)
        ]

    async def verify(self, threads: Executor) -> None:
        """Read every block. Raises CorruptionError naming the first bad one."""
        for number in range(len(self._directory.index_offset)):
            await self._load(_INDEX, [number], threads)
        for number in range(len(self._directory.data_offset)):
            await self._load(_DATA, [number], threads)

    # -- blocks

    async def _index_blocks(self, numbers: list[int], threads: Executor) -> list[IndexBlock]:
        found: dict[int, IndexBlock] = {}
        for number in numbers:
            cached = self._cache.get((self._number, _INDEX, number))
            if cached is not None:
                found[number] = cached
        missing = [number for number in numbers if number not in found]
        for number, raw in zip(missing, await self._load(_INDEX, missing, threads), strict=True):
            rows = int(self._directory.index_rows[number])
            if len(raw) != rows * ROW_BYTES:
                raise corrupt(str(self.path), f"index block {number} has the wrong size")
            block: IndexBlock = {}
            at = 0
            for column, kind in COLUMNS:
                block[column] = np.frombuffer(raw, kind, rows, at)
                at += block[column].nbytes
            found[number] = block
            self._cache.put((self._number, _INDEX, number), block, len(raw))
        return [found[number] for number in numbers]

    async def _data_blocks(self, numbers: list[int], threads: Executor) -> list[bytes]:
        found: dict[int, bytes] = {}
        for number in numbers:
            cached = self._cache.get((self._number, _DATA, number))
            if cached is not None:
                found[number] = cached
        missing = [number for number in numbers if number not in found]
        keep = not self.name.is_image  # a page of an image is the caller's to cache; a delta block serves many keys
        for number, raw in zip(missing, await self._load(_DATA, missing, threads), strict=True):
            found[number] = raw
            if keep:
                self._cache.put((self._number, _DATA, number), raw, len(raw))
        return [found[number] for number in numbers]

    async def _load(self, kind: int, numbers: list[int], threads: Executor) -> list[bytes]:
        """Read, check and decompress blocks; ``numbers`` ascend."""
        directory = self._directory
        if kind == _DATA:
            offset, stored, raw, crc = directory.data_offset, directory.data_stored, directory.data_raw, directory.data_crc
        else:
            offset, stored, raw, crc = directory.index_offset, directory.index_stored, directory.index_raw, directory.index_crc
        answer: list[bytes] = []
        for begin, end in _adjacent(numbers, stored):
            group = numbers[begin:end]
            start = int(offset[group[0]])
            size = int(offset[group[-1]]) + int(stored[group[-1]]) - start
            data = memoryview(await self._read(start, size, threads))
            for number in group:
                at = int(offset[number]) - start
                piece = data[at : at + int(stored[number])]
                if crc32c(piece, number) != crc[number]:
                    what = "data" if kind == _DATA else "index"
                    raise corrupt(str(self.path), f"{what} block {number} at byte {int(offset[number])} fails its checksum")
                plain = kind == _DATA and len(piece) == raw[number]
                answer.append(bytes(piece) if plain else self._decompressor.decompress(piece, max_output_size=int(raw[number])))
        return answer

    async def _read(self, start: int, size: int, threads: Executor) -> bytearray:
        buffer = bytearray(size)
        try:
            if os.preadv(self._descriptor, [buffer], start, os.RWF_NOWAIT) == size:
                return buffer
        except OSError:
            pass  # not in the page cache, or the file system cannot tell: a thread may wait for it

        def read() -> None:
            view, done = memoryview(buffer), 0
            while done < size:
                count = os.preadv(self._descriptor, [view[done:]], start + done)
                if count == 0:
                    raise corrupt(str(self.path), f"ends at byte {start + done}, inside a block")
                done += count

        await asyncio.get_running_loop().run_in_executor(threads, read)
        return buffer


def _adjacent(numbers: list[int], stored: np.ndarray) -> list[tuple[int, int]]:
    """Split into runs of consecutive blocks of bounded size."""
    runs: list[tuple[int, int]] = []
    begin, size = 0, 0
    for place, number in enumerate(numbers):
        if place > begin and (number != numbers[place - 1] + 1 or size > _READ_BYTES_MAX):
            runs.append((begin, place))
            begin, size = place, 0
        size += int(stored[number])
    if numbers:
        runs.append((begin, len(numbers)))
    return runs


def _lookup(block: IndexBlock, key_hi: U64Array, key_lo: U64Array) -> tuple[IndexArray, IndexArray]:
    """(number of the key, row) of all rows of the keys in one index block, in row order within a key."""
    hi, lo = block["key_hi"], block["key_lo"]
    first = np.zeros(len(key_hi), np.int64)
    last = np.zeros(len(key_hi), np.int64)
    for value in np.unique(key_hi):  # hardly ever more than one: it changes with tablespace, database and 2^24 relations
        begin, end = np.searchsorted(hi, value, "left"), np.searchsorted(hi, value, "right")
        same = key_hi == value
        part = lo[begin:end]
        first[same] = begin + np.searchsorted(part, key_lo[same], "left")
        last[same] = begin + np.searchsorted(part, key_lo[same], "right")
    return expand_ranges(first, last)

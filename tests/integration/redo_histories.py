"""Page histories out of a server's WAL: for any page the base it starts from and the records that lead to any LSN.

Rules (a pageserver has the same): a truncation that removes a page ends its history; a database made by copying files starts
from the pages of its source at that moment; a record that makes the page from nothing, or brings its image, needs no base.
"""

import itertools
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn, parse_segment_file_name
from neon_services.wal.control_data import ControlFile
from neon_services.wal.decoder import REF_FPI, REF_WILL_INIT, WalBatch, WalDecoder
from neon_services.wal.scanner import find_end_of_wal

RM_SMGR, RM_DBASE = 2, 4
SMGR_TRUNCATE, DBASE_CREATE_FILE_COPY = 0x20, 0x00
MAIN_FORK, FSM_FORK, VM_FORK = 0, 1, 2
FORK_SUFFIXES = ("", "_fsm", "_vm", "_init")
BLOCKS_PER_FILE = 131072
HEAP_BLOCKS_PER_MAP_PAGE = (8192 - 24) * 4
DEFAULT_TABLESPACE, GLOBAL_TABLESPACE = 1663, 1664


class PageKey(NamedTuple):
    """One page of a cluster."""

    spc: int
    db: int
    rel: int
    fork: int
    blk: int


class Directory:
    """Pages as they are in the files of a stopped server."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self._open: dict[Path, int | None] = {}

    def _path(self, key: PageKey) -> Path | None:
        name = f"{key.rel}{FORK_SUFFIXES[key.fork]}"
        if key.blk >= BLOCKS_PER_FILE:
            name += f".{key.blk // BLOCKS_PER_FILE}"
        if key.spc == GLOBAL_TABLESPACE:
            return self.data / "global" / name
        if key.spc == DEFAULT_TABLESPACE:
            return self.data / "base" / str(key.db) / name
        return next((self.data / "pg_tblspc" / str(key.spc)).glob(f"PG_*/{key.db}/{name}"), None)

    def page(self, key: PageKey) -> bytes | None:
        """The 8192 bytes, None when the file is not there or ends before."""
        path = self._path(key)
        if path is None:
            return None
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY) if path.exists() else None
        descriptor = self._open[path]
        if descriptor is None:
            return None
        page = os.pread(descriptor, 8192, key.blk % BLOCKS_PER_FILE * 8192)
        return page if len(page) == 8192 else None

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            if descriptor is not None:
                os.close(descriptor)
        self._open.clear()


@dataclass(frozen=True)
class DatabaseCopy:
    """CREATE DATABASE ... STRATEGY = file_copy."""

    source_db: int
    lsn: int


class Histories:
    """All WAL from a redo point on, sorted by page."""

    def __init__(self, data: Path, pg_major: int, redo_lsn: Lsn) -> None:
        self._blobs: list[bytes] = []
        records, blob_numbers, refs = [], [], []
        count = 0
        for batch in _decode_files(data / "pg_wal", pg_major, redo_lsn):
            rows = batch.refs.copy()
            rows["rec"] += count
            count += len(batch.records)
            records.append(batch.records)
            blob_numbers.append(np.full(len(batch.records), len(self._blobs)))
            refs.append(rows)
            self._blobs.append(batch.blob)
        self.records = np.concatenate(records)
        self._blob_numbers = np.concatenate(blob_numbers)
        all_refs = np.concatenate(refs)
        names = ("spc", "db", "rel", "fork", "blk")
        order = np.lexsort((all_refs["rec"], *(all_refs[name] for name in reversed(names))))
        self.refs = all_refs[order]
        new = np.ones(len(self.refs) + 1, bool)
        new[1:-1] = np.any([self.refs[name][1:] != self.refs[name][:-1] for name in names], axis=0)
        bounds = np.nonzero(new)[0]
        self.pages = {
            PageKey(*(int(self.refs[name][start]) for name in names)): (start, end)
            for start, end in itertools.pairwise(bounds.tolist())
        }
        """(first, behind the last) index in `refs` of each page that WAL touches."""
        self.copies = {int(db): copy for db, copy in self._database_copies()}
        self._truncations = self._find_truncations()

    def _main_data(self, index: int) -> bytes:
        row = self.records[index]
        at = int(row["blob_off"]) + 8 + int(row["main_off"])
        return self._blobs[self._blob_numbers[index]][at : at + int(row["main_len"])]

    def _of_kind(self, rmid: int, operation: int) -> np.ndarray:
        return np.nonzero((self.records["rmid"] == rmid) & ((self.records["info"] & 0xF0) == operation))[0]

    def _database_copies(self) -> Iterator[tuple[int, DatabaseCopy]]:
        for index in self._of_kind(RM_DBASE, DBASE_CREATE_FILE_COPY):
            db, _, source_db, _ = struct.unpack_from("<IIII", self._main_data(index))
            yield db, DatabaseCopy(source_db, int(self.records["end_lsn"][index]))

    def _find_truncations(self) -> dict[tuple[int, int, int], list[tuple[int, int, int]]]:
        found = defaultdict(list)
        for index in self._of_kind(RM_SMGR, SMGR_TRUNCATE):
            blk, spc, db, rel, flags = struct.unpack_from("<IIIIi", self._main_data(index))
            found[spc, db, rel].append((int(self.records["end_lsn"][index]), blk, flags))
        return found

    def truncated_at(self, key: PageKey, until_lsn: int) -> int:
        """End LSN of the last truncation at or before `until_lsn` that removed the page, 0 when there is none."""
        last = 0
        for lsn, heap_blocks, flags in self._truncations.get(key[:3], ()):
            kept = None
            if key.fork == MAIN_FORK and flags & 1:
                kept = heap_blocks
            elif key.fork == VM_FORK and flags & 2:
                kept = -(-heap_blocks // HEAP_BLOCKS_PER_MAP_PAGE)
            if lsn <= until_lsn and kept is not None and key.blk >= kept:
                last = lsn
        return last

    def entry(self, index: int) -> bytes:
        """[u64 end_lsn][raw record][pad] of one record."""
        row = self.records[index]
        at = int(row["blob_off"])
        return self._blobs[self._blob_numbers[index]][at : at + ((int(row["tot_len"]) + 15) & ~7)]

    def chain(self, key: PageKey, until_lsn: int = (1 << 64) - 1) -> tuple[list[int], bool]:
        """(indexes of the page's records in order, whether a truncation removed what was there before them)."""
        start, end = self.pages.get(key, (0, 0))
        lsns = self.refs["end_lsn"][start:end]
        truncated = self.truncated_at(key, until_lsn)
        first, last = np.searchsorted(lsns, [truncated, until_lsn], "right")
        return list(dict.fromkeys(self.refs["rec"][start + first : start + last].tolist())), truncated != 0

    def from_the_one_that_makes_the_page(self, key: PageKey, indexes: list[int]) -> list[int]:
        """For a page without a base: the records from the first on that needs none. All of them for a visibility map."""
        if key.fork == VM_FORK:
            return indexes
        start, end = self.pages[key]
        refs = self.refs[start:end]
        makers = refs["rec"][(refs["flags"] & (REF_WILL_INIT | REF_FPI)) != 0]
        first = min((int(maker) for maker in makers if maker >= indexes[0]), default=None)
        return indexes if first is None else [index for index in indexes if index >= first]


class WalFiles:
    """The bytes of a directory of WAL segments, by LSN."""

    def __init__(self, directory: Path) -> None:
        self._files = {
            parse_segment_file_name(path.name): path for path in directory.iterdir() if re.fullmatch("[0-9A-F]{24}", path.name)
        }

    def read(self, lsn: int, n: int) -> bytes:
        """Up to n bytes of one segment, b"" behind the last one."""
        path = self._files.get(lsn // WAL_SEGMENT_SIZE)
        if path is None:
            return b""
        with path.open("rb") as file:
            file.seek(lsn % WAL_SEGMENT_SIZE)
            return file.read(n)


def _decode_files(directory: Path, pg_major: int, redo_lsn: Lsn) -> Iterator[WalBatch]:
    files = WalFiles(directory)
    end = find_end_of_wal(files.read, redo_lsn)
    decoder = WalDecoder(redo_lsn, pg_major)
    while decoder.position < end:
        yield decoder.feed(files.read(decoder.position, min(1 << 20, end - decoder.position)))


def redo_lsn_of(data: Path) -> Lsn:
    """Where replay of a stopped server's directory would begin."""
    return ControlFile.parse((data / "global" / "pg_control").read_bytes()).checkpoint.redo

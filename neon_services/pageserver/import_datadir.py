"""The files of a stopped data directory as values at one LSN.

Invariant: every relation fork, SLRU segment, relation map and prepared transaction becomes images at that LSN; files that
only a running server needs (configuration, pg_internal.init, statistics) are left out. Files with equal content, which
initdb makes many of (three copies of each catalog), are stored once.
"""

import asyncio
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from neon_services.ground.errors import CorruptionError
from neon_services.pageserver import keys
from neon_services.pageserver.ingest_rows import RowBuilder
from neon_services.pageserver.ingest_tip import encode_prepared
from neon_services.pageserver.keys import FORK_SUFFIXES, PAGE_SIZE, RelTag
from neon_services.pageserver.relations import Databases, Relations, encode_databases
from neon_services.pageserver.slru import encode_segments
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.values import IMAGE, ValueBatch

_RELATION_FILE = re.compile(r"(\d+)(_fsm|_vm|_init)?(?:\.(\d+))?")
_SEGMENT_BLOCKS = 131072
_BATCH_BYTES = 16 << 20
_U32 = struct.Struct("<I")


async def import_data_directory(timeline: Timeline, data: Path, lsn: int, control: bytes, checkpoint: bytes) -> None:
    """Ingest all files at ``lsn``; the timeline's last record is then there (without a previous record).

    ``control`` is the content of pg_control, ``checkpoint`` the CheckPoint struct in it.
    """
    importer = _Importer(timeline, data, lsn)
    batches = importer.batches(control, checkpoint)
    while True:
        batch = await asyncio.to_thread(next, batches, None)
        if batch is None:
            break
        timeline.ingest(batch, lsn, 0)
        await timeline.ingest_backpressure()
    Relations.of(timeline).set_all(importer.sizes, lsn)


class _Importer:
    def __init__(self, timeline: Timeline, data: Path, lsn: int) -> None:
        self._pg_version = timeline.pg_version
        self._data = data
        self._lsn = lsn
        self._databases: Databases = {}
        self.sizes: dict[RelTag, int] = {}
        self._rows = RowBuilder(b"")
        self._bytes = 0
        self._seen: dict[bytes, int] = {}  # content of a file -> where it is in the data of this batch

    def batches(self, control: bytes, checkpoint: bytes) -> Iterator[ValueBatch]:
        """All rows, in batches of limited size."""
        yield from self._directory(self._data / "global", keys.GLOBAL_TABLESPACE, 0)
        for path in sorted((self._data / "base").iterdir()):
            if path.name.isdecimal():
                yield from self._directory(path, keys.DEFAULT_TABLESPACE, int(path.name))
        foreign = sorted(path.name for path in (self._data / "pg_tblspc").iterdir())
        if foreign:
            raise CorruptionError(f"the cluster to import has tablespace {foreign[0]}: only pg_default can be stored")
        for tag, blocks in self.sizes.items():
            self._rows.put_image(keys.relation_exists(tag), self._lsn, keys.RELATION_EXISTS)
            self._rows.put_image(keys.relation_size(tag), self._lsn, _U32.pack(blocks))
        for kind, directory in enumerate(keys.SLRU_DIRECTORIES):
            self._slru(kind, self._data / directory)
        self._twophase()
        self._rows.put_image(keys.DB_DIRECTORY, self._lsn, encode_databases(self._databases))
        self._rows.put_image(keys.CONTROL_FILE, self._lsn, control)
        self._rows.put_image(keys.CHECKPOINT, self._lsn, checkpoint)
        yield self._rows.finish()

    def _directory(self, directory: Path, spc: int, db: int) -> Iterator[ValueBatch]:
        self._databases[spc, db] = False
        for path in sorted(directory.iterdir()):
            if path.name == "pg_filenode.map":
                self._databases[spc, db] = True
                self._rows.put_image(keys.relation_map(spc, db), self._lsn, path.read_bytes())
                continue
            match = _RELATION_FILE.fullmatch(path.name)
            if match is None:
                continue
            tag = RelTag(spc, db, int(match[1]), FORK_SUFFIXES.index(match[2] or ""))
            self._relation_file(tag, int(match[3] or 0) * _SEGMENT_BLOCKS, path)
            if self._bytes > _BATCH_BYTES:
                yield self._rows.finish()
                self._rows, self._bytes, self._seen = RowBuilder(b""), 0, {}

    def _relation_file(self, tag: RelTag, first_block: int, path: Path) -> None:
        content = path.read_bytes()
        blocks, rest = divmod(len(content), PAGE_SIZE)
        if rest:
            raise CorruptionError(f"{path} has {len(content)} bytes, which is not a whole number of pages")
        self.sizes[tag] = max(self.sizes.get(tag, 0), first_block + blocks if blocks else 0)
        if not blocks:
            return
        offset = self._seen.get(content)
        if offset is None:
            offset = self._seen[content] = self._rows.add_data(content)
            self._bytes += len(content)
        hi, lo = keys.relation_block(tag, first_block)
        numbers = np.arange(blocks, dtype=np.uint64)
        self._rows.put_columns(
            np.full(blocks, hi, np.uint64),
            np.uint64(lo) + numbers,
            np.full(blocks, self._lsn, np.uint64),
            IMAGE,
            np.uint64(offset) + numbers * np.uint64(PAGE_SIZE),
            PAGE_SIZE,
        )

    def _slru(self, kind: int, directory: Path) -> None:
        segments: set[int] = set()
        for path in sorted(directory.iterdir()):
            content = path.read_bytes()
            if len(content) % PAGE_SIZE:
                raise CorruptionError(f"{path} has {len(content)} bytes, which is not a whole number of pages")
            segment = int(path.name, 16)
            segments.add(segment)
            for block in range(len(content) // PAGE_SIZE):
                page = content[block * PAGE_SIZE : (block + 1) * PAGE_SIZE]
                self._rows.put_image(keys.slru_block(kind, segment, block), self._lsn, page)
            self._rows.put_image(keys.slru_segment_size(kind, segment), self._lsn, _U32.pack(len(content) // PAGE_SIZE))
        self._rows.put_image(keys.slru_directory(kind), self._lsn, encode_segments(segments))

    def _twophase(self) -> None:
        prepared: set[int] = set()
        for path in sorted((self._data / "pg_twophase").iterdir()):
            xid = int(path.name, 16)
            prepared.add(xid)
            self._rows.put_image(keys.twophase_file(xid), self._lsn, path.read_bytes()[:-4])  # without its CRC
        self._rows.put_image(keys.TWOPHASE_DIRECTORY, self._lsn, encode_prepared(prepared, self._pg_version))

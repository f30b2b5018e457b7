"""The basebackup of a timeline at an LSN: a tar of a data directory without relation data.

Invariant: ``global/pg_control`` comes after everything that a start needs, so a cut-off stream is noticed. All is read at one
LSN, so the directory is one consistent state.

With ``--skeleton`` (ours; for a compute that makes its own start from it) two members are added in front of pg_control,
``neon.relation_sizes`` (``{u32 spcnode, dbnode, relnode, forknum, nblocks}`` little-endian, for every relation fork) and
``neon.catalog_pages`` (see catalog_pages.py), and the WAL segment, 16 MiB of zeros that such a compute replaces, is left out.
With ``full`` (fullbackup) all relation files are in it.
"""

import struct
import tarfile
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import crc32c
import numpy as np

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import (
    SHORT_PAGE_HEADER,
    WAL_SEGMENT_SIZE,
    XLOG_BLCKSZ,
    Lsn,
    format_lsn,
    page_header_size,
    segment_file_name,
    segment_number,
    skip_page_header,
)
from neon_services.pageserver import keys, slru
from neon_services.pageserver.catalog_pages import catalog_pages
from neon_services.pageserver.ingest_records import decode_aux_files
from neon_services.pageserver.ingest_tip import decode_prepared
from neon_services.pageserver.keys import PAGE_SIZE, RelTag
from neon_services.pageserver.relations import Relations
from neon_services.pageserver.timeline import Timeline
from neon_services.wal.control_data import CheckPoint, ControlFile, DBState
from neon_services.wal.framing import build_page_header

CHUNK_BYTES = 256 * 1024
_DIRECTORIES = (
    *("global", "pg_wal/archive_status", "pg_commit_ts", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots"),
    *("pg_subtrans", "pg_twophase", "pg_multixact", "pg_multixact/members", "pg_multixact/offsets", "base", "base/1"),
    *("pg_replslot", "pg_tblspc", "pg_stat", "pg_stat_tmp", "pg_xact", "pg_logical", "pg_logical/snapshots"),
    "pg_logical/mappings",
)
_PG_HBA = b"""\
# TYPE  DATABASE        USER            ADDRESS                 METHOD
local   all             all                                     trust
host    all             all             127.0.0.1/32            trust
host    all             all             ::1/128                 trust
local   replication     all                                     trust
host    replication     all             127.0.0.1/32            trust
host    replication     all             ::1/128                 trust
"""
_SEGMENT_BLOCKS = 131072
_READ_BLOCKS = 512
_ORIGINS_MAGIC = 0x1257DADE


class BasebackupRefused(NeonError):
    """There can be no basebackup at this LSN."""


@dataclass(frozen=True, slots=True)
class BasebackupOptions:
    """What a basebackup contains."""

    gzip: bool = False
    replica: bool = False  #: leave replication slots out
    skeleton: bool = False
    full: bool = False
    previous_lsn: int | None = None  #: fullbackup: what the caller says that the record before was


async def basebackup(timeline: Timeline, lsn: int, options: BasebackupOptions) -> AsyncIterator[bytes]:
    """The tar in chunks. ``lsn`` has been waited for. Raises BasebackupRefused below the GC cutoff."""
    if lsn < timeline.latest_gc_cutoff_lsn:
        raise BasebackupRefused(
            f"invalid basebackup lsn: {format_lsn(lsn)} is below the garbage collection cutoff "
            f"{format_lsn(timeline.latest_gc_cutoff_lsn)}"
        )
    packer = zlib.compressobj(1, wbits=31) if options.gzip else None
    ready = bytearray()
    async for part in _Basebackup(timeline, lsn, options).parts():
        ready += part if packer is None else packer.compress(part)
        while len(ready) >= CHUNK_BYTES:
            yield bytes(ready[:CHUNK_BYTES])
            del ready[:CHUNK_BYTES]
    if packer is not None:
        ready += packer.flush()
    if ready:
        yield bytes(ready)


class _Basebackup:
    def __init__(self, timeline: Timeline, lsn: int, options: BasebackupOptions) -> None:
        self._timeline = timeline
        self._lsn = lsn
        self._options = options
        self._relations = Relations.of(timeline)
        self._mtime = int(time.time())
        # the tip may move while we read: what is known of it now belongs to the LSN
        self._previous_lsn = timeline.prev_record_lsn if lsn == timeline.last_record_lsn else 0

    async def parts(self) -> AsyncIterator[bytes]:
        major = self._timeline.pg_version
        directories = (*_DIRECTORIES, "pg_wal/summaries") if major >= 17 else _DIRECTORIES
        yield b"".join(self._directory(name) for name in directories)
        yield self._file("pg_hba.conf", _PG_HBA) + self._file("pg_ident.conf", b"") + self._file("postgresql.auto.conf", b"")
        for kind, name in enumerate(keys.SLRU_DIRECTORIES):
            for segment, pages in await slru.list_segments(self._timeline, kind, self._lsn):
                content = await slru.read_segment(self._timeline, kind, segment, pages, self._lsn)
                yield self._file(f"{name}/{segment:04X}", content)
        sizes = await self._relations.relation_sizes(self._lsn)
        async for part in self._databases(sizes):
            yield part
        yield await self._aux_files()
        yield await self._prepared_transactions()
        yield await self._replication_origins()
        signal = f"PREV LSN: {self._previous()}".encode()
        yield self._file("neon.signal", signal) + self._file("zenith.signal", signal)
        if self._options.skeleton:
            rows = [(*tag, blocks) for tag, blocks in sizes.items()]
            yield self._file("neon.relation_sizes", np.array(rows, "<u4").tobytes())
            yield self._file("neon.catalog_pages", await catalog_pages(self._timeline, self._lsn, sizes))
        control = await self._control_file()
        yield self._file("global/pg_control", control)
        if not self._options.skeleton:
            wal_file = segment_file_name(segment_number(self._lsn))
            yield self._file(f"pg_wal/{wal_file}", first_segment(self._lsn, major, int.from_bytes(control[:8], "little")))
        yield bytes(2 * tarfile.BLOCKSIZE)

    # -- members

    def _directory(self, name: str) -> bytes:
        return self._member(name, tarfile.DIRTYPE, 0o755, 0)

    def _file(self, name: str, content: bytes) -> bytes:
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        return self._member(name, tarfile.REGTYPE, 0o600, len(content)) + content + padding

    def _member(self, name: str, kind: bytes, mode: int, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size, info.mtime = kind, mode, size, self._mtime
        return info.tobuf(tarfile.GNU_FORMAT)

    async def _databases(self, sizes: dict[RelTag, int]) -> AsyncIterator[bytes]:
        version = str(self._timeline.pg_version).encode() + b"\n"
        by_database: dict[tuple[int, int], list[RelTag]] = {}
        for tag in sizes:
            by_database.setdefault((tag.spc, tag.db), []).append(tag)
        for (spc, db), has_map in sorted((await self._relations.databases(self._lsn)).items()):
            tags = by_database.get((spc, db), [])
            if spc == keys.GLOBAL_TABLESPACE:
                yield self._file("PG_VERSION", version) + self._file("global/pg_filenode.map", await self._map(spc, db))
                directory = "global"
            elif spc != keys.DEFAULT_TABLESPACE:
                raise BasebackupRefused(f"tablespace {spc} of database {db} is not supported")
            elif not has_map and not tags:
                continue
            else:
                directory = f"base/{db}"
                yield self._directory(directory) if db != 1 else b""
                if has_map:
                    yield self._file(f"{directory}/PG_VERSION", version)
                    yield self._file(f"{directory}/pg_filenode.map", await self._map(spc, db))
            async for part in self._relation_files(directory, tags, sizes):
                yield part

    async def _map(self, spc: int, db: int) -> bytes:
        content = await self._timeline.get(*keys.relation_map(spc, db), self._lsn)
        expected = 512 if self._timeline.pg_version < 16 else 524
        if len(content) != expected:
            raise BasebackupRefused(f"the relation map of database {db} has {len(content)} bytes, not {expected}")
        return content

    async def _relation_files(self, directory: str, tags: list[RelTag], sizes: dict[RelTag, int]) -> AsyncIterator[bytes]:
        """Init forks, also as the main forks of their unlogged relations; with ``full`` all other forks."""
        unlogged = {tag.rel for tag in tags if tag.fork == keys.INIT_FORK}
        for tag in tags:
            if tag.fork == keys.INIT_FORK:
                content = await self._blocks(tag, 0, sizes[tag])
                yield self._file(f"{directory}/{tag.file_name()}", content) + self._file(f"{directory}/{tag.rel}", content)
            elif self._options.full and tag.rel not in unlogged:
                for first in range(0, max(sizes[tag], 1), _SEGMENT_BLOCKS):
                    last = min(first + _SEGMENT_BLOCKS, sizes[tag])
                    suffix = f".{first // _SEGMENT_BLOCKS}" if first else ""
                    yield self._member(
                        f"{directory}/{tag.file_name()}{suffix}", tarfile.REGTYPE, 0o600, (last - first) * PAGE_SIZE
                    )
                    for start in range(first, last, _READ_BLOCKS):
                        yield await self._blocks(tag, start, min(start + _READ_BLOCKS, last))

    async def _blocks(self, tag: RelTag, first: int, last: int) -> bytes:
        hi, lo = keys.relation_block(tag, first)
        numbers = np.arange(last - first, dtype=np.uint64)
        pages = await self._timeline.get_many(np.full(len(numbers), hi, np.uint64), np.uint64(lo) + numbers, self._lsn)
        for page in pages:
            if isinstance(page, Exception):
                raise page
        return b"".join(pages)

    async def _aux_files(self) -> bytes:
        start, end = keys.AUX_FILES_RANGE
        found: dict[str, bytes] = {}
        for _, _, value in await self._timeline.scan(*start, *end, self._lsn):
            found.update(decode_aux_files(value))
        redo = int.from_bytes((await self._timeline.get(*keys.CHECKPOINT, self._lsn))[:8], "little")
        parts, restart_lsns, directories = [], [], set()
        for path, content in sorted(found.items()):
            if path.startswith("pg_replslot/"):
                if self._options.replica:
                    continue
                if len(content) >= 104:
                    restart_lsns.append(int.from_bytes(content[96:104], "little"))
            if path == "pg_logical/replorigin_checkpoint" or (path == "pg_stat/pgstat.stat" and redo != self._lsn):
                continue
            parent = path.rpartition("/")[0]
            if parent and parent not in _DIRECTORIES and parent not in directories:
                directories.add(parent)
                parts.append(self._directory(parent))
            parts.append(self._file(path, content))
        if restart_lsns:
            parts.append(self._file("restart.lsn", struct.pack("<Q", min(restart_lsns))))
        return b"".join(parts)

    async def _prepared_transactions(self) -> bytes:
        major = self._timeline.pg_version
        width = 16 if major >= 17 else 8
        parts = []
        xids = decode_prepared(await self._timeline.get(*keys.TWOPHASE_DIRECTORY, self._lsn), major)
        for xid in sorted(xids):
            content = await self._timeline.get(*keys.twophase_file(xid), self._lsn)
            parts.append(self._file(f"pg_twophase/{xid:0{width}X}", content + struct.pack("<I", crc32c.crc32c(content))))
        return b"".join(parts)

    async def _replication_origins(self) -> bytes:
        start, end = keys.REPLICATION_ORIGINS_RANGE
        rows = await self._timeline.scan(*start, *end, self._lsn)
        origins = [(lo & 0xFFFF, int.from_bytes(value, "big")) for _, lo, value in rows]
        content = struct.pack("<I", _ORIGINS_MAGIC)
        content += b"".join(struct.pack("<H6xQ", origin, remote) for origin, remote in origins if remote)
        if len(content) == 4:
            return b""
        return self._file("pg_logical/replorigin_checkpoint", content + struct.pack("<I", crc32c.crc32c(content)))

    def _previous(self) -> str:
        previous = self._options.previous_lsn or self._previous_lsn
        if previous:
            return format_lsn(previous)
        return "none" if self._lsn == self._timeline.ancestor_lsn else "invalid"

    async def _control_file(self) -> bytes:
        stored = ControlFile.parse(await self._timeline.get(*keys.CONTROL_FILE, self._lsn))
        checkpoint = CheckPoint.parse(await self._timeline.get(*keys.CHECKPOINT, self._lsn))
        checkpoint = replace(checkpoint, redo=skip_page_header(self._lsn))
        return replace(stored, checkpoint=checkpoint, checkpoint_lsn=Lsn(0), state=DBState.SHUTDOWNED).to_bytes()


def first_segment(lsn: int, pg_major: int, system_identifier: int) -> bytes:
    """The WAL segment that holds ``lsn``: zeros but for the page headers that lead to a record there."""
    segment = bytearray(WAL_SEGMENT_SIZE)
    start = lsn - lsn % WAL_SEGMENT_SIZE

    def put_header(page: int, remaining: int) -> None:
        header = build_page_header(page, pg_major=pg_major, system_identifier=system_identifier, remaining_len=remaining)
        segment[page - start : page - start + len(header)] = header

    page = lsn - lsn % XLOG_BLCKSZ
    put_header(start, 0)
    if page == start:
        put_header(start, max(lsn % XLOG_BLCKSZ - page_header_size(start), 0))
    else:
        put_header(page, max(lsn % XLOG_BLCKSZ - SHORT_PAGE_HEADER, 0))
    return bytes(segment)

"""A pageserver for tests that serves one cleanly stopped data directory: basebackup --skeleton and pagestream_v3.

It answers for any LSN at or after the end of the source's WAL, so a test may place the start of a compute anywhere. Run as
``python -m tests.unit.compute.source_server PGDATA PORT [--delay-ms N]``.
"""

import argparse
import asyncio
import io
import os
import re
import struct
import tarfile
import zlib
from pathlib import Path

import crc32c

from neon_services.ground.lsn import (
    Lsn,
    align_lsn,
    format_lsn,
    page_header_size,
    parse_lsn,
    segment_file_name,
    skip_page_header,
)
from neon_services.protocols import pgwire
from neon_services.protocols.pgserver import PgServer, ServerConnection

BLOCK = 8192
SEGMENT_BLOCKS = 131072
SEGMENT_SIZE = 16 * 1024 * 1024
FORKS = {"": 0, "fsm": 1, "vm": 2, "init": 3}
SUFFIX = {0: "", 1: "_fsm", 2: "_vm", 3: "_init"}
_RELATION = re.compile(r"^(\d+)(?:_(fsm|vm|init))?(?:\.(\d+))?$")
_SLRU = ("pg_xact", "pg_multixact/members", "pg_multixact/offsets")
_EMPTY = (
    "global pg_wal/archive_status pg_commit_ts pg_dynshmem pg_notify pg_serial pg_snapshots pg_subtrans pg_twophase "
    "pg_multixact pg_multixact/members pg_multixact/offsets base base/1 pg_replslot pg_tblspc pg_stat "
    "pg_stat_tmp pg_xact pg_logical pg_logical/snapshots pg_logical/mappings"
)


class Source:
    """The data directory that is served."""

    def __init__(self, pgdata: Path) -> None:
        self.pgdata = pgdata
        self.control = (pgdata / "global/pg_control").read_bytes()
        state, self.checkpoint_lsn = (
            struct.unpack_from("<I", self.control, 16)[0],
            struct.unpack_from("<Q", self.control, 32)[0],
        )
        assert state == 1, f"{pgdata} was not stopped cleanly (state {state})"
        self.end_lsn = align_lsn(self._record_end())
        self.sizes = self._scan_sizes()
        self._files: dict[tuple[int, int, int, int, int], int] = {}

    def _record_end(self) -> int:
        start = self.checkpoint_lsn
        segment = self.pgdata / "pg_wal" / segment_file_name(start // SEGMENT_SIZE)
        with segment.open("rb") as file:
            file.seek(start % SEGMENT_SIZE)
            left = struct.unpack("<I", file.read(4))[0]
        at = start
        while left > BLOCK - at % BLOCK:
            left -= BLOCK - at % BLOCK
            at += BLOCK - at % BLOCK
            at += page_header_size(at)
        return at + left

    def _scan_sizes(self) -> dict[tuple[int, int, int, int], int]:
        sizes: dict[tuple[int, int, int, int], int] = {}
        places = [(1664, 0, self.pgdata / "global")]
        places += [(1663, int(d.name), d) for d in sorted((self.pgdata / "base").iterdir()) if d.name.isdecimal()]
        for spc, db, directory in places:
            for entry in os.scandir(directory):
                match = _RELATION.match(entry.name)
                if match:
                    key = (spc, db, int(match[1]), FORKS[match[2] or ""])
                    sizes[key] = sizes.get(key, 0) + entry.stat().st_size // BLOCK
        return sizes

    def path(self, spc: int, db: int, rel: int, fork: int) -> Path:
        """The first segment file of a fork."""
        return self.pgdata / ("global" if spc == 1664 else f"base/{db}") / f"{rel}{SUFFIX[fork]}"

    def page(self, spc: int, db: int, rel: int, fork: int, block: int) -> bytes:
        """One page; zeros behind the end, as a pageserver answers."""
        segment = block // SEGMENT_BLOCKS
        key = (spc, db, rel, fork, segment)
        descriptor = self._files.get(key)
        if descriptor is None:
            path = self.path(spc, db, rel, fork)
            path = path if segment == 0 else path.with_name(f"{path.name}.{segment}")
            if not path.exists():
                raise pgwire.ServerError("XX000", f"Not found: relation {spc}/{db}/{rel}.{fork}")
            descriptor = self._files[key] = os.open(path, os.O_RDONLY)
        return os.pread(descriptor, BLOCK, block % SEGMENT_BLOCKS * BLOCK).ljust(BLOCK, b"\0")

    @staticmethod
    def map_with_other_system(header: bytes) -> bytes:
        """The head of a block map that belongs to another system, with a right checksum."""
        changed = bytearray(header)
        changed[16] ^= 1
        struct.pack_into("<I", changed, 12, crc32c.crc32c(bytes(changed[16:96])))
        return bytes(changed)

    # -- basebackup

    def basebackup(self, lsn: Lsn, *, skeleton: bool = True) -> bytes:
        """The tar of a basebackup at an LSN at or after the end of the source's WAL, not compressed."""
        assert lsn >= self.end_lsn, (lsn, self.end_lsn)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:

            def put(name: str, content: bytes) -> None:
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(content), 0o600
                archive.addfile(info, io.BytesIO(content))

            for name in _EMPTY.split():
                info = tarfile.TarInfo(name)
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            put("pg_hba.conf", b"local all all trust\nlocal replication all trust\nhost all all 127.0.0.1/32 trust\n")
            put("pg_ident.conf", b"")
            put("postgresql.auto.conf", b"")
            for directory in _SLRU:
                for file in sorted((self.pgdata / directory).iterdir()):
                    put(f"{directory}/{file.name}", file.read_bytes())
            self._put_databases(put, archive)
            put("neon.signal", f"PREV LSN: {format_lsn(self.checkpoint_lsn)}".encode())
            if skeleton:
                put("neon.relation_sizes", b"".join(struct.pack("<5I", *key, n) for key, n in self.sizes.items()))
                put("neon.catalog_pages", self._catalog_pages())
            put("global/pg_control", self._control_at(lsn))
        return out.getvalue()

    def _put_databases(self, put, archive: tarfile.TarFile) -> None:  # type: ignore[no-untyped-def]
        put("PG_VERSION", (self.pgdata / "PG_VERSION").read_bytes())
        put("global/pg_filenode.map", (self.pgdata / "global/pg_filenode.map").read_bytes())
        for db in sorted({key[1] for key in self.sizes if key[1]}):
            info = tarfile.TarInfo(f"base/{db}")
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
            for name in ("PG_VERSION", "pg_filenode.map"):
                put(f"base/{db}/{name}", (self.pgdata / f"base/{db}/{name}").read_bytes())
        for spc, db, rel, fork in self.sizes:
            if fork == FORKS["init"]:
                content = self.path(spc, db, rel, fork).read_bytes()
                put(f"base/{db}/{rel}_init", content)
                put(f"base/{db}/{rel}", content)

    def _control_at(self, lsn: Lsn) -> bytes:
        control = bytearray(self.control)
        struct.pack_into("<Q", control, 32, 0)
        struct.pack_into("<Q", control, 40, skip_page_header(lsn))
        struct.pack_into("<I", control, 288, crc32c.crc32c(bytes(control[:288])))
        return bytes(control)

    def _catalog_pages(self) -> bytes:
        """The first pages of the mapped catalogs, which every connection reads."""
        rows = []
        for spc, db in sorted({key[:2] for key in self.sizes}):
            mapping = (self.pgdata / ("global" if db == 0 else f"base/{db}") / "pg_filenode.map").read_bytes()
            (count,) = struct.unpack_from("<i", mapping, 4)
            for index in range(count):
                _, rel = struct.unpack_from("<II", mapping, 8 + 8 * index)
                for block in range(min(self.sizes.get((spc, db, rel, 0), 0), 12)):
                    rows.append(struct.pack("<5I", spc, db, rel, 0, block) + self.page(spc, db, rel, 0, block))
        return b"".join(rows)


class SourceHandler:
    """One connection."""

    def __init__(self, source: Source, delay_s: float) -> None:
        self.source = source
        self.delay_s = delay_s

    async def startup(self, message: pgwire.StartupMessage) -> None:
        pass

    def connection_lost(self) -> None:
        pass

    async def query(self, connection: ServerConnection, sql: str) -> None:
        words = sql.split()
        if words[0] == "basebackup":
            tar = self.source.basebackup(parse_lsn(words[3]), skeleton="--skeleton" in words)
            if "--gzip" in words:
                packer = zlib.compressobj(1, wbits=31)
                tar = packer.compress(tar) + packer.flush()
            connection.begin_copy_out()
            for start in range(0, len(tar), 65536):
                connection.send_copy_data(tar[start : start + 65536])
                await connection.drain()
            connection.end_copy_out()
        elif words[0] == "pagestream_v3":
            connection.begin_copy_both()
            while (request := await connection.next_copy_data()) is not None:
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                connection.send_copy_data(self._answer(request))
                await connection.drain()
        else:
            raise pgwire.ServerError("XX000", f"unknown command {words[0]}")

    def _answer(self, request: bytes) -> bytes:
        assert request[0] == 2 and len(request) == 42, request
        request_id, request_lsn, not_modified_since, spc, db, rel, fork, block = struct.unpack_from("!QQQIIIBI", request, 1)
        assert request_lsn >= not_modified_since >= self.source.end_lsn
        try:
            page = self.source.page(spc, db, rel, fork, block)
        except pgwire.ServerError as error:
            return struct.pack("!BQQQ", 103, request_id, request_lsn, not_modified_since) + str(error).encode() + b"\0"
        return b"\x66" + request[1:] + page


async def serve(pgdata: Path, port: int, delay_s: float) -> None:
    """Serve for ever."""
    source = Source(pgdata)
    server = PgServer(lambda _: SourceHandler(source, delay_s))
    await server.start("127.0.0.1", port)
    print(format_lsn(source.end_lsn), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("pgdata", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--delay-ms", type=float, default=0)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.pgdata, arguments.port, arguments.delay_ms / 1000))

"""Ingest of a real Postgres's WAL: every page, size, SLRU and file equals what Postgres itself has on disk."""

import asyncio
import io
import shutil
import struct
import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from neon_services.compute.first_checkpoint import make_first_checkpoint
from neon_services.ground.lsn import WAL_SEGMENT_SIZE, parse_segment_file_name
from neon_services.pageserver import keys, native_records, slru
from neon_services.pageserver.basebackup import BasebackupOptions, basebackup
from neon_services.pageserver.bootstrap import import_stopped_cluster, run_initdb
from neon_services.pageserver.ingest import WalIngest
from neon_services.pageserver.ingest_records import decode_aux_files
from neon_services.pageserver.ingest_tip import decode_prepared
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.relations import Relations
from neon_services.pageserver.timeline import Timeline, in_memory_timeline
from neon_services.wal.decoder import WalDecodeError, WalDecoder
from neon_services.wal.redo import RedoPool
from neon_services.wal.redo_helper import RedoHelper
from tests.integration.ingest_compare import ManagerOfRelation, compare_slru, compare_with_disk
from tests.integration.real_postgres import PG_BIN, PG_MAJOR, RealPostgres, give_to_postgres

pytestmark = [pytest.mark.postgres]

WORKLOAD = Path(__file__).with_name("ingest_workload.sql")
ROWS = 4000
PORT, RESTORED_PORT = 25520, 25521
DIGEST = """
SELECT string_agg(t, ',' ORDER BY t) FROM (
  SELECT relname || ':' || (xpath('/row/d/text()', query_to_xml(format(
    'SELECT md5(coalesce(string_agg(x::text, %L ORDER BY x::text), %L)) AS d FROM %I x', ',', '', relname),
    true, true, '')))[1] AS t
  FROM pg_class WHERE relkind IN ('r', 'm') AND relnamespace = 'public'::regnamespace AND relpersistence = 'p') q
"""
CHECK_INDEXES = """
CREATE EXTENSION amcheck;
SELECT bt_index_parent_check(c.oid, true)
  FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE amname = 'btree' AND relkind = 'i' AND relpersistence = 'p'
"""


@dataclass
class Ingested:
    """A timeline that has ingested the WAL of a server that was stopped."""

    timeline: Timeline
    data: Path
    managers: ManagerOfRelation
    digest: str
    batches: int


def wal_after(data: Path, lsn: int) -> Iterator[tuple[int, bytes]]:
    """(start LSN, bytes) of the WAL files from an LSN on."""
    numbers = sorted(parse_segment_file_name(p.name) for p in (data / "pg_wal").iterdir() if len(p.name) == 24)
    for path in sorted(p for p in (data / "pg_wal").iterdir() if len(p.name) == 24):
        number = parse_segment_file_name(path.name)
        assert number in numbers
        start = number * WAL_SEGMENT_SIZE
        if start + WAL_SEGMENT_SIZE > lsn:
            skip = max(lsn - start, 0)
            yield start + skip, path.read_bytes()[skip:]


async def ingest_files(timeline: Timeline, data: Path, managers: ManagerOfRelation, chunk: int) -> int:
    """Feed the WAL files of a stopped server; how many batches there were."""
    decoder = WalDecoder(timeline.last_record_lsn, PG_MAJOR)
    ingest = WalIngest(timeline)
    batches = 0
    end = struct.unpack_from("<Q", (data / "global/pg_control").read_bytes(), 32)[0]
    for start, content in wal_after(data, timeline.last_record_lsn):
        for at in range(0, len(content), chunk):
            try:
                # smaller bites near the end, where a bite that runs into unwritten WAL is lost
                step = chunk if start + at + chunk <= end else 8
                for bite in range(at, min(at + chunk, len(content)), step):
                    batch = decoder.feed(content[bite : bite + step])
                    managers.saw(batch)
                    await ingest.ingest(batch)
                    batches += 1
            except WalDecodeError as error:
                assert error.natural_end, error
                return batches
    return batches


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ingested(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ingested]:
    base = tmp_path_factory.mktemp("ingest")
    data = base / "pgdata"
    base.chmod(0o755)
    give_to_postgres(base)
    await run_initdb(PG_BIN, data, PG_MAJOR)
    pool = RedoPool(PG_BIN, PG_MAJOR, 1)
    reconstructor = Reconstructor(pool, native_records.apply)
    timeline = await import_stopped_cluster(
        data, PG_MAJOR, lambda lsn: in_memory_timeline(PG_MAJOR, lsn, reconstructor=reconstructor)
    )
    give_to_postgres(base)
    server = RealPostgres(data, PORT)
    digest = await asyncio.to_thread(run_workload, server)
    managers = ManagerOfRelation()
    batches = await ingest_files(timeline, data, managers, 100_000)
    yield Ingested(timeline, data, managers, digest, batches)
    await pool.close()
    shutil.rmtree(base, ignore_errors=True)


def run_workload(server: RealPostgres) -> str:
    server.start()
    try:
        server.psql_file(WORKLOAD, "-v", f"N={ROWS}")
        server.pgbench("-i", "-s", "1", "-q")
        server.pgbench("-n", "-c", "3", "-t", "300")
        return server.psql(DIGEST)
    finally:
        server.stop()


pytestmark.append(pytest.mark.asyncio(loop_scope="module"))


async def test_ends_where_postgres_ended(ingested: Ingested) -> None:
    control = (ingested.data / "global/pg_control").read_bytes()
    (checkpoint,) = struct.unpack_from("<Q", control, 32)
    assert ingested.timeline.prev_record_lsn == checkpoint  # its last record is the shutdown checkpoint
    assert ingested.batches > 20


async def test_every_page_equals_the_file(ingested: Ingested) -> None:
    helper = await RedoHelper.start(PG_BIN, PG_MAJOR)
    try:
        counts = await compare_with_disk(ingested.timeline, ingested.data, ingested.managers, helper)
    finally:
        await helper.kill()
    print(dict(counts))
    assert counts["pages equal"] + counts["pages equal but for hints"] > 5000


async def test_slrus_and_checkpoint(ingested: Ingested) -> None:
    timeline, lsn = ingested.timeline, ingested.timeline.last_record_lsn
    control = (ingested.data / "global/pg_control").read_bytes()
    next_xid, next_oid, next_multi, next_offset = struct.unpack_from("<QIII", control, 40 + 24)
    assert next_multi > 100, "the workload made no multixacts"
    pages = 0
    for kind, entries, per_page, size in (
        (keys.CLOG, next_xid & 0xFFFF_FFFF, 32768, 0.25),
        (keys.MULTIXACT_OFFSETS, next_multi, 2048, 4),
        (keys.MULTIXACT_MEMBERS, next_offset // 4, 409, 20),
    ):
        segments = dict(await slru.list_segments(timeline, kind, lsn))
        mine = {number: await slru.read_segment(timeline, kind, number, count, lsn) for number, count in segments.items()}
        pages += compare_slru(kind, mine, ingested.data, entries, per_page, size)
    assert pages >= 3
    checkpoint = await timeline.get(*keys.CHECKPOINT, lsn)
    mine_xid, mine_oid, mine_multi, mine_offset = struct.unpack_from("<QIII", checkpoint, 24)
    assert next_xid <= mine_xid <= next_xid + 1024
    assert (mine_multi, mine_offset) == (next_multi, next_offset)
    assert mine_oid >= next_oid


async def test_maps_prepared_transactions_and_aux_files(ingested: Ingested) -> None:
    timeline, lsn, data = ingested.timeline, ingested.timeline.last_record_lsn, ingested.data
    databases = await Relations.of(timeline).databases(lsn)
    on_disk = {int(path.name) for path in (data / "base").iterdir() if path.name.isdecimal()}
    assert {db for spc, db in databases if spc == keys.DEFAULT_TABLESPACE} == on_disk
    for spc, db in databases:
        path = data / ("global" if db == 0 else f"base/{db}") / "pg_filenode.map"
        assert await timeline.get(*keys.relation_map(spc, db), lsn) == path.read_bytes()
    prepared = decode_prepared(await timeline.get(*keys.TWOPHASE_DIRECTORY, lsn), PG_MAJOR)
    files = {int(path.name, 16): path.read_bytes() for path in (data / "pg_twophase").iterdir()}
    assert prepared == set(files) and len(files) == 1
    for xid, content in files.items():
        assert await timeline.get(*keys.twophase_file(xid), lsn) == content[:-4]
    aux = await timeline.get(*keys.aux_file("pg_logical/mappings/test1"), lsn)
    assert decode_aux_files(aux) == [("pg_logical/mappings/test1", b"kept")]


async def test_sizes_at_every_change_are_those_of_that_moment(ingested: Ingested) -> None:
    """The size at LSN L, for all L at which the size of a relation that shrank and grew again changed."""
    timeline, lsn = ingested.timeline, ingested.timeline.last_record_lsn
    relations = Relations.of(timeline)
    sizes = await relations.relation_sizes(lsn)
    fresh = Relations(timeline)  # nothing cached: every size comes from the layers
    tags = list(sizes)
    assert await fresh.sizes(tags, lsn) == [sizes[tag] for tag in tags]
    assert relations.logical_size == await fresh.compute_logical_size() == 8192 * sum(sizes.values())
    early = await Relations(timeline).relation_sizes(timeline.initdb_lsn)
    assert len(early) < len(sizes)
    assert all(tag in sizes or tag.fork in (1, 2) or tag.rel for tag in early)


async def test_postgres_starts_from_a_fullbackup(ingested: Ingested, tmp_path: Path) -> None:
    """The strongest check: stock Postgres runs on what the timeline gives back, and sees the same rows."""
    timeline, lsn = ingested.timeline, ingested.timeline.last_record_lsn
    content = b"".join([chunk async for chunk in basebackup(timeline, lsn, BasebackupOptions(full=True))])
    data = tmp_path / "restored"
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert archive.getnames()[-2] == "global/pg_control"
        archive.extractall(data)
    start = make_first_checkpoint((data / "global/pg_control").read_bytes(), lsn, timeline.prev_record_lsn, PG_MAJOR)
    (data / "global/pg_control").write_bytes(start.control.to_bytes())
    for name, writes in start.segments.items():
        segment = bytearray(start.control.xlog_seg_size)
        for at, part in writes:
            segment[at : at + len(part)] = part
        (data / "pg_wal" / name).write_bytes(segment)
    (data / "postgresql.conf").write_text("")
    give_to_postgres(tmp_path)
    give_to_postgres(data)
    server = RealPostgres(data, RESTORED_PORT)
    await asyncio.to_thread(server.start)
    try:
        assert await asyncio.to_thread(server.psql, DIGEST) == ingested.digest
        assert await asyncio.to_thread(server.psql, "SELECT gid FROM pg_prepared_xacts") == "left prepared\n"
        await asyncio.to_thread(server.psql, "COMMIT PREPARED 'left prepared'")
        assert await asyncio.to_thread(server.psql, "SELECT count(*) FROM undecided") == "2\n"
        assert await asyncio.to_thread(server.psql, "SELECT count(*) FROM pg_class", "by_copy") != "0\n"
        await asyncio.to_thread(server.psql, CHECK_INDEXES)
    finally:
        await asyncio.to_thread(server.stop, "immediate")

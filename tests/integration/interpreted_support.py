"""WAL of a real Postgres, what our own ingest makes of it, and clients of a safekeeper that receive it interpreted."""

import asyncio
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn, format_lsn, parse_segment_file_name
from neon_services.pageserver import native_records
from neon_services.pageserver.bootstrap import import_stopped_cluster, run_initdb
from neon_services.pageserver.ingest import WalIngest
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.timeline import Timeline, in_memory_timeline
from neon_services.pageserver.values import ValueBatch
from neon_services.protocols import pgclient
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.interpreted_options import InterpretedProtocol, format_protocol
from neon_services.protocols.interpreted_wal import InterpretedRecord, decode
from neon_services.protocols.replication_stream import (
    InterpretedWal,
    Keepalive,
    pack_pageserver_feedback,
    parse_interpreted_message,
)
from neon_services.wal.decoder import WalDecoder
from neon_services.wal.redo import RedoPool
from neon_services.wal.scanner import find_end_of_wal
from tests.integration.real_postgres import PG_BIN, PG_MAJOR, RealPostgres, give_to_postgres
from tests.integration.safekeeper_support import Node

WORKLOAD = Path(__file__).with_name("ingest_workload.sql")
# what the workload of the ingest tests has not
MORE = """
SELECT pg_replication_origin_create('origin');
SELECT pg_replication_origin_session_setup('origin');
CREATE TABLE replicated (a int);
BEGIN; SELECT pg_replication_origin_xact_setup('0/AABBCC', now()); INSERT INTO replicated VALUES (1); COMMIT;
SELECT pg_replication_origin_session_reset();
SELECT pg_replication_origin_advance('origin', '0/DDEE00');
SELECT pg_replication_origin_drop('origin');
BEGIN; SAVEPOINT a; INSERT INTO replicated VALUES (2); ROLLBACK TO a; SAVEPOINT b; INSERT INTO replicated VALUES (3); COMMIT;
BEGIN; SAVEPOINT a; INSERT INTO replicated VALUES (4); SAVEPOINT b; INSERT INTO replicated VALUES (5); ROLLBACK;
VACUUM FULL pg_database;
CHECKPOINT;
"""


@dataclass
class RealWal:
    """WAL from the segment start ``begin`` to ``end``; a timeline begins to ingest it at ``start``, a record's end."""

    begin: Lsn
    start: Lsn
    end: Lsn
    data: bytes
    pg_version: int
    system_id: int
    timeline: Timeline
    ingested: list[ValueBatch] = field(default_factory=list)
    record_ends: list[int] = field(default_factory=list)

    def slice(self, begin: int, end: int) -> bytes:
        return self.data[begin - self.begin : end - self.begin]


async def make_real_wal(base: Path, port: int, pool: RedoPool, rows: int) -> RealWal:
    """Run the workload on a new server, stop it, and ingest its WAL as our pageserver does."""
    data = base / "pgdata"
    base.chmod(0o755)
    give_to_postgres(base)
    await run_initdb(PG_BIN, data, PG_MAJOR)
    timeline = await import_stopped_cluster(
        data, PG_MAJOR, lambda lsn: in_memory_timeline(PG_MAJOR, lsn, reconstructor=Reconstructor(pool, native_records.apply))
    )
    give_to_postgres(base)
    await asyncio.to_thread(_run_workload, RealPostgres(data, port), base, rows)
    paths = sorted(path for path in (data / "pg_wal").iterdir() if len(path.name) == 24)
    content = b"".join(path.read_bytes() for path in paths)
    begin = Lsn(parse_segment_file_name(paths[0].name) * WAL_SEGMENT_SIZE)
    start = timeline.last_record_lsn
    end = find_end_of_wal(lambda lsn, count: content[lsn - begin : lsn - begin + count], start)
    (system_id,) = struct.unpack_from("<Q", (data / "global/pg_control").read_bytes())
    wal = RealWal(begin, start, end, content[: end - begin], PG_MAJOR * 10000 + 4, system_id, timeline)
    await _ingest(wal)
    shutil.rmtree(data)
    return wal


def _run_workload(server: RealPostgres, base: Path, rows: int) -> None:
    more = base / "more.sql"
    more.write_text(MORE)
    server.start()
    try:
        server.psql_file(WORKLOAD, "-v", f"N={rows}")
        server.psql_file(more, "-v", "ON_ERROR_STOP=1")
        server.pgbench("-i", "-s", "1", "-q")
        server.pgbench("-n", "-c", "3", "-t", "200")
    finally:
        server.stop()


async def _ingest(wal: RealWal) -> None:
    timeline, take = wal.timeline, wal.timeline.ingest

    def ingest(batch: ValueBatch, last: int, previous: int) -> None:
        wal.ingested.append(batch)
        take(batch, last, previous)

    timeline.ingest = ingest  # type: ignore[method-assign]
    decoder, worker = WalDecoder(wal.start, PG_MAJOR), WalIngest(timeline)
    for at in range(wal.start, wal.end, 1 << 20):
        batch = decoder.feed(wal.slice(at, min(at + (1 << 20), wal.end)))
        wal.record_ends += batch.records["end_lsn"].tolist()
        await worker.ingest(batch)
    assert timeline.last_record_lsn == wal.end


@dataclass
class Receiver:
    """One shard of a pageserver, at a safekeeper; what it checks holds for every stream."""

    protocol: InterpretedProtocol
    next_lsn: int  #: where the next record begins
    records: list[InterpretedRecord] = field(default_factory=list)
    messages: int = 0
    keepalives: int = 0
    commit_lsn: int = 0
    client: pgclient.PgClient | None = None

    async def connect(self, node: Node, ttid: TenantTimelineId, appname: str = "pageserver-1", term: int | None = None) -> None:
        options = " ".join(f"{name}={value}" for name, value in format_protocol(self.protocol).items())
        what = f"-c tenant_id={ttid.tenant_id} timeline_id={ttid.timeline_id} {options}"
        self.client = await node.connect(ttid, appname, options=what)
        suffix = "" if term is None else f" (term='{term}')"
        await self.client.start_copy_both(f"START_REPLICATION PHYSICAL {format_lsn(self.next_lsn)}{suffix}")

    async def receive(self) -> bool:
        """One message; whether it brought WAL."""
        assert self.client is not None
        payload = await asyncio.wait_for(self.client.next_copy_data(), 20)
        assert payload is not None, "the stream ended early"
        message = parse_interpreted_message(payload)
        if isinstance(message, Keepalive):
            self.keepalives += 1
            return False
        self._take(message)
        return True

    def _take(self, message: InterpretedWal) -> None:
        protocol = self.protocol
        batch = decode(bytes(message.payload), protocol.format, compressed=protocol.zstd_level is not None)
        assert batch.raw_wal_start_lsn == self.next_lsn, "a gap, or WAL twice"
        assert self.next_lsn < batch.next_record_lsn
        assert message.streaming_lsn <= message.commit_lsn
        # a switch of segments reaches to the end of its segment, of which the rest need not have been read
        assert batch.next_record_lsn <= message.streaming_lsn or batch.next_record_lsn % WAL_SEGMENT_SIZE == 0
        ends = [record.next_record_lsn for record in batch.records]
        assert ends == sorted(set(ends)) and all(self.next_lsn < end <= batch.next_record_lsn for end in ends)
        assert all(value.lsn == record.next_record_lsn for record in batch.records for value in record.values)
        self.next_lsn, self.commit_lsn = batch.next_record_lsn, message.commit_lsn
        self.records += batch.records
        self.messages += 1

    async def receive_until(self, lsn: int) -> "Receiver":
        while self.next_lsn < lsn:
            await self.receive()
        return self

    def feedback(self, lsn: int) -> None:
        """Say that everything below is durable."""
        assert self.client is not None
        said = PageserverFeedback(0, Lsn(lsn), Lsn(lsn), Lsn(lsn), 1, self.protocol.shard.number)
        self.client.send_copy_data(pack_pageserver_feedback(said))

    def leave(self) -> None:
        if self.client is not None:
            self.client.abort()


def signature(records: list[InterpretedRecord]) -> list[Any]:
    """Records in a form in which equal means equal: named tuples of different types may be equal otherwise."""
    return [(type(record.metadata).__name__, record) for record in records]

"""How fast a pageserver process ingests WAL: MB/s of pgbench WAL, and the ratio to decoding alone.

Run: ``python -m tests.benchmarks.bench_ingest [--seconds 10] [--scale 10] [--no-full-page-writes] [--wal DIR]``. Makes the
WAL with a throw-away Postgres (``--wal``: kept in and taken from a directory), then feeds it in pieces of 1 MiB, as a
connection does: once to the decoder, once to decoder, ingest and an in-memory timeline that writes no layer files.
"""

import argparse
import asyncio
import contextlib
import cProfile
import pstats
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from neon_services.pageserver import native_records
from neon_services.pageserver.bootstrap import import_stopped_cluster, run_initdb
from neon_services.pageserver.ingest import WalIngest
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.timeline import Timeline, in_memory_timeline
from neon_services.wal.decoder import WalDecodeError, WalDecoder
from tests.integration.real_postgres import PG_BIN, PG_MAJOR, RealPostgres, give_to_postgres

CHUNK_BYTES = 1 << 20
PORT = 25530


def make_wal(base: Path, seconds: int, scale: int, full_page_writes: bool) -> None:
    """``base/source`` is the cluster after initdb, ``base/pgdata`` after the load."""
    give_to_postgres(base)
    asyncio.run(run_initdb(PG_BIN, base / "pgdata", PG_MAJOR))

    shutil.copytree(base / "pgdata", base / "source")
    give_to_postgres(base)
    give_to_postgres(base / "pgdata")
    server = RealPostgres(
        base / "pgdata", PORT, {"full_page_writes": "on" if full_page_writes else "off", "synchronous_commit": "off"}
    )
    server.start()
    try:
        server.pgbench("-i", "-s", str(scale), "-q")
        server.pgbench("-n", "-c", "4", "-T", str(seconds))
    finally:
        server.stop()


def chunks(data: Path, start: int) -> Iterator[bytes]:
    """The WAL from ``start`` in pieces."""
    content = b"".join(p.read_bytes() for p in sorted((data / "pg_wal").iterdir()) if len(p.name) == 24)
    skip = start % (16 << 20)
    for at in range(skip, len(content), CHUNK_BYTES):
        yield content[at : at + CHUNK_BYTES]


async def run(base: Path, profile: bool) -> None:
    def make(lsn: int) -> Timeline:
        return in_memory_timeline(PG_MAJOR, lsn, reconstructor=Reconstructor(None, native_records.apply))

    timeline = await import_stopped_cluster(base / "source", PG_MAJOR, make)
    start = timeline.last_record_lsn
    pieces = list(chunks(base / "pgdata", start))
    decoder = WalDecoder(start, PG_MAJOR)
    records = refs = total = 0
    began = time.perf_counter()
    for piece in pieces:
        try:
            batch = decoder.feed(piece)
        except WalDecodeError:
            break
        records, refs, total = records + len(batch.records), refs + len(batch.refs), total + len(piece)
    decoding = time.perf_counter() - began
    print(f"{total / 1e6:.0f} MB of WAL, {records} records, {refs} block references, {total / records:.0f} bytes a record")

    decoder, ingest = WalDecoder(start, PG_MAJOR), WalIngest(timeline)
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    began = time.perf_counter()
    slowest = 0.0
    for piece in pieces[: total // CHUNK_BYTES]:
        piece_began = time.perf_counter()
        await ingest.ingest(decoder.feed(piece))
        slowest = max(slowest, time.perf_counter() - piece_began)
    ingesting = time.perf_counter() - began
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    print(f"decoder alone  {total / 1e6 / decoding:8.0f} MB/s {records / decoding:10.0f} records/s")
    print(f"decode+ingest  {total / 1e6 / ingesting:8.0f} MB/s {records / ingesting:10.0f} records/s")
    print(f"ratio {decoding / ingesting:.3f}; slowest piece of 1 MiB {slowest * 1e3:.1f} ms")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options about the WAL, which bench_interpret has, too."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--scale", type=int, default=10)
    parser.add_argument("--no-full-page-writes", action="store_true")
    parser.add_argument("--wal", type=Path, help="directory to keep the WAL in and take it from")
    return parser


@contextlib.contextmanager
def load(arguments: argparse.Namespace) -> Iterator[Path]:
    """A directory with the source cluster and its WAL, made unless ``--wal`` has it."""
    with tempfile.TemporaryDirectory(prefix="bench-wal-") as temporary:
        base = arguments.wal or Path(temporary)
        base.mkdir(parents=True, exist_ok=True)
        if not (base / "source").exists():
            make_wal(base, min(arguments.seconds, 120), arguments.scale, not arguments.no_full_page_writes)
        yield base


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    with load(arguments) as base:
        asyncio.run(run(base, arguments.profile))


if __name__ == "__main__":
    main()

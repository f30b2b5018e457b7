"""Throughput of the storage engine alone, in one process: ingest of value batches, flush, page reads. Prints one line each.

Run: ``python -m tests.benchmarks.bench_pageserver_engine [--mib 128]``. The batches look like pgbench WAL: about 1,120 bytes a
record, 1.7 block references each, decoded in chunks of 128 KiB.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import uvloop

from neon_services.ground.ids import TenantId, TimelineId
from neon_services.pageserver.layers.block_cache import BlockCache
from neon_services.pageserver.layers.layer import LayerEnvironment
from neon_services.pageserver.location_config import TenantConf
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.timeline import Timeline, TimelineResources
from neon_services.pageserver.values import IMAGE, WAL, ValueBatch
from neon_services.wal.redo import RedoRequest, RedoResult, RedoStatus

RECORD_BYTES, REFS_PER_RECORD, CHUNK_BYTES = 1120, 1.7, 128 * 1024
HI = (1663 << 40) | (5 << 8)  # relation blocks of database 5
PAGES = 40_000
READ_BATCH = 64


class InstantRedo:
    """Answers at once, so that only the engine is measured."""

    async def apply(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        return [RedoResult(RedoStatus.OK, request.base) for request in requests]


def make_timeline(directory: Path) -> Timeline:
    environment = LayerEnvironment(BlockCache(64 << 20), ThreadPoolExecutor(2), ThreadPoolExecutor(2), None, sync=False)
    timeline = Timeline(
        tenant_shard_id=TenantShardId(TenantId.generate()),
        timeline_id=TimelineId.generate(),
        pg_version=15,
        initdb_lsn=8,
        disk_consistent_lsn=0,
        resources=TimelineResources(environment, Reconstructor(InstantRedo()), directory, 1, TenantConf()),
    )
    timeline.start()
    return timeline


def relation_blocks(count: int, rng: np.random.Generator) -> np.ndarray:
    return np.uint64(16384 << 40) + rng.integers(0, PAGES, count).astype(np.uint64)


def images(rng: np.random.Generator) -> ValueBatch:
    """A page for every block, half of it compressible."""
    data = rng.integers(0, 256, (PAGES, 8192), np.uint8)
    data[:, 4096:] = 7
    numbers = np.arange(PAGES, dtype=np.uint64)
    return ValueBatch(
        key_hi=np.full(PAGES, HI, np.uint64),
        key_lo=np.uint64(16384 << 40) + numbers,
        lsn=np.full(PAGES, 8, np.uint64),
        kind=np.full(PAGES, IMAGE, np.uint8),
        offset=numbers * 8192,
        length=np.full(PAGES, 8192, np.uint32),
        data=data.tobytes(),
    )


def wal_chunk(start: int, rng: np.random.Generator) -> tuple[ValueBatch, int]:
    records = CHUNK_BYTES // RECORD_BYTES
    refs = int(records * REFS_PER_RECORD)
    record = np.sort(rng.integers(0, records, refs))
    offset = record.astype(np.uint64) * np.uint64(RECORD_BYTES)
    batch = ValueBatch(
        key_hi=np.full(refs, HI, np.uint64),
        key_lo=relation_blocks(refs, rng),
        lsn=np.uint64(start + RECORD_BYTES) + offset,
        kind=np.full(refs, WAL, np.uint8),
        offset=offset,
        length=np.full(refs, RECORD_BYTES, np.uint32),
        data=rng.bytes(CHUNK_BYTES),
    )
    return batch, start + records * RECORD_BYTES


async def read_pages(
    timeline: Timeline, seconds: float, what: str, rng: np.random.Generator, *, sequential: bool = False
) -> None:
    hi, lsn, pages, latencies = np.full(READ_BATCH, HI, np.uint64), timeline.last_record_lsn, 0, []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        first = int(rng.integers(0, PAGES - READ_BATCH))
        keys = (
            np.uint64(16384 << 40) + np.arange(first, first + READ_BATCH, dtype=np.uint64)
            if sequential
            else relation_blocks(READ_BATCH, rng)
        )
        before = time.perf_counter()
        values = await timeline.get_many(hi, keys, lsn)
        latencies.append(time.perf_counter() - before)
        assert all(isinstance(value, bytes) for value in values)
        pages += READ_BATCH
    rate, median = pages / (time.perf_counter() - started), np.median(latencies) * 1000
    print(f"{what}: {rate:,.0f} pages/s in batches of {READ_BATCH}, median {median:.2f} ms a batch")


async def read_single(timeline: Timeline, what: str, rng: np.random.Generator) -> None:
    latencies = []
    for key in relation_blocks(2000, rng).tolist():
        before = time.perf_counter()
        await timeline.get(HI, key, timeline.last_record_lsn)
        latencies.append((time.perf_counter() - before) * 1000)
    p50, p99 = np.percentile(latencies, [50, 99])
    print(f"{what}: one page median {p50:.3f} ms, p99 {p99:.3f} ms")


async def bench(directory: Path, mib: int, seconds: float) -> None:
    rng = np.random.default_rng(1)
    timeline = make_timeline(directory)
    timeline.ingest(images(rng), 8, 0)
    started = time.perf_counter()
    await timeline.create_image_layers()
    print(f"flush and image layers of {PAGES} pages: {PAGES / (time.perf_counter() - started):,.0f} pages/s")
    await read_pages(timeline, seconds, "image layers, random", rng)
    await read_pages(timeline, seconds, "image layers, sequential", rng, sequential=True)
    await read_single(timeline, "image layers", rng)

    chunks, lsn = [], 16
    for _ in range(mib * 1024 * 1024 // CHUNK_BYTES):
        chunk, lsn = wal_chunk(lsn, rng)
        chunks.append((chunk, lsn))
    started = time.perf_counter()
    for chunk, end in chunks:
        timeline.ingest(chunk, end, 0)
        await timeline.ingest_backpressure()
    elapsed = time.perf_counter() - started
    rows = sum(len(chunk) for chunk, _ in chunks)
    print(f"ingest: {mib / elapsed:,.0f} MiB/s of WAL, {rows / elapsed:,.0f} references/s")
    await read_pages(timeline, seconds, "open layer over images, random", rng)
    await read_single(timeline, "open layer over images", rng)
    started = time.perf_counter()
    await timeline.freeze_and_flush()
    print(f"flush to L0: {mib / (time.perf_counter() - started):,.0f} MiB/s")
    await read_pages(timeline, seconds, "L0 over images, random", rng)
    await read_single(timeline, "L0 over images", rng)
    started = time.perf_counter()
    for chunk, end in chunks:
        chunk.lsn = chunk.lsn + np.uint64(lsn)
        timeline.ingest(chunk, end + lsn, 0)
        await timeline.ingest_backpressure()
        await timeline.get(HI, int(chunk.key_lo[0]), end + lsn)
    print(f"ingest with one read after each chunk: {mib / (time.perf_counter() - started):,.0f} MiB/s of WAL")
    await timeline.shutdown(flush=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=128, help="WAL to ingest")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each read test")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-engine-"))
    try:
        uvloop.run(bench(directory, arguments.mib, arguments.seconds))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()

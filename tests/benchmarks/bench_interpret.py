"""How fast a safekeeper interprets WAL: MB/s of pgbench WAL for one reader, and for the shards of a tenant.

Run: ``python -m tests.benchmarks.bench_interpret [--seconds 10] [--scale 10] [--no-full-page-writes] [--wal DIR]``. Makes the
WAL as bench_ingest does (``--wal``: kept in and taken from a directory), then decodes, interprets and encodes it in pieces of
128 KiB. The figures are of one thread, in WAL read; shards share decoding and interpreting, as with ``--wal-reader-fanout``.
"""

import struct
import time
from pathlib import Path

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn, parse_segment_file_name
from neon_services.protocols.interpreted_options import BINCODE, PROTOBUF
from neon_services.protocols.sharding import ShardIdentity
from neon_services.wal.decoder import WalDecoder
from neon_services.wal.interpret import interpret
from neon_services.wal.interpreted_encoding import encode_batch
from neon_services.wal.scanner import find_end_of_wal
from tests.benchmarks.bench_ingest import load, make_parser
from tests.integration.real_postgres import PG_MAJOR

CHUNK_BYTES = 128 * 1024
ALONE = [ShardIdentity(0, 0, 2048)]
FOUR = [ShardIdentity(number, 4, 2048) for number in range(4)]


def read_wal(base: Path) -> tuple[Lsn, bytes]:
    """The WAL of the load, from the checkpoint of initdb on."""
    (start,) = struct.unpack_from("<Q", (base / "source/global/pg_control").read_bytes(), 32)
    paths = sorted(path for path in (base / "pgdata/pg_wal").iterdir() if len(path.name) == 24)
    begin = parse_segment_file_name(paths[0].name) * WAL_SEGMENT_SIZE
    content = b"".join(path.read_bytes() for path in paths)
    end = find_end_of_wal(lambda lsn, count: content[lsn - begin : lsn - begin + count], start)
    return Lsn(start), content[start - begin : end - begin]


def run(start: Lsn, data: bytes, shards: list[ShardIdentity], payload_format: str, zstd_level: int | None) -> None:
    decoder, position, sent, slowest = WalDecoder(start, PG_MAJOR), start, 0, 0.0
    began = time.perf_counter()
    for at in range(0, len(data), CHUNK_BYTES):
        piece_began = time.perf_counter()
        decoded = decoder.feed(data[at : at + CHUNK_BYTES])
        if len(decoded.records):
            batch = interpret(decoded, position, PG_MAJOR)
            sent += sum(len(encode_batch(batch, shard, payload_format, zstd_level)) for shard in shards)
            position = decoded.next_lsn
        slowest = max(slowest, time.perf_counter() - piece_began)
    seconds = time.perf_counter() - began
    what = f"{payload_format}{'' if zstd_level is None else f' zstd {zstd_level}'}, {len(shards)} shard(s)"
    rate, ratio = len(data) / 1e6 / seconds, sent / len(data)
    print(f"{what:32} {rate:6.0f} MB/s, {ratio:5.2f} bytes sent for one of WAL, slowest piece {slowest * 1e3:.1f} ms")


def main() -> None:
    with load(make_parser(__doc__).parse_args()) as base:
        start, data = read_wal(base)
        print(f"{len(data) / 1e6:.0f} MB of WAL")
        run(start, data, [], PROTOBUF, None)
        for shards in (ALONE, FOUR[1:2], FOUR):
            for payload_format, zstd_level in ((PROTOBUF, 1), (PROTOBUF, None), (BINCODE, None)):
                run(start, data, shards, payload_format, zstd_level)


if __name__ == "__main__":
    main()

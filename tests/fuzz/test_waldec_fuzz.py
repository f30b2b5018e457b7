"""Mutated WAL must not crash the decoder: the C fuzzer with sanitizers, bounded, and the Python bindings in a child."""

import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.wal.stock_postgres import bin_dir, make_real_wal
from tests.unit.wal.wal_builder import SMALL_SEGMENT, random_wal

REPOSITORY = Path(__file__).parents[2]
PIECE = 200_000


def fuzz_input(start_lsn: int, segment_size: int, wal: bytes) -> bytes:
    """One input as waldec_fuzz.c reads it."""
    return struct.pack("<QBBH", start_lsn, segment_size.bit_length() - 1 - 13, 0, 0) + wal


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pieces of synthetic and of real WAL, each beginning at a page start."""
    directory = tmp_path_factory.mktemp("corpus")
    pieces = []
    for seed in range(6):
        wal = random_wal(random.Random(seed), 25)
        pieces.append(fuzz_input(wal.start, SMALL_SEGMENT, wal.data[:PIECE]))
    with make_real_wal(directory, full_page_writes="off") as real:
        for at in range(0, len(real.data) - PIECE, 2_000_000 // 8192 * 8192):
            if any(real.data[at : at + 100]):
                pieces.append(fuzz_input(real.start_lsn + at, 16 << 20, real.data[at : at + PIECE]))
    paths = []
    for number, piece in enumerate(pieces):
        paths.append(directory / f"piece-{number}")
        paths[-1].write_bytes(piece)
    assert len(paths) > 10
    return paths


@pytest.mark.postgres
def test_sanitizers_find_nothing(corpus: list[Path], tmp_path: Path) -> None:
    if shutil.which("clang") is None and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    built = subprocess.run(
        ["make", "-C", REPOSITORY / "postgres_ext", "sanitize", f"PG_CONFIG={bin_dir() / 'pg_config'}", f"OUT={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    seed = random.randrange(1 << 32)
    print("seed", seed)
    fuzzed = subprocess.run(
        [tmp_path / "fuzz" / "waldec_fuzz", str(seed), "1500", *corpus], capture_output=True, text=True, timeout=300
    )
    assert fuzzed.returncode == 0, f"seed {seed}: {fuzzed.stderr[-5000:]}"
    assert fuzzed.stdout == "1500 inputs\n"


_CHILD = """
import random, struct, sys
from neon_services.wal.decoder import WalDecoder, WalDecodeError
from neon_services.wal.oracle import OracleDecoder

rng = random.Random(int(sys.argv[1]))
survived = differed = 0
for path in sys.argv[3:]:
    piece = open(path, "rb").read()
    lsn, log2, _, _ = struct.unpack_from("<QBBH", piece)
    for _ in range(int(sys.argv[2])):
        wal = bytearray(piece[12:60000])
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(wal)) if rng.random() < 0.5 else rng.randrange(8) * 8192 % len(wal) + rng.randrange(80)
            wal[at % len(wal)] ^= 1 << rng.randrange(8)
        outcomes = []
        for make in (WalDecoder, OracleDecoder):
            decoder = make(lsn, 15, segment_size=1 << (13 + log2), verify_crc=False)
            try:
                batch = decoder.feed(bytes(wal))
                outcomes.append((batch.records.tobytes(), batch.refs.tobytes(), batch.blob, batch.next_lsn))
            except WalDecodeError as error:
                outcomes.append((error.reason, str(error).split(" (decoding")[0]))
        survived += len(outcomes[0]) == 4
        if outcomes[0] != outcomes[1]:
            differed += 1
            print("differ", path, *(outcome if len(outcome) == 2 else "decoded" for outcome in outcomes))
print("survived", survived, "differed", differed)
"""


@pytest.mark.postgres
def test_decoder_and_oracle_agree_on_damage(corpus: list[Path]) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(seed), "12", *corpus], capture_output=True, text=True, cwd=REPOSITORY, timeout=300
    )
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.rstrip().endswith("differed 0"), child.stdout[-3000:]

"""What the C fuzzers start from, and the fuzzers, built with sanitizers."""

import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.unit.wal.stock_postgres import bin_dir, make_real_wal
from tests.unit.wal.wal_builder import SMALL_SEGMENT, random_wal

REPOSITORY = Path(__file__).parents[2]
PIECE = 200_000


def fuzz_input(start_lsn: int, segment_size: int, wal: bytes) -> bytes:
    """One input as waldec_fuzz.c and lane_fuzz/main.c read it."""
    return struct.pack("<QBBH", start_lsn, segment_size.bit_length() - 1 - 13, 0, 0) + wal


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def fuzzers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the fuzzers."""
    if shutil.which("clang") is None and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    out = tmp_path_factory.mktemp("fuzzers")
    built = subprocess.run(
        ["make", "-C", REPOSITORY / "postgres_ext", "sanitize", f"PG_CONFIG={bin_dir() / 'pg_config'}", f"OUT={out}"],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return out / "fuzz"

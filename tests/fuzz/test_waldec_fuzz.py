"""Mutated WAL must not crash the decoder: the C fuzzer with sanitizers, bounded, and the Python bindings in a child."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.conftest import REPOSITORY


@pytest.mark.postgres
def test_sanitizers_find_nothing(corpus: list[Path], fuzzers: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    fuzzed = subprocess.run([fuzzers / "waldec_fuzz", str(seed), "1500", *corpus], capture_output=True, text=True, timeout=300)
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

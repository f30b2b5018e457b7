"""Mutated messages must not make a lane take, write, send or tell anything wrong: the C fuzzer with sanitizers, bounded."""

import random
import subprocess
from pathlib import Path

import pytest


@pytest.mark.postgres
def test_sanitizers_find_nothing(corpus: list[Path], fuzzers: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    fuzzed = subprocess.run([fuzzers / "lane_fuzz", str(seed), "1000", *corpus], capture_output=True, text=True, timeout=300)
    assert fuzzed.returncode == 0, f"seed {seed}: {fuzzed.stderr[-5000:]}"
    assert fuzzed.stdout == "1000 inputs\n"

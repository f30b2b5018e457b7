"""Redo verification on this machine's Postgres: the whole workload, every page after every record."""

import os
import random
from pathlib import Path

import pytest

from neon_services.wal.libraries import SUPPORTED_MAJORS
from tests.integration.redo_verification import make_cluster, verify_cluster
from tests.unit.wal.stock_postgres import bin_dir, stock_postgres

BUILT = Path(__file__).parents[2] / "build" / "lib"
PAGE_CHANGING = {0: "XLOG", 9: "Heap2", 10: "Heap", 11: "Btree", 12: "Hash", 13: "Gin", 14: "Gist", 15: "Sequence"} | {
    16: "SPGist",
    17: "BRIN",
    20: "Generic",
}
ALSO_IN_THE_WORKLOAD = {1: "Transaction", 2: "Storage", 4: "Database", 6: "MultiXact", 7: "RelMap"}


INSTALLED = [major for major in SUPPORTED_MAJORS if (bin_dir(major) / "postgres").exists()]


@pytest.mark.postgres
@pytest.mark.parametrize("major", INSTALLED)
async def test_any_page_after_any_record(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setenv("NEON_LIB_DIR", os.environ.get("NEON_LIB_DIR", str(BUILT)))
    seed = random.randrange(1 << 32)
    print("seed", seed)
    with stock_postgres(bin_dir(major)) as server:
        before = make_cluster(server, rows=1200)
        report, (tried, noticed) = await verify_cluster(server, before, major, seed=seed)
    print(report)
    print(f"negative control: one record left out of {tried} chains, noticed in {noticed}")
    assert not report.problems, str(report)
    assert report.images_compared > 100_000 and report.final_pages_equal > 1000
    missing = {name for rmid, name in (PAGE_CHANGING | ALSO_IN_THE_WORKLOAD).items() if not report.record_kinds[rmid]}
    assert not missing, f"the workload made no records of {missing}"
    # not all: a later full rewrite of the page hides what was left out before it
    assert tried == 300 and noticed > 200

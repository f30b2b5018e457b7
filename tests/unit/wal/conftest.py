"""Fixtures for the WAL tests: the compiled libraries of this clone, and WAL from a real server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.wal.stock_postgres import RealWal, make_real_wal

BUILT = Path(__file__).parents[3] / "build" / "lib"


@pytest.fixture(autouse=True, scope="session")
def built_libraries() -> None:
    """Use the libraries that `make ext` built, unless told otherwise."""
    os.environ.setdefault("NEON_LIB_DIR", str(BUILT))


@pytest.fixture(scope="session", params=["on", "off"], ids=["fpw-on", "fpw-off"])
def real_wal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealWal]:
    """All WAL of a small workload on a stock server, with and without full-page writes; the server is stopped."""
    with make_real_wal(tmp_path_factory.mktemp("wal"), full_page_writes=request.param) as wal:
        yield wal

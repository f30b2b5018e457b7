"""A WAL store with small segments, and what its files hold."""

from pathlib import Path

from neon_services.ground.lsn import Lsn, parse_segment_file_name
from neon_services.safekeeper.segments import PARTIAL_SUFFIX, SCRATCH_NAME
from neon_services.safekeeper.wal_store import WalStore
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)


def new_store(directory: Path, commit_lsn: int = 0) -> WalStore:
    directory.mkdir(exist_ok=True)
    store = WalStore(directory, SEGMENT)
    store.recover(Lsn(commit_lsn))
    return store


def begin(store: WalStore, lsn: int = START) -> WalStore:
    """What an election does to an empty store."""
    store.initialize(Lsn(lsn), pg_version=PG_VERSION, system_id=SYSTEM_ID)
    cut(store, lsn)
    return store


def cut(store: WalStore, lsn: int) -> None:
    store.truncate(Lsn(lsn), pg_version=PG_VERSION, system_id=SYSTEM_ID)


def append(store: WalStore, wal: WalMaker, until: int, chunk: int = 50_000, flush: bool = True) -> None:
    """Feed the store in chunks up to a position."""
    while store.write_lsn < until:
        end = min(store.write_lsn + chunk, until)
        store.write(store.write_lsn, wal.slice(store.write_lsn, end))
    if flush:
        store.flush()
    else:
        store.write_out()


def stored(directory: Path, begin_lsn: int, end_lsn: int) -> bytes:
    """What the segment files hold."""
    content = bytearray()
    for path in sorted(directory.iterdir(), key=lambda p: p.name):
        if path.name in (SCRATCH_NAME, "safekeeper.control"):
            continue
        number = parse_segment_file_name(path.name.removesuffix(PARTIAL_SUFFIX), SEGMENT)
        data = path.read_bytes()
        assert len(data) == SEGMENT, f"{path.name} has {len(data)} bytes"
        low, high = max(begin_lsn, number * SEGMENT), min(end_lsn, (number + 1) * SEGMENT)
        if low < high:
            assert low == begin_lsn + len(content), "a segment is missing"
            content += data[low - number * SEGMENT : high - number * SEGMENT]
    return bytes(content)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name != SCRATCH_NAME)

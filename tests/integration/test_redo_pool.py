"""The redo pool against real helper processes: order, errors, deaths, hangs, memory, privileges."""

import asyncio
import os
import pwd
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest

from neon_services.ground.errors import Cancelled, ConfigError
from neon_services.ground.lsn import LONG_PAGE_HEADER, WAL_SEGMENT_SIZE
from neon_services.wal import framing, redo, redo_helper
from neon_services.wal.decoder import REF_FPI, REF_WILL_INIT, WalDecoder
from neon_services.wal.redo import RedoHelper, RedoPool, RedoRequest, RedoResult, RedoStatus
from neon_services.wal.scanner import find_end_of_wal
from tests.unit.wal.stock_postgres import bin_dir, stock_postgres
from tests.waiting import eventually

BUILT = Path(__file__).parents[2] / "build" / "lib"
pytestmark = pytest.mark.postgres
BIN = bin_dir()
RM_HEAP2, RM_HEAP = 9, 10


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Use what `make ext` built."""
    os.environ.setdefault("NEON_LIB_DIR", str(BUILT))


@pytest.fixture(scope="module")
def requests() -> list[RedoRequest]:
    """Histories of some hundred pages that begin with a record which makes the page, up to 20 records each."""
    with stock_postgres() as server:
        server.initdb(settings={"full_page_writes": "off"})
        server.start()
        server.psql(
            "CREATE TABLE t (id int PRIMARY KEY, v int, f text) WITH (fillfactor = 80);"
            "INSERT INTO t SELECT g, 0, repeat('x', 60) FROM generate_series(1, 30000) g; UPDATE t SET v = 1 WHERE id % 3 = 0;"
            "DELETE FROM t WHERE id % 5 = 0; VACUUM t;"
        )
        server.stop()
        start, data = server.wal()
    end = find_end_of_wal(lambda lsn, n: data[lsn - start : lsn - start + n], start)
    batch = WalDecoder(start, 15).feed(data[: end - start])
    pages: dict[tuple[int, ...], list[int]] = {}
    for ref in batch.refs:
        key = tuple(int(ref[name]) for name in ("spc", "db", "rel", "fork", "blk"))
        if key[3] == 0 and (key in pages or ref["flags"] & (REF_WILL_INIT | REF_FPI)):
            pages.setdefault(key, []).append(int(ref["rec"]))
    made = []
    for key, indexes in pages.items():
        rows = batch.records[list(dict.fromkeys(indexes))[:20]]
        entries = [batch.blob[int(row["blob_off"]) : int(row["blob_off"]) + ((int(row["tot_len"]) + 15) & ~7)] for row in rows]
        made.append(RedoRequest(*key, None, b"".join(entries), len(entries)))
    assert len(made) > 500
    return made


@pytest.fixture
async def pool() -> AsyncIterator[RedoPool]:
    """A pool of one helper."""
    pool = RedoPool(BIN, 15, timeout_s=20)
    yield pool
    await pool.close()


def page_lsn(page: bytes | None) -> int:
    """pd_lsn."""
    assert page is not None
    high, low = struct.unpack_from("<II", page)
    return high << 32 | low


class Entry(NamedTuple):
    """One record of a request."""

    end_lsn: int
    rmid: int
    data: bytes


def entries_of(request: RedoRequest) -> list[Entry]:
    """The entries one by one."""
    entries, at = [], 0
    while at < len(request.entries):
        end_lsn, length = struct.unpack_from("<QI", request.entries, at)
        size = (8 + length + 7) & ~7
        entries.append(Entry(end_lsn, request.entries[at + 8 + 17], request.entries[at : at + size]))
        at += size
    return entries


def heap_page(requests: list[RedoRequest]) -> RedoRequest:
    """A page of the table that 20 heap records filled from nothing."""
    return next(
        request
        for request in requests
        if request.rel >= 16384 and request.nrecords == 20 and {entry.rmid for entry in entries_of(request)} == {RM_HEAP}
    )


async def test_results_are_in_the_order_of_the_requests(pool: RedoPool, requests: list[RedoRequest]) -> None:
    results = await pool.apply(requests)
    assert len(results) == len(requests) and {result.status for result in results} == {RedoStatus.OK}
    moved = [
        page_lsn(result.page) == last.end_lsn
        for request, result in zip(requests, results, strict=True)
        if (last := entries_of(request)[-1]).rmid != RM_HEAP2  # marking a page all-visible leaves its LSN alone
    ]
    assert len(moved) > 300 and all(moved)
    alone = [(await pool.apply([request]))[0] for request in requests[:50]]
    assert alone == results[:50]
    assert await pool.apply([]) == []
    assert pool.restarts == 0


async def test_base_and_rest_equals_the_whole(pool: RedoPool, requests: list[RedoRequest]) -> None:
    whole = heap_page(requests)
    cut = sum(len(entry.data) for entry in entries_of(whole)[:3])
    key = (whole.spc, whole.db, whole.rel, whole.fork, whole.blk)
    (first,) = await pool.apply([RedoRequest(*key, None, whole.entries[:cut], 3)])
    second, direct, untouched = await pool.apply(
        [
            RedoRequest(*key, first.page, whole.entries[cut:], whole.nrecords - 3),
            whole,
            RedoRequest(*key, first.page, b"", 0),
        ]
    )
    assert second == direct and untouched == first


async def test_many_calls_at_once(requests: list[RedoRequest]) -> None:
    pool = RedoPool(BIN, 15, size=2)
    expected = await pool.apply(requests)
    parts = [(start, min(start + 1 + start % 90, len(requests))) for start in range(0, len(requests), 37)]
    for (start, end), part in zip(
        parts, await asyncio.gather(*(pool.apply(requests[start:end]) for start, end in parts)), strict=True
    ):
        assert part == expected[start:end]
    await pool.close()


def corrupt(request: RedoRequest) -> RedoRequest:
    """The same page, whose first record claims to be longer than all entries."""
    entries = bytearray(request.entries)
    struct.pack_into("<I", entries, 8, 1 << 20)
    return RedoRequest(request.spc, request.db, request.rel, request.fork, request.blk, None, bytes(entries), 1)


async def test_errors_cost_only_their_page(pool: RedoPool, requests: list[RedoRequest]) -> None:
    good = requests[:40]
    expected = await pool.apply(good)
    whole = heap_page(requests)
    key = (whole.spc, whole.db, whole.rel, whole.fork, whole.blk)
    tail, count = b"".join(entry.data for entry in entries_of(whole)[1:]), whole.nrecords - 1
    empty = bytearray(8192)
    struct.pack_into("<HHHH", empty, 12, 24, 8192, 8192, 0x2004)
    other_page = RedoRequest(*key[:4], 70000, bytes(empty), tail, count)
    bad = [
        (corrupt(good[0]), RedoStatus.ERROR, "inside a record"),
        (RedoRequest(*key, None, tail, count), RedoStatus.MISSING_BASE, "existing page"),
        (RedoRequest(*key, bytes(empty), tail, count), RedoStatus.ERROR, "PANIC"),
        (other_page, RedoStatus.ERROR, "does not touch the page"),
        (
            RedoRequest(*key, None, whole.entries + whole.entries, 2 * whole.nrecords),
            RedoStatus.ERROR,
            "not after the one before",
        ),
        (RedoRequest(*key[:3], 9, key[4], None, tail, count), RedoStatus.ERROR, "no fork 9"),
    ]
    mixed: list[RedoRequest] = []
    for index, request in enumerate(good):
        mixed += [request, bad[index % len(bad)][0]]
    for _ in range(20):
        results = await pool.apply(mixed)
        assert results[::2] == expected
        for index, result in enumerate(results[1::2]):
            _, status, text = bad[index % len(bad)]
            assert (result.status, result.page) == (status, None) and text in result.error, result
    assert pool.restarts == 0, "no error ends the helper"


async def test_records_that_change_no_pages_are_refused(pool: RedoPool) -> None:
    record = framing.build_record(1, 0, bytes(8), prev_lsn=0, xid=700)
    end = WAL_SEGMENT_SIZE + LONG_PAGE_HEADER + 40
    entries = struct.pack("<Q", end) + record + bytes(-len(record) % 8)
    (result,) = await pool.apply([RedoRequest(1663, 5, 16384, 0, 0, None, entries, 1)])
    assert result.status == RedoStatus.ERROR and "resource manager 1" in result.error


async def frames_in_flight(helper: RedoHelper) -> None:
    """Return when the helper has been given work that it has not answered."""
    async with asyncio.timeout(10):
        while not helper._pipes._waiting:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_killed_helper_is_replaced_and_nothing_is_lost(pool: RedoPool, requests: list[RedoRequest]) -> None:
    expected = await pool.apply(requests)
    for _ in range(3):
        helper = pool._slots[0].helper
        assert helper is not None
        running = asyncio.create_task(pool.apply(requests))
        await frames_in_flight(helper)
        os.kill(helper.pid, signal.SIGKILL)
        assert await running == expected
    assert pool.restarts >= 3


async def test_a_hanging_helper_is_replaced(requests: list[RedoRequest]) -> None:
    pool = RedoPool(BIN, 15, timeout_s=0.5)
    expected = await pool.apply(requests[:10])
    helper = pool._slots[0].helper
    assert helper is not None
    os.kill(helper.pid, signal.SIGSTOP)
    assert await pool.apply(requests[:10]) == expected
    assert pool.restarts == 1
    with pytest.raises(ProcessLookupError):
        os.kill(helper.pid, 0)
    await pool.close()


async def test_a_page_that_ends_its_helper_is_named(
    monkeypatch: pytest.MonkeyPatch, pool: RedoPool, requests: list[RedoRequest]
) -> None:
    expected = await pool.apply(requests[:5])
    poison = requests[2]
    plain = RedoHelper.apply

    async def kill_on_poison(self: RedoHelper, frame: list[RedoRequest]) -> list[RedoResult]:
        if poison in frame:
            os.kill(self.pid, signal.SIGSEGV)
        return await plain(self, frame)

    monkeypatch.setattr(redo_helper.RedoHelper, "apply", kill_on_poison)
    results = await pool.apply(requests[:5])
    assert results[:2] + results[3:] == expected[:2] + expected[3:]
    assert results[2].status == RedoStatus.ERROR and poison.describe() in results[2].error


async def test_close_cancels_and_ends_the_process(requests: list[RedoRequest]) -> None:
    pool = RedoPool(BIN, 15)
    await pool.apply(requests[:1])
    helper = pool._slots[0].helper
    assert helper is not None
    running = asyncio.create_task(pool.apply(requests))
    await frames_in_flight(helper)
    await pool.close()
    with pytest.raises(Cancelled):
        await running
    with pytest.raises(Cancelled):
        await pool.apply(requests[:1])
    with pytest.raises(ProcessLookupError):
        os.kill(helper.pid, 0)


def resident_kb(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4


async def test_memory_is_stable(pool: RedoPool, requests: list[RedoRequest]) -> None:
    await pool.apply(requests)
    await pool.apply([corrupt(requests[0])] * 100)
    helper = pool._slots[0].helper
    assert helper is not None
    before = resident_kb(helper.pid)
    for round_number in range(20):
        await pool.apply(requests)
        await pool.apply([corrupt(requests[0])] * 200)
        base = bytes(8192)
        await pool.apply([RedoRequest(1663, 5, 100000 + round_number * 1000 + i, 0, i, base, b"", 0) for i in range(1000)])
    assert resident_kb(helper.pid) - before < 1000


async def test_helper_is_locked_in_and_its_environment_is_empty(pool: RedoPool, requests: list[RedoRequest]) -> None:
    await pool.apply(requests[:1])
    helper = pool._slots[0].helper
    assert helper is not None
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{helper.pid}/status").read_text().splitlines())
    assert status["Seccomp"] == "2" and status["NoNewPrivs"] == "1"
    names = {entry.split(b"=")[0] for entry in Path(f"/proc/{helper.pid}/environ").read_bytes().split(b"\0") if entry}
    assert names <= {b"LD_PRELOAD"}
    assert sorted(int(path.name) for path in Path(f"/proc/{helper.pid}/fd").iterdir()) == [0, 1, 2]


async def test_missing_parts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"postgres is missing"):
        await RedoHelper.start(tmp_path, 15)
    monkeypatch.setenv("NEON_LIB_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="make ext"):
        await RedoPool(BIN, 15).apply([RedoRequest(1, 1, 1, 0, 0, bytes(8192), b"", 0)])
    library = tmp_path / "pg15" / "neon_redo.so"
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    with pytest.raises(ConfigError, match="does not work as a WAL redo helper"):
        await RedoHelper.start(BIN, 15)
    with pytest.raises(ValueError, match="has 3 bytes"):
        monkeypatch.delenv("NEON_LIB_DIR")
        monkeypatch.setenv("NEON_LIB_DIR", str(BUILT))
        await RedoPool(BIN, 15).apply([RedoRequest(1, 1, 1, 0, 0, b"abc", b"", 0)])


_CHILD = """
import asyncio, os, sys
from neon_services.wal.redo import RedoHelper

async def main():
    helper = await RedoHelper.start(sys.argv[1], 15)
    print(os.geteuid(), helper.pid, flush=True)
    sys.stdin.read(1)

asyncio.run(main())
"""


async def test_works_as_an_ordinary_user_and_dies_with_its_service() -> None:
    account = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    child = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", _CHILD, str(BIN)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(redo.__file__).parents[2],
        env={"NEON_LIB_DIR": os.environ["NEON_LIB_DIR"], "PYTHONDONTWRITEBYTECODE": "1"},
        **user,  # type: ignore[call-overload]
    )
    try:
        assert child.stdout is not None
        uid, helper_pid = (int(word) for word in child.stdout.readline().split())
        assert uid == account.pw_uid
        os.kill(helper_pid, signal.SIGSTOP)  # so that it cannot notice the end of its input
        child.kill()
        child.wait()
        await eventually(lambda: not is_running(helper_pid), "the helper to end", 5)
    finally:
        child.kill()
        child.wait()


def is_running(pid: int) -> bool:
    """True unless the process is gone or waits only to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

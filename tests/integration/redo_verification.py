"""Verification of WAL redo (design 9.3): any page after any record, against what the server itself says.

A stock server runs a workload of everything that changes pages, with wal_consistency_checking = all, so that nearly every
record carries the image of its pages after it. Then each page is rebuilt from its history, compared after every single record
with the image in the record, and at the end with the server's files. Run it alone with

    python -m tests.integration.redo_verification --pg-bin-dir /usr/lib/postgresql/17/bin

Differences at the end that are inherent, the same after a crash of a stock server, are counted as such and nothing else is:
visibility map bits that an image in WAL does not carry (ours has fewer), sequences (WAL is ahead by the prefetched values),
the SP-GiST metapage's cache of free pages (never logged).
"""

import argparse
import asyncio
import random
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neon_services.wal.redo import RedoHelper, RedoRequest, RedoResult, RedoStatus
from tests.integration.redo_histories import FSM_FORK, VM_FORK, Directory, Histories, PageKey, redo_lsn_of
from tests.unit.wal.stock_postgres import StockPostgres, bin_dir, stock_postgres

WORKLOAD = Path(__file__).with_name("redo_workload.sql")
LOCKS = Path(__file__).with_name("redo_workload_locks.sql")
RM_SEQUENCE, RM_SPGIST = 15, 16
FRAME_BYTES = 6 << 20


@dataclass
class Report:
    """What was compared and what came out."""

    pages: int = 0
    records_applied: int = 0
    images_compared: int = 0
    final_pages_equal: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    record_kinds: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        explained = "".join(f"\n  {count} {what}" for what, count in self.explained.items())
        problems = "".join(f"\n  {text}" for text in self.problems[:20])
        return (
            f"{self.pages} pages, {self.records_applied} records applied, {self.images_compared} images compared after their "
            f"record, {self.final_pages_equal} pages equal at the end; inherent differences:{explained or ' none'}\n"
            f"{len(self.problems)} problems{problems}"
        )


def make_cluster(server: StockPostgres, rows: int) -> Path:
    """Run the workload and stop the server; the copy of its directory from before it."""
    server.initdb(
        settings={
            "wal_consistency_checking": "'all'",
            "max_prepared_transactions": "5",
            "track_commit_timestamp": "on",
            "autovacuum_naptime": "'1s'",
            "checkpoint_timeout": "'30s'",
        }
    )
    server.start()
    server.stop()  # so that the settings in pg_control are not a change any more
    before = server.base / "before"
    shutil.copytree(server.data, before)
    tablespace = server.make_directory("tablespace")
    server.start()
    variables = {"n": str(rows), "copyfile": str(server.base / "copied"), "tablespace": str(tablespace)}
    server.psql(WORKLOAD.read_text(), *(argument for pair in variables.items() for argument in ("-v", "=".join(pair))))
    server.run(
        "pgbench",
        *(*server.connection, "-n", "-c", "4", "-t", "25", "--max-tries=100", "-f", "-", "postgres"),
        input=LOCKS.read_text(),
    )
    server.psql("VACUUM hot; VACUUM FREEZE everything; SELECT pg_switch_wal();")
    server.stop()
    return before


class Verification:
    """The histories of one cluster, a helper, and the comparison of the two."""

    def __init__(self, server: StockPostgres, before: Path, pg_major: int, helper: RedoHelper) -> None:
        self.histories = Histories(server.data, pg_major, redo_lsn_of(before))
        self._before, self._after = Directory(before), Directory(server.data)
        self._helper = helper
        self.report = Report()
        self._mask_of: dict[tuple[int, ...], int] = {}
        for key, (start, end) in self.histories.pages.items():
            for rmid in set(self.histories.refs["rmid"][start:end].tolist()) - {0}:
                self._mask_of.setdefault(key[:4], rmid)

    async def page_at(self, key: PageKey, lsn: int) -> bytes | None:
        """The page as it was at an LSN, None when it did not exist."""
        base, indexes = await self.history(key, lsn)
        if not indexes:
            return base
        (result,) = await self._helper.apply([self.request(key, base, indexes)])
        assert result.status == RedoStatus.OK, f"{key} at {lsn:X}: {result.error}"
        return result.page

    async def history(self, key: PageKey, until_lsn: int = (1 << 64) - 1) -> tuple[bytes | None, list[int]]:
        """(base, indexes of the records) of a page, up to an LSN."""
        histories = self.histories
        indexes, truncated = histories.chain(key, until_lsn)
        base = None
        if not truncated:
            base = self._before.page(key)
            copy = histories.copies.get(key.db)
            if base is None and copy is not None and copy.lsn <= until_lsn:
                base = await self.page_at(key._replace(db=copy.source_db), copy.lsn)
        if base is None and indexes:
            indexes = histories.from_the_one_that_makes_the_page(key, indexes)
        return base, indexes

    def request(self, key: PageKey, base: bytes | None, indexes: list[int]) -> RedoRequest:
        """The request that rebuilds a page from these records."""
        return RedoRequest(*key, base, b"".join(map(self.histories.entry, indexes)), len(indexes))

    async def run(self) -> Report:
        """Rebuild and compare every page that WAL touches, but for the free space map, which is not logged."""
        self.report.record_kinds.update(self.histories.records["rmid"].tolist())
        frame: list[tuple[PageKey, RedoRequest]] = []
        size = 0
        for key in self.histories.pages:
            if key.fork == FSM_FORK:
                continue
            request = self.request(key, *await self.history(key))
            if request.nrecords:
                frame.append((key, request))
                size += request.size
            if len(frame) == 64 or size > FRAME_BYTES:
                await self._compare(frame)
                frame, size = [], 0
        if frame:
            await self._compare(frame)
        self._before.close()
        self._after.close()
        return self.report

    async def _compare(self, frame: Sequence[tuple[PageKey, RedoRequest]]) -> None:
        results = await self._helper.verify([request for _, request in frame])
        masks: list[tuple[int, int, bytes]] = []
        masked_keys = []
        for (key, request), result in zip(frame, results, strict=True):
            self._count(key, request, result)
            want = self._after.page(key)
            if result.page is None or want is None:
                continue  # dropped or truncated since: its images were compared
            if key.fork == VM_FORK:
                self._compare_map(key, result.page, want)
            else:
                rmid = self._mask_of.get(key[:4], 10)
                masks += [(rmid, key.blk, result.page), (rmid, key.blk, want)]
                masked_keys.append((key, rmid))
        pages = await self._helper.mask(masks)
        for position, (key, rmid) in enumerate(masked_keys):
            self._compare_final(key, rmid, pages[2 * position], pages[2 * position + 1])

    def _count(self, key: PageKey, request: RedoRequest, result: RedoResult) -> None:
        report = self.report
        report.pages += 1
        report.records_applied += request.nrecords
        report.images_compared += result.compared
        if result.status != RedoStatus.OK:
            report.problems.append(f"{key}: {result.status.name} {result.error}")
        elif result.mismatches:
            report.problems.append(f"{key}: {result.mismatches} mismatches, first after record {result.first_mismatch}")

    def _compare_map(self, key: PageKey, page: bytes, want: bytes) -> None:
        ours, theirs = int.from_bytes(page[24:], "little"), int.from_bytes(want[24:], "little")
        if ours == theirs:
            self.report.final_pages_equal += 1
        elif not ours & ~theirs:
            self.report.explained["visibility map pages with fewer bits, their image in WAL has none"] += 1
        else:
            self.report.problems.append(f"{key}: a visibility map bit is set that the server has cleared")

    def _compare_final(self, key: PageKey, rmid: int, page: bytes, want: bytes) -> None:
        differing = [at for at in range(8192) if page[at] != want[at]] if page != want else []
        if not differing:
            self.report.final_pages_equal += 1
        elif rmid == RM_SEQUENCE and differing[0] >= 8160 and differing[-1] <= 8176:
            self.report.explained["sequences, ahead by the prefetched values"] += 1
        elif rmid == RM_SPGIST and key.blk == 0 and differing[0] >= 28 and differing[-1] < 100:
            self.report.explained["SP-GiST metapages, whose cache is not logged"] += 1
        else:
            self.report.problems.append(f"{key}: {len(differing)} bytes differ at the end, first at {differing[0]}")

    async def drop_one_record(self, rng: random.Random, chains: int) -> tuple[int, int]:
        """Negative control: (chains with one record left out, how many of them were noticed)."""
        candidates = [key for key in self.histories.pages if key.fork == 0]
        rng.shuffle(candidates)
        tried = noticed = 0
        for key in candidates:
            base, indexes = await self.history(key)
            if not 3 <= len(indexes) <= 2000:
                continue
            del indexes[rng.randrange(1, len(indexes) - 1)]
            broken = self.request(key, base, indexes)
            (result,) = await self._helper.verify([broken])
            tried += 1
            noticed += result.status != RedoStatus.OK or result.mismatches > 0
            if tried == chains:
                break
        return tried, noticed


async def verify_cluster(server: StockPostgres, before: Path, pg_major: int, *, seed: int) -> tuple[Report, tuple[int, int]]:
    """Compare everything, then the negative control on 300 chains."""
    helper = await RedoHelper.start(server.programs, pg_major)
    try:
        verification = Verification(server, before, pg_major, helper)
        report = await verification.run()
        return report, await verification.drop_one_record(random.Random(seed), 300)
    finally:
        await helper.kill()


def main() -> int:
    """The command line; exit status 1 when there is any difference."""
    parser = argparse.ArgumentParser(description="Verify WAL redo against a stock server.")
    parser.add_argument("--pg-bin-dir", type=Path, default=bin_dir(), help="directory of the server's programs")
    parser.add_argument("--rows", type=int, default=1000, help="size of the workload")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    with stock_postgres(arguments.pg_bin_dir) as server:
        pg_major = int(server.run("postgres", "--version").split()[2].split(".")[0])
        before = make_cluster(server, arguments.rows)
        report, (tried, noticed) = asyncio.run(verify_cluster(server, before, pg_major, seed=arguments.seed))
    print(f"Postgres {pg_major}, seed {arguments.seed}: {report}")
    print(f"negative control: one record left out of {tried} chains, noticed in {noticed}")
    return 1 if report.problems or noticed < tried // 2 else 0


if __name__ == "__main__":
    sys.exit(main())

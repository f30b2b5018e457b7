"""Compare a timeline, page by page, with the cleanly shut down data directory whose WAL it has ingested.

Differences that are inherent to WAL and allowed: what Postgres's own consistency masks hide (hint bits, unused space), free
space maps (not logged), visibility maps with fewer bits than on disk (set without being logged), sequences that are ahead by
their prefetch, the SP-GiST metapage's cache, and pages at the end of a file that hold nothing (extended without WAL).
"""

import re
import struct
from collections import Counter
from pathlib import Path

import numpy as np

from neon_services.pageserver import keys
from neon_services.pageserver.keys import FORK_SUFFIXES, PAGE_SIZE, RelTag
from neon_services.pageserver.relations import Relations
from neon_services.pageserver.timeline import Timeline
from neon_services.wal.records import WalBatch
from neon_services.wal.redo_helper import RedoHelper

_FILE = re.compile(r"(\d+)(_fsm|_vm|_init)?(?:\.(\d+))?")
_HEAP, _BTREE, _SEQUENCE, _SPGIST = 10, 11, 15, 16


class ManagerOfRelation:
    """Which resource manager's mask fits each relation: that of its WAL."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, int], int] = {}

    def saw(self, batch: WalBatch) -> None:
        """Note the relations of a batch."""
        refs = batch.refs[(batch.refs["rmid"] != 0) & (batch.refs["fork"] == 0)]
        for spc, db, rel, rmid in np.unique(refs[["spc", "db", "rel", "rmid"]]).tolist():
            self._found.setdefault((spc, db, rel), _HEAP if rmid == 9 else rmid)

    def of(self, tag: RelTag) -> int | None:
        """The resource manager; None when the relation was in no record."""
        return self._found.get((tag.spc, tag.db, tag.rel))


def files_on_disk(data: Path) -> dict[RelTag, bytes]:
    """The content of every relation fork (all segments)."""
    found: dict[RelTag, bytes] = {}
    directories = [(keys.GLOBAL_TABLESPACE, 0, data / "global")]
    directories += [(keys.DEFAULT_TABLESPACE, int(p.name), p) for p in (data / "base").iterdir() if p.name.isdecimal()]
    for spc, db, directory in directories:
        for path in sorted(directory.iterdir()):
            match = _FILE.fullmatch(path.name)
            if match is not None:
                tag = RelTag(spc, db, int(match[1]), FORK_SUFFIXES.index(match[2] or ""))
                found[tag] = found.get(tag, b"") + path.read_bytes()
    return found


async def read_fork(timeline: Timeline, tag: RelTag, blocks: int, lsn: int) -> list[bytes]:
    """All pages of a fork."""
    pages: list[bytes] = []
    for first in range(0, blocks, 256):
        halves = [keys.relation_block(tag, block) for block in range(first, min(first + 256, blocks))]
        pages += await timeline.get_many([hi for hi, _ in halves], [lo for _, lo in halves], lsn)
    return pages


async def compare_with_disk(timeline: Timeline, data: Path, managers: ManagerOfRelation, helper: RedoHelper) -> Counter[str]:
    """Compare everything; raises AssertionError naming the first differences, returns counts of what was compared."""
    lsn = timeline.last_record_lsn
    disk = files_on_disk(data)
    sizes = await Relations.of(timeline).relation_sizes(lsn)
    unlogged = {tag[:3] for tag in disk if tag.fork == keys.INIT_FORK}
    problems: list[str] = []
    counts: Counter[str] = Counter()
    for tag, content in sorted(disk.items()):
        if tag.fork == keys.FSM_FORK or (tag[:3] in unlogged and tag.fork != keys.INIT_FORK):
            continue
        if tag not in sizes and tag.fork == keys.VM_FORK and not any(content[24:]):
            counts["visibility maps without a bit"] += 1
            continue
        if tag not in sizes:
            if content:
                problems.append(f"relation {tag} is on disk ({len(content)} bytes) and not in the timeline")
            continue
        blocks = sizes[tag]
        on_disk = len(content) // PAGE_SIZE
        extra = content[blocks * PAGE_SIZE :]
        if blocks > on_disk:
            problems.append(f"relation {tag} has {blocks} blocks in the timeline and {on_disk} on disk")
            continue
        if (
            any(_holds_something(extra[at : at + PAGE_SIZE]) for at in range(0, len(extra), PAGE_SIZE))
            and tag.fork != keys.VM_FORK
        ):
            problems.append(f"relation {tag} has {blocks} blocks in the timeline, and data in its {on_disk} blocks on disk")
        counts["pages beyond what WAL knows"] += on_disk - blocks
        got = await read_fork(timeline, tag, blocks, lsn)
        want = [content[at : at + PAGE_SIZE] for at in range(0, blocks * PAGE_SIZE, PAGE_SIZE)]
        problems += await _compare_pages(tag, got, want, managers.of(tag), helper, counts)
    for tag, blocks in sizes.items():
        if tag not in disk and tag.fork != keys.FSM_FORK:
            problems.append(f"relation {tag} is in the timeline ({blocks} blocks) and not on disk")
    assert not problems, f"{len(problems)} differences at {lsn:#x}: " + "; ".join(problems[:20])
    return counts


def _holds_something(page: bytes) -> bool:
    lower = struct.unpack_from("<H", page, 12)[0]
    return lower > 24


async def _compare_pages(
    tag: RelTag, got: list[bytes], want: list[bytes], manager: int | None, helper: RedoHelper, counts: Counter[str]
) -> list[str]:
    problems = []
    masked: list[tuple[int, int, bytes]] = []
    blocks: list[int] = []
    rmgr = manager if manager is not None else _HEAP
    for block, (mine, disk) in enumerate(zip(got, want, strict=True)):
        if not isinstance(mine, bytes):
            problems.append(f"relation {tag} block {block}: {mine}")
        elif mine == disk:
            counts["pages equal"] += 1
        elif tag.fork == keys.VM_FORK:
            if any(a & ~b for a, b in zip(mine[24:], disk[24:], strict=True)):
                problems.append(f"relation {tag} block {block}: a bit is set that is clear on disk")
            counts["visibility map pages with fewer bits"] += 1
        else:
            masked += [(rmgr, block, mine), (rmgr, block, disk)]
            blocks.append(block)
    pages = await helper.mask(masked) if masked else []
    for number, block in enumerate(blocks):
        mine, disk = np.frombuffer(pages[2 * number], np.uint8), np.frombuffer(pages[2 * number + 1], np.uint8)
        different = np.flatnonzero(mine != disk)
        if not len(different):
            counts["pages equal but for hints"] += 1
        elif manager == _SEQUENCE and different.min() >= 8160:
            counts["sequences ahead by their prefetch"] += 1
        elif manager == _SPGIST and block == 0 and different.max() < 100:
            counts["SP-GiST metapages"] += 1
        elif manager is None and set(different.tolist()) <= set(range(8)):
            counts["page LSN only"] += 1
        else:
            problems.append(
                f"relation {tag} block {block} (resource manager {manager}): {len(different)} bytes differ, first at "
                f"{different[:8].tolist()}, page LSNs {masked[2 * number][2][:8].hex()}, {masked[2 * number + 1][2][:8].hex()}"
            )
    return problems


def compare_slru(kind: int, mine: dict[int, bytes], data: Path, entries: int, per_page: int, entry_bytes: float) -> int:
    """Compare the entries ``[0, entries)`` of an SLRU; returns how many pages were compared."""
    compared = 0
    for segment, content in sorted(mine.items()):
        path = data / keys.SLRU_DIRECTORIES[kind] / f"{segment:04X}"
        disk = path.read_bytes()
        for block in range(len(content) // PAGE_SIZE):
            page = segment * keys.SLRU_PAGES_PER_SEGMENT + block
            used = min(max(entries - page * per_page, 0), per_page)
            size = int(used * entry_bytes)
            at = block * PAGE_SIZE
            assert content[at : at + size] == disk[at : at + size], f"{path.name} page {block} of {path.parent.name}"
            compared += used > 0
    return compared

"""WAL for ingest tests, record by record: the columns that the decoder would give, without Postgres."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from neon_services.ground.lsn import Lsn
from neon_services.pageserver import keys
from neon_services.pageserver.ingest import WalIngest
from neon_services.pageserver.ingest_rows import RowBuilder
from neon_services.pageserver.ingest_tip import encode_prepared
from neon_services.pageserver.native_records import ZERO_PAGE, apply
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.relations import encode_databases
from neon_services.pageserver.slru import encode_segments
from neon_services.pageserver.timeline import Timeline, in_memory_timeline
from neon_services.wal.records import RECORD_DTYPE, REF_DTYPE, REF_IMPLIED_VM, REF_WILL_INIT, WalBatch
from neon_services.wal.redo_frames import RedoRequest, RedoResult, RedoStatus

START = 0x0100_0028
FIRST_XID = 1024

Ref = tuple[int, int, int, int, int, int]  # spc, db, rel, fork, block, flags


class FakeRedo:
    """Pages as texts of what was applied to them: ``base+lsn+lsn``."""

    async def apply(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        answers = []
        for request in requests:
            text = b"init" if request.base is None else request.base.rstrip(b"\0") or b"zero"
            at = 0
            for _ in range(request.nrecords):
                end_lsn, length = struct.unpack_from("<QI", request.entries, at)
                text += f"+{end_lsn:x}".encode()
                at += 8 + (length + 7) // 8 * 8
            answers.append(RedoResult(RedoStatus.OK, text.ljust(8192, b"\0")))
        return answers


def make_checkpoint() -> bytes:
    """A CheckPoint with next xid FIRST_XID."""
    value = bytearray(88)
    struct.pack_into("<QIII", value, 24, FIRST_XID, 16384, 1, 0)
    struct.pack_into("<I", value, 44, 3)
    return bytes(value)


def empty_timeline(pg_version: int = 15) -> Timeline:
    """A timeline as after a bootstrap, without relations."""
    timeline = in_memory_timeline(pg_version, START, reconstructor=Reconstructor(FakeRedo(), apply))
    rows = RowBuilder(b"")
    rows.put_image(keys.DB_DIRECTORY, START, encode_databases({}))
    rows.put_image(keys.TWOPHASE_DIRECTORY, START, encode_prepared((), pg_version))
    rows.put_image(keys.CHECKPOINT, START, make_checkpoint())
    for kind in (keys.CLOG, keys.MULTIXACT_OFFSETS, keys.MULTIXACT_MEMBERS):
        rows.put_image(keys.slru_directory(kind), START, encode_segments({0}))
        rows.put_image(keys.slru_segment_size(kind, 0), START, struct.pack("<I", 1))
        rows.put_image(keys.slru_block(kind, 0, 0), START, ZERO_PAGE)
    timeline.ingest(rows.finish(), START, 0)
    return timeline


@dataclass
class Wal:
    """Collects records; ``batch()`` gives those since the last call."""

    lsn: int = START
    ends: list[int] = field(default_factory=list)
    _rows: list[tuple[int, int, int, int, int, bytes, list[Ref]]] = field(default_factory=list)

    def add(self, rmid: int, info: int, main: bytes = b"", *, xid: int = 0, refs: list[Ref] | None = None) -> int:
        """Append a record; its end LSN."""
        start, self.lsn = self.lsn, self.lsn + (24 + len(main) + 7) // 8 * 8 + 8
        self._rows.append((start, self.lsn, rmid, info, xid, main, refs or []))
        self.ends.append(self.lsn)
        return self.lsn

    def touch(self, rel: int, block: int, *, init: bool = True, fork: int = 0, implied: bool = False, xid: int = 0) -> int:
        """A heap record about one block; ``implied``: also about the visibility map, without naming it."""
        refs: list[Ref] = [(1663, 5, rel, fork, block, REF_WILL_INIT if init else 0)]
        if implied:
            refs.append((1663, 5, rel, keys.VM_FORK, block // 32672, REF_IMPLIED_VM))
        return self.add(10, 0, xid=xid, refs=refs)

    def batch(self) -> WalBatch:
        """The records as the decoder would give them."""
        records = np.zeros(len(self._rows), RECORD_DTYPE)
        refs: list[tuple[int, ...]] = []
        blob = bytearray()
        for number, (start, end, rmid, info, xid, main, touched) in enumerate(self._rows):
            raw = struct.pack("<IIQBBxxI", 24 + len(main), xid, 0, info, rmid, 0) + main
            row = (start, end, len(blob), len(raw), xid, 24, len(main), len(refs), len(touched), rmid, info, 0)
            records[number] = row
            refs += [(end, number, *ref[:3], ref[4], ref[3], ref[5], index, rmid) for index, ref in enumerate(touched)]
            blob += struct.pack("<Q", end) + raw + bytes(-len(raw) % 8)
        self._rows = []
        return WalBatch(records, np.array(refs, REF_DTYPE), bytes(blob), Lsn(self.lsn))


async def ingest_all(timeline: Timeline, wal: Wal) -> None:
    """Ingest what was collected, as one batch."""
    await WalIngest(timeline).ingest(wal.batch())


async def page(timeline: Timeline, rel: int, block: int, lsn: int, fork: int = 0) -> str:
    """The text of a page as FakeRedo makes it; ``zero`` for zeros."""
    content = await timeline.get(*keys.relation_block(keys.RelTag(1663, 5, rel, fork), block), lsn)
    return content.rstrip(b"\0").decode() or "zero"

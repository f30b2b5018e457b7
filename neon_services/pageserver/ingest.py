"""WAL in, values out: what a batch of decoded records changes, handed to the timeline as columns.

Invariant: after ``ingest`` a read at LSN L sees exactly the effects of the records that end at or before L, on pages, sizes and
directories alike. Blocks are handled in bulk; only the few records that are about more than pages are looked at one by one. A
batch is cut at the records that make relations shorter or vanish, so that blocks before and after do not mix.

An error leaves the timeline at the end of an earlier record and this object useless: make a new one.
"""

import numpy as np

from neon_services.pageserver import ingest_records as ir
from neon_services.pageserver import ingest_xact
from neon_services.pageserver.ingest_blocks import BlockRefs, group_refs, put_blocks
from neon_services.pageserver.ingest_database import handle_database
from neon_services.pageserver.ingest_rows import RowBuilder
from neon_services.pageserver.ingest_tip import TipState
from neon_services.pageserver.keys import RelTag
from neon_services.pageserver.native_records import CLOG_XIDS_PER_PAGE
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.values import IndexArray
from neon_services.wal import xact
from neon_services.wal.raw_record import DBASE, LOOKED_AT, XACT, XLOG, Record
from neon_services.wal.records import WalBatch

_LOOKED_AT = np.zeros(256, bool)
_LOOKED_AT[list(LOOKED_AT)] = True
_FPI, _FPI_FOR_HINT = 0xB0, 0xA0
_MASK32 = np.uint32(0xFFFF_FFFF)
_HALF32 = np.uint32(0x8000_0000)


class WalIngest:
    """Ingests the WAL of one timeline. There is at most one per timeline at a time."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._tip = TipState(timeline)
        self._loaded = False

    async def ingest(self, batch: WalBatch) -> None:
        """Ingest all records of a batch; the timeline's ``last_record_lsn`` is then the end of the last one.

        Call ``Timeline.ingest_backpressure`` before the next one.
        Raises CorruptionError for a record that makes no sense; the records before it may or may not be ingested.
        """
        if not len(batch.records):
            return
        if not self._loaded:
            await self._tip.load()
            self._loaded = True
        await _BatchIngest(self._timeline, self._tip, batch).run()


class _BatchIngest:
    """One batch on its way into the timeline."""

    def __init__(self, timeline: Timeline, tip: TipState, batch: WalBatch) -> None:
        self._timeline = timeline
        self._tip = tip
        self._batch = batch
        self._blocks: BlockRefs = group_refs(tip, batch.refs)
        self._simple = np.empty(0, np.int64)
        self._blocks_done = self._simple_done = 0  # records below have their rows

    async def run(self) -> None:
        batch, tip = self._batch, self._tip
        self._simple, special = self._sort_out()
        looked_at = [Record.of(batch, row, tip.pg_major) for row in special.tolist()]
        needed = {tag for record in looked_at for tag in ir.relations_needed(record, tip.pg_major)}
        await tip.prefetch([*self._blocks.tags, *needed])
        xids = batch.records["xid"][batch.records["rmid"] == XACT]
        await tip.clog.prefetch(np.unique(xids[xids != 0] // CLOG_XIDS_PER_PAGE).tolist())

        tip.rows = RowBuilder(batch.blob)
        for row, record in zip(special.tolist(), looked_at, strict=True):
            tip.checkpoint.saw_xid(record.xid)
            if record.rmid == DBASE:
                self._hand_over(row)
                await handle_database(tip, self._timeline, record)
            elif ir.is_barrier(record):
                self._put_blocks_until(row + 1)  # its own blocks are those before the cut
                ir.handle(tip, record)
            else:
                created = ir.created_relation(record)
                if created is not None and self._is_touched_before(created, row):
                    self._put_blocks_until(row)  # its blocks have made it exist already
                ir.handle(tip, record)
            tip.put_checkpoint_if_changed(record.end_lsn)
        self._hand_over(len(batch.records))

    def _sort_out(self) -> tuple[IndexArray, IndexArray]:
        """The commits and aborts that go in bulk, and the records that must be looked at."""
        records = self._batch.records
        rmid, opcode = records["rmid"], records["info"] & np.uint8(0xF0)
        looked_at = _LOOKED_AT[rmid]
        looked_at &= ~((rmid == XLOG) & ((opcode == _FPI) | (opcode == _FPI_FOR_HINT)))
        # with the 0x80 bit clear, the opcode is the whole high half: nothing but the time follows
        simple = (rmid == XACT) & ((opcode == xact.COMMIT) | (opcode == xact.ABORT))
        looked_at &= ~simple
        looked_at[self._first_of_new_xids()] = True
        return np.flatnonzero(simple), np.flatnonzero(looked_at)

    def _first_of_new_xids(self) -> list[int]:
        """The records that move the checkpoint's next xid: few, as it moves in steps of 1024."""
        xids = self._batch.records["xid"]
        next_xid = self._tip.checkpoint.next_xid & 0xFFFF_FFFF
        found: list[int] = []
        start = 0
        while True:
            ahead = (xids[start:] != 0) & ((xids[start:] - np.uint32(next_xid)) & _MASK32 < _HALF32)
            first = int(np.argmax(ahead)) if len(ahead) else 0
            if not len(ahead) or not ahead[first]:
                return found
            start += first
            found.append(start)
            next_xid = max((int(xids[start]) + 1024) // 1024 * 1024 & 0xFFFF_FFFF, 3)
            start += 1

    def _refs_until(self, row: int) -> tuple[int, int]:
        """The range of block references from ``blocks_done`` to ``row``."""
        records, refs = self._batch.records, len(self._batch.refs)
        first = int(records["first_ref"][self._blocks_done]) if self._blocks_done < len(records) else refs
        return first, int(records["first_ref"][row]) if row < len(records) else refs

    def _is_touched_before(self, tag: RelTag, row: int) -> bool:
        """Whether a record below ``row``, whose blocks have not been put, is about this relation."""
        number = self._blocks.numbers.get(tag)
        if number is None:
            return False
        first, last = self._refs_until(row)
        return bool((self._blocks.group[first:last] == number).any())

    def _put_blocks_until(self, row: int) -> None:
        """Put the rows of the block references of the records below ``row``."""
        put_blocks(self._tip, self._batch, self._blocks, *self._refs_until(row))
        self._blocks_done = row

    def _hand_over(self, row: int) -> None:
        """Give the timeline everything about the records below ``row``."""
        self._put_blocks_until(row)
        last = int(np.searchsorted(self._simple, row))
        ingest_xact.put_simple_xacts(self._tip, self._batch, self._simple[self._simple_done : last])
        self._simple_done = last
        self._tip.clog.put_images(self._tip.rows)
        if row:
            end = self._batch.records[row - 1]
            self._timeline.ingest(self._tip.rows.finish(), int(end["end_lsn"]), int(end["start_lsn"]))
            self._tip.publish()
        self._tip.rows = RowBuilder(self._batch.blob)

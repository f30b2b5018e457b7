"""One decoded record by itself, for those that are about more than pages: the pageserver's ingest and interpreted WAL."""

import struct
from typing import NamedTuple

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import format_lsn
from neon_services.wal import xact
from neon_services.wal.records import WalBatch

#: Resource managers by their numbers.
XLOG, XACT, SMGR, CLOG, DBASE, TABLESPACE, MULTIXACT, RELMAP, STANDBY = range(9)
REPLORIGIN, LOGICAL_MESSAGE = 19, 21
#: Those whose records are about more than pages.
LOOKED_AT = (XLOG, XACT, SMGR, CLOG, DBASE, MULTIXACT, RELMAP, STANDBY, REPLORIGIN, LOGICAL_MESSAGE)


class Record(NamedTuple):
    """One decoded record. ``raw`` is the whole XLogRecord, ``main`` its main data."""

    end_lsn: int
    xid: int
    rmid: int
    info: int
    main: bytes
    raw: bytes
    pg_major: int

    @classmethod
    def of(cls, batch: WalBatch, row: int, pg_major: int) -> "Record":
        """The record of one row of a batch."""
        record = batch.records[row]
        start = int(record["blob_off"]) + 8
        main = start + int(record["main_off"])
        return cls(
            end_lsn=int(record["end_lsn"]),
            xid=int(record["xid"]),
            rmid=int(record["rmid"]),
            info=int(record["info"]),
            main=batch.blob[main : main + int(record["main_len"])],
            raw=batch.blob[start : start + int(record["tot_len"])],
            pg_major=pg_major,
        )

    @property
    def opcode(self) -> int:
        """What the record does, without the flags that stand beside it."""
        return self.info & (xact.OPCODE_MASK if self.rmid == XACT else 0xF0)

    def unpack(self, layout: str, offset: int = 0) -> tuple[int, ...]:
        """Fields of the main data, little-endian. Raises CorruptionError."""
        try:
            return struct.unpack_from("<" + layout, self.main, offset)
        except struct.error as error:
            raise CorruptionError(
                f"the record of resource manager {self.rmid}, info {self.info:#x}, that ends at {format_lsn(self.end_lsn)} "
                f"is too short: {error}"
            ) from error

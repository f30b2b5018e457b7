"""What a layer found for a set of keys: rows in columns, without their bytes."""

from dataclasses import dataclass

import numpy as np

from neon_services.pageserver.values import IS_BASE, IndexArray, U8Array, U64Array


@dataclass(slots=True)
class Hits:
    """Rows ordered by (key number, lsn, ingest order)."""

    owner: IndexArray  #: the number of the key in the question
    lsn: U64Array
    kind: U8Array
    row: IndexArray  #: what the layer's ``fetch`` takes

    @classmethod
    def none(cls) -> "Hits":
        """Nothing found."""
        empty = np.empty(0, np.int64)
        return cls(empty, np.empty(0, np.uint64), np.empty(0, np.uint8), empty)

    def __len__(self) -> int:
        return len(self.row)

    def since_last_base(self) -> tuple["Hits", IndexArray]:
        """Per key only the newest row that needs no base and what follows it; and the numbers of the keys that have one."""
        if not len(self):
            return self, self.row
        place = np.arange(len(self))
        last_base = np.full(int(self.owner[-1]) + 1, -1, np.int64)
        bases = IS_BASE[self.kind]
        last_base[self.owner[bases]] = place[bases]  # assignment in order: the last one stays
        keep = place >= last_base[self.owner]
        complete = np.flatnonzero(last_base >= 0)
        return Hits(self.owner[keep], self.lsn[keep], self.kind[keep], self.row[keep]), complete

"""What a layer found for a set of keys: rows in columns, without their bytes."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from neon_services.pageserver.values import IS_BASE, IndexArray, U8Array, U32Array, U64Array


@dataclass(slots=True)
class Hits:
    """Rows ordered by (key number, lsn, ingest order)."""

    owner: IndexArray  #: the number of the key in the question
    lsn: U64Array
    kind: U8Array
    position: U64Array  #: what the layer's ``fetch`` takes, together with the length
    length: U32Array

    @classmethod
    def none(cls) -> "Hits":
        """Nothing found."""
        u64 = np.empty(0, np.uint64)
        return cls(np.empty(0, np.int64), u64, np.empty(0, np.uint8), u64, np.empty(0, np.uint32))

    def __len__(self) -> int:
        return len(self.owner)

    def take(self, rows: Any) -> "Hits":
        """Some of the rows (by number or by mask), in that order."""
        return Hits(self.owner[rows], self.lsn[rows], self.kind[rows], self.position[rows], self.length[rows])

    def since_last_base(self) -> tuple["Hits", IndexArray]:
        """Per key only the newest row that needs no base and what follows it; and the numbers of the keys that have one."""
        if not len(self):
            return self, self.owner
        place = np.arange(len(self))
        last_base = np.full(int(self.owner[-1]) + 1, -1, np.int64)
        bases = IS_BASE[self.kind]
        last_base[self.owner[bases]] = place[bases]  # assignment in order: the last one stays
        keep = place >= last_base[self.owner]
        return (self if keep.all() else self.take(keep)), np.flatnonzero(last_base >= 0)


class ValueSource(Protocol):
    """A layer as the last step of a read needs it."""

    async def fetch(self, position: U64Array, length: U32Array) -> list[bytes]:
        """The bytes of rows that the layer's lookup named."""

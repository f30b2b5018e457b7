"""Keys of relation pages in Neon's key space, one by one and in columns.

Invariant: a key is Neon's (``field1 u8, field2 u32, field3 u32, field4 u32, field5 u8, field6 u32``) in its compact form
``(f1&0x7F)<<120 | (f2&0xFFFF)<<104 | f3<<72 | f4<<40 | f5<<32 | f6``, 128 bits, as two halves ``(hi, lo)``. A page of a
relation is ``00 | SPC | DB | REL | FORK | BLK``. The safekeeper names the pages that WAL changes so, the pageserver keeps them.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Halves = tuple[int, int]
U64Array = npt.NDArray[np.uint64]

MAIN_FORK, FSM_FORK, VM_FORK, INIT_FORK = range(4)
FORK_SUFFIXES = ("", "_fsm", "_vm", "_init")
PAGE_SIZE = 8192
TABLESPACE_MAX = 0xFFFF  #: larger oids of tablespaces do not fit into a key
HEAP_BLOCKS_PER_VM_PAGE = (PAGE_SIZE - 24) * 4


class RelTag(NamedTuple):
    """One fork of one relation."""

    spc: int
    db: int
    rel: int
    fork: int

    def file_name(self) -> str:
        """The name of its (first) file."""
        return f"{self.rel}{FORK_SUFFIXES[self.fork]}"

    def __str__(self) -> str:
        return f"{self.spc}/{self.db}/{self.rel}{FORK_SUFFIXES[self.fork] if self.fork < 4 else f'_fork{self.fork}'}"


def make_key(field1: int, field2: int, field3: int, field4: int, field5: int, field6: int) -> Halves:
    """The halves of a key given by its fields."""
    return (
        (field1 & 0x7F) << 56 | (field2 & 0xFFFF) << 40 | field3 << 8 | field4 >> 24,
        (field4 & 0xFF_FFFF) << 40 | field5 << 32 | field6,
    )


def relation_block(tag: RelTag, block: int) -> Halves:
    """One 8 KiB page."""
    return make_key(0, tag.spc, tag.db, tag.rel, tag.fork, block)


def block_keys(
    spc: npt.NDArray[np.integer],
    db: npt.NDArray[np.integer],
    rel: npt.NDArray[np.integer],
    fork: npt.NDArray[np.integer],
    block: npt.NDArray[np.integer],
) -> tuple[U64Array, U64Array]:
    """``relation_block`` for columns."""
    wide_rel = rel.astype(np.uint64)
    hi = spc.astype(np.uint64) << np.uint64(40)
    hi |= db.astype(np.uint64) << np.uint64(8)
    hi |= wide_rel >> np.uint64(24)
    lo = (wide_rel & np.uint64(0xFF_FFFF)) << np.uint64(40)
    lo |= fork.astype(np.uint64) << np.uint64(32)
    lo |= block.astype(np.uint64)
    return hi, lo

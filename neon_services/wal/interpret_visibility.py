"""Heap records that clear bits of the visibility map without naming its pages.

Opcodes and the place of the flags in the main data are Postgres's (heapam_xlog.h) and, for resource manager 134, those of
Neon's own builds. A map page that the record does name (minors of 17 and 18 do that) is redone with it and not told here.
"""

from neon_services.protocols import interpreted_metadata as md
from neon_services.protocols.page_keys import HEAP_BLOCKS_PER_VM_PAGE, MAIN_FORK, VM_FORK, RelTag

HEAP2, HEAP, NEON = 9, 10, 134
_VISIBLE_AND_FROZEN, _FROZEN = 3, 2
_OLD_CLEARED, _NEW_CLEARED = 1, 2  # in an update's flags
_OPCODE_MASK = 0x70
# opcode -> (what it is, place of its flags)
_OPERATIONS: dict[int, dict[int, tuple[str, int]]] = {
    HEAP: {0x00: ("new", 2), 0x10: ("new", 7), 0x20: ("update", 7), 0x40: ("update", 7), 0x60: ("lock", 7)},
    HEAP2: {0x50: ("new", 0), 0x60: ("lock", 7)},
    NEON: {
        0x00: ("new", 2),
        0x10: ("new", 7),
        0x20: ("update", 7),
        0x30: ("update", 7),
        0x40: ("lock", 11),
        0x50: ("new", 0),
    },
}
Block = tuple[int, int, int]  # block id, fork, block


def cleared_bits(
    rmid: int, info: int, main: bytes, relation: tuple[int, int, int], blocks: list[Block]
) -> md.ClearVmBits | md.NeonClearVmBits | None:
    """What a heap record clears; ``blocks`` are those that it names, of ``relation`` (tablespace, database, relation)."""
    operation = _OPERATIONS[rmid].get(info & _OPCODE_MASK)
    if operation is None or not blocks or operation[1] >= len(main):
        return None
    kind, place = operation
    flags = main[place]
    first = blocks[0][2]
    old: int | None = None
    new: int | None = None
    if kind == "update":
        if flags & _OLD_CLEARED:
            old = next((block for block_id, fork, block in blocks if block_id == 1 and fork == MAIN_FORK), first)
        if flags & _NEW_CLEARED:
            new = first
    elif flags & 1:
        old, new = (first, None) if kind == "lock" else (None, first)
    named = {block for _, fork, block in blocks if fork == VM_FORK}
    if old is not None and old // HEAP_BLOCKS_PER_VM_PAGE in named:
        old = None
    if new is not None and new // HEAP_BLOCKS_PER_VM_PAGE in named:
        new = None
    if old is None and new is None:
        return None
    made = md.NeonClearVmBits if rmid == NEON else md.ClearVmBits
    return made(new, old, RelTag(*relation, VM_FORK), _FROZEN if kind == "lock" else _VISIBLE_AND_FROZEN)

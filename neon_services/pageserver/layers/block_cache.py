"""A cache of decoded blocks with a bound in bytes, least recently used first out. Used on the event loop only."""

from collections import OrderedDict
from typing import Any


class BlockCache:
    """Maps (file number, block kind, block number) to a decoded block."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.hits = 0
        self.misses = 0
        self._blocks: OrderedDict[tuple[int, int, int], tuple[Any, int]] = OrderedDict()

    def get(self, key: tuple[int, int, int]) -> Any | None:
        """The block, or None."""
        found = self._blocks.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._blocks.move_to_end(key)
        return found[0]

    def put(self, key: tuple[int, int, int], block: Any, size: int) -> None:
        """Keep a block of ``size`` bytes."""
        old = self._blocks.pop(key, None)
        if old is not None:
            self.used_bytes -= old[1]
        self._blocks[key] = (block, size)
        self.used_bytes += size
        while self.used_bytes > self.capacity_bytes and len(self._blocks) > 1:
            _, (_, freed) = self._blocks.popitem(last=False)
            self.used_bytes -= freed

"""The vectored read: for a set of keys at one LSN, find the rows that rebuild each of them.

Invariant: a read at LSN L takes, per key, exactly the newest base at or before L and every row after that base up to L. Each
layer is asked only for the LSNs that newer layers have not already covered for that key (``ceiling``), and not below the newest
image that covers the key (``floor``): what lies below an image may already be garbage.

In-memory layers are looked up synchronously on the event loop, at the moment when the snapshot of the layer map is taken: a
flush that turns one into a file cannot hide rows in between.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from neon_services.pageserver.layers.hits import Hits, ValueSource
from neon_services.pageserver.layers.in_memory import InMemoryLayer
from neon_services.pageserver.reconstruct import History
from neon_services.pageserver.values import NOT_INHERITED_FIELD1, IndexArray, U64Array


class HistoricView(Protocol):
    """An unchanging snapshot of the layer files of a timeline."""

    async def collect(self, search: "Search") -> None:
        """Look for the open keys of the search in the layer files, newest first."""


class Readable(Protocol):
    """What the read path needs of a timeline."""

    ancestor_lsn: int

    @property
    def ancestor(self) -> "Readable | None":
        """The timeline this one branched from."""

    def in_memory_layers(self) -> list[InMemoryLayer]:
        """Open and frozen layers, newest first."""

    def historic_view(self) -> HistoricView:
        """A snapshot of the layer files."""

    async def wait_lsn(self, lsn: int) -> None:
        """Return when everything up to the LSN is there."""


@dataclass(slots=True)
class Piece:
    """Rows that one layer contributes; ``hits.owner`` numbers the keys of the whole search."""

    layer: ValueSource
    hits: Hits


class Search:
    """The state of one vectored read."""

    def __init__(self, key_hi: U64Array, key_lo: U64Array, lsn: int) -> None:
        self.key_hi = key_hi
        self.key_lo = key_lo
        self.open: IndexArray = np.arange(len(key_hi))  #: numbers of the keys that still need older rows
        self.ceiling: U64Array = np.full(len(key_hi), lsn + 1, np.uint64)  #: rows below this LSN are still wanted
        self.pieces: list[Piece] = []  #: newest layer first
        self.layers_visited = 0

    def visit(self, layer: ValueSource, keys: IndexArray, floor: U64Array, hits: Hits) -> IndexArray:
        """Record what a layer answered for ``keys`` (numbers); returns the numbers of those that remain open."""
        self.layers_visited += 1
        self.ceiling[keys] = np.minimum(self.ceiling[keys], floor)
        if not len(hits):
            return keys
        hits, complete = hits.since_last_base()
        hits.owner = keys[hits.owner]
        self.pieces.append(Piece(layer, hits))
        return np.delete(keys, complete) if len(complete) else keys

    def visit_in_memory(self, layer: InMemoryLayer) -> None:
        """Look for the open keys in an in-memory layer."""
        keys = self.open
        start = np.uint64(layer.start_lsn)
        inside = self.ceiling[keys] > start
        if not inside.all():
            if not inside.any():
                return
            asked, rest = keys[inside], keys[~inside]
        else:
            asked, rest = keys, keys[:0]
        floor = np.full(len(asked), start, np.uint64)
        hits = layer.find(self.key_hi[asked], self.key_lo[asked], floor, self.ceiling[asked])
        left = self.visit(layer, asked, floor, hits)
        self.open = np.concatenate((left, rest)) if len(rest) else left

    async def histories(self) -> list[History]:
        """The rows of each key with their bytes, oldest first."""
        found = [History() for _ in range(len(self.key_hi))]
        for piece in reversed(self.pieces):
            hits = piece.hits
            values = await piece.layer.fetch(hits.position, hits.length)
            for owner, lsn, kind, value in zip(hits.owner.tolist(), hits.lsn.tolist(), hits.kind.tolist(), values, strict=True):
                history = found[owner]
                history.kinds.append(kind)
                history.lsns.append(lsn)
                history.values.append(value)
        return found


async def search_timeline(timeline: Readable, key_hi: U64Array, key_lo: U64Array, lsn: int) -> Search:
    """Search a timeline and its ancestors for the keys at an LSN."""
    search = Search(key_hi, key_lo, lsn)
    level: Readable | None = timeline
    while level is not None:
        historic = level.historic_view()
        for layer in level.in_memory_layers():
            if not len(search.open):
                break
            search.visit_in_memory(layer)
        if len(search.open):
            await historic.collect(search)
        if not len(search.open) or level.ancestor is None:
            break
        field1 = key_hi[search.open] >> np.uint64(56)
        inherited = ~np.isin(field1, NOT_INHERITED_FIELD1)
        search.open = search.open[inherited]
        np.minimum(search.ceiling, np.uint64(level.ancestor_lsn + 1), out=search.ceiling)
        # after a crash the ancestor may not yet have received again what it had when the branch was made
        await level.ancestor.wait_lsn(level.ancestor_lsn)
        level = level.ancestor
    return search

"""Which layer files a timeline has, and which of them a key at an LSN is read from.

Invariant: ``LayerView`` never changes. Readers keep the view they started with; every change makes a new one.

For a key below an LSN ``ceiling`` (exclusive) the candidates are the newest delta D with ``start < ceiling`` and the newest
image I with ``lsn < ceiling`` whose key ranges hold the key. Without D it is I. With both, I when nothing of D lies above it
(``I.lsn + 1 >= min(D.end, ceiling)``), else D down to ``max(D.start, I.lsn + 1)``. The key space is cut at all layer
boundaries; within one interval all keys have the same candidates, which are worked out at the first question and kept.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

import numpy as np

from neon_services.pageserver.layers.layer import Layer
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.read_path import Search
from neon_services.pageserver.values import U64Array


class _Interval:
    """The layers that cover one interval of the key space."""

    __slots__ = ("delta_starts", "deltas", "image_lsns", "images")

    def __init__(self, layers: Iterable[Layer]) -> None:
        everything = list(layers)
        self.deltas = sorted((x for x in everything if not x.name.is_image), key=lambda x: (x.name.lsn_start, x.name.lsn_end))
        self.images = sorted((x for x in everything if x.name.is_image), key=lambda x: x.name.lsn_start)
        self.delta_starts = [x.name.lsn_start for x in self.deltas]
        self.image_lsns = [x.name.lsn_start for x in self.images]

    def choose(self, ceiling: int) -> tuple[Layer, int] | None:
        """The layer to read and the floor (the lowest LSN to take from it)."""
        at_delta, at_image = bisect_left(self.delta_starts, ceiling), bisect_left(self.image_lsns, ceiling)
        image = self.images[at_image - 1] if at_image else None
        if not at_delta:
            return None if image is None else (image, image.name.lsn_start)
        delta = self.deltas[at_delta - 1]
        if image is None:
            return delta, delta.name.lsn_start
        above_image = image.name.lsn_start + 1
        if above_image >= min(delta.name.lsn_end, ceiling):
            return image, image.name.lsn_start
        return delta, max(delta.name.lsn_start, above_image)


class LayerView:
    """An unchanging set of layers."""

    def __init__(self, layers: dict[LayerName, Layer]) -> None:
        self.layers = layers
        self._edges = sorted({edge for name in layers for edge in (name.key_start, name.key_end)})
        self._intervals: dict[int, _Interval] = {}

    def _interval(self, number: int) -> _Interval:
        """The interval between edges ``number - 1`` and ``number``."""
        found = self._intervals.get(number)
        if found is None:
            if 0 < number < len(self._edges):
                start = self._edges[number - 1]
                found = _Interval(x for x in self.layers.values() if x.name.key_start <= start < x.name.key_end)
            else:
                found = _Interval(())
            self._intervals[number] = found
        return found

    async def collect(self, search: Search) -> None:
        """Look for the search's open keys, newest layer first; what stays open was not found down to the oldest layer."""
        keys = search.open.tolist()
        key_hi, key_lo = search.key_hi.tolist(), search.key_lo.tolist()
        interval = {n: bisect_right(self._edges, key_hi[n] << 64 | key_lo[n]) for n in keys}
        exhausted: list[int] = []
        while keys:
            ceilings = search.ceiling[keys].tolist()
            groups: dict[tuple[int, int], list[int]] = {}
            for n, ceiling in zip(keys, ceilings, strict=True):
                groups.setdefault((interval[n], ceiling), []).append(n)
            reads: dict[LayerName, tuple[Layer, list[int], list[int]]] = {}
            for (number, ceiling), members in groups.items():
                chosen = self._interval(number).choose(ceiling)
                if chosen is None:
                    exhausted += members
                    continue
                layer, floor = chosen
                _, asked, floors = reads.setdefault(layer.name, (layer, [], []))
                asked += members
                floors += [floor] * len(members)
            keys = []
            for layer, asked, floors in reads.values():
                numbers, floor_column = np.array(asked), np.array(floors, np.uint64)
                hits = await layer.find(search.key_hi[numbers], search.key_lo[numbers], floor_column, search.ceiling[numbers])
                left = search.visit(layer, numbers, floor_column, hits)
                if not layer.name.is_image:  # what an image of the range does not have does not exist
                    keys += left.tolist()
        search.open = np.array(exhausted, np.int64)

    async def keys_in_range(self, start: tuple[int, int], end: tuple[int, int], lsn: int) -> list[tuple[U64Array, U64Array]]:
        """A superset of the keys in ``[start, end)`` that exist at an LSN, as far as these layers know; with repetitions."""
        first, last = start[0] << 64 | start[1], end[0] << 64 | end[1]
        floors: dict[LayerName, int] = {}
        for number in range(bisect_right(self._edges, first), bisect_left(self._edges, last) + 1):
            interval = self._interval(number)
            at_image = bisect_right(interval.image_lsns, lsn)
            image_lsn = -1
            if at_image:
                image = interval.images[at_image - 1]
                image_lsn = image.name.lsn_start
                floors[image.name] = image_lsn
            for delta in interval.deltas:
                if delta.name.lsn_start <= lsn and delta.name.lsn_end > image_lsn + 1:
                    floors[delta.name] = min(floors.get(delta.name, image_lsn + 1), image_lsn + 1)
        found = []
        for name, floor in floors.items():
            found.append(await self.layers[name].keys(start, end, floor, lsn + 1))
        return found


class LayerMap:
    """The current view and its changes."""

    def __init__(self, layers: Iterable[Layer] = ()) -> None:
        self.view = LayerView({layer.name: layer for layer in layers})

    @property
    def layers(self) -> list[Layer]:
        """All layers, by name."""
        return [layer for _, layer in sorted(self.view.layers.items())]

    def get(self, name: LayerName) -> Layer | None:
        return self.view.layers.get(name)

    def replace(self, *, add: Iterable[Layer] = (), remove: Iterable[Layer] = ()) -> None:
        """Remove and add layers in one step that no reader sees half of."""
        layers = dict(self.view.layers)
        for layer in remove:
            del layers[layer.name]
        for layer in add:
            layers[layer.name] = layer
        self.view = LayerView(layers)

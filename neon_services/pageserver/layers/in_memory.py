"""The open (or frozen) in-memory layer: append-only columns with an index that is made when somebody looks.

Invariant: rows are only ever added, at LSNs not below ``start_lsn``; once frozen (``end_lsn`` set) nothing changes, so a thread
may read it. Appending costs a few array copies whatever the number of rows; sorting happens at the first lookup.

The index is a small set of runs, each sorted by key hash and keeping arrival order among equal hashes; runs of similar size are
merged, so that n rows cost O(n log n) in all and a lookup visits O(log n) runs. The newest rows are a tail that is searched
as it is while it is short.
"""

import numpy as np

from neon_services.pageserver.layers.hits import Hits
from neon_services.pageserver.values import IndexArray, U8Array, U32Array, U64Array, ValueBatch, expand_ranges, key_hash

_TAIL_ROWS_MAX = 2048  # a longer tail is sorted into a run before a lookup
_TAIL_KEYS_MAX = 8  # more keys than this are not searched row by row in the tail
_SEGMENT_BYTES_MIN = 1 << 20
_SEGMENT_BYTES_MAX = 16 << 20
_SEGMENT_SHIFT = np.uint64(32)
_SEGMENT_MASK = np.uint64(0xFFFF_FFFF)


class _Columns:
    """Growing arrays; the first ``n`` rows are valid."""

    def __init__(self, capacity: int = 1024) -> None:
        self.n = 0
        self.hash = np.empty(capacity, np.uint64)
        self.key_hi = np.empty(capacity, np.uint64)
        self.key_lo = np.empty(capacity, np.uint64)
        self.lsn = np.empty(capacity, np.uint64)
        self.kind = np.empty(capacity, np.uint8)
        self.position = np.empty(capacity, np.uint64)
        self.length = np.empty(capacity, np.uint32)

    def reserve(self, rows: int) -> None:
        capacity = len(self.lsn)
        if self.n + rows <= capacity:
            return
        while capacity < self.n + rows:
            capacity *= 2
        for name in ("hash", "key_hi", "key_lo", "lsn", "kind", "position", "length"):
            old = getattr(self, name)
            new = np.empty(capacity, old.dtype)
            new[: self.n] = old[: self.n]
            setattr(self, name, new)


class InMemoryLayer:
    """Values of one LSN range that are not in a file yet."""

    is_image = False

    def __init__(self, start_lsn: int, opened_at: float = 0.0) -> None:
        self.start_lsn = start_lsn
        self.end_lsn: int | None = None  #: exclusive; None while open
        self.opened_at = opened_at  #: the caller's clock, seconds
        self._columns = _Columns()
        self._segments: list[U8Array] = []
        self._used = 0  # bytes used of the last segment
        self._runs: list[tuple[U64Array, IndexArray]] = []
        self._indexed = 0  # rows below are in runs
        self.data_bytes = 0

    def __len__(self) -> int:
        return self._columns.n

    @property
    def size(self) -> int:
        """Bytes this layer would take in a file, roughly."""
        return self.data_bytes + 40 * self._columns.n

    # -- writing (event loop only)

    def append(self, batch: ValueBatch) -> None:
        """Add rows. The batch's arrays and data are copied: the producer may reuse its buffers."""
        assert self.end_lsn is None, "a frozen layer takes no more rows"
        rows = len(batch)
        if rows == 0:
            return
        assert int(batch.lsn.min()) >= self.start_lsn, "a value below the start of the open layer"
        columns = self._columns
        columns.reserve(rows)
        new = slice(columns.n, columns.n + rows)
        columns.key_hi[new] = batch.key_hi
        columns.key_lo[new] = batch.key_lo
        columns.lsn[new] = batch.lsn
        columns.kind[new] = batch.kind
        columns.length[new] = batch.length
        columns.position[new] = batch.offset.astype(np.uint64) + self._store(batch)
        columns.hash[new] = key_hash(columns.key_hi[new], columns.key_lo[new])
        columns.n += rows

    def _store(self, batch: ValueBatch) -> np.uint64:
        """Copy the batch's data into a segment; its position (segment number in the high half)."""
        size = batch.data_bytes
        if not self._segments or len(self._segments[-1]) - self._used < size:
            grown = min(max(2 * self.data_bytes, _SEGMENT_BYTES_MIN), _SEGMENT_BYTES_MAX)
            self._segments.append(np.empty(max(size, grown), np.uint8))
            self._used = 0
        position = np.uint64(len(self._segments) - 1 << 32 | self._used)
        if size:
            self._segments[-1][self._used : self._used + size] = np.frombuffer(batch.data, np.uint8)
        self._used += size
        self.data_bytes += size
        return position

    def freeze(self, end_lsn: int) -> None:
        """No more rows: the layer covers ``[start_lsn, end_lsn)``."""
        assert self.end_lsn is None and end_lsn > self.start_lsn
        self.end_lsn = end_lsn

    # -- reading

    def find(self, key_hi: U64Array, key_lo: U64Array, floor: U64Array, ceiling: U64Array) -> Hits:
        """Rows of the keys with ``floor <= lsn < ceiling`` (per key), in ingest order within a key."""
        columns = self._columns
        wanted = key_hash(key_hi, key_lo)
        if columns.n - self._indexed > _TAIL_ROWS_MAX or len(wanted) > _TAIL_KEYS_MAX:
            self._index_tail()
        owners: list[IndexArray] = []
        rows: list[IndexArray] = []
        for run_hash, run_row in self._runs:
            first = np.searchsorted(run_hash, wanted, "left")
            last = np.searchsorted(run_hash, wanted, "right")
            if not np.array_equal(first, last):
                owner, place = expand_ranges(first, last)
                owners.append(owner)
                rows.append(run_row[place])
        if columns.n > self._indexed:
            tail = columns.hash[self._indexed : columns.n]
            for number, value in enumerate(wanted):
                found = np.flatnonzero(tail == value)
                if len(found):
                    owners.append(np.full(len(found), number))
                    rows.append(found + self._indexed)
        if not rows:
            return Hits.none()
        owner, row = np.concatenate(owners), np.concatenate(rows)
        lsn = columns.lsn[row]
        keep = (lsn >= floor[owner]) & (lsn < ceiling[owner])
        keep &= (columns.key_lo[row] == key_lo[owner]) & (columns.key_hi[row] == key_hi[owner])
        owner, row, lsn = owner[keep], row[keep], lsn[keep]
        order = np.lexsort((row, lsn, owner))
        row = row[order]
        return Hits(owner[order], lsn[order], columns.kind[row], columns.position[row], columns.length[row])

    def scan(self, start: tuple[int, int], end: tuple[int, int], floor: int, ceiling: int) -> tuple[U64Array, U64Array]:
        """The distinct keys (unordered halves) with ``start <= key < end`` that have rows with ``floor <= lsn < ceiling``."""
        columns, n = self._columns, self._columns.n
        hi, lo = columns.key_hi[:n], columns.key_lo[:n]
        inside = (hi > start[0]) | ((hi == start[0]) & (lo >= start[1]))
        inside &= (hi < end[0]) | ((hi == end[0]) & (lo < end[1]))
        inside &= (columns.lsn[:n] >= floor) & (columns.lsn[:n] < ceiling)
        return hi[inside], lo[inside]

    async def fetch(self, position: U64Array, length: U32Array) -> list[bytes]:
        """The bytes of rows that ``find`` named."""
        segments = self._segments
        return [
            segments[place >> 32][(at := place & 0xFFFF_FFFF) : at + size].tobytes()
            for place, size in zip(position.tolist(), length.tolist(), strict=True)
        ]

    def sorted_rows(self) -> tuple[U64Array, U64Array, U64Array, U8Array, U64Array, U32Array]:
        """All rows as columns in (key, lsn, ingest) order: key_hi, key_lo, lsn, kind, position, length."""
        c, n = self._columns, self._columns.n
        order = np.lexsort((c.lsn[:n], c.key_lo[:n], c.key_hi[:n]))  # lexsort is stable: ingest order is the last criterion
        return c.key_hi[order], c.key_lo[order], c.lsn[order], c.kind[order], c.position[order], c.length[order]

    def slice_at(self, position: int, length: int) -> memoryview:
        """The bytes at a position that ``sorted_rows`` named."""
        at = position & 0xFFFF_FFFF
        return self._segments[position >> 32][at : at + length].data

    def _index_tail(self) -> None:
        columns = self._columns
        if columns.n == self._indexed:
            return
        tail = columns.hash[self._indexed : columns.n]
        order = np.argsort(tail, kind="stable")
        self._runs.append((tail[order], order + self._indexed))
        self._indexed = columns.n
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            (older_hash, older_row), (newer_hash, newer_row) = self._runs[-2:]
            merged_hash = np.concatenate((older_hash, newer_hash))
            order = np.argsort(merged_hash, kind="stable")  # two sorted runs: a merge
            self._runs[-2:] = [(merged_hash[order], np.concatenate((older_row, newer_row))[order])]

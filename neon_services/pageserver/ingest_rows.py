"""Collects the rows that one batch of WAL makes, to be handed to the timeline as one ValueBatch.

Invariant: rows keep the order in which they were put, which decides between values of one key at one LSN (a fresh zero page
comes before the record that changes it). The decoded records are the front of the batch's data, so a row of a record is
three numbers and no copy.
"""

import numpy as np

from neon_services.pageserver.keys import Halves
from neon_services.pageserver.native_records import ZERO_PAGE
from neon_services.pageserver.values import IMAGE, TOMBSTONE, U8Array, U32Array, U64Array, ValueBatch

_NO_U64: U64Array = np.empty(0, np.uint64)


class RowBuilder:
    """Rows in the order of ``put...`` calls."""

    def __init__(self, blob: bytes) -> None:
        self._data: list[bytes] = [blob]
        self._size = len(blob)
        self._columns: list[tuple[U64Array, U64Array, U64Array, U8Array, U64Array, U32Array]] = []
        self._small: list[tuple[int, int, int, int, int, int]] = []
        self._zero_page_at: int | None = None

    def __len__(self) -> int:
        return len(self._small) + sum(len(columns[0]) for columns in self._columns)

    def add_data(self, content: bytes) -> int:
        """Append bytes that rows will name; their offset."""
        offset = self._size
        self._data.append(content)
        self._size += len(content)
        return offset

    def put(self, key: Halves, lsn: int, kind: int, content: bytes) -> None:
        """One value."""
        self._small.append((key[0], key[1], lsn, kind, self.add_data(content), len(content)))

    def put_image(self, key: Halves, lsn: int, content: bytes) -> None:
        """One complete value."""
        self.put(key, lsn, IMAGE, content)

    def put_tombstone(self, key: Halves, lsn: int) -> None:
        """The key is gone from this LSN on."""
        self._small.append((key[0], key[1], lsn, TOMBSTONE, 0, 0))

    def put_columns(
        self, hi: U64Array, lo: U64Array, lsn: U64Array, kind: U8Array | int, offset: U64Array, length: U32Array | int
    ) -> None:
        """Many values."""
        self._flush_small()
        count = len(hi)
        kinds = np.full(count, kind, np.uint8) if isinstance(kind, int) else kind
        lengths = np.full(count, length, np.uint32) if isinstance(length, int) else length
        self._columns.append((hi, lo, lsn, kinds, offset, lengths))

    def put_zero_pages(self, hi: U64Array, lo: U64Array, lsn: U64Array) -> None:
        """Pages of zeros: all rows share one."""
        self.put_columns(hi, lo, lsn, IMAGE, np.full(len(hi), self._zero_page(), np.uint64), len(ZERO_PAGE))

    def put_zero_page(self, key: Halves, lsn: int) -> None:
        """One page of zeros."""
        self._small.append((key[0], key[1], lsn, IMAGE, self._zero_page(), len(ZERO_PAGE)))

    def _zero_page(self) -> int:
        if self._zero_page_at is None:
            self._zero_page_at = self.add_data(ZERO_PAGE)
        return self._zero_page_at

    def _flush_small(self) -> None:
        if not self._small:
            return
        hi, lo, lsn, kind, offset, length = zip(*self._small, strict=True)
        self._columns.append(
            (
                np.array(hi, np.uint64),
                np.array(lo, np.uint64),
                np.array(lsn, np.uint64),
                np.array(kind, np.uint8),
                np.array(offset, np.uint64),
                np.array(length, np.uint32),
            )
        )
        self._small = []

    def finish(self) -> ValueBatch:
        """All rows."""
        self._flush_small()
        if not self._columns:
            return ValueBatch(_NO_U64, _NO_U64, _NO_U64, np.empty(0, np.uint8), _NO_U64, np.empty(0, np.uint32), b"")
        hi, lo, lsn, kind, offset, length = (np.concatenate(column) for column in zip(*self._columns, strict=True))
        return ValueBatch(hi, lo, lsn, kind, offset, length, b"".join(self._data))

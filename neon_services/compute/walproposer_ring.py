"""The proposer's memory of recent WAL: a ring in which the byte of an LSN has one place.

Invariant: ``views(begin, end)`` gives exactly the bytes that were appended for that range, for any range within
``start..end``. The ring forgets only what its user allowed to be forgotten: whoever appends checks ``room`` first.
"""

import ctypes

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn, format_lsn


class WalRing:
    """A window of the WAL that ends at ``end``."""

    def __init__(self, size: int, start: Lsn) -> None:
        self._buffer = bytearray(size)
        self._view = memoryview(self._buffer)
        self._size = size
        self._first = start
        self.end: Lsn = start

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        return self._size

    @property
    def start(self) -> Lsn:
        """The oldest position that is still held."""
        return max(self._first, Lsn(self.end - self._size))

    @property
    def address(self) -> int:
        """Of the first byte of the memory, in which the byte of an LSN is at ``lsn % size``; until grow()."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))

    def extended_to(self, end: Lsn) -> None:
        """Somebody else has written the bytes up to this position, where append() would have put them."""
        self.end = end

    def append(self, data: memoryview) -> None:
        """Append bytes at ``end``, over the oldest ones when the ring is full."""
        length = len(data)
        if length > self._size:
            raise NeonError(f"{length} bytes of WAL at {format_lsn(self.end)} do not fit a ring of {self._size}")
        at = self.end % self._size
        room = self._size - at
        if length <= room:
            self._view[at : at + length] = data
        else:
            self._view[at:] = data[:room]
            self._view[: length - room] = data[room:]
        self.end = Lsn(self.end + length)

    def views(self, begin: Lsn, end: Lsn) -> tuple[memoryview, ...]:
        """One or two views of the bytes [begin, end). They change when the ring comes round: use or copy them at once."""
        if not self.start <= begin <= end <= self.end:
            held = f"{format_lsn(self.start)}..{format_lsn(self.end)}"
            raise NeonError(f"WAL {format_lsn(begin)}..{format_lsn(end)} is not in the ring, which holds {held}")
        at, length = begin % self._size, end - begin
        if at + length <= self._size:
            return (self._view[at : at + length],)
        return (self._view[at:], self._view[: at + length - self._size])

    def grow(self) -> None:
        """Double the capacity and keep everything: for a record that is larger than the ring."""
        held = [bytes(view) for view in self.views(self.start, self.end)]
        start = self.start
        self._size *= 2
        self._buffer = bytearray(self._size)
        self._view = memoryview(self._buffer)
        self._first = self.end = start
        for piece in held:
            self.append(memoryview(piece))

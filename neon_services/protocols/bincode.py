"""Neon's bincode: big-endian, fixed-width integers, described by layouts instead of derived code.

Byte layouts: an integer as many bytes as it is wide; ``bool`` u8; an option u8 (0 or 1) and the value; a list, bytes or text
u64 length and the items; a struct its fields one after another; an enum u32 variant and the variant's struct. A layout packs a
Python value and takes it back from a ``Cursor``; whatever does not fit raises ProtocolViolation on reading.
"""

import struct
from collections.abc import Callable
from typing import Any, Protocol

from neon_services.ground.errors import ProtocolViolation


class Cursor:
    """Reads one message from its front."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data = memoryview(data)
        self._what = what
        self._at = 0

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        end = self._at + count
        if end > len(self._data):
            raise ProtocolViolation(f"{self._what} is cut off: {count} bytes at {self._at} of {len(self._data)}")
        view = self._data[self._at : end]
        self._at = end
        return view

    def take_count(self, item_bytes: int) -> int:
        """A u64 number of items that take at least so many bytes each: never more than can follow."""
        count = int.from_bytes(self.take(8), "big")
        if count * item_bytes > len(self._data) - self._at:
            raise ProtocolViolation(f"{self._what} claims {count} items with {len(self._data) - self._at} bytes left")
        return count

    def fail(self, text: str) -> ProtocolViolation:
        """The error for a value that makes no sense."""
        return ProtocolViolation(f"{self._what}: {text} before byte {self._at}")

    def finish(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            raise ProtocolViolation(f"{self._what} has {len(self._data) - self._at} bytes too many")


class Layout(Protocol):
    """How one type is written. ``least`` is the smallest number of bytes that a value takes."""

    least: int

    def pack(self, value: Any, out: bytearray) -> None:
        """Append the value. A value of another type or out of range is the caller's mistake: struct.error, TypeError."""

    def take(self, cursor: Cursor) -> Any:
        """Read the value."""


class Fixed:
    """One integer; ``code`` is struct's."""

    def __init__(self, code: str) -> None:
        self._struct = struct.Struct(">" + code)
        self.least = self._struct.size

    def pack(self, value: int, out: bytearray) -> None:
        out += self._struct.pack(value)

    def take(self, cursor: Cursor) -> int:
        return self._struct.unpack(cursor.take(self.least))[0]


class Blob:
    """Bytes."""

    least = 8

    def pack(self, value: bytes, out: bytearray) -> None:
        out += len(value).to_bytes(8, "big")
        out += value

    def take(self, cursor: Cursor) -> bytes:
        return bytes(cursor.take(cursor.take_count(1)))


class Text:
    """A string in UTF-8."""

    least = 8

    def pack(self, value: str, out: bytearray) -> None:
        BLOB.pack(value.encode(), out)

    def take(self, cursor: Cursor) -> str:
        try:
            return BLOB.take(cursor).decode()
        except UnicodeDecodeError as error:
            raise cursor.fail(f"a text is not UTF-8 ({error.reason})") from error


class Option:
    """A value or None."""

    least = 1

    def __init__(self, item: Layout) -> None:
        self._item = item

    def pack(self, value: Any, out: bytearray) -> None:
        out.append(value is not None)
        if value is not None:
            self._item.pack(value, out)

    def take(self, cursor: Cursor) -> Any:
        (present,) = cursor.take(1)
        if present > 1:
            raise cursor.fail(f"an option begins with {present}")
        return self._item.take(cursor) if present else None


class List:
    """A tuple of values of one type."""

    least = 8

    def __init__(self, item: Layout) -> None:
        self._item = item

    def pack(self, value: tuple[Any, ...], out: bytearray) -> None:
        out += len(value).to_bytes(8, "big")
        for item in value:
            self._item.pack(item, out)

    def take(self, cursor: Cursor) -> tuple[Any, ...]:
        return tuple(self._item.take(cursor) for _ in range(cursor.take_count(self._item.least)))


class Struct:
    """A NamedTuple (or tuple), field by field; ``order`` says in which order the fields are written."""

    def __init__(self, make: Callable[..., Any], *fields: Layout, order: tuple[int, ...] | None = None) -> None:
        self._make = make
        self._fields = fields
        self._order = order or tuple(range(len(fields)))
        self.least = sum(field.least for field in fields)

    def pack(self, value: tuple[Any, ...], out: bytearray) -> None:
        for layout, place in zip(self._fields, self._order, strict=True):
            layout.pack(value[place], out)

    def take(self, cursor: Cursor) -> Any:
        values = [layout.take(cursor) for layout in self._fields]
        return self._make(*(values[self._order.index(place)] for place in range(len(values))))


class Enum:
    """One of several variants. ``variants`` are ``(type, layout)`` in the order of their numbers; None is a unit variant."""

    least = 4

    def __init__(self, name: str, *variants: tuple[type, Layout]) -> None:
        self._name = name
        self._variants = variants
        self._numbers = {made: number for number, (made, _) in enumerate(variants)}

    def pack(self, value: Any, out: bytearray) -> None:
        number = self._numbers[type(value)]
        out += number.to_bytes(4, "big")
        self._variants[number][1].pack(value, out)

    def take(self, cursor: Cursor) -> Any:
        number = int.from_bytes(cursor.take(4), "big")
        if number >= len(self._variants):
            raise cursor.fail(f"{self._name} has no variant {number}")
        return self._variants[number][1].take(cursor)


U8, U16, U32, U64, I32, I64 = Fixed("B"), Fixed("H"), Fixed("I"), Fixed("Q"), Fixed("i"), Fixed("q")
BLOB, TEXT = Blob(), Text()

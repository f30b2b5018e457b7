"""Values as columns: what ingest hands to a timeline and what layers keep.

Invariant: a value is stamped with the *end* LSN of the record that made it, so a read at LSN L sees exactly the rows with
``lsn <= L``. Rows of one key at one LSN keep the order in which they were ingested.

A key is Neon's compact 128-bit key ``(f1&0x7F)<<120 | (f2&0xFFFF)<<104 | f3<<72 | f4<<40 | f5<<32 | f6`` in two unsigned
64-bit halves. The column ``kind`` says how the bytes ``data[offset:offset+length]`` are read; several rows may name the same
bytes (a WAL record that touches several blocks), and layers keep such bytes once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neon_services.ground.errors import NeonError

U64Array = npt.NDArray[np.uint64]
U32Array = npt.NDArray[np.uint32]
U8Array = npt.NDArray[np.uint8]
IndexArray = npt.NDArray[np.int64]

#: A page or a metadata value: complete in itself.
IMAGE = 0
#: A Postgres WAL record as the redo helper takes it, ``[u64 LE end_lsn][raw record][pad to 8]``; needs a base page.
WAL = 1
#: The same, but needs no base: the record initialises the page or carries an image that is applied.
WAL_INIT = 2
#: A functional record (Neon's bincode-BE NeonWalRecord, tags 1-7) applied natively; needs a base page.
NATIVE = 3
#: The key does not exist from this LSN on.
TOMBSTONE = 4

KIND_NAMES = ("image", "wal", "wal_init", "native", "tombstone")
#: Kinds at which the search for a key's history ends.
IS_BASE = np.array([True, False, True, False, True])

KEY_MIN = 0
KEY_MAX = (1 << 128) - 1
SPARSE_FIELD1 = 0x60  # keys with field 1 from here to 0x7F may be absent without that being an error
NOT_INHERITED_FIELD1 = (0x62, 0x63)  # aux files and replication origins: a branch starts without its ancestor's

_HALF = 0xFFFF_FFFF_FFFF_FFFF


class MissingKey(NeonError):
    """There is no value of this key at this LSN. An item of a vectored read's answer; raised by single reads."""

    def __init__(self, key_hi: int, key_lo: int, lsn: int, detail: str = "") -> None:
        super().__init__(f"no value of key {format_key(key_hi << 64 | key_lo)} at {lsn >> 32:X}/{lsn & 0xFFFF_FFFF:X}{detail}")
        self.key = key_hi << 64 | key_lo
        self.lsn = lsn


def split_key(key: int) -> tuple[int, int]:
    """The two halves (hi, lo) of a compact key."""
    return key >> 64, key & _HALF


def format_key(key: int) -> str:
    """Neon's 36 hex digits of a compact key: field1 u8, field2 u32, field3 u32, field4 u32, field5 u8, field6 u32."""
    if key >= 1 << 127:
        return "F" * 36
    field2 = key >> 104 & 0xFFFF
    if field2 == 0xFFFF:
        field2 = 0xFFFF_FFFF  # the reserved maximum; Neon's reader accepts 16 bits or this
    return (
        f"{key >> 120 & 0x7F:02X}{field2:08X}{key >> 72 & 0xFFFF_FFFF:08X}{key >> 40 & 0xFFFF_FFFF:08X}"
        f"{key >> 32 & 0xFF:02X}{key & 0xFFFF_FFFF:08X}"
    )


def parse_key(text: str) -> int:
    """Read 36 hex digits. Raises ValueError that quotes the text. All F is KEY_MAX."""
    if len(text) != 36 or set(text) - set("0123456789ABCDEFabcdef"):
        raise ValueError(f"not a key: {text!r} (expected 36 hexadecimal digits)")
    if text.upper() == "F" * 36:
        return KEY_MAX
    field1, field2 = int(text[:2], 16), int(text[2:10], 16)
    if field1 > 0x7F or (field2 > 0xFFFF and field2 != 0xFFFF_FFFF):
        raise ValueError(f"key {text!r} does not fit the compact form")
    rest = int(text[10:18], 16) << 72 | int(text[18:26], 16) << 40 | int(text[26:28], 16) << 32 | int(text[28:], 16)
    return field1 << 120 | (field2 & 0xFFFF) << 104 | rest


@dataclass(slots=True)
class ValueBatch:
    """Rows of values in columns of equal length, in LSN order as far as the producer can (any order is accepted)."""

    key_hi: U64Array
    key_lo: U64Array
    lsn: U64Array
    kind: U8Array
    offset: U64Array
    length: U32Array
    data: bytes | bytearray | memoryview | U8Array

    def __len__(self) -> int:
        return len(self.lsn)

    @property
    def data_bytes(self) -> int:
        """The size of ``data``, shared rows counted once."""
        return len(self.data)

    def check(self) -> None:
        """Raise ValueError when columns differ in length, a kind is unknown or a slice leaves ``data``."""
        n = len(self.lsn)
        for name in ("key_hi", "key_lo", "kind", "offset", "length"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"value batch: column {name} has {len(getattr(self, name))} rows, lsn has {n}")
        if n:
            if int(self.kind.max()) >= len(KIND_NAMES):
                raise ValueError(f"value batch: unknown value kind {int(self.kind.max())}")
            end = int((self.offset.astype(np.uint64) + self.length).max())
            if end > len(self.data):
                raise ValueError(f"value batch: a value ends at {end}, the data has {len(self.data)} bytes")

    @classmethod
    def build(cls, rows: Iterable[tuple[int, int, int, int, bytes]]) -> "ValueBatch":
        """A batch of ``(key_hi, key_lo, lsn, kind, bytes)`` rows; for small batches, not for the WAL path."""
        items = list(rows)
        length = np.array([len(item[4]) for item in items], np.uint32)
        offset = np.zeros(len(items), np.uint64)
        np.cumsum(length[:-1], out=offset[1:])
        return cls(
            np.array([item[0] for item in items], np.uint64),
            np.array([item[1] for item in items], np.uint64),
            np.array([item[2] for item in items], np.uint64),
            np.array([item[3] for item in items], np.uint8),
            offset,
            length,
            b"".join(item[4] for item in items),
        )


def key_hash(key_hi: U64Array, key_lo: U64Array) -> U64Array:
    """A 64-bit mix of each key, by which in-memory indexes are sorted. Different keys may have one hash."""
    mixed = key_lo * np.uint64(0x9E37_79B9_7F4A_7C15)
    mixed ^= key_hi * np.uint64(0xC2B2_AE3D_27D4_EB4F)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58_476D_1CE4_E5B9)
    return mixed


def expand_ranges(first: IndexArray, last: IndexArray) -> tuple[IndexArray, IndexArray]:
    """All integers of the half-open ranges ``[first[i], last[i])``, with the number ``i`` of the range each is from."""
    counts = last - first
    owner = np.repeat(np.arange(len(first)), counts)
    starts = np.repeat(first - (np.cumsum(counts) - counts), counts)
    return owner, starts + np.arange(len(owner))


def unique_keys(key_hi: U64Array, key_lo: U64Array) -> tuple[U64Array, U64Array]:
    """The distinct keys, sorted."""
    order = np.lexsort((key_lo, key_hi))
    hi, lo = key_hi[order], key_lo[order]
    first = np.ones(len(hi), bool)
    first[1:] = (hi[1:] != hi[:-1]) | (lo[1:] != lo[:-1])
    return hi[first], lo[first]

"""The payload of a message of interpreted WAL, from columns: byte for byte what protocols/interpreted_wal.py writes.

All sizes are computed first, then every field is scattered to its place with one numpy call for all records, so that a record
costs a microsecond or two; only the bytes of values and metadata are copied one by one.
"""

from collections.abc import Callable

import numpy as np

from neon_services.protocols.interpreted_options import PROTOBUF
from neon_services.protocols.interpreted_wal import compress
from neon_services.protocols.page_keys import PAGE_SIZE, U64Array
from neon_services.protocols.sharding import ShardIdentity
from neon_services.wal.interpret import I64Array, InterpretedBatch
from neon_services.wal.interpreted_selection import IMAGE_HEADER_BYTES, RECORD_HEADER_BYTES, Selection, select

_VARINT_LIMITS = np.array([1 << 7 * width for width in range(1, 10)], np.uint64)
_SEVEN_BITS, _SEVEN = np.uint8(0x7F), np.uint64(7)
_PLACES = np.arange(17)
_IMAGE_HEADER = np.frombuffer(bytes(4) + PAGE_SIZE.to_bytes(8, "big"), np.uint8)
_RECORD_HEADER = np.dtype([("kind", ">u4"), ("variant", ">u4"), ("will_init", "u1"), ("length", ">u8")])
# where metadata and values go: (buffer, places of the metadata records, place of each record's first value)
_Laid = tuple[np.ndarray, I64Array, I64Array]


def encode_batch(
    batch: InterpretedBatch, shard: ShardIdentity, payload_format: str, zstd_level: int | None
) -> bytes | memoryview:
    """The payload that a shard gets of a batch."""
    selection = select(batch, shard)
    lay: Callable[[Selection, int, int], _Laid] = _lay_protobuf if payload_format == PROTOBUF else _lay_bincode
    out, metadata_at, raw_at = lay(selection, batch.next_lsn, batch.start_lsn)
    _fill_metadata(selection, out, metadata_at)
    _fill_values(selection, out, raw_at)
    return out.data if zstd_level is None else compress(out.data, zstd_level)


def _fill_metadata(selection: Selection, out: np.ndarray, places: I64Array) -> None:
    target, source = out.data, memoryview(selection.data)
    present = selection.metadata_bytes >= 0
    columns = (places[present], selection.metadata[present], selection.metadata_bytes[present])
    for place, start, length in zip(*(column.tolist() for column in columns), strict=True):
        target[place : place + length] = source[start : start + length]


def _fill_values(selection: Selection, out: np.ndarray, raw_at: I64Array) -> None:
    rows = np.flatnonzero(selection.has_bytes)
    places = raw_at[selection.record[rows]] + selection.raw_offset[rows]
    is_image = selection.is_image[rows]
    header_bytes = np.where(is_image, IMAGE_HEADER_BYTES, RECORD_HEADER_BYTES)
    bodies = selection.value_bytes[rows] - header_bytes
    out[places[is_image, None] + _PLACES[:IMAGE_HEADER_BYTES]] = _IMAGE_HEADER
    headers = np.zeros(int((~is_image).sum()), _RECORD_HEADER)
    headers["kind"], headers["will_init"], headers["length"] = 1, selection.will_init[rows][~is_image], bodies[~is_image]
    out[places[~is_image, None] + _PLACES] = headers.view(np.uint8).reshape(-1, RECORD_HEADER_BYTES)
    target, source = out.data, memoryview(selection.data)
    columns = (places + header_bytes, selection.body[rows], bodies)
    for place, start, length in zip(*(column.tolist() for column in columns), strict=True):
        target[place : place + length] = source[start : start + length]


def _within_records(selection: Selection, entry_bytes: I64Array) -> tuple[I64Array, I64Array]:
    """Bytes of the entries of each record, and where in them each entry begins."""
    total = np.bincount(selection.record, entry_bytes, len(selection.end_lsn)).astype(np.int64)
    before = np.cumsum(entry_bytes) - entry_bytes
    return total, before - (np.cumsum(total) - total)[selection.record]


# --- protobuf -------------------------------------------------------------------------------------------------------


class _Varints:
    """A column of numbers and the bytes that each takes; with ``present`` only some are written, with their tag."""

    def __init__(self, values: np.ndarray, tag: int, present: np.ndarray | None = None) -> None:
        self.values: U64Array = values.astype(np.uint64)
        self._tag = tag
        self._present = present
        width = np.searchsorted(_VARINT_LIMITS, self.values, "right") + 1
        self._width: I64Array = width
        self.size: I64Array = width + 1 if present is None else np.where(present, width + 1, 0)

    def write(self, out: "_Scattered", places: I64Array) -> I64Array:
        """Write tag and number; the places behind."""
        present = slice(None) if self._present is None else self._present
        out.add(places[present], self.values[present], self._width[present], self._tag)
        return places + self.size


class _Scattered:
    """All numbers of a message on their way to their places: written at once, as each call of numpy has its price."""

    def __init__(self) -> None:
        self._columns: list[tuple[I64Array, U64Array, I64Array]] = []
        self._tags: list[int] = []

    def add(self, places: I64Array, values: U64Array, width: I64Array, tag: int) -> None:
        self._columns.append((places, values, width))
        self._tags.append(tag)

    def write(self, out: np.ndarray) -> None:
        """Byte by byte of all numbers, least significant first; each but the last of a number says that more follow."""
        at, values, width = (np.concatenate(column) for column in zip(*self._columns, strict=True))
        out[at] = np.repeat(np.array(self._tags, np.uint8), [len(places) for places, _, _ in self._columns])
        at = at + 1
        while len(at):
            part = values.astype(np.uint8)  # the low 8 bits
            longer = width > 1
            part &= _SEVEN_BITS
            part |= longer.astype(np.uint8) << np.uint8(7)
            out[at] = part
            at, values, width = at[longer] + 1, values[longer] >> _SEVEN, width[longer] - 1


def _put_bytes(out: np.ndarray, places: I64Array, tag: int, value: np.ndarray | int) -> None:
    out[places] = tag
    out[places + 1] = value


def _lay_protobuf(selection: Selection, next_lsn: int, start_lsn: int) -> _Laid:
    has_bytes, lsn = selection.has_bytes, selection.end_lsn[selection.record]
    high = _Varints(selection.hi, 0x08, selection.hi > 0)
    low = _Varints(selection.lo, 0x10, selection.lo > 0)
    value_lsn = _Varints(lsn, 0x18)
    offset = _Varints(selection.raw_offset, 0x20, has_bytes)
    length = _Varints(selection.value_bytes, 0x28, has_bytes)
    key_bytes = high.size + low.size
    # an observed entry begins with its type, a value ends with will_init: two bytes either way; never more than 127
    inner = 2 + 2 + key_bytes + value_lsn.size + offset.size + length.size
    entries, entry_at = _within_records(selection, inner + 2)

    has_values = selection.value_count > 0
    raw = _Varints(selection.raw_bytes, 0x0A, has_values)
    max_lsn = _Varints(selection.end_lsn, 0x18, has_values)
    count = _Varints(selection.value_count, 0x20, has_values)
    batch = _Varints(raw.size + selection.raw_bytes + entries + max_lsn.size + count.size, 0x12)
    has_metadata = selection.metadata_bytes >= 0
    metadata = _Varints(np.maximum(selection.metadata_bytes, 0), 0x0A, has_metadata)
    next_record = _Varints(selection.end_lsn, 0x18)
    xid = _Varints(selection.xid, 0x28, selection.xid > 0)
    flush = 2 * selection.flush_uncommitted.astype(np.int64)
    body = metadata.size + metadata.values.astype(np.int64) + batch.size + batch.values.astype(np.int64)
    record = _Varints(body + next_record.size + flush + xid.size, 0x0A)

    ends = np.cumsum(record.size + record.values.astype(np.int64))
    last = _Varints(np.array([next_lsn]), 0x10), _Varints(np.array([start_lsn]), 0x18)
    total = int(ends[-1]) if len(ends) else 0
    out = np.zeros(total + int(last[0].size[0] + last[1].size[0]), np.uint8)
    numbers = _Scattered()
    last[1].write(numbers, last[0].write(numbers, np.array([total])))

    metadata_at = metadata.write(numbers, record.write(numbers, ends - record.size - record.values.astype(np.int64)))
    raw_at = raw.write(numbers, batch.write(numbers, metadata_at + metadata.values.astype(np.int64)))
    places = raw_at + selection.raw_bytes
    entry_at += places[selection.record]
    places = next_record.write(numbers, count.write(numbers, max_lsn.write(numbers, places + entries)))
    _put_bytes(out, places[selection.flush_uncommitted], 0x20, 1)
    xid.write(numbers, places + flush)

    _put_bytes(out, entry_at, 0x12, inner)
    entry_at += 2
    _put_bytes(out, entry_at[~has_bytes], 0x08, 1)
    entry_at[~has_bytes] += 2
    _put_bytes(out, entry_at, 0x12, key_bytes)
    places = value_lsn.write(numbers, low.write(numbers, high.write(numbers, entry_at + 2)))
    places = length.write(numbers, offset.write(numbers, places))
    _put_bytes(out, places[has_bytes], 0x30, selection.will_init[has_bytes])
    numbers.write(out)
    return out, metadata_at, raw_at


# --- bincode --------------------------------------------------------------------------------------------------------

_VALUE = np.dtype(
    [("type", ">u4"), ("hi", ">u8"), ("lo", ">u8"), ("lsn", ">u8"), ("offset", ">u8"), ("length", ">u8"), ("will_init", "u1")]
)
_VALUE_BYTES, _OBSERVED_BYTES = _VALUE.itemsize, 28
_RECORD_END = np.dtype([("max_lsn", ">u8"), ("count", ">u8"), ("next", ">u8"), ("flush", ">u4"), ("xid", ">u4")])


def _scatter(out: np.ndarray, places: I64Array, made: np.ndarray, width: int) -> None:
    out[places[:, None] + np.arange(width)] = made.view(np.uint8).reshape(len(made), made.itemsize)[:, :width]


def _lay_bincode(selection: Selection, next_lsn: int, start_lsn: int) -> _Laid:
    has_bytes = selection.has_bytes
    entry_bytes = np.where(has_bytes, _VALUE_BYTES, _OBSERVED_BYTES)
    entries, entry_at = _within_records(selection, entry_bytes)
    has_metadata = selection.metadata_bytes >= 0
    metadata_bytes = np.maximum(selection.metadata_bytes, 0)
    sizes = 1 + metadata_bytes + 8 + selection.raw_bytes + 8 + entries + _RECORD_END.itemsize
    ends = 8 + np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 8
    last = next_lsn.to_bytes(8, "big") + b"\1" + start_lsn.to_bytes(8, "big")
    out = np.zeros(total + len(last), np.uint8)
    out[:8] = np.frombuffer(len(ends).to_bytes(8, "big"), np.uint8)
    out[total:] = np.frombuffer(last, np.uint8)

    places = ends - sizes
    out[places] = has_metadata
    metadata_at = places + 1
    places = metadata_at + metadata_bytes
    _scatter(out, places, selection.raw_bytes.astype(">u8"), 8)
    raw_at = places + 8
    places = raw_at + selection.raw_bytes
    entry_count = np.bincount(selection.record, minlength=len(ends))
    _scatter(out, places, entry_count.astype(">u8"), 8)
    entry_at += (places + 8)[selection.record]
    made = np.zeros(len(ends), _RECORD_END)
    made["max_lsn"] = np.where(selection.value_count > 0, selection.end_lsn, np.uint64(0))
    made["count"], made["next"], made["xid"] = selection.value_count, selection.end_lsn, selection.xid
    made["flush"] = ~selection.flush_uncommitted  # Yes is 0
    _scatter(out, places + 8 + entries, made, _RECORD_END.itemsize)

    values = np.zeros(len(has_bytes), _VALUE)
    values["type"], values["hi"], values["lo"] = ~has_bytes, selection.hi, selection.lo
    values["lsn"], values["offset"] = selection.end_lsn[selection.record], selection.raw_offset
    values["length"], values["will_init"] = selection.value_bytes, selection.will_init
    _scatter(out, entry_at[has_bytes], values[has_bytes], _VALUE_BYTES)
    _scatter(out, entry_at[~has_bytes], values[~has_bytes], _OBSERVED_BYTES)
    return out, metadata_at, raw_at

"""Interpreted WAL: what WAL records do to keys, as a safekeeper sends it to one shard of a pageserver.

A message of records says which WAL it was made from: all of it from ``raw_wal_start_lsn`` up to ``next_record_lsn``, also when
nothing in it is for this shard. A value's bytes are Neon's bincode ``Value``: u32 0, u64 length, page image; or u32 1, u32 0,
u8 will_init, u64 length, Postgres WAL record. An *observed* value has no bytes: its page lives on another shard.

Payloads are bincode (see bincode.py; a key is its 16 bytes) or protobuf (package ``interpreted_wal``, described at run time),
with zstd around either. This module is the whole format, object by object, both ways; wal/interpreted_encoding.py writes the
same bytes from columns.
"""

from dataclasses import dataclass
from typing import Any

import zstandard
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from neon_services.ground.errors import ProtocolViolation
from neon_services.protocols.bincode import BLOB, U32, U64, Cursor, Option
from neon_services.protocols.interpreted_metadata import MetadataRecord, pack_metadata, parse_metadata, take_metadata
from neon_services.protocols.interpreted_options import BINCODE, PROTOBUF

PAYLOAD_BYTES_MAX = 1 << 31  #: a decompressed payload; WAL records have up to 1 GiB
_PACKAGE = "interpreted_wal"
_ZSTD_BITE = 1 << 14  # compressed bytes at once, so that a bomb is seen before it has all gone off
_SERIALIZED, _OBSERVED = 0, 1
_FLUSH_YES, _FLUSH_NO = 0, 1
_OPTIONAL_U64 = Option(U64)
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class InterpretedValue:
    """A key that a record changes: ``data`` is the value, None when it is only observed. ``key`` has 128 bits."""

    key: int
    lsn: int
    data: bytes | None
    will_init: bool = False


@dataclass(frozen=True, slots=True)
class InterpretedRecord:
    """One WAL record. ``flush_uncommitted``: it reads what records before it wrote."""

    next_record_lsn: int
    xid: int
    values: tuple[InterpretedValue, ...] = ()
    metadata: MetadataRecord | None = None
    flush_uncommitted: bool = False

    @property
    def max_lsn(self) -> int:
        """The highest LSN of a value that has bytes; 0 without one."""
        return max((value.lsn for value in self.values if value.data is not None), default=0)


@dataclass(frozen=True, slots=True)
class InterpretedRecords:
    """The payload of one message."""

    records: tuple[InterpretedRecord, ...]
    next_record_lsn: int
    raw_wal_start_lsn: int | None


_FIELDS: dict[str, tuple[tuple[int, str, str, str], ...]] = {
    "CompactKey": ((1, "high", "UINT64", ""), (2, "low", "UINT64", "")),
    "ValueMeta": (
        (1, "type", "ValueMetaType", ""),
        (2, "key", "CompactKey", ""),
        (3, "lsn", "UINT64", ""),
        (4, "batch_offset", "UINT64", "optional"),
        (5, "len", "UINT64", "optional"),
        (6, "will_init", "BOOL", "optional"),
    ),
    "SerializedValueBatch": (
        (1, "raw", "BYTES", ""),
        (2, "metadata", "ValueMeta", "repeated"),
        (3, "max_lsn", "UINT64", ""),
        (4, "len", "UINT64", ""),
    ),
    "InterpretedWalRecord": (
        (1, "metadata_record", "BYTES", "optional"),
        (2, "batch", "SerializedValueBatch", ""),
        (3, "next_record_lsn", "UINT64", ""),
        (4, "flush_uncommitted", "BOOL", ""),
        (5, "xid", "UINT32", ""),
    ),
    "InterpretedWalRecords": (
        (1, "records", "InterpretedWalRecord", "repeated"),
        (2, "next_record_lsn", "UINT64", "optional"),
        (3, "raw_wal_start_lsn", "UINT64", "optional"),
    ),
}


def _make_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="interpreted_wal.proto", package=_PACKAGE, syntax="proto3")
    enum = file.enum_type.add(name="ValueMetaType")
    enum.value.add(name="Serialized", number=_SERIALIZED)
    enum.value.add(name="Observed", number=_OBSERVED)
    for message_name, fields in _FIELDS.items():
        message = file.message_type.add(name=message_name)
        for number, name, kind, modifier in fields:
            field = message.field.add(name=name, number=number, json_name=name)
            field.label = field.LABEL_REPEATED if modifier == "repeated" else field.LABEL_OPTIONAL
            if kind.isupper():
                field.type = getattr(field, f"TYPE_{kind}")
            else:
                field.type = field.TYPE_ENUM if kind == "ValueMetaType" else field.TYPE_MESSAGE
                field.type_name = f".{_PACKAGE}.{kind}"
            if modifier == "optional":
                field.oneof_index = len(message.oneof_decl)
                field.proto3_optional = True
                message.oneof_decl.add(name=f"_{name}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.InterpretedWalRecords"))


_Records = _make_class()


def encode(records: InterpretedRecords, payload_format: str, zstd_level: int | None = None) -> bytes:
    """The payload of a message."""
    payload = _to_protobuf(records) if payload_format == PROTOBUF else _to_bincode(records)
    return payload if zstd_level is None else compress(payload, zstd_level)


def compress(payload: bytes | memoryview, zstd_level: int) -> bytes:
    """A zstd frame; level 0 is zstd's own default."""
    return zstandard.ZstdCompressor(level=zstd_level or 3).compress(payload)


def decode(payload: bytes, payload_format: str, *, compressed: bool) -> InterpretedRecords:
    """Read the payload of a message. Raises ProtocolViolation."""
    if compressed:
        payload = _decompress(payload)
    if payload_format not in (PROTOBUF, BINCODE):
        raise ValueError(f"no such format of interpreted WAL: {payload_format!r}")
    return _from_protobuf(payload) if payload_format == PROTOBUF else _from_bincode(payload)


def _decompress(payload: bytes) -> bytes:
    reader = zstandard.ZstdDecompressor().decompressobj()
    parts, size = [], 0
    try:
        for at in range(0, len(payload), _ZSTD_BITE):
            if reader.eof:
                raise ProtocolViolation("interpreted WAL goes on after its zstd frame")
            parts.append(reader.decompress(payload[at : at + _ZSTD_BITE]))
            size += len(parts[-1])
            if size > PAYLOAD_BYTES_MAX:
                raise ProtocolViolation(f"interpreted WAL of more than {PAYLOAD_BYTES_MAX} bytes")
    except zstandard.ZstdError as error:
        raise ProtocolViolation(f"interpreted WAL is not a zstd frame: {error}") from error
    if not reader.eof or reader.unused_data:
        raise ProtocolViolation("interpreted WAL is not one whole zstd frame")
    return b"".join(parts)


# --- protobuf -------------------------------------------------------------------------------------------------------


def _to_protobuf(records: InterpretedRecords) -> bytes:
    message = _Records(next_record_lsn=records.next_record_lsn, raw_wal_start_lsn=records.raw_wal_start_lsn)
    for record in records.records:
        made = message.records.add(
            next_record_lsn=record.next_record_lsn, flush_uncommitted=record.flush_uncommitted, xid=record.xid
        )
        if record.metadata is not None:
            made.metadata_record = pack_metadata(record.metadata)
        batch = made.batch
        batch.SetInParent()
        raw = bytearray()
        for value in record.values:
            meta = batch.metadata.add(lsn=value.lsn)
            meta.key.high, meta.key.low = value.key >> 64, value.key & _MASK64
            meta.key.SetInParent()
            if value.data is None:
                meta.type = _OBSERVED
            else:
                meta.batch_offset, meta.len, meta.will_init = len(raw), len(value.data), value.will_init
                raw += value.data
                batch.len += 1
        batch.raw = bytes(raw)
        batch.max_lsn = record.max_lsn
    return message.SerializeToString()


def _from_protobuf(payload: bytes) -> InterpretedRecords:
    try:
        message = _Records.FromString(payload)
    except DecodeError as error:
        raise ProtocolViolation(f"interpreted WAL is not protobuf: {error}") from error
    if not message.HasField("next_record_lsn"):
        raise ProtocolViolation("interpreted WAL: next_record_lsn is missing")
    start = message.raw_wal_start_lsn if message.HasField("raw_wal_start_lsn") else None
    return InterpretedRecords(tuple(map(_record_from_protobuf, message.records)), message.next_record_lsn, start)


def _record_from_protobuf(record: Any) -> InterpretedRecord:
    if not record.HasField("batch"):
        raise ProtocolViolation("interpreted WAL: a record has no batch")
    values = []
    for meta in record.batch.metadata:
        if not meta.HasField("key"):
            raise ProtocolViolation("interpreted WAL: a value has no key")
        key = meta.key.high << 64 | meta.key.low
        if meta.type == _OBSERVED:
            values.append(InterpretedValue(key, meta.lsn, None))
        elif meta.type == _SERIALIZED:
            for name in ("batch_offset", "len", "will_init"):
                if not meta.HasField(name):
                    raise ProtocolViolation(f"interpreted WAL: a value has no {name}")
            data = _slice(record.batch.raw, meta.batch_offset, meta.len)
            values.append(InterpretedValue(key, meta.lsn, data, meta.will_init))
        else:
            raise ProtocolViolation(f"interpreted WAL: there is no type {meta.type} of values")
    metadata = parse_metadata(record.metadata_record) if record.HasField("metadata_record") else None
    made = InterpretedRecord(record.next_record_lsn, record.xid, tuple(values), metadata, record.flush_uncommitted)
    _check_totals(made, record.batch.max_lsn, record.batch.len)
    return made


def _slice(raw: bytes, offset: int, length: int) -> bytes:
    if offset + length > len(raw):
        raise ProtocolViolation(f"interpreted WAL: a value is at {offset}+{length} of {len(raw)} bytes")
    return raw[offset : offset + length]


def _check_totals(record: InterpretedRecord, max_lsn: int, count: int) -> None:
    with_bytes = sum(value.data is not None for value in record.values)
    if max_lsn != record.max_lsn or count != with_bytes:
        raise ProtocolViolation(
            f"interpreted WAL: a batch of {with_bytes} values up to LSN {record.max_lsn} claims {count} up to {max_lsn}"
        )


# --- bincode --------------------------------------------------------------------------------------------------------


def _to_bincode(records: InterpretedRecords) -> bytes:
    out = bytearray(len(records.records).to_bytes(8, "big"))
    for record in records.records:
        out.append(record.metadata is not None)
        if record.metadata is not None:
            out += pack_metadata(record.metadata)
        BLOB.pack(b"".join(value.data for value in record.values if value.data is not None), out)
        out += len(record.values).to_bytes(8, "big")
        offset = count = 0
        for value in record.values:
            out += (_SERIALIZED if value.data is not None else _OBSERVED).to_bytes(4, "big")
            out += value.key.to_bytes(16, "big")
            U64.pack(value.lsn, out)
            if value.data is not None:
                U64.pack(offset, out)
                U64.pack(len(value.data), out)
                out.append(value.will_init)
                offset += len(value.data)
                count += 1
        U64.pack(record.max_lsn, out)
        U64.pack(count, out)
        U64.pack(record.next_record_lsn, out)
        U32.pack(_FLUSH_YES if record.flush_uncommitted else _FLUSH_NO, out)
        U32.pack(record.xid, out)
    U64.pack(records.next_record_lsn, out)
    _OPTIONAL_U64.pack(records.raw_wal_start_lsn, out)
    return bytes(out)


def _from_bincode(payload: bytes) -> InterpretedRecords:
    cursor = Cursor(payload, "interpreted WAL")
    records = tuple(_record_from_bincode(cursor) for _ in range(cursor.take_count(49)))
    made = InterpretedRecords(records, U64.take(cursor), _OPTIONAL_U64.take(cursor))
    cursor.finish()
    return made


def _flag(cursor: Cursor, what: str) -> bool:
    (byte,) = cursor.take(1)
    if byte > 1:
        raise cursor.fail(f"{what} is {byte}")
    return bool(byte)


def _record_from_bincode(cursor: Cursor) -> InterpretedRecord:
    metadata = take_metadata(cursor) if _flag(cursor, "the option of a metadata record") else None
    raw = BLOB.take(cursor)
    values = tuple(_value_from_bincode(cursor, raw) for _ in range(cursor.take_count(28)))
    max_lsn, count, next_record_lsn = (U64.take(cursor) for _ in range(3))
    flush = U32.take(cursor)
    if flush not in (_FLUSH_YES, _FLUSH_NO):
        raise cursor.fail(f"flush_uncommitted has no variant {flush}")
    record = InterpretedRecord(next_record_lsn, U32.take(cursor), values, metadata, flush == _FLUSH_YES)
    _check_totals(record, max_lsn, count)
    return record


def _value_from_bincode(cursor: Cursor, raw: bytes) -> InterpretedValue:
    kind = U32.take(cursor)
    key, lsn = int.from_bytes(cursor.take(16), "big"), U64.take(cursor)
    if kind == _OBSERVED:
        return InterpretedValue(key, lsn, None)
    if kind != _SERIALIZED:
        raise cursor.fail(f"there is no type {kind} of values")
    offset, length = U64.take(cursor), U64.take(cursor)
    return InterpretedValue(key, lsn, _slice(raw, offset, length), _flag(cursor, "will_init"))

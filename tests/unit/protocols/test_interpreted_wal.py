"""Interpreted WAL on the wire: known bytes, both formats there and back, cut off and damaged payloads, options."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import zstandard

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.lsn import Lsn
from neon_services.protocols import interpreted_metadata as md
from neon_services.protocols import interpreted_wal
from neon_services.protocols.interpreted_options import (
    BINCODE,
    PROTOBUF,
    BadProtocolOption,
    InterpretedProtocol,
    format_protocol,
    parse_protocol_options,
)
from neon_services.protocols.interpreted_wal import InterpretedRecord, InterpretedRecords, InterpretedValue, decode, encode
from neon_services.protocols.page_keys import RelTag, relation_block
from neon_services.protocols.replication_stream import (
    InterpretedWal,
    Keepalive,
    XLogData,
    parse_interpreted_message,
    parse_sender_message,
)
from neon_services.protocols.sharding import ShardIdentity, hash_combine, murmurhash32

TAG = RelTag(1663, 5, 16384, 0)
VM = RelTag(1663, 5, 16384, 2)
HIGH, LOW = relation_block(TAG, 7)
KEY = HIGH << 64 | LOW
END = (11, 0x20, -7, 0x55, 5, 1663, (12, 13), ((1663, 5, 16390),), 0x7000, 3, 14, 0x1000028)
METADATA: list[Any] = [
    md.ClearVmBits(7, None, VM, 3),
    md.ClearVmBits(None, 0xFFFF_FFFF, VM, 2),
    md.NeonClearVmBits(1, 2, VM, 3),
    md.SmgrCreate(TAG),
    md.SmgrTruncate(9, 1663, 5, 16384, 7),
    md.DatabaseCreate(16400, 1663, 1, 1664),
    md.DatabaseDrop(16400, (1663, 1664)),
    md.DatabaseDrop(16400, ()),
    md.ClogZeroPage(1, 31),
    md.ClogTruncate(33, 740, 1),
    md.Commit(*END),
    md.Abort(*END),
    md.CommitPrepared(*END),
    md.AbortPrepared(*END),
    md.Prepare(15, b"state"),
    md.MultiXactZeroPage(md.MEMBERS_KIND, 0, 2),
    md.MultiXactCreate(4, 9, 2, ((700, 1), (701, 5))),
    md.MultiXactTruncate(1, 2, 3, 4, 5),
    md.RelmapUpdate(5, 1663, 512, bytes(512)),
    md.XlogRaw(0x10, 0x1000028, bytes(range(88))),
    md.LogicalMessagePut("pg_logical/snapshots/ä", b""),
    md.RunningXacts(730),
    md.ReploriginSet(1 << 63, 65535),
    md.ReploriginDrop(1),
]
FORMATS = [(payload_format, level) for payload_format in (PROTOBUF, BINCODE) for level in (None, 1, 0)]


def example() -> InterpretedRecords:
    serialized = InterpretedValue(KEY, 0x1000028, b"value bytes", True)
    observed = InterpretedValue(KEY + 1, 0x1000028, None)
    records = [
        InterpretedRecord(0x1000028, 0),
        InterpretedRecord(0x1000060, 700, (serialized, observed, dataclasses.replace(serialized, key=0, will_init=False))),
        InterpretedRecord(0x1000090, 0xFFFF_FFFF, (observed,), md.RunningXacts(3), True),
        *(InterpretedRecord(0x1000100, 1, (), record) for record in METADATA),
    ]
    return InterpretedRecords(tuple(records), 0x1000200, 0x1000000)


def types_of(records: InterpretedRecords) -> list[type]:
    return [type(record.metadata) for record in records.records]


@pytest.mark.parametrize(("payload_format", "level"), FORMATS)
def test_there_and_back(payload_format: str, level: int | None) -> None:
    for records in (example(), InterpretedRecords((), 0x1000200, 0x1000000), InterpretedRecords((), 5, None)):
        payload = encode(records, payload_format, level)
        back = decode(payload, payload_format, compressed=level is not None)
        assert back == records
        assert types_of(back) == types_of(records)


def test_known_protobuf() -> None:
    """Field by field as the proto file of the format says; a proto3 default is left out, an optional 0 is not."""
    values = (InterpretedValue(2 << 64 | 5, 0x28, b"abc"), InterpretedValue(1, 0x28, None))
    records = InterpretedRecords((InterpretedRecord(0x28, 3, values),), 0x30, 0)
    serialized = "120e1204 0802 10051828200028033000"
    observed = "120808011202 10011828"
    batch = bytes.fromhex("0a03 616263" + serialized + observed + "18282001")
    record = b"\x12" + bytes([len(batch)]) + batch + bytes.fromhex("1828 2803")
    assert encode(records, PROTOBUF) == b"\x0a" + bytes([len(record)]) + record + bytes.fromhex("1030 1800")


def test_known_bincode() -> None:
    records = InterpretedRecords(
        (
            InterpretedRecord(
                0x28,
                3,
                (InterpretedValue(2 << 64 | 5, 0x28, b"abc", True), InterpretedValue(1, 0x28, None)),
                md.RunningXacts(9),
            ),
        ),
        0x30,
        0x10,
    )
    expected = (
        "0000000000000001"
        "01 0000000a 00000000 00000009"
        "0000000000000003 616263"
        "0000000000000002"
        "00000000 00000000000000020000000000000005 0000000000000028 0000000000000000 0000000000000003 01"
        "00000001 00000000000000000000000000000001 0000000000000028"
        "0000000000000028 0000000000000001"
        "0000000000000028 00000001 00000003"
        "0000000000000030 01 0000000000000010"
    )
    assert encode(records, BINCODE) == bytes.fromhex(expected.replace(" ", ""))


@pytest.mark.parametrize("record", METADATA, ids=lambda record: type(record).__name__)
def test_metadata_on_every_prefix(record: Any) -> None:
    packed = md.pack_metadata(record)
    assert md.parse_metadata(packed) == record
    assert type(md.parse_metadata(packed)) is type(record)
    for cut in range(len(packed)):
        with pytest.raises(ProtocolViolation):
            md.parse_metadata(packed[:cut])
    with pytest.raises(ProtocolViolation):
        md.parse_metadata(packed + b"\0")


def test_known_metadata() -> None:
    assert md.pack_metadata(md.ClearVmBits(7, None, VM, 3)).hex() == (
        "0000000000000000010000000700020000067f000000050000400003"
    )
    assert md.pack_metadata(md.Commit(11, 0, 1, 0, 0, 0, (), (), 0, 0, 11, 0x28)).hex() == (
        "00000005"
        "00000000"
        "0000000b"
        "00"
        "0000000000000001"
        "00000000"
        "00000000"
        "00000000"
        "0000000000000000"
        "0000000000000000"
        "0000000000000000"
        "0000"
        "0000000b"
        "0000000000000028"
    )
    assert md.pack_metadata(md.XlogRaw(0xB0, 0x28, b"")).hex() == "0000000800000000b000000000000000280000000000000000"


@pytest.mark.parametrize(("payload_format", "level"), FORMATS)
def test_every_prefix(payload_format: str, level: int | None) -> None:
    """A cut payload is refused, or (protobuf, cut between two fields of the outermost message) has fewer records."""
    whole = example()
    payload = encode(whole, payload_format, level)
    for cut in range(len(payload)):
        try:
            records = decode(payload[:cut], payload_format, compressed=level is not None)
        except ProtocolViolation:
            continue
        assert payload_format == PROTOBUF and level is None
        assert records.records == whole.records and records.raw_wal_start_lsn is None
    if payload_format == BINCODE or level is not None:
        with pytest.raises(ProtocolViolation):
            decode(payload + b"\0", payload_format, compressed=level is not None)


@pytest.mark.parametrize(("payload_format", "level"), [(PROTOBUF, None), (BINCODE, None), (BINCODE, 1)])
def test_damage_and_noise_never_surprise(payload_format: str, level: int | None) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    payload = encode(example(), payload_format, level)
    for _ in range(3000):
        if rng.random() < 0.3:
            damaged = bytearray(rng.randbytes(rng.randrange(200)))
        else:
            damaged = bytearray(payload)
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            records = decode(bytes(damaged), payload_format, compressed=level is not None)
        except ProtocolViolation:
            continue
        assert all(value.data is None or len(value.data) <= len(payload) for r in records.records for value in r.values)


def test_lies_about_lengths() -> None:
    with pytest.raises(ProtocolViolation, match="claims 18446744073709551615 items"):
        decode(b"\xff" * 8 + bytes(100), BINCODE, compressed=False)
    honest = encode(example(), BINCODE)
    at = honest.index(b"value bytes")
    for changed in (honest[: at - 8] + (1).to_bytes(8, "big") + honest[at:], honest[:at] + honest[at + 1 :]):
        with pytest.raises(ProtocolViolation):
            decode(changed, BINCODE, compressed=False)


def test_lies_about_totals() -> None:
    """How many values have bytes, and up to which LSN, is said twice."""
    records = InterpretedRecords((InterpretedRecord(0x28, 3, (InterpretedValue(1, 0x28, b"abc"),)),), 0x30, None)
    for payload_format, total, lie in (
        (PROTOBUF, "2001 1828", "2002 1828"),
        (PROTOBUF, "1828 2001", "1829 2001"),
        (BINCODE, "0000000000000028 0000000000000001 0000000000000028", "0000000000000028 0000000000000000 0000000000000028"),
        (BINCODE, "0000000000000028 0000000000000001 0000000000000028", "0000000000000027 0000000000000001 0000000000000028"),
    ):
        payload = encode(records, payload_format)
        assert payload.count(bytes.fromhex(total)) == 1
        with pytest.raises(ProtocolViolation, match="a batch of 1 values up to LSN 40 claims"):
            decode(payload.replace(bytes.fromhex(total), bytes.fromhex(lie)), payload_format, compressed=False)


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted_wal, "PAYLOAD_BYTES_MAX", 1 << 20)
    with pytest.raises(ProtocolViolation, match="more than 1048576 bytes"):
        decode(zstandard.ZstdCompressor().compress(bytes(1 << 22)), BINCODE, compressed=True)


def test_a_frame_without_its_size_is_read() -> None:
    """As streaming compressors write it."""
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    frame = compressor.compress(encode(example(), BINCODE)) + compressor.flush()
    assert decode(frame, BINCODE, compressed=True) == example()


def test_stream_messages() -> None:
    message = InterpretedWal(Lsn(0x1234), Lsn(0x5678), b"payload")
    packed = message.pack()
    assert packed == b"0" + (0x1234).to_bytes(8, "big") + (0x5678).to_bytes(8, "big") + b"payload"
    assert parse_interpreted_message(packed) == message
    for cut in range(17):
        with pytest.raises(ProtocolViolation):
            parse_interpreted_message(packed[:cut])
    keepalive = Keepalive(Lsn(7), 8, True)
    assert parse_interpreted_message(keepalive.pack()) == keepalive
    with pytest.raises(ProtocolViolation, match="vanilla"):
        parse_interpreted_message(XLogData(Lsn(1), Lsn(2), 3, b"").pack())
    with pytest.raises(ProtocolViolation, match="unknown message"):
        parse_sender_message(packed)


def test_options() -> None:
    for protocol in (
        InterpretedProtocol(PROTOBUF, 1, ShardIdentity(0, 0, 2048)),
        InterpretedProtocol(BINCODE, None, ShardIdentity(3, 4, 1)),
        InterpretedProtocol(BINCODE, 22, ShardIdentity(0, 1, 0)),
    ):
        assert parse_protocol_options(format_protocol(protocol)) == protocol
    assert parse_protocol_options({}) is None
    assert parse_protocol_options({"protocol": '{"type":"vanilla"}', "tenant_id": "x"}) is None


SHARD = {"shard_count": "4", "shard_number": "1", "shard_stripe_size": "2048"}
GOOD = '{"type":"interpreted","args":{"format":"protobuf","compression":null}}'


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": GOOD}, "needs the option shard_count"),
        ({"protocol": GOOD, "shard_count": "1", "shard_number": "0"}, "needs the option shard_stripe_size"),
        ({"protocol": '{"type":"vanilla"}', **SHARD}, "shard_count belongs to the interpreted protocol"),
        ({"shard_stripe_size": "1"}, "shard_stripe_size belongs to the interpreted protocol"),
        ({"protocol": GOOD, **SHARD, "shard_number": "4"}, "shard_number 4 does not fit shard_count 4: expected 0 to 3"),
        ({"protocol": GOOD, **SHARD, "shard_count": "0"}, "shard_number 1 does not fit shard_count 0"),
        ({"protocol": GOOD, **SHARD, "shard_count": "256"}, "shard_count must be from 0 to 255, not 256"),
        ({"protocol": GOOD, **SHARD, "shard_stripe_size": "0"}, "shard_stripe_size must be"),
        ({"protocol": GOOD, **SHARD, "shard_count": "-1"}, "shard_count must be a number, not '-1'"),
        ({"protocol": GOOD, **SHARD, "shard_count": "9" * 5000}, "shard_count must be a number"),
        ({"protocol": "interpreted", **SHARD}, "is not JSON"),
        ({"protocol": "[" * 100_000, **SHARD}, "is not JSON"),
        ({"protocol": '{"type":"other"}'}, '"vanilla" or "interpreted"'),
        ({"protocol": '{"type":"interpreted"}', **SHARD}, '"args"'),
        ({"protocol": '{"type":"interpreted","args":{"format":"json"}}', **SHARD}, '"protobuf" or "bincode"'),
        ({"protocol": GOOD.replace("null", '"zstd"'), **SHARD}, '"compression" must be null or'),
        ({"protocol": GOOD.replace("null", '{"zstd":{"level":23}}'), **SHARD}, '"compression" must be null or'),
        ({"protocol": GOOD.replace("null", '{"zstd":{"level":true}}'), **SHARD}, '"compression" must be null or'),
    ],
)
def test_bad_options(options: dict[str, str], words: str) -> None:
    with pytest.raises(BadProtocolOption, match=words.replace("(", r"\(")):
        parse_protocol_options(options)


def u32(*values: int) -> Any:
    return np.array(values, np.uint32)


def test_shards_of_known_pages() -> None:
    """Vectors of Neon's own tests of the mapping."""
    assert murmurhash32(u32(0)) == 0
    assert hash_combine(u32(0xB1FF3B40), u32(0)) == 0xFB7923C9
    page = (u32(0x400C), np.zeros(1, np.uint8), u32(0x7D06))
    holders = [number for number in range(10) if ShardIdentity(number, 10, 32768).holds_blocks(*page)[0]]
    assert holders == [8]


def test_every_page_has_one_shard() -> None:
    rng = np.random.default_rng(5)
    rel, block = rng.integers(1, 1 << 32, 4000, np.uint32), rng.integers(0, 1 << 32, 4000, np.uint32)
    fork = rng.integers(0, 4, 4000).astype(np.uint8)
    held = [ShardIdentity(number, 7, 3).holds_blocks(rel, fork, block) for number in range(7)]
    assert (np.sum(held, axis=0) == 1).all()
    assert held[0][fork == 3].all()
    assert all(mask[fork != 3].sum() > 300 for mask in held)
    assert ShardIdentity(0, 1, 0).holds_blocks(rel, fork, block).all()

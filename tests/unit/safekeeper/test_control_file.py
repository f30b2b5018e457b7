"""The control file: exact bytes of both versions, every prefix, every flipped bit, atomic replacement."""

import struct
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from neon_services.consensus.acceptor import AcceptorState
from neon_services.ground.errors import CorruptionError
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId, TermLsn
from neon_services.safekeeper.control_file import ControlFile, PartialSegment

TTID = TenantTimelineId(TenantId(bytes(range(16))), TimelineId(bytes(range(16, 32))))
STATE = AcceptorState(
    term=7,
    term_history=(TermLsn(1, Lsn(0x100)), TermLsn(7, Lsn(0x200))),
    pg_version=160004,
    system_id=0x0102030405060708,
    wal_seg_size=0x1000000,
    proposer_uuid=bytes(range(32, 48)),
    timeline_start_lsn=Lsn(0x11),
    local_start_lsn=Lsn(0x12),
    commit_lsn=Lsn(0x13),
    backup_lsn=Lsn(0x14),
    peer_horizon_lsn=Lsn(0x15),
    remote_consistent_lsn=Lsn(0x16),
)
MCONF = MembershipConfiguration(
    5, (SafekeeperId(1, "sk-1", 5454), SafekeeperId(2, "sk-2", 6500)), (SafekeeperId(3, "sk-3", 5454),)
)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    return u64(len(value)) + value.encode()


IDS = text("000102030405060708090a0b0c0d0e0f") + text("101112131415161718191a1b1c1d1e1f")
ACCEPTOR = u64(7) + u64(2) + u64(1) + u64(0x100) + u64(7) + u64(0x200)
SERVER = u32(160004) + u64(0x0102030405060708) + u32(0x1000000)
LSNS = text("202122232425262728292a2b2c2d2e2f") + b"".join(u64(lsn) for lsn in range(0x11, 0x17))


def test_version_9_byte_for_byte() -> None:
    expected = u32(0xCAFECEEF) + u32(9) + IDS + ACCEPTOR + SERVER + LSNS + u64(0) + u64(0) + u32(0)
    expected += u32(crc32c(expected))
    control = ControlFile(TTID, STATE, creation_ts_ns=123)
    assert control.encode() == expected
    assert ControlFile.decode(expected) == ControlFile(TTID, STATE, creation_ts_ns=0)


def test_version_10_byte_for_byte() -> None:
    members = u64(2) + u64(1) + text("sk-1") + struct.pack("<H", 5454) + u64(2) + text("sk-2") + struct.pack("<H", 6500)
    new_members = b"\1" + u64(1) + u64(3) + text("sk-3") + struct.pack("<H", 5454)
    partial = u64(1) + u32(1) + text("seg") + u64(0x21) + u64(0x22) + u64(6)
    expected = u32(0xCAFECEEF) + u32(10) + IDS + u32(5) + members + new_members + ACCEPTOR + SERVER + LSNS
    expected += partial + u32(1) + u64(0x99) + u64(1_700_000_000) + u32(42)
    expected += u32(crc32c(expected))
    state = AcceptorState(**{name: getattr(STATE, name) for name in AcceptorState.__slots__} | {"mconf": MCONF})
    control = ControlFile(
        TTID, state, (PartialSegment(1, "seg", Lsn(0x21), Lsn(0x22), 6),), Lsn(0x99), 1_700_000_000_000_000_042
    )
    assert control.encode() == expected
    assert ControlFile.decode(expected) == control


def example() -> bytes:
    state = AcceptorState(**{name: getattr(STATE, name) for name in AcceptorState.__slots__} | {"mconf": MCONF})
    return ControlFile(TTID, state, (PartialSegment(0, "n", Lsn(1), Lsn(2), 3),), None, 5).encode()


def test_every_prefix_is_refused() -> None:
    data = example()
    for length in range(len(data)):
        with pytest.raises(CorruptionError):
            ControlFile.decode(data[:length])


def test_a_tail_is_refused() -> None:
    with pytest.raises(CorruptionError):
        ControlFile.decode(example() + b"\0")


def test_every_flipped_bit_is_refused() -> None:
    data = bytearray(example())
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises(CorruptionError):
                ControlFile.decode(bytes(data))
            data[position] ^= 1 << bit


def with_checksum(head: bytes) -> bytes:
    return head + u32(crc32c(head))


@given(st.integers(0, 400), st.binary(min_size=1, max_size=16))
def test_wrong_content_under_a_right_checksum_never_escapes(position: int, noise: bytes) -> None:
    """Bytes that no safekeeper wrote: decoded to something that encodes again, or refused; never another exception."""
    head = bytearray(example()[:-4])
    position = 8 + position % (len(head) - 8)
    head[position : position + len(noise)] = noise
    try:
        control = ControlFile.decode(with_checksum(bytes(head)))
    except CorruptionError:
        return
    control.encode()
    control.to_json()


@pytest.mark.parametrize("version", [0, 1, 8, 11])
def test_other_versions_are_refused_by_number(version: int) -> None:
    with pytest.raises(CorruptionError, match=f"version {version} is not supported"):
        ControlFile.decode(with_checksum(u32(0xCAFECEEF) + u32(version) + bytes(100)))


def test_a_huge_count_is_refused_without_allocating() -> None:
    head = u32(0xCAFECEEF) + u32(9) + IDS + u64(7) + u64(1 << 60)
    with pytest.raises(CorruptionError, match="cut inside a list"):
        ControlFile.decode(with_checksum(head))


def test_a_history_that_goes_back_is_refused() -> None:
    acceptor = u64(7) + u64(2) + u64(3) + u64(0x200) + u64(2) + u64(0x300)
    with pytest.raises(CorruptionError, match="term history"):
        ControlFile.decode(with_checksum(u32(0xCAFECEEF) + u32(9) + IDS + acceptor + SERVER + LSNS + u64(0) + u64(0) + u32(0)))


def test_the_error_names_the_file_and_the_repair(tmp_path: Path) -> None:
    path = tmp_path / "safekeeper.control"
    path.write_bytes(example()[:-9])
    with pytest.raises(CorruptionError, match=r"safekeeper\.control: checksum mismatch; remove .* pull"):
        ControlFile.load(path)


def test_replacement_is_atomic_and_leaves_no_scratch(tmp_path: Path) -> None:
    first, second = ControlFile(TTID, STATE, creation_ts_ns=0), ControlFile(TTID, AcceptorState(), creation_ts_ns=0)
    first.save(tmp_path)
    (tmp_path / "safekeeper.control.partial").write_bytes(b"torn")  # what a crash in the middle leaves
    assert ControlFile.load(tmp_path / "safekeeper.control") == first
    second.save(tmp_path)
    assert ControlFile.load(tmp_path / "safekeeper.control") == second
    assert [path.name for path in tmp_path.iterdir()] == ["safekeeper.control"]


def test_json_has_neons_names() -> None:
    shown = ControlFile.decode(example()).to_json()
    assert shown["acceptor_state"] == {"term": 7, "term_history": [{"term": 1, "lsn": "0/100"}, {"term": 7, "lsn": "0/200"}]}
    assert shown["server"] == {"pg_version": 160004, "system_id": 0x0102030405060708, "wal_seg_size": 0x1000000}
    assert shown["mconf"]["new_members"] == [{"id": 3, "host": "sk-3", "pg_port": 5454}]
    assert (shown["commit_lsn"], shown["eviction_state"]) == ("0/13", "Present")
    assert shown["partial_backup"]["segments"][0]["status"] == "InProgress"

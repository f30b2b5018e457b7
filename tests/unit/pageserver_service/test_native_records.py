"""Functional records: the published encodings and what they do to pages."""

import random
import struct

import pytest

from neon_services.ground.errors import CorruptionError
from neon_services.pageserver import native_records as nr

ZEROS = bytes(8192)


def clog_status(page: bytes, xid: int) -> int:
    return page[xid % 32768 // 4] >> 2 * (xid % 4) & 3


def test_encodings() -> None:
    assert nr.clear_visibility_map_flags(0x11, None, 3).hex() == "00000001010000001100" + "03"
    assert nr.clog_set_committed([1, 2], 3).hex() == "00000002" + "0000000000000002" + "0000000100000002" + "0000000000000003"
    assert nr.clog_set_aborted([7]).hex() == "00000003" + "0000000000000001" + "00000007"
    assert nr.multixact_offset_create(5, 6).hex() == "000000040000000500000006"
    assert nr.multixact_members_create(5, [(1, 2)]).hex() == "0000000500000005" + "0000000000000001" + "0000000100000002"
    assert nr.truncate_visibility_map(9, 2).hex() == "00000007" + "0000000000000009" + "0000000000000002"


def test_clog_keeps_other_transactions_and_the_last_commit_time() -> None:
    page = nr.apply(ZEROS, nr.clog_set_committed([32768 + 4, 32768 + 7], 1234), 0x10, 0)
    assert len(page) == 8200 and struct.unpack(">q", page[8192:]) == (1234,)
    page = nr.apply(page, nr.clog_set_aborted([32768 + 5]), 0x20, 0)
    assert struct.unpack(">q", page[8192:]) == (1234,)
    assert [clog_status(page, xid) for xid in range(4, 9)] == [1, 2, 0, 1, 0]
    page = nr.apply(page, nr.clog_set_committed([32768 + 6], 99), 0x30, 0)
    assert len(page) == 8200 and struct.unpack(">q", page[8192:]) == (99,)
    assert page[:1] == b"\0"  # these pages carry no LSN


def test_multixact_pages() -> None:
    page = nr.apply(ZEROS, nr.multixact_offset_create(2048 + 3, 77), 0, 0)
    assert struct.unpack_from("<I", page, 12) == (77,) and page.count(0) == 8191
    members = [(100 + i, i) for i in range(6)]
    page = nr.apply(ZEROS, nr.multixact_members_create(1636 + 2, members), 0, 0)
    # groups of 4 flag bytes and 4 xids; the six members begin at the third of the first group
    assert page[0:4] == bytes([0, 0, 0, 1]) and struct.unpack_from("<4I", page, 4) == (0, 0, 100, 101)
    assert page[20:24] == bytes([2, 3, 4, 5]) and struct.unpack_from("<4I", page, 24) == (102, 103, 104, 105)


def test_visibility_map_bits_and_lsn() -> None:
    full = bytearray(b"\xff" * 8192)
    full[12:16] = struct.pack("<HH", 8192, 8192)
    page = nr.apply(bytes(full), nr.clear_visibility_map_flags(32672 + 5, 32672 + 6, 2), 0x1_0000_0010, 0)
    assert page[24 + 1] == 0xFF & ~(2 << 2) & ~(2 << 4)
    assert struct.unpack_from("<II", page) == (1, 0x10)
    page = nr.apply(bytes(full), nr.truncate_visibility_map(3, 2), 0x20, 0)
    assert page[24:27] == b"\xff\xff\xff" and page[27] == 3 and not any(page[28:])
    new = nr.apply(ZEROS, nr.clear_visibility_map_flags(0, None, 3), 0x20, 0)
    assert new == ZEROS  # a page that was never initialised gets no LSN


def test_malformed_records_are_refused() -> None:
    examples = [
        nr.clog_set_committed([5], 1),
        nr.multixact_members_create(1, [(2, 3)]),
        nr.clear_visibility_map_flags(1, 2, 3),
        nr.truncate_visibility_map(1, 2),
    ]
    for record in examples:
        nr.apply(ZEROS, record, 1, 0)
        for length in range(4):
            with pytest.raises(CorruptionError):
                nr.apply(ZEROS, record[:length], 1, 0)
        with pytest.raises(CorruptionError, match="no page"):
            nr.apply(None, record, 1, 0)
    with pytest.raises(CorruptionError, match="unknown"):
        nr.apply(ZEROS, struct.pack(">I", 42), 1, 0)
    with pytest.raises(CorruptionError):
        nr.apply(ZEROS, struct.pack(">IQ", nr.CLOG_SET_COMMITTED, 1 << 60), 1, 0)


def test_garbage_never_raises_anything_else() -> None:
    seed = 99
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(3000):
        record = struct.pack(">I", rng.randrange(9)) + rng.randbytes(rng.randrange(40))
        try:
            assert len(nr.apply(ZEROS, record, 1, 0)) in (8192, 8200)
        except CorruptionError:
            pass

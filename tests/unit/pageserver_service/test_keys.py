"""Keys: Neon's layout, published vectors, the columns, the ranges."""

import random

import numpy as np

from neon_services.pageserver import keys
from neon_services.pageserver.keys import RelTag
from neon_services.pageserver.values import format_key, parse_key, split_key


def text(halves: keys.Halves) -> str:
    return format_key(halves[0] << 64 | halves[1])


def test_relation_keys() -> None:
    tag = RelTag(0x67F, 0x1, 0x4DF, 0)
    assert text(keys.relation_block(tag, 6)) == "000000067F00000001000004DF0000000006"
    assert text(keys.relation_size(tag)) == "000000067F00000001000004DF00FFFFFFFF"
    assert text(keys.relation_exists(tag._replace(fork=2))) == "650000067F00000001000004DF0200000001"
    assert text(keys.relation_map(1664, 0)) == "000000068000000000000000000000000000"
    assert text(keys.DB_DIRECTORY) == "0" * 36


def test_other_keys() -> None:
    assert text(keys.slru_page(keys.MULTIXACT_OFFSETS, 33)) == "010000000200000001000000010000000001"
    assert text(keys.slru_segment_size(keys.CLOG, 2)) == "0100000000000000010000000200FFFFFFFF"
    assert text(keys.slru_directory(keys.MULTIXACT_MEMBERS)) == "010000000100000000000000000000000000"
    assert text(keys.twophase_file(0x01_23_4567_89AB)) == "02000000000000000000000001234567" + "89AB"
    assert text(keys.twophase_file(0xABCD_EF01_2345_6789)) == "02000000000000000000ABCDEF0123456789"
    assert text(keys.CONTROL_FILE) == "030000000000000000000000000000000000"
    assert text(keys.CHECKPOINT) == "030000000000000000000000000000000001"
    assert text(keys.replication_origin(7)) == "630000000000000000000000000000000007"


def test_published_vectors_of_aux_files() -> None:
    assert keys.fnv1a_128(b"test1") == 265160408618497461376862998434862070044
    assert text(keys.aux_file("pg_logical/mappings/test1")) == "62000001017F8B83D94F7081693471ABF91C"
    assert text(keys.aux_file("pg_replslot/test3")) == "62000002017F8D83D94F7081693471ABFB92"
    assert text(keys.aux_file("pg_logical/replorigin_checkpoint")) == "62000001032E07BB014262B821756295C58D"
    assert keys.aux_file("other_file_not_supported") == split_key(parse_key("620000FFFF2B6ECC8AEF93F643DC44F15E03"))


def test_columns_equal_single_keys_and_relations_are_read_back() -> None:
    seed = 4711
    print("seed", seed)
    rng = random.Random(seed)
    rows = [
        (rng.choice([1663, 1664]), rng.getrandbits(32), rng.getrandbits(32), rng.randrange(4), rng.getrandbits(32))
        for _ in range(500)
    ]
    columns = [np.array(column, np.uint32) for column in zip(*rows, strict=True)]
    hi, lo = keys.block_keys(*columns)
    for row, key_hi, key_lo in zip(rows, hi.tolist(), lo.tolist(), strict=True):
        tag = RelTag(*row[:4])
        assert (key_hi, key_lo) == keys.relation_block(tag, row[4])
        assert keys.relation_of(key_hi, key_lo) == keys.relation_of(*keys.relation_exists(tag)) == tag


def test_directory_ranges_hold_exactly_one_database() -> None:
    start, end = keys.relation_directory_range(1663, 5)
    inside = [RelTag(1663, 5, rel, fork) for rel in (0, 1, 0xFF_FFFF, 0x1000000, 0xFFFF_FFFF) for fork in range(4)]
    assert all(start <= keys.relation_exists(tag) < end for tag in inside)
    for tag in (RelTag(1663, 4, 0xFFFF_FFFF, 3), RelTag(1663, 6, 0, 0), RelTag(1664, 5, 1, 0)):
        assert not start <= keys.relation_exists(tag) < end
    first, last = keys.relation_directory_range()
    assert all(first <= keys.relation_exists(tag) < last for tag in inside)

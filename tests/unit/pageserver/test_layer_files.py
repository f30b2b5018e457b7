"""Layer files: what was written is read; damage is found and named."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from neon_services.ground.errors import CorruptionError
from neon_services.ground.ids import TenantId, TimelineId
from neon_services.pageserver.layers.block_cache import BlockCache
from neon_services.pageserver.layers.delta import write_level0
from neon_services.pageserver.layers.image import ImageLayerWriter
from neon_services.pageserver.layers.in_memory import InMemoryLayer
from neon_services.pageserver.layers.names import LayerName, parse_layer_name
from neon_services.pageserver.layers.reader import LayerFile
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.values import KEY_MAX, ValueBatch

SHARD, TIMELINE = TenantShardId(TenantId.generate()), TimelineId.generate()
THREADS = ThreadPoolExecutor(1)


def open_layer(path: Path, name: LayerName) -> LayerFile:
    return LayerFile.open(path, name, TIMELINE, BlockCache(1 << 20))


def random_layer(rng: random.Random, rows: int, keys: int) -> tuple[InMemoryLayer, list[tuple[int, int, int, int, bytes]]]:
    layer = InMemoryLayer(100)
    everything = []
    lsn = 100
    while rows > 0:
        count = min(rows, 300)
        batch = []
        for _ in range(count):
            lsn += rng.randrange(2)
            value = rng.randbytes(rng.choice([0, 3, 60, 700])) if rng.random() < 0.9 else bytes(8192)
            batch.append((rng.randrange(3), rng.randrange(keys), lsn, rng.randrange(5), value))
        layer.append(ValueBatch.build(batch))
        everything += batch
        rows -= count
    layer.freeze(lsn + 1)
    return layer, everything


@pytest.mark.parametrize(("seed", "rows", "keys"), [(1, 40, 5), (2, 12_000, 900), (3, 9000, 1), (4, 70_000, 20_000)])
async def test_delta_layer_answers_as_the_memory_it_was_made_from(tmp_path: Path, seed: int, rows: int, keys: int):
    rng = random.Random(seed)
    layer, _ = random_layer(rng, rows, keys)
    name, size = write_level0(layer, tmp_path, 7, SHARD, TIMELINE, sync=False)
    path = tmp_path / name.local(7)
    assert path.stat().st_size == size and [p.name for p in tmp_path.iterdir()] == [path.name]
    file = open_layer(path, name)
    assert file.rows == rows
    top = layer.end_lsn or 0
    for count in (1, 64, 3000):
        hi = np.array([rng.randrange(3) for _ in range(count)], np.uint64)
        lo = np.array([rng.randrange(keys + 1) for _ in range(count)], np.uint64)
        floor = np.array([rng.randrange(100, top) for _ in range(count)], np.uint64)
        ceiling = floor + np.array([rng.randrange(top) for _ in range(count)], np.uint64)
        expected, found = layer.find(hi, lo, floor, ceiling), await file.find(hi, lo, floor, ceiling, THREADS)
        for column in ("owner", "lsn", "kind", "length"):
            assert np.array_equal(getattr(expected, column), getattr(found, column)), column
        values = await file.fetch(found.position, found.length, THREADS)
        assert values == await layer.fetch(expected.position, expected.length)
    begin, end = (1, keys // 3), (2, keys // 2)
    assert sorted(zip(*layer.scan(begin, end, 150, top), strict=True)) == sorted(
        zip(*await file.keys(begin, end, 150, top, THREADS), strict=True)
    )


async def test_shared_bytes_are_written_once(tmp_path: Path):
    record = random.Random(5).randbytes(100_000)
    n = 50
    batch = ValueBatch(
        np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64), np.full(n, 10, np.uint64), np.full(n, 2, np.uint8),
        np.zeros(n, np.uint64), np.full(n, len(record), np.uint32), record,
    )  # fmt: skip
    layer = InMemoryLayer(10)
    layer.append(batch)
    layer.freeze(11)
    name, size = write_level0(layer, tmp_path, 1, SHARD, TIMELINE)
    assert size < 110_000
    file = open_layer(tmp_path / name.local(1), name)
    keys = np.arange(n, dtype=np.uint64)
    hits = await file.find(np.zeros(n, np.uint64), keys, np.zeros(n, np.uint64), np.full(n, 99, np.uint64), THREADS)
    assert await file.fetch(hits.position, hits.length, THREADS) == [record] * n


def small_files(tmp_path: Path) -> list[tuple[LayerName, Path]]:
    layer, _ = random_layer(random.Random(9), 60, 10)
    delta, _ = write_level0(layer, tmp_path, 1, SHARD, TIMELINE, sync=False)
    image = LayerName.image(0, KEY_MAX, 500)
    writer = ImageLayerWriter(tmp_path, image, 1, SHARD, TIMELINE, sync=False)
    writer.add(np.zeros(3, np.uint64), np.arange(3, dtype=np.uint64), [b"\x07" * 8192, b"", random.Random(1).randbytes(600)])
    writer.finish()
    return [(name, tmp_path / name.local(1)) for name in (delta, image)]


async def test_every_flipped_bit_is_found_and_the_file_named(tmp_path: Path):
    for name, path in small_files(tmp_path):
        good = path.read_bytes()
        await open_layer(path, name).verify(THREADS)
        for at in range(0, len(good), 1 if len(good) < 3000 else 7):
            bad = bytearray(good)
            bad[at] ^= 1 << at % 8
            path.write_bytes(bad)
            with pytest.raises(CorruptionError, match=str(name)):
                await open_layer(path, name).verify(THREADS)
        path.write_bytes(good)
        await open_layer(path, name).verify(THREADS)


def test_every_prefix_is_refused(tmp_path: Path):
    for name, path in small_files(tmp_path):
        good = path.read_bytes()
        for size in range(0, len(good), 1 if len(good) < 3000 else 7):
            path.write_bytes(good[:size])
            with pytest.raises(CorruptionError, match=str(name)):
                open_layer(path, name)


def test_a_file_under_another_name_is_refused(tmp_path: Path):
    (name, path), _ = small_files(tmp_path)
    other = LayerName.level0(name.lsn_start, name.lsn_end + 1)
    path.rename(tmp_path / other.local(1))
    with pytest.raises(CorruptionError, match="the header is that of layer"):
        open_layer(tmp_path / other.local(1), other)


def test_names_are_neons():
    text = "000000000000000000000000000000000000-FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF__0000000001696070-00000000016960E9"
    name, generation = parse_layer_name(text + "-v1-0000000a")
    assert (str(name), name.is_l0, generation) == (text, True, 10)
    assert parse_layer_name(name.remote(3)) == (name, 3)
    assert parse_layer_name(text) == (name, None)
    image, _ = parse_layer_name(
        "000000067F00000001000004DF0000000006-000000067F00000001000004E10000000000__00000000014FED58-00000001"
    )
    assert image.is_image and image.lsn_start == 0x14FED58
    assert str(image) == "000000067F00000001000004DF0000000006-000000067F00000001000004E10000000000__00000000014FED58"
    for bad in ("", "x", text[:-1], text.replace("F", "f"), text + "-zz"):
        with pytest.raises(ValueError, match="not a layer file name"):
            parse_layer_name(bad)

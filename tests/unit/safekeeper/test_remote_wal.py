"""Reading WAL that is in the bucket only: the same bytes, whatever breaks on the way; a clear error when they are nowhere."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pytest

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import Lsn, segment_file_name
from neon_services.ground.remote_storage import RemoteStorageError
from neon_services.safekeeper import remote_wal
from neon_services.safekeeper.removal import remove_wal
from neon_services.safekeeper.wal_backup import upload_segment
from neon_services.safekeeper.wal_reader import WalNotHere, WalReader
from tests.unit.safekeeper.offload_support import SEGMENT, START, World, failing


async def without_local_wal(base: Path) -> World:
    """Segments 1 to 3 are in the bucket only, 4 and 5 on the disk."""
    world = World(base)
    for segment in (1, 2, 3):
        await upload_segment(world.timeline, segment)
    await remove_wal(world.timeline, 4)
    assert world.segments() == [4, 5]
    return world


async def read_all(reader: WalReader, begin: int, end: int, chunk: int = 131072) -> bytes:
    received = bytearray()
    while begin + len(received) < end:
        data = await reader.read(begin + len(received), min(chunk, end - begin - len(received)))
        assert data
        received += data
    reader.close()
    return bytes(received)


async def test_the_same_bytes_from_the_bucket_and_the_disk(tmp_path: Path) -> None:
    world = await without_local_wal(tmp_path)
    assert world.timeline.first_available_lsn == START - START % SEGMENT
    everything = await read_all(world.timeline.reader(), START, world.wal.end)
    assert hashlib.sha256(everything).digest() == hashlib.sha256(world.wal.data).digest()
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    reader = world.timeline.reader()
    for _ in range(100):
        begin = rng.randrange(START, world.wal.end)
        count = rng.randrange(1, min(200_000, world.wal.end - begin + 1))
        data = await reader.read(begin, count)
        assert 1 <= len(data) <= count
        assert data == world.wal.slice(begin, begin + len(data))
    reader.close()


async def test_a_body_that_breaks_off_goes_on_where_it_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_wal, "FIRST_BACKOFF_S", 0.001)
    world = await without_local_wal(tmp_path)
    world.bucket.largest_read = 77_777
    calls = 0

    def before(operation: str, key: str) -> None:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise RemoteStorageError(f"{operation} {key}: reset by peer")

    world.bucket.before = before
    assert await read_all(world.timeline.reader(), START, 4 * SEGMENT) == world.wal.slice(START, 4 * SEGMENT)
    assert calls > 3 * 13 * 3
    world.bucket.before = failing(1000, "get")
    with pytest.raises(RemoteStorageError, match=segment_file_name(2, SEGMENT)):
        await world.timeline.reader().read(2 * SEGMENT, 10)


async def test_an_object_that_is_missing_or_short_is_named(tmp_path: Path) -> None:
    world = await without_local_wal(tmp_path)
    name = segment_file_name(2, SEGMENT)
    (path,) = world.bucket.root.rglob(name)
    content = path.read_bytes()
    path.write_bytes(content[:300_000])
    with pytest.raises(CorruptionError, match=f"{name} ends at byte 300000"):
        await world.timeline.reader().read(2 * SEGMENT, 10)
    path.unlink()
    with pytest.raises(WalNotHere, match=f"neither on this safekeeper's disk nor in object storage: object .*/{name} does not"):
        await world.timeline.reader().read(2 * SEGMENT + 5, 10)
    world.timeline.remote = None
    with pytest.raises(WalNotHere, match="not on this safekeeper's disk"):
        await world.timeline.reader().read(3 * SEGMENT, 10)


async def test_bytes_that_were_never_on_this_disk_come_from_the_bucket(tmp_path: Path) -> None:
    world = World(tmp_path)
    await upload_segment(world.timeline, 2)
    joined = Lsn(2 * SEGMENT + 0x3000)
    acceptor = world.timeline.acceptor
    path = world.timeline.store.segments.find(2)
    assert path is not None
    path.write_bytes(bytes(0x3000) + path.read_bytes()[0x3000:])
    acceptor.state = replace(acceptor.state, local_start_lsn=joined)
    begin = 2 * SEGMENT
    assert await read_all(world.timeline.reader(), begin, 3 * SEGMENT) == world.wal.slice(begin, 3 * SEGMENT)
    assert world.timeline.first_local_segment == 2

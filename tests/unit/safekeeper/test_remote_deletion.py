"""A deleted timeline's objects go, all of them, even those that were on their way; and nobody else's."""

import asyncio
from pathlib import Path

import pytest

from neon_services.ground.remote_storage import RemoteStorageError
from neon_services.safekeeper import remote_deletion
from neon_services.safekeeper.remote_deletion import RemoteDeletion
from neon_services.safekeeper.wal_backup import upload_segment
from tests.unit.safekeeper.offload_support import World, failing
from tests.unit.safekeeper.test_timelines import OTHER, TTID


def deletion(world: World) -> RemoteDeletion:
    return RemoteDeletion(world.timelines, world.bucket, world.datadir, sync=False)


async def finished(made: RemoteDeletion) -> None:
    async with asyncio.timeout(20):
        await asyncio.gather(*made._tasks)


def markers(world: World) -> list[str]:
    return [path.name for path in (world.datadir / "deleting").iterdir()]


async def test_what_is_on_its_way_is_deleted_too(tmp_path: Path) -> None:
    world = World(tmp_path)
    await upload_segment(world.timeline, 1)
    await world.bucket.put(f"{OTHER.tenant_id}/{OTHER.timeline_id}/other", b"stays")
    may_go_on, waits = asyncio.Event(), asyncio.Event()
    put = world.bucket.put

    async def slow_put(key: str, content: bytes, *, metadata: dict[str, str] | None = None) -> None:
        waits.set()
        await may_go_on.wait()
        await put(key, content, metadata=metadata)

    world.bucket.put = slow_put  # type: ignore[method-assign]
    upload = asyncio.create_task(upload_segment(world.timeline, 2))
    await waits.wait()
    upload.cancel()
    await asyncio.gather(upload, return_exceptions=True)
    timeline = world.timeline
    assert world.timelines.delete(TTID)
    made = deletion(world)
    made.schedule(TTID, timeline)
    assert markers(world) == [f"{TTID.tenant_id}_{TTID.timeline_id}"]
    may_go_on.set()
    await finished(made)
    assert list(world.bucket.objects()) == ["other"]
    assert len(world.bucket.puts) == 3, "it did arrive"
    assert markers(world) == []


async def test_it_goes_on_until_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_deletion, "FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(remote_deletion, "BATCH", 2)
    world = World(tmp_path)
    for segment in (1, 2, 3, 4):
        await upload_segment(world.timeline, segment)
    world.timelines.delete(TTID)
    failed = asyncio.Event()

    def broken(operation: str, key: str) -> None:
        failed.set()
        raise RemoteStorageError(f"{operation} {key}: the store is broken")

    world.bucket.before = broken
    made = deletion(world)
    made.schedule(TTID, None)
    async with asyncio.timeout(20):
        await failed.wait()
    await made.stop()
    assert len(world.bucket.objects()) == 4 and len(markers(world)) == 1
    # the next process
    world.bucket.before = failing(3, "delete")
    (world.datadir / "deleting" / "half.new").write_bytes(b"")
    made = deletion(world)
    made.resume()
    await finished(made)
    assert world.bucket.objects() == {}
    assert markers(world) == ["half.new"]


async def test_a_timeline_that_is_here_again_keeps_its_objects(tmp_path: Path) -> None:
    world = World(tmp_path)
    await upload_segment(world.timeline, 1)
    made = deletion(world)
    made.schedule(TTID, None)
    await finished(made)
    assert len(world.bucket.objects()) == 1
    assert markers(world) == []


async def test_nothing_is_sent_of_a_deleted_timeline(tmp_path: Path) -> None:
    world = World(tmp_path)
    timeline = world.timeline
    timeline.close("deleted")
    with pytest.raises(Exception, match="deleted"):
        await upload_segment(timeline, 1)
    assert world.bucket.objects() == {}

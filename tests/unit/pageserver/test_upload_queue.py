"""The upload queue's order, with a store that fails and delays at random."""

import asyncio
import random
from pathlib import Path

import pytest

from neon_services.ground.errors import Cancelled
from neon_services.ground.remote_storage import LocalFsStorage, RemoteStorageError
from neon_services.pageserver import upload
from neon_services.pageserver.index_part import IndexPart, LayerMetadata
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.upload import UploadQueue


class Unruly(LocalFsStorage):
    """Checks the promise of the queue at every operation."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        super().__init__(root)
        self.rng = rng
        self.layers: set[str] = set()
        self.index: IndexPart | None = None
        self.failing = False
        self.deleted = asyncio.Event()

    async def _trouble(self) -> None:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)
        if self.failing or self.rng.random() < 0.3:
            raise RemoteStorageError("no")

    async def put_file(self, key: str, path: Path) -> None:
        await self._trouble()
        self.layers.add(key)

    async def put(self, key: str, content: bytes) -> None:
        await self._trouble()
        index = IndexPart.parse(content, key)
        assert {f"k/{name}" for name in index.layers} <= self.layers, "an index names a layer that is not there"
        assert self.index is None or index.disk_consistent_lsn > self.index.disk_consistent_lsn, "an older index came later"
        self.index = index

    async def delete(self, keys: list[str]) -> None:
        await self._trouble()
        assert self.index is not None
        assert not {f"k/{name}" for name in self.index.layers} & set(keys), "a layer of the index is deleted"
        self.layers -= set(keys)
        self.deleted.set()


def index_of(lsn: int, names: set[LayerName]) -> IndexPart:
    return IndexPart(lsn, None, None, 0, 8, 8, 15, {name: LayerMetadata(1, 1) for name in names})


@pytest.mark.parametrize("seed", range(8))
async def test_order_is_kept_whatever_fails(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(upload, "_BACKOFF_MIN_S", 0.0001)
    rng = random.Random(seed)
    remote, uploaded = Unruly(tmp_path, rng), []
    queue = UploadQueue(remote, "index", lambda index: uploaded.append(index.disk_consistent_lsn), name="test")
    queue.start()
    names: set[LayerName] = {LayerName.level0(1, 2)}
    queue.upload_layer(f"k/{LayerName.level0(1, 2)}", tmp_path)
    for lsn in range(10, 150):
        name = LayerName.level0(lsn, lsn + 1)
        names.add(name)
        queue.upload_layer(f"k/{name}", tmp_path)
        gone = set(rng.sample(sorted(names), rng.randrange(2))) - {name}
        names -= gone
        queue.upload_index(index_of(lsn, names))
        queue.delete([f"k/{x}" for x in sorted(gone)])
        if rng.random() < 0.3:
            await asyncio.sleep(0.0005)
        if rng.random() < 0.05:
            await queue.wait_done(10)
            assert remote.index is not None and remote.index.disk_consistent_lsn == lsn == uploaded[-1]
    await queue.wait_done(10)
    assert remote.layers == {f"k/{name}" for name in names}
    assert uploaded == sorted(uploaded) and not queue.pending
    assert len(uploaded) < 140, "indexes must coalesce while the store is slow"
    await queue.stop()


async def test_deletions_are_held_until_they_are_allowed(tmp_path: Path):
    remote = Unruly(tmp_path, random.Random(1))
    remote.rng.random = lambda: 1.0  # type: ignore[method-assign]
    queue = UploadQueue(remote, "index", lambda _: None, name="test", may_delete=False)
    queue.start()
    queue.upload_layer("k/old", tmp_path)
    queue.upload_layer(f"k/{LayerName.level0(1, 2)}", tmp_path)
    queue.upload_index(index_of(10, {LayerName.level0(1, 2)}))
    queue.delete(["k/old"])
    await queue.wait_done(5)
    assert "k/old" in remote.layers
    queue.allow_deletions(True)
    async with asyncio.timeout(5):
        await remote.deleted.wait()
    assert "k/old" not in remote.layers
    await queue.stop()


async def test_a_store_that_is_away_delays_and_stop_ends_the_wait(tmp_path: Path):
    remote = Unruly(tmp_path, random.Random(1))
    remote.failing = True
    queue = UploadQueue(remote, "index", lambda _: None, name="test")
    queue.start()
    queue.upload_layer(f"k/{LayerName.level0(1, 2)}", tmp_path)
    queue.upload_index(index_of(10, {LayerName.level0(1, 2)}))
    waiting = asyncio.create_task(queue.wait_done())
    await asyncio.sleep(0)
    assert remote.index is None and queue.pending
    await queue.stop()
    with pytest.raises(Cancelled):
        await waiting

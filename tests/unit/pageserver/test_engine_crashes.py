"""A crash between any two steps of flush and upload: nothing that safekeepers may have dropped is lost."""

import asyncio
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground.ids import TimelineId
from neon_services.pageserver.layers.format import LayerWriter
from neon_services.pageserver.timeline import LsnTimeout, Timeline
from neon_services.pageserver.values import IMAGE, WAL, ValueBatch
from tests.unit.pageserver.engine_fixtures import INITDB_LSN, Engine, new_shard


@dataclass
class Snapshot:
    """The disks at one moment, and what had been promised by then."""

    directory: Path
    promised_lsn: int  #: remote_consistent_lsn: safekeepers may have dropped the WAL up to here
    created: bool  #: the client had been told that the timeline exists


class Camera:
    """Copies the disks before and after every rename and unlink and before every layer file is complete."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.snapshots: list[Snapshot] = []
        self.timeline: Timeline | None = None
        self.enabled = False
        self._lock = threading.RLock()
        for name in ("rename", "unlink"):
            self._surround(monkeypatch, Path, name)
        self._surround(monkeypatch, LayerWriter, "finish")

    def _surround(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def step(*arguments: Any, **options: Any) -> Any:
            with self._lock:  # threads flush and upload at the same time; a picture shows one moment
                self.take()
                answer = original(*arguments, **options)
                self.take()
                return answer

        monkeypatch.setattr(owner, name, step)

    def take(self) -> None:
        if not self.enabled:
            return
        self.enabled = False
        target = self.base.with_name(f"{self.base.name}-{len(self.snapshots)}")
        created, promised = self.timeline is not None, 0 if self.timeline is None else self.timeline.remote_consistent_lsn
        shutil.copytree(self.base, target)
        self.snapshots.append(Snapshot(target, promised, created))
        self.enabled = True


HISTORY = [(2000, b"+a"), (3000, b"+b"), (4000, b"+c")]


def expected_value(lsn: int) -> bytes:
    return b"initdb" + b"".join(value for at, value in HISTORY if at <= lsn)


async def test_crash_between_any_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, shard, timeline_id = tmp_path / "node", new_shard(), TimelineId.generate()
    base.mkdir()
    engine = Engine(base)
    tenant = await engine.attach(shard)
    camera = Camera(base, monkeypatch)
    camera.enabled = True
    timeline = camera.timeline = await tenant.create_timeline(timeline_id, pg_version=15)
    for lsn, value in HISTORY:
        rows = [(0, 0, lsn, WAL, value), (0, lsn, lsn, IMAGE, b"only here")]
        timeline.ingest(ValueBatch.build(rows), lsn, timeline.last_record_lsn)
        await timeline.freeze_and_flush()
        if lsn == 3000:
            await timeline.create_image_layers()
        await timeline.wait_uploads()
    camera.enabled = False
    await engine.crash()

    seen = set()
    for snapshot in camera.snapshots:
        for disk_lost in (False, True):
            if disk_lost:
                shutil.rmtree(snapshot.directory / "tenants")
            again = Engine(snapshot.directory)
            again.tenants.start()
            tenant = await (again.attach(shard, 2) if disk_lost else again.tenant(shard))
            loaded = tenant.timelines.get(timeline_id)
            if loaded is None:
                assert not snapshot.created, "a timeline that the client was told of is gone"
            else:
                seen.add(loaded.last_record_lsn)
                assert loaded.last_record_lsn >= snapshot.promised_lsn
                assert await loaded.get(0, 0, loaded.last_record_lsn) == expected_value(loaded.last_record_lsn)
                for lsn, _ in HISTORY:
                    if lsn <= loaded.last_record_lsn:
                        assert await loaded.get(0, lsn, loaded.last_record_lsn) == b"only here"
                        assert await loaded.get(0, 0, lsn) == expected_value(lsn)
                directory = loaded.resources.directory
                assert directory is not None and not list(directory.glob("*temp*"))
            await again.crash()
    assert seen == {INITDB_LSN + 8, 2000, 3000, 4000}, "the schedule did not stop at every stage"
    assert len(camera.snapshots) > 30


async def test_branch_waits_for_an_ancestor_that_lost_its_memory(tmp_path: Path):
    engine, shard, main, branch = Engine(tmp_path), new_shard(), TimelineId.generate(), TimelineId.generate()
    tenant = await engine.attach(shard)
    timeline = await tenant.create_timeline(main, pg_version=15)
    lost = ValueBatch.build([(0, 0, 2000, WAL, b"+a")])
    timeline.ingest(lost, 2000, 0)
    await tenant.create_timeline(branch, pg_version=15, ancestor=main)
    await engine.crash()
    again = Engine(tmp_path)
    again.tenants.start()
    tenant = await again.tenant(shard)
    timeline, child = tenant.get_timeline(main), tenant.get_timeline(branch)
    assert timeline.last_record_lsn < child.ancestor_lsn == child.last_record_lsn
    reading = asyncio.create_task(child.get(0, 0, 2000))
    with pytest.raises(LsnTimeout):
        await timeline.wait_lsn(2000, 0.02)
    assert not reading.done(), "the branch must not read an older state of its ancestor"
    timeline.ingest(lost, 2000, 0)
    assert await reading == b"initdb+a"
    await again.crash()


async def test_shutdown_keeps_what_was_in_memory(tmp_path: Path):
    engine, shard, main = Engine(tmp_path), new_shard(), TimelineId.generate()
    timeline = await (await engine.attach(shard)).create_timeline(main, pg_version=15)
    timeline.ingest(ValueBatch.build([(0, 0, 2000, WAL, b"+a")]), 2000, 1008)
    await engine.tenants.shutdown()
    shutil.rmtree(tmp_path / "tenants")
    again = Engine(tmp_path)
    timeline = (await again.attach(shard, 2)).get_timeline(main)
    assert (timeline.last_record_lsn, timeline.prev_record_lsn) == (2000, 1008)
    assert await timeline.get(0, 0, 2000) == b"initdb+a"
    await again.crash()


async def test_full_disk_delays_the_flush_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine, shard, main = Engine(tmp_path), new_shard(), TimelineId.generate()
    timeline = await (await engine.attach(shard)).create_timeline(main, pg_version=15)
    monkeypatch.setattr("neon_services.pageserver.timeline._FLUSH_RETRY_S", 0.001)
    original, failures = LayerWriter._write_data_block, iter(range(3))

    def full(writer: LayerWriter, raw: bytes | memoryview) -> None:
        if next(failures, None) is not None:
            raise OSError(28, "No space left on device")
        original(writer, raw)

    monkeypatch.setattr(LayerWriter, "_write_data_block", full)
    timeline.ingest(ValueBatch.build([(0, 0, 2000, WAL, b"+a")]), 2000, 1008)
    flushing = asyncio.create_task(timeline.freeze_and_flush())
    await asyncio.sleep(0)
    assert await timeline.get(0, 0, 2000) == b"initdb+a", "reads go on"
    assert await flushing == 2000 == timeline.disk_consistent_lsn
    directory = timeline.resources.directory
    assert directory is not None and not list(directory.glob("*temp*")) and len(timeline.layer_map.layers) == 3
    await engine.crash()

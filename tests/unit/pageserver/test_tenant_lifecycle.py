"""Tenants and timelines: attach, create, branch, restart, detach, delete."""

import asyncio
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground.errors import CorruptionError, NeonError
from neon_services.ground.http import ApiError
from neon_services.ground.ids import TimelineId
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.values import IMAGE, WAL, ValueBatch
from tests.unit.pageserver.engine_fixtures import INITDB_LSN, Engine, new_shard


def write(timeline: Timeline, lsn: int, *rows: tuple[int, int, bytes]) -> None:
    batch = ValueBatch.build([(0, key, lsn, kind, value) for key, kind, value in rows])
    timeline.ingest(batch, lsn, timeline.last_record_lsn)


async def test_create_is_durable_in_remote_storage_and_idempotent(tmp_path: Path):
    engine, shard, timeline_id = Engine(tmp_path), new_shard(), TimelineId.generate()
    tenant = await engine.attach(shard)
    timeline = await tenant.create_timeline(timeline_id, pg_version=15)
    assert timeline.remote_consistent_lsn == INITDB_LSN + 8
    key = f"tenants/{shard}/timelines/{timeline_id}/index_part.json-00000001"
    index = json.loads(await engine.remote.get(key))
    assert index["version"] == 15 and index["metadata_bytes"]["initdb_lsn"] == "0/3E8"
    layers = [f"tenants/{shard}/timelines/{timeline_id}/{name}-00000001" for name in index["layer_metadata"]]
    assert len(layers) == 2 and await engine.remote.list_keys(f"tenants/{shard}/") == sorted([key, *layers])
    assert await tenant.create_timeline(timeline_id, pg_version=15) is timeline
    with pytest.raises(ApiError, match="other parameters"):
        await tenant.create_timeline(timeline_id, pg_version=16)
    await engine.crash()


async def test_restart_keeps_what_was_flushed_and_attach_needs_only_the_bucket(tmp_path: Path):
    engine, shard, main, branch = Engine(tmp_path), new_shard(), TimelineId.generate(), TimelineId.generate()
    tenant = await engine.attach(shard)
    timeline = await tenant.create_timeline(main, pg_version=15)
    write(timeline, 2000, (0, WAL, b"+a"), (5, IMAGE, b"five"))
    await timeline.wait_uploaded(await timeline.freeze_and_flush(), 5)
    child = await tenant.create_timeline(branch, pg_version=15, ancestor=main, start_lsn=1500)
    assert child.ancestor_lsn == 1504 and child.prev_record_lsn == 0
    write(child, 3000, (0, WAL, b"+child"))
    await child.wait_uploaded(await child.freeze_and_flush(), 5)
    write(timeline, 4000, (0, WAL, b"+lost"))
    await engine.crash()

    for wipe in (False, True):
        if wipe:
            shutil.rmtree(tmp_path / "tenants")
        again = Engine(tmp_path)
        again.tenants.start()
        if wipe:
            await again.attach(shard, 2)
        tenant = await again.tenant(shard)
        assert again.services.active == {main, branch}
        timeline, child = tenant.get_timeline(main), tenant.get_timeline(branch)
        assert (timeline.last_record_lsn, timeline.prev_record_lsn) == (2000, INITDB_LSN + 8)
        assert await timeline.get(0, 0, 2000) == b"initdb+a"
        assert await child.get(0, 0, 3000) == b"initdb+child"
        assert child.ancestor is timeline
        visited = [layer.resident for t in (timeline, child) for layer in t.layer_map.layers]
        assert visited.count(True) == again.environment.downloads if wipe else all(visited)
        assert again.environment.downloads == (3 if wipe else 0)
        await again.crash()


async def test_generations_rise_and_stale_indexes_are_not_read(tmp_path: Path):
    engine, shard, main = Engine(tmp_path), new_shard(), TimelineId.generate()
    tenant = await engine.attach(shard, 3)
    timeline = await tenant.create_timeline(main, pg_version=15)
    with pytest.raises(ApiError, match="3; 2 is older"):
        await engine.attach(shard, 2)
    newer = await engine.attach(shard, 5)
    assert newer is not tenant and timeline.state == "Stopping"
    assert newer.get_timeline(main).last_record_lsn == INITDB_LSN + 8
    write(newer.get_timeline(main), 2000, (0, WAL, b"+a"))
    await newer.get_timeline(main).wait_uploaded(await newer.get_timeline(main).freeze_and_flush(), 5)
    keys = await engine.remote.list_keys(f"tenants/{shard}/timelines/{main}/index_part.json")
    assert [key[-8:] for key in keys] == ["00000003", "00000005"]
    await engine.crash()
    older = Engine(tmp_path / "other", engine.remote)
    assert (await older.attach(shard, 4)).get_timeline(main).last_record_lsn == INITDB_LSN + 8, (
        "generation 4 must not see index 5"
    )
    await older.crash()


async def test_branch_rules(tmp_path: Path):
    engine, shard = Engine(tmp_path), new_shard()
    tenant = await engine.attach(shard)
    main, one, two = (TimelineId.generate() for _ in range(3))
    timeline = await tenant.create_timeline(main, pg_version=15)
    write(timeline, 2000, (0, WAL, b"+a"))
    tip = await tenant.create_timeline(one, pg_version=15, ancestor=main)
    assert (tip.ancestor_lsn, tip.prev_record_lsn, tip.last_record_lsn) == (2000, INITDB_LSN + 8, 2000)
    assert await tip.get(0, 0, 2000) == b"initdb+a", "the ancestor's in-memory data is readable"
    with pytest.raises(ApiError, match="less than latest GC cutoff") as refused:
        await tenant.create_timeline(two, pg_version=15, ancestor=main, start_lsn=INITDB_LSN - 100)
    assert refused.value.status == 406
    write(tip, 3000, (0, WAL, b"+b"))
    with pytest.raises(ApiError, match="less than timeline ancestor lsn 0/7D0") as refused:
        await tenant.create_timeline(two, pg_version=15, ancestor=one, start_lsn=1992)
    assert refused.value.status == 406
    with pytest.raises(ApiError, match="child timelines") as refused:
        await tenant.delete_timeline(main)
    assert refused.value.status == 412
    with pytest.raises(ApiError, match="was not found"):
        await tenant.create_timeline(two, pg_version=15, ancestor=TimelineId.generate())
    await engine.crash()


async def test_a_branch_from_now_has_all_that_was_received(tmp_path: Path):
    engine, shard = Engine(tmp_path), new_shard()
    tenant = await engine.attach(shard)
    main, now, earlier = (TimelineId.generate() for _ in range(3))
    timeline = await tenant.create_timeline(main, pg_version=15)
    write(timeline, 2000, (0, WAL, b"+ingested"))

    async def ingest_latest(timeout_s: float) -> None:
        await asyncio.sleep(0)
        write(timeline, 3000, (0, WAL, b"+received"))

    timeline.ingested_by(lambda: None, ingest_latest)
    branch = await tenant.create_timeline(earlier, pg_version=15, ancestor=main, start_lsn=2000)
    assert (branch.ancestor_lsn, timeline.last_record_lsn) == (2000, 2000)
    branch = await tenant.create_timeline(now, pg_version=15, ancestor=main)
    assert (branch.ancestor_lsn, branch.prev_record_lsn) == (3000, 2000)
    assert await branch.get(0, 0, 3000) == b"initdb+ingested+received"
    await engine.crash()


@pytest.mark.parametrize("succeeds", [True, False])
async def test_an_ancestor_is_not_deleted_while_it_is_branched(tmp_path: Path, succeeds: bool):
    engine, shard = Engine(tmp_path), new_shard()
    tenant = await engine.attach(shard)
    main, child = TimelineId.generate(), TimelineId.generate()
    timeline = await tenant.create_timeline(main, pg_version=15)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def ingest_latest(timeout_s: float) -> None:
        begun.set()
        await go_on.wait()
        if not succeeds:
            raise NeonError("no")

    timeline.ingested_by(lambda: None, ingest_latest)
    creation = asyncio.create_task(tenant.create_timeline(child, pg_version=15, ancestor=main))
    await begun.wait()
    with pytest.raises(ApiError, match=rf"child timelines {child} \(being created\)") as refused:
        await tenant.delete_timeline(main)
    assert refused.value.status == 412 and timeline.state == "Active"
    go_on.set()
    if succeeds:
        await creation
        with pytest.raises(ApiError, match=f"child timelines {child}$"):
            await tenant.delete_timeline(main)
        await tenant.delete_timeline(child)
        await tenant.deletion_done(child)
    else:
        with pytest.raises(NeonError, match="no"):
            await creation
    await tenant.delete_timeline(main)
    await tenant.deletion_done(main)
    assert not tenant.timelines
    await engine.crash()


async def test_delete_leaves_nothing_and_is_resumed(tmp_path: Path):
    engine, shard, main, other = Engine(tmp_path), new_shard(), TimelineId.generate(), TimelineId.generate()
    tenant = await engine.attach(shard)
    await tenant.create_timeline(main, pg_version=15)
    await tenant.create_timeline(other, pg_version=15)
    await tenant.delete_timeline(main)
    await tenant.deletion_done(main)
    assert main not in tenant.timelines
    assert await engine.remote.list_keys(f"tenants/{shard}/timelines/{main}") == []
    assert not (tmp_path / "tenants" / str(shard) / "timelines" / str(main)).exists()
    # a crash right after the deletion became durable
    timeline = tenant.get_timeline(other)
    await timeline.mark_deleted()
    await engine.crash()
    again = Engine(tmp_path)
    again.tenants.start()
    tenant = await again.tenant(shard)
    await tenant.deletion_done(other)
    assert other not in tenant.timelines
    assert await again.remote.list_keys(f"tenants/{shard}/") == []
    await again.crash()


async def test_detach_removes_local_files_only(tmp_path: Path):
    engine, shard, main = Engine(tmp_path), new_shard(), TimelineId.generate()
    await (await engine.attach(shard)).create_timeline(main, pg_version=15)
    remote = await engine.remote.list_keys("tenants/")
    for _ in range(2):
        await engine.tenants.set_location(shard, None)
        assert list((tmp_path / "tenants").iterdir()) == [] and await engine.remote.list_keys("tenants/") == remote
    with pytest.raises(ApiError, match="was not found"):
        engine.tenants.tenant_here(shard)


async def test_local_leftovers_without_index_are_removed(tmp_path: Path):
    engine, shard, main = Engine(tmp_path), new_shard(), TimelineId.generate()
    await (await engine.attach(shard)).create_timeline(main, pg_version=15)
    await engine.crash()
    timelines = tmp_path / "tenants" / str(shard) / "timelines"
    orphan = timelines / str(TimelineId.generate())
    orphan.mkdir()
    directory = timelines / str(main)
    for layer in list(directory.iterdir()):
        (directory / (layer.name + ".___temp")).write_text("x")
        layer.write_bytes(layer.read_bytes() + b"x")
    (directory / "ephemeral-7").write_text("x")
    again = Engine(tmp_path)
    again.tenants.start()
    timeline = (await again.tenant(shard)).get_timeline(main)
    assert not orphan.exists() and list(directory.iterdir()) == []
    assert await timeline.get(0, 0, 2000) == b"initdb"
    assert again.environment.downloads == 1
    await again.crash()


@pytest.mark.parametrize("where", [5, 300, -100, -20])
async def test_damaged_local_layer_is_taken_from_remote_storage_again(tmp_path: Path, where: int):
    engine, shard, main = Engine(tmp_path), new_shard(), TimelineId.generate()
    timeline = await (await engine.attach(shard)).create_timeline(main, pg_version=15)
    value = random.Random(1).randbytes(5000)
    write(timeline, 2000, (0, IMAGE, value))
    await timeline.freeze_and_flush()
    await timeline.wait_uploads(5)
    layer = next(layer for layer in timeline.layer_map.layers if layer.name.lsn_end == 2001)
    damage(layer.path, where)
    assert await asyncio.gather(*(timeline.get(0, 0, 2000) for _ in range(3))) == [value] * 3
    assert (engine.environment.damaged, engine.environment.downloads) == (1, 1)
    # in both places: an error that names the layer, never wrong bytes
    layer.evict()
    damage(tmp_path / "remote" / layer.remote_key, where)
    with pytest.raises(CorruptionError, match=str(layer.name)):
        await timeline.get(0, 0, 2000)
    await engine.crash()


def damage(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 0x10
    path.write_bytes(content)


async def test_stale_attachment_serves_reads_and_writes_nothing(tmp_path: Path):
    engine, shard, main = Engine(tmp_path), new_shard(), TimelineId.generate()
    timeline = await (await engine.attach(shard)).create_timeline(main, pg_version=15)
    tenant = await engine.attach(shard, 1, "AttachedStale")
    before = await engine.remote.list_keys("")
    write(timeline, 2000, (0, WAL, b"+a"))
    assert await timeline.freeze_and_flush() == 2000
    assert await timeline.get(0, 0, 2000) == b"initdb+a"
    with pytest.raises(NeonError, match="AttachedStale"):
        await timeline.wait_uploads(1)
    with pytest.raises(ApiError, match="AttachedStale") as refused:
        await tenant.create_timeline(TimelineId.generate(), pg_version=15)
    assert refused.value.status == 409
    assert await engine.remote.list_keys("") == before and timeline.remote_consistent_lsn == INITDB_LSN + 8
    await engine.attach(shard, 1, "AttachedSingle")
    await timeline.wait_uploaded(2000, 5)
    await engine.crash()


async def test_visible_remote_consistent_lsn_waits_for_validation(tmp_path: Path):
    engine, shard, main = Engine(tmp_path), new_shard(), TimelineId.generate()
    engine.node.needs_validation = True
    timeline = await (await engine.attach(shard)).create_timeline(main, pg_version=15)
    assert (timeline.remote_consistent_lsn, timeline.remote_consistent_lsn_visible) == (INITDB_LSN + 8, 0)
    timeline.validated(timeline.remote_consistent_lsn)
    write(timeline, 2000, (0, WAL, b"+a"))
    await timeline.wait_uploaded(await timeline.freeze_and_flush(), 5)
    assert (timeline.remote_consistent_lsn, timeline.remote_consistent_lsn_visible) == (2000, INITDB_LSN + 8)
    await engine.crash()


async def test_detach_interrupts_a_creation_and_leaves_nothing(tmp_path: Path):
    engine, shard, main = Engine(tmp_path), new_shard(), TimelineId.generate()
    tenant = await engine.attach(shard)
    started, never = asyncio.Event(), asyncio.Event()
    original = engine.services.bootstrap

    async def slow(*arguments: Any) -> Timeline:
        timeline = await original(*arguments)
        started.set()
        await never.wait()
        return timeline

    engine.services.bootstrap = slow  # type: ignore[method-assign]
    creating = asyncio.create_task(tenant.create_timeline(main, pg_version=15))
    await started.wait()
    with pytest.raises(ApiError, match="is being created") as refused:
        await tenant.create_timeline(main, pg_version=15)
    assert refused.value.status == 429
    await engine.tenants.set_location(shard, None)
    with pytest.raises(ApiError, match="detached"):
        await creating
    assert list((tmp_path / "tenants").iterdir()) == [] and await engine.remote.list_keys("") == []

"""The engine against a dictionary: random writes, freezes, images, branches, evictions and restarts, reads at random LSNs.

The seed that pytest prints in the test's name is the whole reproduction.
"""

import asyncio
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from neon_services.ground.ids import TimelineId
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.values import IMAGE, NATIVE, TOMBSTONE, WAL, WAL_INIT, MissingKey, ValueBatch, split_key
from tests.unit.pageserver.engine_fixtures import INITDB_LSN, Engine, new_shard

AUX = 0x62 << 120
KEYS = [*range(12), *(5 << 64 | n for n in range(12)), *(AUX | n for n in range(4))]


@dataclass
class Model:
    """What a timeline must answer: per key its rows, plus the ancestor up to the branch point."""

    parent: "Model | None" = None
    parent_lsn: int = 0
    rows: dict[int, list[tuple[int, int, bytes]]] = field(default_factory=dict)  # key -> (lsn, kind, value)
    last: int = 0

    def read(self, key: int, lsn: int) -> bytes | None:
        value = None if self.parent is None or key >= AUX else self.parent.read(key, min(lsn, self.parent_lsn))
        for at, kind, row in self.rows.get(key, ()):
            if at <= lsn:
                value = None if kind == TOMBSTONE else row if kind in (IMAGE, WAL_INIT) else (value or b"") + row
        return value


class Run:
    """One random run."""

    def __init__(self, base: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.base = base
        self.shard = new_shard()
        self.models: dict[TimelineId, Model] = {}
        self.generation = 1
        self.engine = self.new_engine()
        self.done: dict[str, int] = {}

    def new_engine(self) -> Engine:
        conf = {"checkpoint_distance": self.rng.choice([300, 3000, 1 << 20]), "compaction_target_size": 5 * 8192}
        return Engine(self.base, node_conf=conf)

    def timeline(self, timeline_id: TimelineId) -> Timeline:
        return self.engine.tenants.tenants[self.shard].get_timeline(timeline_id)

    async def start(self) -> None:
        tenant = await self.engine.attach(self.shard)
        timeline_id = TimelineId(self.rng.randbytes(16))
        await tenant.create_timeline(timeline_id, pg_version=15)
        model = Model(last=INITDB_LSN + 8)
        model.rows = {0: [(INITDB_LSN, IMAGE, b"initdb")], 1: [(INITDB_LSN + 8, IMAGE, b"checkpoint")]}
        self.models[timeline_id] = model

    async def step(self) -> None:
        actions = [self.write] * 12 + [self.read] * 8 + [self.freeze] * 3 + [self.images, self.branch, self.evict, self.restart]
        action = self.rng.choice(actions)
        self.done[action.__name__] = self.done.get(action.__name__, 0) + 1
        await action(self.rng.choice(list(self.models)))

    async def write(self, timeline_id: TimelineId) -> None:
        timeline, model, rng = self.timeline(timeline_id), self.models[timeline_id], self.rng
        lsn, rows = model.last, []
        for _ in range(rng.choice([1, 4, 30])):
            lsn += rng.choice([0, 1, 8, 40]) if rows else 8
            key = rng.choice(KEYS)
            known = model.read(key, lsn) is not None
            kind = rng.choice([IMAGE, WAL, WAL, WAL, NATIVE, NATIVE, WAL_INIT, TOMBSTONE] if known else [IMAGE, WAL_INIT])
            value = b"" if kind == TOMBSTONE else rng.randbytes(rng.choice([1, 5, 200]))
            rows.append((*split_key(key), lsn, kind, value))
            model.rows.setdefault(key, []).append((lsn, kind, value))
        timeline.ingest(ValueBatch.build(rows), lsn, model.last)
        await timeline.ingest_backpressure()
        model.last = lsn

    async def read(self, timeline_id: TimelineId) -> None:
        timeline, model, rng = self.timeline(timeline_id), self.models[timeline_id], self.rng
        keys = [rng.choice(KEYS) for _ in range(rng.choice([1, 3, 40]))]
        lsn = rng.choice([model.last, rng.randint(INITDB_LSN, model.last)])
        if rng.random() < 0.2:
            start, end = sorted(rng.sample([*KEYS, AUX | 99], 2))
            found = await timeline.scan(*split_key(start), *split_key(end), lsn)
            expected = [(*split_key(k), v) for k in sorted(KEYS) if start <= k < end and (v := model.read(k, lsn)) is not None]
            assert found == expected
            return
        halves = [split_key(key) for key in keys]
        found = await timeline.get_many([h[0] for h in halves], [h[1] for h in halves], lsn)
        for key, value in zip(keys, found, strict=True):
            expected_value = model.read(key, lsn)
            got = None if isinstance(value, MissingKey) else value
            assert got == expected_value, f"key {key:x} at {lsn} of {timeline_id}"

    async def freeze(self, timeline_id: TimelineId) -> None:
        timeline = self.timeline(timeline_id)
        if self.rng.random() < 0.5:
            timeline.freeze()
        else:
            await timeline.freeze_and_flush()
            assert timeline.disk_consistent_lsn == self.models[timeline_id].last

    async def images(self, timeline_id: TimelineId) -> None:
        await self.timeline(timeline_id).create_image_layers()

    async def branch(self, timeline_id: TimelineId) -> None:
        if len(self.models) > 4:
            return
        model = self.models[timeline_id]
        lowest = max(model.parent_lsn, INITDB_LSN)
        lsn = min((self.rng.randint(lowest, model.last) + 7) & ~7, model.last & ~7)
        if lsn < lowest:
            return
        child = TimelineId(self.rng.randbytes(16))
        tenant = await self.engine.tenant(self.shard)
        await tenant.create_timeline(child, pg_version=15, ancestor=timeline_id, start_lsn=lsn)
        self.models[child] = Model(model, lsn, {}, lsn)

    async def evict(self, timeline_id: TimelineId) -> None:
        timeline = self.timeline(timeline_id)
        await timeline.wait_uploads(10)
        for layer in timeline.layer_map.layers:
            if self.rng.random() < 0.5:
                layer.evict()

    async def restart(self, _: TimelineId) -> None:
        how = self.rng.choice(["crash", "clean", "wipe", "generation"])
        if how == "clean":
            await self.engine.tenants.shutdown()
        else:
            await asyncio.sleep(self.rng.choice([0, 0, 0.005]))
            await self.engine.crash()
        if how == "wipe":
            shutil.rmtree(self.base / "tenants")
        self.engine = self.new_engine()
        self.engine.tenants.start()
        if how in ("wipe", "generation"):
            self.generation += self.rng.randint(1, 3)
            await self.engine.attach(self.shard, self.generation)
        tenant = await self.engine.tenant(self.shard)
        assert set(tenant.timelines) == set(self.models)
        for timeline_id, model in self.models.items():
            timeline = tenant.get_timeline(timeline_id)
            assert timeline.last_record_lsn <= model.last
            if how == "clean":
                assert timeline.last_record_lsn == model.last
        # as safekeepers do: a branch's ancestor is refilled at least up to the branch point
        for timeline_id, model in self.models.items():
            await self.refill(tenant.get_timeline(timeline_id), model)

    async def refill(self, timeline: Timeline, model: Model) -> None:
        """Ingest again what the crash lost, as from the safekeepers' WAL."""
        have = timeline.last_record_lsn
        lost = sorted(
            (lsn, n, key, kind, v) for key, rows in model.rows.items() for n, (lsn, kind, v) in enumerate(rows) if lsn > have
        )
        if model.last > have:
            timeline.ingest(ValueBatch.build([(*split_key(k), lsn, kind, v) for lsn, _, k, kind, v in lost]), model.last, 0)


@pytest.mark.parametrize("seed", range(12))
async def test_engine_equals_dictionary(tmp_path: Path, seed: int):
    run = Run(tmp_path, seed)
    await run.start()
    for _ in range(250):
        await run.step()
    for timeline_id in run.models:
        for _ in range(10):
            await run.read(timeline_id)
    assert run.done["restart"] and run.done["images"] and run.done["evict"], "a run that does nothing proves nothing"
    await run.engine.crash()

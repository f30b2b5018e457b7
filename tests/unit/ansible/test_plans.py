"""What the modules decide, without a cluster; each plan is also cut off after every step and asked for again."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

START = "0/16B9188"


@pytest.fixture(scope="module")
def timeline(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("library/neon_timeline.py")


@pytest.fixture(scope="module")
def tenant(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("library/neon_tenant.py")


class World:
    """A pageserver and three safekeepers, as dictionaries."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.pageserver: dict[str, Any] | None = None
        self.members: dict[int, dict[str, Any] | None] = {1: None, 2: None, 3: None}

    def plan(self) -> list[Any]:
        return self.module.plan(self.pageserver, self.members, {"new_timeline_id": "b" * 32, "pg_version": 15})

    def carry_out(self, step: Any) -> None:
        if isinstance(step, self.module.CreateOnPageserver):
            self.pageserver = {"last_record_lsn": START, "pg_version": 15}
        elif isinstance(step, self.module.CreateOnSafekeeper):
            assert self.pageserver is not None, "a safekeeper learns where the timeline starts from the pageserver"
            self.register(step.node_id, step.start_lsn or self.pageserver["last_record_lsn"])
        else:
            donor = self.members[step.donors[0]]
            assert donor is not None
            self.members[step.node_id] = dict(donor)

    def register(self, node_id: int, start: str, flush: str | None = None) -> None:
        self.members[node_id] = {"timeline_start_lsn": start, "flush_lsn": flush or start, "commit_lsn": flush or start}


def test_a_new_timeline_is_made_and_registered_everywhere(timeline: ModuleType) -> None:
    world = World(timeline)
    for step in world.plan():
        world.carry_out(step)
    assert world.plan() == []
    assert {status["timeline_start_lsn"] for status in world.members.values() if status} == {START}


@pytest.mark.parametrize("done", range(5))
def test_a_run_cut_off_anywhere_is_finished_by_the_next(timeline: ModuleType, done: int) -> None:
    world = World(timeline)
    for step in world.plan()[:done]:
        world.carry_out(step)
    for step in world.plan():
        assert not isinstance(step, timeline.PullToSafekeeper)
        world.carry_out(step)
    assert world.plan() == []
    assert {status["timeline_start_lsn"] for status in world.members.values() if status} == {START}


def test_a_member_that_lost_its_disk_gets_the_wal_from_the_others(timeline: ModuleType) -> None:
    world = World(timeline)
    world.pageserver = {"last_record_lsn": "0/2000000", "pg_version": 15}
    world.register(1, START, "0/2000000")
    world.register(3, START, "0/1F00000")
    assert world.plan() == [timeline.PullToSafekeeper(2, (1, 3))]


def test_when_a_majority_lost_its_disks_a_person_decides(timeline: ModuleType) -> None:
    world = World(timeline)
    world.pageserver = {"last_record_lsn": "0/2000000", "pg_version": 15}
    world.register(1, START, "0/2000000")
    with pytest.raises(timeline.TimelineError, match="safekeepers 2, 3 of 3 lack the timeline"):
        world.plan()


def test_a_member_is_never_registered_later_than_the_others(timeline: ModuleType) -> None:
    world = World(timeline)
    world.pageserver = {"last_record_lsn": "0/2000000", "pg_version": 15}
    world.register(1, START)
    assert world.plan() == [timeline.CreateOnSafekeeper(2, START), timeline.CreateOnSafekeeper(3, START)]


def test_safekeepers_without_a_pageserver_are_not_overwritten(timeline: ModuleType) -> None:
    world = World(timeline)
    world.register(2, START)
    with pytest.raises(timeline.TimelineError, match="safekeepers 2 have the timeline"):
        world.plan()


def test_lsns_are_numbers(timeline: ModuleType) -> None:
    assert timeline.lsn("1/0") == 1 << 32
    assert timeline.lsn("0/FFFFFFFF") < timeline.lsn("1/0")


def test_bodies(timeline: ModuleType) -> None:
    params = {"timeline_id": "b", "ancestor_timeline_id": None, "ancestor_start_lsn": None, "pg_version": 15}
    assert timeline.creation_body(params) == {"new_timeline_id": "b", "pg_version": 15}
    params |= {"ancestor_timeline_id": "a", "ancestor_start_lsn": "0/1"}
    assert timeline.creation_body(params) == {
        "new_timeline_id": "b",
        "ancestor_timeline_id": "a",
        "ancestor_start_lsn": "0/1",
    }
    member = {"name": "sk1", "id": 1, "host": "h", "pg_port": 5454, "http_port": 7676}
    assert timeline.membership({"generation": 1, "safekeepers": [member]}) == {
        "generation": 1,
        "members": [{"id": 1, "host": "h", "pg_port": 5454}],
        "new_members": None,
    }


def test_a_tenant_is_attached_once(tenant: ModuleType) -> None:
    desired = tenant.location(1, {"gc_horizon": 5})
    assert tenant.plan(None, desired) == desired
    assert tenant.plan({"mode": "Detached"}, desired) == desired
    assert tenant.plan({**desired, "tenant_conf": {"gc_horizon": 5, "pitr_interval": None}}, desired) is None
    assert tenant.plan({**desired, "tenant_conf": {}}, desired) == desired
    assert tenant.plan({**desired, "mode": "AttachedStale"}, desired) == desired


def test_a_generation_never_goes_back(tenant: ModuleType) -> None:
    with pytest.raises(tenant.TenantError, match="never goes back"):
        tenant.plan(tenant.location(3, {}), tenant.location(2, {}))
    assert tenant.plan(tenant.location(1, {}), tenant.location(2, {})) == tenant.location(2, {})


def test_a_bucket_of_somebody_else_is_refused(load: Callable[[str], ModuleType]) -> None:
    bucket = load("library/s3_bucket.py")
    assert bucket.plan("absent", bucket="b") == ["create", "prove"]
    assert bucket.plan("present", bucket="b") == ["prove"]
    with pytest.raises(bucket.BucketError, match="other keys"):
        bucket.plan("forbidden", bucket="b")

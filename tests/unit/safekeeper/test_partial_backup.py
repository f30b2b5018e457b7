"""The last segment in the bucket: every crash leaves what the next run finishes, and the current object is never deleted."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn
from neon_services.ground.remote_storage import RemoteStorageError
from neon_services.safekeeper.control_file import ControlFile, PartialSegment
from neon_services.safekeeper.partial_backup import (
    DELETING,
    IN_PROGRESS,
    MAX_ENTRIES,
    UPLOADED,
    back_up_partial,
    begin,
    condemn,
    describe,
    finish,
    forget,
    garbage,
    is_uploaded,
    partial_name,
    reset_partial_backup,
    uploaded,
)
from tests.unit.safekeeper.offload_support import SEGMENT, World, failing


def entry(name: str, status: int = IN_PROGRESS) -> PartialSegment:
    return PartialSegment(status, name, Lsn(1), Lsn(2), 3)


def test_the_name() -> None:
    name = partial_name("000000010000000000000001", 5, 0x16B5A50, 0x16B5A40, 9)
    assert name == "000000010000000000000001_5_00000000016B5A50_00000000016B5A40_sk9.partial"


def test_the_steps() -> None:
    segments = begin((), entry("a"))
    assert segments == (entry("a"),)
    segments = finish(segments, "a")
    assert uploaded(segments) == entry("a", UPLOADED) and is_uploaded(segments, entry("a"))
    segments = begin(segments, entry("b"))
    assert garbage(segments) == [] and uploaded(segments) == entry("a", UPLOADED)
    segments = finish(segments, "b")
    assert garbage(segments) == ["a"]
    # the older name comes again before it was deleted: then it must not be
    again = begin(segments, entry("a"))
    assert garbage(again) == [] and [part.name for part in again] == ["b", "a"]
    assert garbage(finish(again, "a")) == ["b"]
    assert forget(segments, ["a"]) == (entry("b", UPLOADED),)
    assert forget(again, ["a"]) == again, "it is wanted again"
    assert garbage(condemn(again)) == ["a"]
    assert garbage(condemn(again, uploaded_too=True)) == ["b", "a"]


class Crash(Exception):
    """The process dies here."""


def crash_at(world: World, step: int) -> list[str]:
    """The run dies before or after its ``step``-th change; the changes that happened."""
    counter = itertools.count()
    done: list[str] = []

    def point(what: str) -> None:
        if next(counter) == step:
            raise Crash
        done.append(what)

    save = world.timeline.save_control

    def saving(control: ControlFile) -> None:
        point("before save")
        save(control)
        point("after save")

    world.timeline.save_control = saving  # type: ignore[method-assign]
    world.bucket.before = lambda operation, _: point(f"before {operation}") if operation != "get" else None
    world.bucket.after = lambda operation, _: point(f"after {operation}")
    return done


def check(world: World) -> None:
    """The invariants, at any moment after a crash."""
    control = ControlFile.load(world.timeline.directory / "safekeeper.control")
    objects = world.bucket.objects()
    assert set(objects) <= {part.name for part in control.partial_backup}, "what may be in the bucket is listed"
    current = uploaded(control.partial_backup)
    if current is not None:
        first = current.flush_lsn - current.flush_lsn % SEGMENT
        assert objects[current.name] == world.wal.slice(first, current.flush_lsn)
    assert len({part.name for part in control.partial_backup}) == len(control.partial_backup)


def check_finished(world: World) -> None:
    check(world)
    wanted = describe(world.timeline)
    assert wanted is not None
    (part,) = ControlFile.load(world.timeline.directory / "safekeeper.control").partial_backup
    assert part.status == UPLOADED and part.name == wanted.name
    assert set(world.bucket.objects()) == {part.name}


@pytest.mark.parametrize("goes_on", [False, True], ids=["the same log", "the log went on"])
async def test_a_crash_at_every_step(tmp_path: Path, goes_on: bool) -> None:
    changes: list[str] = []
    for step in range(100):
        base = tmp_path / str(step)
        base.mkdir()
        world = World(base, segments=1)
        await back_up_partial(world.timeline)
        check_finished(world)
        world.wal.records(5)
        world.append(world.wal.end)
        world.save()
        changes = crash_at(world, step)
        try:
            await back_up_partial(world.timeline)
            check_finished(world)
            break
        except Crash:
            pass
        world.bucket.before = world.bucket.after = lambda operation, key: None
        check(world)
        timeline = world.reboot()
        check(world)
        if goes_on:
            world.lead(2)
            world.wal.records(3)
            world.append(world.wal.end)
        await back_up_partial(timeline)
        check_finished(world)
    assert changes == ["before save", "after save", "before put", "after put", "before save", "after save", "before delete",
                       "after delete", "before save", "after save"]  # fmt: skip


async def test_what_is_the_same_is_not_sent_again(tmp_path: Path) -> None:
    world = World(tmp_path, segments=1)
    await back_up_partial(world.timeline)
    await back_up_partial(world.timeline)
    assert len(world.bucket.puts) == 1
    world.save()
    await back_up_partial(world.reboot())
    assert len(world.bucket.puts) == 1


async def test_a_segment_whose_begin_was_never_here_is_not_sent(tmp_path: Path) -> None:
    world = World(tmp_path, segments=1)
    acceptor = world.timeline.acceptor
    begin = acceptor.flush_lsn - acceptor.flush_lsn % SEGMENT
    acceptor.state = replace(acceptor.state, local_start_lsn=Lsn(begin + 8))
    await back_up_partial(world.timeline)
    assert world.bucket.puts == []
    acceptor.state = replace(acceptor.state, local_start_lsn=Lsn(begin))
    await back_up_partial(world.timeline)
    check_finished(world)


async def test_many_failures_are_cleaned_up(tmp_path: Path) -> None:
    world = World(tmp_path, segments=1)
    await back_up_partial(world.timeline)
    good = set(world.bucket.objects())
    world.bucket.before = failing(1000, "put")
    for _ in range(3 * MAX_ENTRIES):
        world.wal.record(10)
        world.append(world.wal.end)
        with pytest.raises(RemoteStorageError):
            await back_up_partial(world.timeline)
        assert len(world.timeline.control.partial_backup) <= MAX_ENTRIES + 1
        assert set(world.bucket.objects()) == good
    world.bucket.before = lambda operation, key: None
    await back_up_partial(world.timeline)
    check_finished(world)


async def test_a_log_that_was_cut_meanwhile_is_not_current(tmp_path: Path) -> None:
    world = World(tmp_path, segments=1)
    await back_up_partial(world.timeline)
    before = uploaded(world.timeline.control.partial_backup)
    world.wal.records(3)
    world.append(world.wal.end)

    def deposed(operation: str, key: str) -> None:
        world.bucket.before = lambda operation, key: None
        world.lead(9)
        world.wal.records(2)
        world.append(world.wal.end)

    world.bucket.before = deposed
    await back_up_partial(world.timeline)
    assert uploaded(world.timeline.control.partial_backup) == before
    await back_up_partial(world.timeline)
    check_finished(world)


async def test_reset_deletes_everything_that_is_listed(tmp_path: Path) -> None:
    world = World(tmp_path, segments=1)
    await back_up_partial(world.timeline)
    world.wal.records(3)
    world.append(world.wal.end)
    world.bucket.before = failing(1, "put")
    with pytest.raises(NeonError):
        await back_up_partial(world.timeline)
    listed = [part.name for part in world.timeline.control.partial_backup]
    assert len(listed) == 2
    assert await reset_partial_backup(world.timeline) == listed
    assert world.timeline.control.partial_backup == () and not world.bucket.objects()
    assert not [part for part in world.timeline.control.partial_backup if part.status == DELETING]

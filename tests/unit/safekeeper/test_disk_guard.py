"""When WAL is refused because of the disk, and that it is accepted again."""

from pathlib import Path

import pytest

from neon_services.safekeeper.disk_guard import (
    DiskGuard,
    DiskSpace,
    floor_bytes,
    refusal_above_ratio,
    refusal_below_floor,
    refusal_of_timeline,
)
from neon_services.safekeeper.timelines import Timelines

MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "floor", "again"), [([], 64, 80), ([16, 16], 64, 80), ([1, 1, 1], 4, 5), ([16, 64], 256, 320)]
)
def test_the_floor(sizes: list[int], floor: int, again: int) -> None:
    assert floor_bytes([size * MIB for size in sizes], refusing=False) == floor * MIB
    assert floor_bytes([size * MIB for size in sizes], refusing=True) == again * MIB


def test_the_limits() -> None:
    assert refusal_below_floor(DiskSpace(1000, 100), 100) is None
    assert refusal_below_floor(DiskSpace(1000, 99), 100) == (
        "the disk is nearly full: 99 bytes are free, at least 100 must stay free to accept WAL"
    )
    assert refusal_above_ratio(DiskSpace(1000, 0), 0.0) is None
    assert refusal_above_ratio(DiskSpace(1000, 200), 0.8) is None
    assert str(refusal_above_ratio(DiskSpace(1000, 199), 0.8)).startswith("Global disk usage exceeded limit")
    assert refusal_of_timeline(1 << 60, 0) is None
    assert refusal_of_timeline(100, 100) is None
    assert refusal_of_timeline(101, 100) == (
        "WAL storage utilization exceeds configured limit of 100 bytes: current disk usage: 101 bytes"
    )


def test_refusing_begins_and_ends_by_itself(tmp_path: Path) -> None:
    timelines = Timelines(tmp_path, 1)
    guard = DiskGuard(timelines, tmp_path, max_ratio=0.9, ratio_interval_s=60)
    seen = []
    # (seconds, free MiB of 10,000)
    for now, free in ((0, 5000), (1, 500), (59, 500), (60, 500), (61, 5000), (119, 63), (120, 5000), (121, 64),
                      (122, 63), (123, 79), (124, 80), (125, 64)):  # fmt: skip
        guard.judge(DiskSpace(10_000 * MIB, free * MIB), now)
        refusal = timelines.disk_refusal
        seen.append(None if refusal is None else "ratio" if "Global" in refusal else "floor")
    assert seen == [None, None, None, "ratio", "ratio", "ratio", None, None, "floor", "floor", None, None]

"""The metrics of hot paths look like the library's own."""

import random

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry

from neon_services.ground.histogram import HotCounter, HotHistogram

BOUNDS = (0.001, 0.01, 0.5, 1, 10)


def exposition(registry: CollectorRegistry) -> list[str]:
    lines = prometheus_client.generate_latest(registry).decode().splitlines()
    return sorted(line for line in lines if "_created" not in line)


def without_sum(lines: list[str]) -> tuple[float, list[str]]:
    (summed,) = (line for line in lines if "_sum" in line)
    return float(summed.split()[1]), [line for line in lines if line != summed]


def test_the_exposition_is_that_of_the_librarys_histogram() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    hot = HotHistogram("some_seconds", "Seconds of something", BOUNDS, registry=ours)
    library = prometheus_client.Histogram("some_seconds", "Seconds of something", buckets=BOUNDS, registry=theirs)
    values = [*BOUNDS, 0, 11, *(random.Random(7).uniform(0, 12) for _ in range(200))]
    for value in values:
        library.observe(value)
    for value in values[:60]:
        hot.observe(value)
    hot.observe_all(values[60:60])
    hot.observe_all(values[60:63])
    hot.observe_all(values[63:])
    (our_sum, our_lines), (their_sum, their_lines) = map(without_sum, (exposition(ours), exposition(theirs)))
    assert our_lines == their_lines
    assert our_sum == pytest.approx(their_sum)  # they add in another order
    assert any(line.startswith('some_seconds_bucket{le="+Inf"} 207') for line in exposition(ours))


def test_a_name_is_taken_once() -> None:
    registry = CollectorRegistry()
    HotHistogram("some_seconds", "Seconds", BOUNDS, registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        HotHistogram("some_seconds", "Seconds", BOUNDS, registry=registry)


def test_disordered_buckets_are_refused() -> None:
    with pytest.raises(ValueError, match="ascending"):
        HotHistogram("some_seconds", "Seconds", (1, 0.5), registry=CollectorRegistry())


def test_the_counter_looks_like_the_librarys() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    hot = HotCounter("some_things", "Things by outcome", "outcome", ("good", "bad"), registry=ours)
    library = prometheus_client.Counter("some_things", "Things by outcome", ["outcome"], registry=theirs)
    hot.counts["good"] += 7
    library.labels("good").inc(7)
    library.labels("bad")  # the values are known, so both are shown from the beginning
    assert exposition(ours) == exposition(theirs)
    with pytest.raises(ValueError, match="Duplicated"):
        HotCounter("some_things", "Things", "outcome", ("good",), registry=ours)

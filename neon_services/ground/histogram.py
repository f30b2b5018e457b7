"""A Prometheus histogram for hot paths: one bisection and two additions an observation, without locks.

Invariant: only one thread observes (the event loop's). A scrape that runs in another thread may see an observation half.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

import prometheus_client
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString


class HotHistogram(Collector):
    """The same exposition as ``prometheus_client.Histogram`` without labels. ``buckets``: upper bounds, ascending."""

    def __init__(
        self, name: str, documentation: str, buckets: Sequence[float], registry: CollectorRegistry = prometheus_client.REGISTRY
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = [float(bound) for bound in buckets]
        if self._bounds != sorted(set(self._bounds)):
            raise ValueError(f"histogram {name}: the buckets are not in ascending order")
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """The name, by which the registry notices that it is taken."""
        return [HistogramMetricFamily(self._name, self._documentation)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The present state."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = [(name, float(count)) for name, count in zip(names, accumulate(self._counts), strict=True)]
        return [HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)]

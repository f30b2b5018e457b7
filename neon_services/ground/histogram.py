"""Prometheus metrics for hot paths, without locks: an observation of a histogram is one bisection and two additions.

Invariant: only one thread observes (the event loop's). A scrape that runs in another thread may see an observation half.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import prometheus_client
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
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

    def observe_all(self, values: Sequence[float]) -> None:
        """Count values. Costs one step for each bucket, when there are more values than that."""
        if len(values) < len(self._bounds):
            for value in values:
                self.observe(value)
            return
        counts, ordered, below = self._counts, sorted(values), 0
        for bucket, bound in enumerate(self._bounds):
            upto = bisect_right(ordered, bound, below)
            counts[bucket] += upto - below
            below = upto
        counts[-1] += len(ordered) - below
        self._sum += sum(values)

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """The name, by which the registry notices that it is taken."""
        return [HistogramMetricFamily(self._name, self._documentation)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The present state."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = [(name, float(count)) for name, count in zip(names, accumulate(self._counts), strict=True)]
        return [HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)]


class HotCounter(Collector):
    """``prometheus_client.Counter`` with one label, whose values are known beforehand. Add to ``counts[value]``."""

    def __init__(
        self,
        name: str,
        documentation: str,
        label: str,
        values: Sequence[str],
        registry: CollectorRegistry = prometheus_client.REGISTRY,
    ) -> None:
        self._name, self._documentation, self._label = name, documentation, label
        self.counts = dict.fromkeys(values, 0)
        registry.register(self)

    def describe(self) -> Iterable[CounterMetricFamily]:
        """The name, by which the registry notices that it is taken."""
        return [CounterMetricFamily(self._name, self._documentation)]

    def collect(self) -> Iterable[CounterMetricFamily]:
        """The present state."""
        family = CounterMetricFamily(self._name, self._documentation, labels=[self._label])
        for value, count in self.counts.items():
            family.add_metric([value], count)
        return [family]

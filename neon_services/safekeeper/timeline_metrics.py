"""Metrics of each broker-active timeline, and counts of timelines, read from the timelines when somebody asks."""

import time
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from neon_services.ground.pgtime import to_datetime
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines

LABELS = ("tenant_id", "timeline_id")


def _feedback_time(timeline: Timeline) -> float:
    feedback = timeline.last_ps_feedback
    return to_datetime(feedback.replytime_us).timestamp() if feedback is not None else 0.0


_GAUGES: tuple[tuple[str, str, Callable[[Timeline], float]], ...] = (
    ("commit_lsn", "Position committed by a quorum", lambda t: t.acceptor.commit_lsn),
    ("backup_lsn", "Position up to which WAL is in object storage", lambda t: t.acceptor.backup_lsn),
    ("flush_lsn", "End of the last complete record on disk", lambda t: t.acceptor.flush_lsn),
    ("epoch_start_lsn", "Where the newest term begins", lambda t: t.acceptor.term_start_lsn),
    ("peer_horizon_lsn", "Position flushed by all members", lambda t: t.acceptor.peer_horizon_lsn),
    ("remote_consistent_lsn", "Position durable at the pageserver", lambda t: t.acceptor.remote_consistent_lsn),
    (
        "ps_last_received_lsn",
        "Last position received by the pageserver",
        lambda t: t.last_ps_feedback.last_received_lsn if t.last_ps_feedback is not None else 0,
    ),
    ("feedback_last_time_seconds", "Time of the pageserver's last feedback", _feedback_time),
    ("ps_corruption_detected", "Whether a pageserver reported corruption", lambda t: t.ps_corruption_detected),
    ("timeline_active", "Whether the timeline is published at the broker", lambda t: t.active),
    ("wal_backup_active", "Whether this safekeeper uploads the timeline's WAL", lambda t: t.offloading),
    ("connected_computes", "Connected proposers", lambda t: t.computes),
    ("interpreted_wal_reader_tasks", "Readers that interpret WAL", lambda t: t.interpreted.count),
    ("disk_usage_bytes", "Bytes of WAL segments on disk", lambda t: t.disk_usage_bytes),
    ("acceptor_term", "Highest term promised", lambda t: t.acceptor.term),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Timeline], float]], ...] = (
    ("ps_feedback_count", "Feedback messages of pageservers", lambda t: t.ps_feedback_count),
    ("written_wal_bytes", "Bytes of WAL written", lambda t: t.store.written_bytes),
    ("written_wal_seconds", "Seconds spent writing WAL without sync", lambda t: t.store.write_seconds),
    ("flushed_wal_seconds", "Seconds spent making WAL durable", lambda t: t.store.flush_seconds),
)


class TimelineCollector(Collector):
    """Registered once per process."""

    def __init__(self, timelines: Timelines) -> None:
        self._timelines = timelines

    def collect(self) -> Iterable[Metric]:
        """All metrics of this moment."""
        started = time.perf_counter()
        everything = self._timelines.all()
        active = [timeline for timeline in everything if timeline.active]
        yield GaugeMetricFamily("safekeeper_timelines", "Timelines on this safekeeper", value=len(everything))
        yield GaugeMetricFamily("safekeeper_active_timelines", "Timelines published at the broker", value=len(active))
        evicted = sum(timeline.offloaded for timeline in everything)
        yield GaugeMetricFamily("safekeeper_evicted_timelines", "Timelines whose WAL is in object storage only", value=evicted)
        broken = len(self._timelines.broken)
        yield GaugeMetricFamily("safekeeper_broken_timelines", "Timelines whose files are unusable", value=broken)
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(f"safekeeper_{name}", text, labels=LABELS)
            for timeline in active:
                gauge.add_metric([str(timeline.ttid.tenant_id), str(timeline.ttid.timeline_id)], float(value(timeline)))
            yield gauge
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(f"safekeeper_{name}", text, labels=LABELS)
            for timeline in active:
                counter.add_metric([str(timeline.ttid.tenant_id), str(timeline.ttid.timeline_id)], float(value(timeline)))
            yield counter
        seconds = time.perf_counter() - started
        yield GaugeMetricFamily(
            "safekeeper_collect_timeline_metrics_seconds", "Seconds to collect these metrics", value=seconds
        )

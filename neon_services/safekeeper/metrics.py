"""The safekeeper's process-wide metrics, by Neon's names. Those of each timeline are in timeline_metrics.py."""

import threading
from collections.abc import Iterable

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from neon_services.ground.histogram import HotCounter, HotHistogram


class UnsuffixedCounter(Collector):
    """A counter whose name does not end in ``_total``, which the library's own cannot do: some of Neon's are so."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text, self._value = name, text, 0
        self._lock = threading.Lock()
        REGISTRY.register(self)

    def inc(self) -> None:
        """Count one."""
        with self._lock:
            self._value += 1

    def collect(self) -> Iterable[Metric]:
        """The one sample."""
        metric = Metric(self._name, self._text, "unknown")
        metric.add_sample(self._name, {}, self._value)
        yield metric


_FAST = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_BYTES = (128, 512, 1024, 4096, 8192, 16384, 65536, 131072, 262144, 1048576)

WRITE_WAL_BYTES = HotHistogram("safekeeper_write_wal_bytes", "Bytes of WAL written in one batch", buckets=_BYTES)
WRITE_WAL_SECONDS = HotHistogram("safekeeper_write_wal_seconds", "Seconds of one write of WAL without sync", buckets=_FAST)
FLUSH_WAL_SECONDS = HotHistogram("safekeeper_flush_wal_seconds", "Seconds of one durable write of WAL", buckets=_FAST)
PERSIST_CONTROL_FILE_SECONDS = Histogram(
    "safekeeper_persist_control_file_seconds", "Seconds of one replacement of a control file", buckets=_FAST
)
WAL_STORAGE_OPERATION_SECONDS = Histogram(
    "safekeeper_wal_storage_operation_seconds", "Seconds of the rarer operations on segments", ["operation"], buckets=_FAST
)
WAL_DISK_IO_ERRORS = UnsuffixedCounter("safekeeper_wal_disk_io_errors", "Failed operations on WAL segments")
REMOVED_WAL_SEGMENTS = Counter("safekeeper_removed_wal_segments", "WAL segments removed")

BACKED_UP_SEGMENTS = Counter("safekeeper_backed_up_segments", "Full WAL segments sent to object storage")
BACKUP_ERRORS = Counter("safekeeper_backup_errors", "Failed attempts to send a full WAL segment")
BACKUP_REELECT_LEADER = Counter("safekeeper_backup_reelect_leader", "Times another member was chosen because of a backlog")
WAL_BACKUP_TASKS_STARTED = Counter("safekeeper_wal_backup_tasks_started", "Times this member began to send a timeline's WAL")
WAL_BACKUP_TASKS_FINISHED = Counter("safekeeper_wal_backup_tasks_finished", "Times this member stopped sending it")
PARTIAL_BACKUP_UPLOADS = Counter("safekeeper_partial_backup_uploads", "Uploads of partial segments", ["result"])
PARTIAL_BACKUP_UPLOADED_BYTES = Counter("safekeeper_partial_backup_uploaded_bytes", "Bytes of uploaded partial segments")
EVICTION_EVENTS_STARTED = Counter("safekeeper_eviction_events_started", "Evictions and their reversals begun", ["kind"])
EVICTION_EVENTS_COMPLETED = Counter("safekeeper_eviction_events_completed", "Evictions and their reversals done", ["kind"])
WAL_STORAGE_LIMIT_ERRORS = UnsuffixedCounter(
    "safekeeper_wal_storage_limit_errors", "Messages refused because the disk is too full"
)
WAL_REFUSED = Gauge("safekeeper_wal_refused", "1 while no timeline accepts WAL because the disk is too full")
GLOBAL_DISK_UTILIZATION_CHECK_SECONDS = Histogram(
    "safekeeper_global_disk_utilization_check_seconds", "Seconds to ask how full the disk is", buckets=_FAST
)

PROPOSER_ACCEPTOR_MESSAGES = HotCounter(
    "safekeeper_proposer_acceptor_messages", "Messages of proposers, by what became of them", "outcome", ("success", "error")
)
PG_QUERIES_RECEIVED = Counter("safekeeper_pg_queries_received", "Commands received on the WAL port", ["query"])
PG_QUERIES_FINISHED = Counter("safekeeper_pg_queries_finished", "Commands finished on the WAL port", ["query"])
WAL_RECEIVERS = Gauge("safekeeper_wal_receivers", "Open connections of proposers")
WAL_READERS = Gauge("safekeeper_wal_readers", "Open readers of WAL", ["kind", "target"])
RECEIVED_PS_FEEDBACKS = Counter("safekeeper_received_ps_feedbacks", "Feedback messages of pageservers")

BROKER_PUSHED_UPDATES = Counter("safekeeper_broker_pushed_updates", "Timeline infos sent to the broker")
BROKER_PULLED_UPDATES = Counter("safekeeper_broker_pulled_updates", "Timeline infos received from the broker", ["result"])
BROKER_PUSH_UPDATE_SECONDS = Histogram("safekeeper_broker_push_update_seconds", "Seconds of one round of infos")
BROKER_ITERATION_TIMELINES = Histogram(
    "safekeeper_broker_iteration_timelines", "Timelines pushed in one round", buckets=(0, 1, 10, 100, 1000, 10000)
)
MANAGER_ITERATIONS = Counter("safekeeper_manager_iterations", "Times a timeline was looked at by the manager")
MANAGER_ACTIVE_CHANGES = Counter("safekeeper_manager_active_changes", "Times a timeline became active or inactive")

PULL_TIMELINE_ERRORS = UnsuffixedCounter("safekeeper_recovery_pull_timeline_errors", "Failed pulls of timelines")
PULL_TIMELINE_OKS = UnsuffixedCounter("safekeeper_recovery_pull_timeline_oks", "Timelines pulled, or found here already")
PULL_TIMELINE_SECONDS = Histogram(
    "safekeeper_recovery_pull_timeline_seconds", "Seconds to pull a timeline", buckets=(0.1, 0.5, 1, 5, 10, 60, 300, 1800)
)
MISC_OPERATION_SECONDS = Histogram(
    "safekeeper_misc_operation_seconds", "Seconds of operations on timelines", ["operation"], buckets=(*_FAST, 10, 60, 300)
)

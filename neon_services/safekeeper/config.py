"""What the command line says, checked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neon_services.safekeeper.access import AccessConfig


@dataclass(frozen=True)
class OffloadConfig:
    """How WAL goes to object storage. Durations are in seconds, lags in bytes of WAL; a lag of 0 is no limit."""

    #: Full and partial segments are sent.
    wal_backup: bool = True
    backup_parallel_jobs: int = 5
    heartbeat_timeout_s: float = 5.0
    max_offloader_lag: int = 128 * 1024 * 1024
    max_reelect_offloader_lag: int = 0
    partial_backup_timeout_s: float = 900.0
    partial_backup_concurrency: int = 5
    #: Idle timelines are evicted from the disk.
    eviction: bool = False
    delete_offloaded_wal: bool = False
    eviction_min_resident_s: float = 900.0


@dataclass(frozen=True)
class SafekeeperConfig:
    """Settings of one safekeeper process. Durations are in seconds."""

    datadir: Path
    node_id: int
    listen_pg: tuple[str, int]
    listen_http: tuple[str, int]
    advertise_pg: str
    http_connstr: str
    availability_zone: str | None = None
    broker_endpoint: str = "http://127.0.0.1:50051"
    broker_keepalive_interval_ms: int = 5000
    heartbeat_timeout_s: float = 5.0
    control_file_save_interval_s: float = 300.0
    periodic_broker_push: bool = True
    walsenders_keep_horizon: bool = False
    peer_recovery: bool = False
    #: WAL is interpreted once for all shards; those further apart than this many bytes (None: any) are served on their own.
    wal_reader_fanout: bool = False
    max_delta_for_fanout: int | None = None
    sync: bool = True
    #: The remote_storage table; None: no WAL is sent, and none is ever removed.
    remote_storage: dict[str, Any] | None = None
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    max_timeline_disk_usage_bytes: int = 0
    max_global_disk_usage_ratio: float = 0.0
    global_disk_check_interval_s: float = 60.0
    force_metric_collection_on_scrape: bool = True
    #: Whom to ask at the start which timelines should be here; None: nobody.
    startup_recovery_url: str | None = None

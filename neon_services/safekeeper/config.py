"""What the command line says, checked."""

from dataclasses import dataclass
from pathlib import Path


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
    sync: bool = True

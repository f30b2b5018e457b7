"""What the HTTP API says about timelines: TimelineStatus and the debug dump, in Neon's JSON shapes."""

import contextlib
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from neon_services.ground.lsn import format_lsn
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.control_file import FILE_NAME
from neon_services.safekeeper.timeline import Timeline


def timeline_status(timeline: Timeline, heartbeat_timeout_s: float) -> dict[str, Any]:
    """TimelineStatus. All LSNs are those in memory; peers that fell silent are left out."""
    acceptor = timeline.acceptor
    state = acceptor.state
    fresh = time.monotonic() - heartbeat_timeout_s
    return {
        "tenant_id": str(timeline.ttid.tenant_id),
        "timeline_id": str(timeline.ttid.timeline_id),
        "mconf": state.mconf.to_json(),
        "acceptor_state": {
            "term": state.term,
            "epoch": acceptor.last_log_term,
            "term_history": [{"term": entry.term, "lsn": format_lsn(entry.lsn)} for entry in state.term_history],
        },
        "pg_info": {"pg_version": state.pg_version, "system_id": state.system_id, "wal_seg_size": state.wal_seg_size},
        "flush_lsn": format_lsn(acceptor.flush_lsn),
        "timeline_start_lsn": format_lsn(state.timeline_start_lsn),
        "local_start_lsn": format_lsn(state.local_start_lsn),
        "commit_lsn": format_lsn(acceptor.commit_lsn),
        "backup_lsn": format_lsn(acceptor.backup_lsn),
        "peer_horizon_lsn": format_lsn(acceptor.peer_horizon_lsn),
        "remote_consistent_lsn": format_lsn(acceptor.remote_consistent_lsn),
        "peers": [peer.to_json() for peer in timeline.peers.values() if peer.seen_at >= fresh],
        "walsenders": [sender.to_json() for sender in timeline.senders.values()],
        "walreceivers": [receiver.to_json() for receiver in timeline.receivers.values()],
    }


def memory_dump(timeline: Timeline) -> dict[str, Any]:
    """What is in memory only."""
    acceptor, store = timeline.acceptor, timeline.store
    return {
        "is_cancelled": timeline.cancelled,
        "peers_info_len": len(timeline.peers),
        "walsenders": [sender.to_json() for sender in timeline.senders.values()],
        "wal_backup_active": timeline.offloading,
        "active": timeline.active,
        "num_computes": timeline.computes,
        "last_removed_segno": timeline.removed_segment,
        "epoch_start_lsn": format_lsn(acceptor.term_start_lsn),
        "mem_state": {
            "commit_lsn": format_lsn(acceptor.commit_lsn),
            "backup_lsn": format_lsn(acceptor.backup_lsn),
            "peer_horizon_lsn": format_lsn(acceptor.peer_horizon_lsn),
            "remote_consistent_lsn": format_lsn(acceptor.remote_consistent_lsn),
            "proposer_uuid": acceptor.state.proposer_uuid.hex(),
        },
        "mgr_status": _manager_status(timeline),
        "write_lsn": format_lsn(store.write_lsn),
        "write_record_lsn": format_lsn(store.write_record_lsn),
        "flush_lsn": format_lsn(store.flush_lsn),
        "file_open": store.file_open,
    }


def _manager_status(timeline: Timeline) -> str:
    if timeline.cancelled:
        return "Deleted"
    if timeline.offloaded:
        return "Evicted"
    return "Active" if timeline.active else "Inactive"


def disk_content(directory: Path) -> dict[str, Any] | None:
    """The files of a timeline; None when it has just been deleted. Reads them, so it belongs into a thread. Raises OSError."""
    files = []
    try:
        paths = sorted(directory.iterdir())
    except FileNotFoundError:
        return None
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # segments are completed and removed while we look
            details = path.stat()
            start_zeroes, end_zeroes = _zero_edges(path)
            files.append(
                {
                    "name": path.name,
                    "size": details.st_size,
                    "created": _time(details.st_ctime),
                    "modified": _time(details.st_mtime),
                    "start_zeroes": start_zeroes,
                    "end_zeroes": end_zeroes,
                }
            )
    return {"files": files}


def _zero_edges(path: Path) -> tuple[int, int]:
    """How many zero bytes the file begins with, and how many follow behind the last other byte."""
    data = path.read_bytes()
    content = data.rstrip(b"\0")
    return (len(data) - len(data.lstrip(b"\0")), len(data) - len(content)) if content else (len(data), 0)


def config_dump(config: SafekeeperConfig) -> dict[str, Any]:
    """What may be known about how this process was started: no paths of keys, no storage's address, no tokens."""
    return {
        "id": config.node_id,
        "workdir": str(config.datadir),
        "listen_pg_addr": "{}:{}".format(*config.listen_pg),
        "listen_http_addr": "{}:{}".format(*config.listen_http),
        "no_sync": not config.sync,
        "max_offloader_lag_bytes": config.offload.max_offloader_lag,
        "wal_backup_enabled": config.offload.wal_backup and config.remote_storage is not None,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat().replace("+00:00", "Z")


def now_text() -> str:
    """The wall clock's time for the debug dump."""
    return _time(time.time())


def wal_last_modified(directory: Path) -> str | None:
    """When WAL was last written; None when there is none. Raises OSError."""
    times = []
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            if path.name != FILE_NAME:
                with contextlib.suppress(FileNotFoundError):
                    times.append(path.stat().st_mtime)
    return _time(max(times)) if times else None

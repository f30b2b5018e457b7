"""The JSON shapes of Neon's management API for tenants, timelines and layers."""

from typing import Any

from neon_services.ground.lsn import format_lsn
from neon_services.pageserver.tenant import Tenant
from neon_services.pageserver.timeline import Timeline


def timeline_info(timeline: Timeline, extra: dict[str, Any]) -> dict[str, Any]:
    """TimelineInfo; ``extra`` are the fields that WAL receiving and logical sizes contribute."""
    state: Any = (
        {"Broken": {"reason": timeline.broken_reason, "backtrace": ""}} if timeline.state == "Broken" else timeline.state
    )
    physical = sum(layer.file_size for layer in timeline.layer_map.layers if layer.resident)
    ancestor = timeline.ancestor
    return {
        "tenant_id": str(timeline.tenant_shard_id),
        "timeline_id": str(timeline.timeline_id),
        "ancestor_timeline_id": None if ancestor is None else str(ancestor.timeline_id),
        "ancestor_lsn": None if ancestor is None else format_lsn(timeline.ancestor_lsn),
        "last_record_lsn": format_lsn(timeline.last_record_lsn),
        "prev_record_lsn": format_lsn(timeline.prev_record_lsn) if timeline.prev_record_lsn else None,
        "applied_gc_cutoff_lsn": format_lsn(timeline.latest_gc_cutoff_lsn),
        "min_readable_lsn": format_lsn(max(timeline.latest_gc_cutoff_lsn, timeline.initdb_lsn)),
        "disk_consistent_lsn": format_lsn(timeline.disk_consistent_lsn),
        "remote_consistent_lsn": format_lsn(timeline.remote_consistent_lsn),
        "remote_consistent_lsn_visible": format_lsn(timeline.remote_consistent_lsn_visible),
        "initdb_lsn": format_lsn(timeline.initdb_lsn),
        "current_logical_size": 0,
        "current_logical_size_is_accurate": False,
        "directory_entries_counts": [],
        "current_physical_size": physical,
        "pitr_history_size": 0,
        "within_ancestor_pitr": False,
        "timeline_dir_layer_file_size_sum": physical,
        "wal_source_connstr": None,
        "last_received_msg_lsn": None,
        "last_received_msg_ts": None,
        "pg_version": timeline.pg_version,
        "state": state,
        "walreceiver_status": "",
        "is_archived": False,
    } | extra


def tenant_info(tenant: Tenant) -> dict[str, Any]:
    """TenantInfo."""
    broken = {"reason": tenant.broken_reason, "backtrace": ""}
    slug = "failed" if tenant.state == "Broken" else "maybe" if tenant.state == "Attaching" else "attached"
    return {
        "id": str(tenant.shard),
        "state": {"slug": tenant.state, **({"data": broken} if tenant.state == "Broken" else {})},
        "current_physical_size": sum(
            layer.file_size for t in tenant.timelines.values() for layer in t.layer_map.layers if layer.resident
        ),
        "attachment_status": {"slug": slug, **({"data": broken} if slug == "failed" else {})},
        "generation": tenant.generation,
    }


def layer_map_info(timeline: Timeline) -> dict[str, Any]:
    """LayerMapInfo."""
    in_memory: list[dict[str, Any]] = []
    for layer in reversed(timeline.in_memory_layers()):
        entry: dict[str, Any] = {
            "kind": "Open" if layer.end_lsn is None else "Frozen",
            "lsn_start": format_lsn(layer.start_lsn),
        }
        if layer.end_lsn is not None:
            entry["lsn_end"] = format_lsn(layer.end_lsn)
        in_memory.append(entry)
    historic: list[dict[str, Any]] = []
    for file in timeline.layer_map.layers:
        entry = {
            "kind": "Image" if file.name.is_image else "Delta",
            "layer_file_name": str(file.name),
            "layer_file_size": file.file_size,
            "lsn_start": format_lsn(file.name.lsn_start),
            "remote": not file.resident,
            "access_stats": {
                "access_time": int(file.access_time * 1000),
                "residence_time": int(file.residence_time * 1000),
                "visible": True,
            },
        }
        if not file.name.is_image:
            entry |= {"lsn_end": format_lsn(file.name.lsn_end), "l0": file.name.is_l0}
        historic.append(entry)
    return {"in_memory_layers": in_memory, "historic_layers": historic}

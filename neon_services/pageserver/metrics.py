"""Prometheus metrics under Neon's names; values of timelines are read when somebody scrapes, so detached ones disappear."""

from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from neon_services.pageserver.layers.layer import LayerEnvironment
from neon_services.pageserver.tenant_manager import TenantManager

_LABELS = ["tenant_id", "shard_id", "timeline_id"]


class EngineCollector(Collector):
    """Metrics of tenants, timelines, layers and the block cache."""

    def __init__(self, tenants: TenantManager, environment: LayerEnvironment, config_ignored_items: int) -> None:
        self._tenants = tenants
        self._environment = environment
        self._ignored = config_ignored_items

    def register(self) -> None:
        """Add to the process's default registry."""
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        yield from self._timelines()
        states: dict[str, int] = {}
        for tenant in self._tenants.tenants.values():
            states[tenant.state] = states.get(tenant.state, 0) + 1
        family = GaugeMetricFamily("pageserver_tenant_states_count", "Attached tenants by state", labels=["state"])
        for state, count in states.items():
            family.add_metric([state], count)
        yield family
        cache, environment = self._environment.cache, self._environment
        yield GaugeMetricFamily("pageserver_page_cache_size_current_bytes", "Decoded blocks kept", cache.used_bytes)
        yield GaugeMetricFamily("pageserver_page_cache_size_max_bytes", "Bound of the block cache", cache.capacity_bytes)
        yield CounterMetricFamily("pageserver_page_cache_read_accesses", "Block cache lookups", value=cache.hits + cache.misses)
        yield CounterMetricFamily("pageserver_page_cache_read_hits", "Block cache hits", value=cache.hits)
        yield CounterMetricFamily(
            "pageserver_ondemand_download_count", "Layers downloaded for a read", value=environment.downloads
        )
        yield CounterMetricFamily(
            "pageserver_ondemand_download_bytes_total", "Bytes of these layers", value=environment.downloaded_bytes
        )
        yield CounterMetricFamily(
            "pageserver_layer_files_damaged", "Local files that failed a check", value=environment.damaged
        )
        yield GaugeMetricFamily("pageserver_config_ignored_items", "Unknown keys in pageserver.toml", self._ignored)

    def _timelines(self) -> Iterator[Metric]:
        def gauge(name: str, text: str, extra: tuple[str, ...] = ()) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"pageserver_{name}", text, labels=[*_LABELS, *extra])

        last = gauge("last_record_lsn", "End of the last ingested record")
        disk = gauge("disk_consistent_lsn", "Everything up to here is in layer files")
        remote = gauge("projected_remote_consistent_lsn", "Everything up to here is in remote storage")
        resident = gauge("resident_physical_size", "Bytes of layer files on local disk")
        stored = gauge("remote_physical_size", "Bytes of layer files in remote storage")
        count = gauge("layer_count", "Layers", ("level", "kind"))
        size = gauge("layer_bytes", "Bytes of layers", ("level", "kind"))
        failing = gauge("upload_consecutive_failures", "Failed attempts since the last upload that worked")
        for timeline in self._tenants.timelines():
            shard = timeline.tenant_shard_id
            labels = [str(shard.tenant_id), shard.shard_slug, str(timeline.timeline_id)]
            layers = timeline.layer_map.layers
            last.add_metric(labels, timeline.last_record_lsn)
            disk.add_metric(labels, timeline.disk_consistent_lsn)
            remote.add_metric(labels, timeline.remote_consistent_lsn)
            resident.add_metric(labels, sum(layer.file_size for layer in layers if layer.resident))
            stored.add_metric(labels, sum(layer.file_size for layer in layers))
            failing.add_metric(labels, 0 if timeline.uploads is None else timeline.uploads.failures)
            groups: dict[tuple[str, str], list[int]] = {}
            for layer in layers:
                kind = ("L0" if layer.name.is_l0 else "L1", "image" if layer.name.is_image else "delta")
                groups.setdefault(kind, []).append(layer.file_size)
            for kind, sizes in groups.items():
                count.add_metric([*labels, *kind], len(sizes))
                size.add_metric([*labels, *kind], sum(sizes))
        yield from (last, disk, remote, resident, stored, count, size, failing)

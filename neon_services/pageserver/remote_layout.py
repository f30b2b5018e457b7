"""Keys of the pageserver's objects in remote storage. The generation suffix is 8 hex digits; very old objects have none."""

from neon_services.ground.ids import TenantId, TimelineId
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.shard import TenantShardId

INDEX_NAME = "index_part.json"
TEMP_DOWNLOAD_SUFFIX = ".temp_download"


def tenant_prefix(shard: TenantShardId) -> str:
    """Where everything of a tenant shard is; ends in a slash."""
    return f"tenants/{shard}/"


def timelines_prefix(shard: TenantShardId) -> str:
    """Where the timelines of a tenant shard are; ends in a slash."""
    return f"tenants/{shard}/timelines/"


def timeline_prefix(shard: TenantShardId, timeline: TimelineId) -> str:
    """Where the objects of a timeline are; ends in a slash."""
    return f"{timelines_prefix(shard)}{timeline}/"


def layer_key(shard: TenantShardId, timeline: TimelineId, name: LayerName, generation: int) -> str:
    """A layer object. ``shard`` is the one that wrote the layer, which after a split is not the reader's."""
    return timeline_prefix(shard, timeline) + name.remote(generation)


def index_key(shard: TenantShardId, timeline: TimelineId, generation: int) -> str:
    """The index object that a given generation writes."""
    return f"{timeline_prefix(shard, timeline)}{INDEX_NAME}-{generation:08x}"


def parse_index_generation(object_name: str) -> int | None:
    """The generation of ``index_part.json[-<generation>]``, -1 without suffix, None for any other object name."""
    if object_name == INDEX_NAME:
        return -1
    prefix, dash, suffix = object_name.partition(f"{INDEX_NAME}-")
    if prefix or not dash or len(suffix) != 8 or set(suffix) - set("0123456789abcdef"):
        return None
    return int(suffix, 16)


def manifest_key(shard: TenantShardId, generation: int) -> str:
    """The tenant manifest that a given generation writes."""
    return f"{tenant_prefix(shard)}tenant-manifest-{generation:08x}.json"


def initdb_key(tenant: TenantId, timeline: TimelineId) -> str:
    """The archive of the data directory that a timeline was bootstrapped from; not per shard."""
    return f"tenants/{tenant}/timelines/{timeline}/initdb.tar.zst"

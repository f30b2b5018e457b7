"""``index_part.json``: the one truth about a timeline, in remote storage under a name that carries the writer's generation.

Invariant: every layer that an uploaded index names has been uploaded before. A timeline exists exactly when it has an index.
"""

import json
import time
from dataclasses import dataclass, field
from typing import Any

from neon_services.ground.errors import CorruptionError
from neon_services.ground.ids import TimelineId
from neon_services.ground.lsn import format_lsn, parse_lsn
from neon_services.ground.remote_storage import ObjectNotFound, RemoteStorage
from neon_services.pageserver.layers.names import LayerName, parse_layer_name
from neon_services.pageserver.remote_layout import INDEX_NAME, index_key, parse_index_generation, timeline_prefix
from neon_services.pageserver.shard import TenantShardId

INDEX_VERSION = 15


@dataclass(frozen=True, slots=True)
class LayerMetadata:
    """What the index says about one layer."""

    file_size: int
    generation: int
    shard: str | None = None  #: ``NNCC`` of the writer when it was a shard


@dataclass(slots=True)
class IndexPart:
    """The content of an index."""

    disk_consistent_lsn: int
    prev_record_lsn: int | None
    ancestor_timeline: TimelineId | None
    ancestor_lsn: int
    latest_gc_cutoff_lsn: int
    initdb_lsn: int
    pg_version: int
    layers: dict[LayerName, LayerMetadata] = field(default_factory=dict)
    deleted_at: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  #: fields that are not ours to interpret: kept as they are

    def to_json(self) -> bytes:
        """The object's content."""
        layer_metadata: dict[str, Any] = {}
        for name, layer in sorted(self.layers.items()):
            entry: dict[str, Any] = {"file_size": layer.file_size, "generation": layer.generation}
            if layer.shard is not None:
                entry["shard"] = layer.shard
            layer_metadata[str(name)] = entry
        body: dict[str, Any] = {
            "version": INDEX_VERSION,
            **self.extra,
            "layer_metadata": layer_metadata,
            "disk_consistent_lsn": format_lsn(self.disk_consistent_lsn),
            "metadata_bytes": {
                "disk_consistent_lsn": format_lsn(self.disk_consistent_lsn),
                "prev_record_lsn": None if self.prev_record_lsn is None else format_lsn(self.prev_record_lsn),
                "ancestor_timeline": None if self.ancestor_timeline is None else str(self.ancestor_timeline),
                "ancestor_lsn": format_lsn(self.ancestor_lsn),
                "latest_gc_cutoff_lsn": format_lsn(self.latest_gc_cutoff_lsn),
                "initdb_lsn": format_lsn(self.initdb_lsn),
                "pg_version": self.pg_version,
            },
        }
        body.setdefault("lineage", {})
        if self.deleted_at is not None:
            body["deleted_at"] = self.deleted_at
        return json.dumps(body, indent=1).encode()

    @classmethod
    def parse(cls, content: bytes, where: str) -> "IndexPart":
        """Read an index. Raises CorruptionError naming the object and what is wrong with it."""
        try:
            body = json.loads(content)
            metadata = body.get("metadata_bytes", body.get("metadata"))
            if not isinstance(metadata, dict):
                raise CorruptionError(f"{where}: metadata of index version {body.get('version')} is not supported")
            layers = {}
            for text, entry in body["layer_metadata"].items():
                name, _ = parse_layer_name(text)
                layers[name] = LayerMetadata(int(entry["file_size"]), int(entry.get("generation", -1)), entry.get("shard"))
            prev, ancestor = metadata.get("prev_record_lsn"), metadata.get("ancestor_timeline")
            known = {"version", "layer_metadata", "disk_consistent_lsn", "metadata_bytes", "metadata", "deleted_at"}
            index = cls(
                disk_consistent_lsn=parse_lsn(metadata["disk_consistent_lsn"]),
                prev_record_lsn=None if prev is None else parse_lsn(prev),
                ancestor_timeline=None if ancestor is None else TimelineId.parse(ancestor),
                ancestor_lsn=parse_lsn(metadata["ancestor_lsn"]),
                latest_gc_cutoff_lsn=parse_lsn(metadata["latest_gc_cutoff_lsn"]),
                initdb_lsn=parse_lsn(metadata["initdb_lsn"]),
                pg_version=int(metadata["pg_version"]),
                layers=layers,
                deleted_at=body.get("deleted_at"),
                extra={key: value for key, value in body.items() if key not in known},
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptionError(f"{where} is not a valid index: {type(error).__name__}: {error}") from error
        if index.ancestor_timeline is None and not index.layers and "import_pgdata" not in index.extra:
            raise CorruptionError(f"{where} is not a valid index: a timeline without ancestor has no layers")
        return index


def naive_now() -> str:
    """The current UTC time as the index writes it."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}"


async def find_index(
    remote: RemoteStorage, shard: TenantShardId, timeline: TimelineId, generation: int
) -> tuple[IndexPart, int] | None:
    """The newest index written by a generation up to ours, with that generation; None when there is none.

    Most often it is ours or the previous one; otherwise the objects are listed. Raises CorruptionError, RemoteStorageError.
    """
    for candidate in (generation, generation - 1):
        if candidate >= 0:
            try:
                key = index_key(shard, timeline, candidate)
                return IndexPart.parse(await remote.get(key), key), candidate
            except ObjectNotFound:
                continue
    prefix = timeline_prefix(shard, timeline)
    generations = [
        found
        for key in await remote.list_keys(prefix + INDEX_NAME)
        if (found := parse_index_generation(key.removeprefix(prefix))) is not None and found <= generation
    ]
    if not generations:
        return None
    newest = max(generations)
    key = index_key(shard, timeline, newest) if newest >= 0 else prefix + INDEX_NAME
    try:
        return IndexPart.parse(await remote.get(key), key), newest
    except ObjectNotFound:
        return None

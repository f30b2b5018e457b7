"""Writing image layers of a whole timeline at one LSN.

Invariant: together the new layers cover the key space without gaps, because what an image layer's range does not contain counts
as not existing; and they appear in the layer map all at once.
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from neon_services.ground.errors import NeonError
from neon_services.pageserver.layers.image import ImageLayerWriter
from neon_services.pageserver.layers.layer import Layer, run_to_end
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.operations import STORAGE_OPERATIONS
from neon_services.pageserver.reconstruct import RedoFailed
from neon_services.pageserver.values import KEY_MAX, KEY_MIN, MissingKey, U64Array, split_key

if TYPE_CHECKING:
    from neon_services.pageserver.timeline import Timeline

_KEYS_PER_READ = 256
_PAGE_BYTES = 8192
_FSM_FORK, _VM_FORK = 1, 2


async def create_image_layers(timeline: "Timeline") -> list[Layer]:
    """Flush, then write image layers at ``disk_consistent_lsn``; the new layers, already in the map and on their way up.

    A key whose history cannot be rebuilt stops the work, except pages of free space and visibility maps, which become zero
    pages: both are hints that Postgres repairs by itself.
    """
    lsn = await timeline.freeze_and_flush()
    started = time.monotonic()
    key_hi, key_lo = await timeline.keys_in_range(split_key(KEY_MIN), split_key(KEY_MAX), lsn)
    per_layer = max(1, timeline.conf.integer("compaction_target_size") // _PAGE_BYTES)
    cuts = [0, *range(per_layer, len(key_hi), per_layer), len(key_hi)]
    edges = [KEY_MIN, *(int(key_hi[cut]) << 64 | int(key_lo[cut]) for cut in cuts[1:-1]), KEY_MAX]
    created: list[Layer] = []
    try:
        for number in range(len(cuts) - 1):
            name = LayerName.image(edges[number], edges[number + 1], lsn)
            if timeline.layer_map.get(name) is None:
                part = slice(cuts[number], cuts[number + 1])
                created.append(await _write_one(timeline, name, key_hi[part], key_lo[part]))
    except BaseException:
        for layer in created:
            layer.path.unlink(missing_ok=True)
        raise
    if created:
        timeline.layer_map.replace(add=created)
        timeline.schedule_uploads(created)
        STORAGE_OPERATIONS.labels("create images").observe(time.monotonic() - started)
    return created


async def _write_one(timeline: "Timeline", name: LayerName, key_hi: U64Array, key_lo: U64Array) -> Layer:
    resources = timeline.resources
    assert resources.directory is not None
    writer = ImageLayerWriter(
        resources.directory,
        name,
        resources.generation,
        timeline.tenant_shard_id,
        timeline.timeline_id,
        sync=resources.environment.sync,
    )
    threads = resources.environment.writers
    try:
        for first in range(0, len(key_hi), _KEYS_PER_READ):
            hi, lo = key_hi[first : first + _KEYS_PER_READ], key_lo[first : first + _KEYS_PER_READ]
            values = await timeline.get_many(hi, lo, name.lsn_start)
            values = [_usable(value, *key) for value, *key in zip(values, hi.tolist(), lo.tolist(), strict=True)]
            present = np.array([value is not None for value in values], bool)
            kept = [value for value in values if value is not None]
            await run_to_end(threads, writer.add, hi[present], lo[present], kept)
        size = await run_to_end(threads, writer.finish)
    except BaseException:
        writer.abandon()
        raise
    return timeline.new_layer(name, size)


def _usable(value: Any, key_hi: int, key_lo: int) -> bytes | None:
    if isinstance(value, bytes):
        return value
    if isinstance(value, MissingKey):
        return None
    fork = key_lo >> 32 & 0xFF
    if isinstance(value, RedoFailed) and key_hi >> 56 == 0 and fork in (_FSM_FORK, _VM_FORK):
        return bytes(_PAGE_BYTES)
    assert isinstance(value, NeonError)
    raise value

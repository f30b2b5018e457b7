"""Image layers: the value of every key of a range at one LSN. A key of the range that is absent does not exist there."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neon_services.ground.ids import TimelineId
from neon_services.pageserver.layers.format import LayerWriter
from neon_services.pageserver.layers.names import LayerName
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.values import IMAGE, U64Array


class ImageLayerWriter:
    """Writes one image layer file from values in key order; blocking."""

    def __init__(
        self,
        directory: Path,
        name: LayerName,
        generation: int,
        shard: TenantShardId,
        timeline_id: TimelineId,
        *,
        sync: bool = True,
    ) -> None:
        assert name.is_image
        self.name = name
        self._writer = LayerWriter(directory, name, generation, shard, timeline_id, sync=sync)

    def add(self, key_hi: U64Array, key_lo: U64Array, values: Sequence[bytes]) -> None:
        """Add values; keys ascend within and between calls."""
        count = len(values)
        lsn = np.full(count, self.name.lsn_start, np.uint64)
        kind = np.full(count, IMAGE, np.uint8)
        lengths = np.fromiter(map(len, values), np.uint32, count)
        self._writer.add(key_hi, key_lo, lsn, kind, np.arange(count), values, lengths)

    def finish(self) -> int:
        """Make the file durable under its name; its size."""
        return self._writer.finish()

    def abandon(self) -> None:
        """Drop the unfinished file."""
        self._writer.abandon()

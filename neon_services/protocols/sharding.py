"""Which shard of a tenant holds which page.

Invariant: the mapping is Neon's, bit for bit: ``murmurhash32`` of the relation combined with that of the stripe's number,
modulo the number of shards. Only pages of relations are spread; init forks and everything that is no page live on shard 0.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neon_services.protocols.page_keys import INIT_FORK

U32Array = npt.NDArray[np.uint32]
LAYOUT_V1 = 1
SHARDS_MAX = 255


def murmurhash32(values: U32Array) -> U32Array:
    """Postgres's ``murmurhash32`` of a column."""
    mixed = values ^ values >> np.uint32(16)
    mixed *= np.uint32(0x85EB_CA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2_AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def hash_combine(first: U32Array, second: U32Array) -> U32Array:
    """Postgres's ``hash_combine`` of two columns."""
    return first ^ second + np.uint32(0x9E37_79B9) + (first << np.uint32(6)) + (first >> np.uint32(2))


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """One shard. ``count`` 0 and 1 mean a tenant of one shard; ``stripe_size`` is in pages."""

    number: int
    count: int
    stripe_size: int

    @classmethod
    def checked(cls, number: int, count: int, stripe_size: int) -> "ShardIdentity":
        """Raises ValueError that says what does not fit."""
        if not 0 <= count <= SHARDS_MAX:
            raise ValueError(f"shard_count must be from 0 to {SHARDS_MAX}, not {count}")
        if not 0 <= number < max(count, 1):
            raise ValueError(f"shard_number {number} does not fit shard_count {count}: expected 0 to {max(count, 1) - 1}")
        if not 0 <= stripe_size <= 0xFFFF_FFFF or (count > 1 and not stripe_size):
            raise ValueError(f"shard_stripe_size must be a number of pages from 1 to {0xFFFF_FFFF}, not {stripe_size}")
        return cls(number, count, stripe_size)

    @property
    def is_zero(self) -> bool:
        """Whether it is the shard that keeps sizes, directories and all that is no page."""
        return self.number == 0

    @property
    def is_only_one(self) -> bool:
        """Whether it holds everything."""
        return self.count < 2

    def holds_blocks(self, rel: U32Array, fork: npt.NDArray[np.uint8], block: U32Array) -> npt.NDArray[np.bool_]:
        """For columns of relation pages: which of them this shard holds."""
        if self.is_only_one:
            return np.ones(len(rel), bool)
        mixed = hash_combine(murmurhash32(rel), murmurhash32(block // np.uint32(self.stripe_size)))
        return np.where(fork == INIT_FORK, self.is_zero, mixed % np.uint32(self.count) == self.number)

    def to_json(self) -> dict[str, Any]:
        """Neon's JSON form."""
        return {"number": self.number, "count": self.count, "stripe_size": self.stripe_size, "layout": LAYOUT_V1}

    def __str__(self) -> str:
        return "unsharded" if self.count == 0 else f"{self.number:02x}{self.count:02x}"

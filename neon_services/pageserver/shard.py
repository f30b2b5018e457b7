"""Tenant shard ids: a tenant id with a shard number and count, written ``<tenant>`` when unsharded, else ``<tenant>-NNCC``."""

from dataclasses import dataclass

from neon_services.ground.ids import TenantId


@dataclass(frozen=True, slots=True, order=True)
class TenantShardId:
    """One shard of a tenant. ``count`` 0 means that the tenant is not sharded."""

    tenant_id: TenantId
    number: int = 0
    count: int = 0

    @classmethod
    def parse(cls, text: str) -> "TenantShardId":
        """Read ``<tenant>`` or ``<tenant>-NNCC``. Raises ValueError that quotes the text."""
        tenant, dash, index = text.partition("-")
        if not dash:
            return cls(TenantId.parse(tenant))
        if len(index) != 4 or set(index) - set("0123456789abcdefABCDEF"):
            raise ValueError(f"not a tenant shard id: {text!r} (expected <tenant> or <tenant>-NNCC)")
        return cls(TenantId.parse(tenant), int(index[:2], 16), int(index[2:], 16))

    @property
    def shard_slug(self) -> str:
        """``NNCC`` as in index_part.json and metric labels; ``0000`` when unsharded."""
        return f"{self.number:02x}{self.count:02x}"

    @property
    def is_unsharded(self) -> bool:
        return self.count == 0

    def __str__(self) -> str:
        return str(self.tenant_id) if self.count == 0 else f"{self.tenant_id}-{self.shard_slug}"

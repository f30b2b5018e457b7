"""Tenant and timeline ids: 16 bytes, written as 32 lower-case hex digits."""

import os
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True, order=True)
class _HexId:
    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != 16:
            raise ValueError(f"a {self._kind()} has 16 bytes, not {len(self.raw)}")

    @classmethod
    def _kind(cls) -> str:
        return {"TenantId": "tenant id", "TimelineId": "timeline id"}.get(cls.__name__, "id")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read 32 hex digits. Raises ValueError that quotes the text."""
        if len(text) != 32 or set(text) - set("0123456789abcdefABCDEF"):
            raise ValueError(f"not a {cls._kind()}: {text!r} (expected 32 hexadecimal digits)")
        return cls(bytes.fromhex(text))

    @classmethod
    def generate(cls) -> Self:
        """A new random id."""
        return cls(os.urandom(16))

    def __str__(self) -> str:
        return self.raw.hex()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.raw.hex()})"


class TenantId(_HexId):
    """Identity of a tenant."""


class TimelineId(_HexId):
    """Identity of a timeline (a branch) within its tenant."""


@dataclass(frozen=True, slots=True, order=True)
class TenantTimelineId:
    """The pair that names one WAL stream ("ttid")."""

    tenant_id: TenantId
    timeline_id: TimelineId

    def __str__(self) -> str:
        return f"{self.tenant_id}/{self.timeline_id}"

"""Calls to the control plane: which tenants are ours, in which generation, and whether a generation is still the newest.

Invariant: without an answer nothing is assumed: ``re_attach`` tries for ever; what ``validate`` does not confirm is not valid.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import aiohttp

from neon_services.ground.errors import NeonError
from neon_services.pageserver.shard import TenantShardId

log = logging.getLogger(__name__)

_VALIDATE_MAX = 128  # tenants per call
_TIMEOUT_S = 10.0
_RETRY_MIN_S, _RETRY_MAX_S = 0.2, 5.0
_MODES = ("AttachedSingle", "AttachedMulti", "AttachedStale", "Secondary")


class UpcallError(NeonError):
    """The control plane does not answer, or not what it should."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the control plane wants of one tenant shard on this node."""

    mode: str
    generation: int | None


class ControlPlane:
    """A client of ``control_plane_api``."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    async def re_attach(self, node_id: int, register: dict[str, Any] | None) -> dict[TenantShardId, Assignment]:
        """The tenants of this node, each with a generation made for this start; waits until the control plane answers."""
        body: dict[str, Any] = {"node_id": node_id}
        if register is not None:
            body["register"] = register
        delay = _RETRY_MIN_S
        while True:
            try:
                return _assignments(await self._post("re-attach", body))
            except UpcallError as error:
                log.warning("%s; tenants are not attached until it answers", error)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _RETRY_MAX_S)

    async def validate(self, generations: dict[TenantShardId, int]) -> set[TenantShardId]:
        """Those whose generation is still the newest. Raises UpcallError."""
        valid: set[TenantShardId] = set()
        items = sorted(generations.items())
        for first in range(0, len(items), _VALIDATE_MAX):
            part = items[first : first + _VALIDATE_MAX]
            answer = await self._post("validate", {"tenants": [{"id": str(shard), "gen": gen} for shard, gen in part]})
            confirmed = {entry.get("id") for entry in _list(answer, "tenants") if entry.get("valid") is True}
            valid |= {shard for shard, _ in part if str(shard) in confirmed}
        return valid

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        url = f"{self._url}/{path}"
        try:
            async with (
                aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session,
                session.post(url, json=body) as answer,
            ):
                if answer.status != 200:
                    raise UpcallError(f"control plane {url}: status {answer.status}: {(await answer.text())[:200]}")
                return await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise UpcallError(f"control plane {url}: {error or 'timeout'}") from error


def _list(answer: Any, name: str) -> list[dict[str, Any]]:
    items = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UpcallError(f"the control plane's answer has no list {name!r}")
    return items


def _assignments(answer: Any) -> dict[TenantShardId, Assignment]:
    found: dict[TenantShardId, Assignment] = {}
    for entry in _list(answer, "tenants"):
        mode, generation = entry.get("mode", "AttachedSingle"), entry.get("gen")
        try:
            shard = TenantShardId.parse(entry["id"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UpcallError(f"the control plane's answer names no tenant shard: {entry!r}") from error
        attached = isinstance(generation, int) and not isinstance(generation, bool)
        if mode not in _MODES or attached != (mode != "Secondary"):
            raise UpcallError(f"the control plane's answer for tenant {shard} makes no sense: {entry!r}")
        found[shard] = Assignment(mode, generation)
    return found

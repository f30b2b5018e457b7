"""All tenant shards on this node: attach, change, detach, start and stop.

Invariant: at most one change of a tenant shard is under way at a time; a second one gets 409. ``config-v1`` is on disk before
the tenant acts on it, so a restart never works with an older generation than one it has already used.
"""

import asyncio
import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neon_services.ground.durable import sync_directory
from neon_services.ground.errors import CorruptionError
from neon_services.ground.http import ApiError
from neon_services.ground.ids import TenantId
from neon_services.pageserver.location_config import CONFIG_NAME, LocationConf
from neon_services.pageserver.remote_layout import tenant_prefix
from neon_services.pageserver.shard import TenantShardId
from neon_services.pageserver.tenant import NodeResources, Tenant, remove_directory_durably
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.upcalls import Assignment

log = logging.getLogger(__name__)

ACTIVE_TIMEOUT_S = 5.0


class TenantManager:
    """The tenants of the process."""

    def __init__(self, node: NodeResources, tenants_dir: Path) -> None:
        self._node = node
        self._directory = tenants_dir
        self._busy: set[TenantShardId] = set()
        self.tenants: dict[TenantShardId, Tenant] = {}
        self.secondaries: dict[TenantShardId, LocationConf] = {}
        self.starting = False  #: True from outside until ``start``: nobody knows yet which tenants are here
        self.stopping = False

    # -- start and stop

    def start(self, assignments: dict[TenantShardId, Assignment] | None = None) -> None:
        """Attach what ``config-v1`` files on disk say: as the control plane assigned, or (None) with the generation on disk.

        A tenant that is assigned but has no directory here is not attached: the control plane sends its location afterwards.
        """
        self.starting = False
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._directory.iterdir()):
            if path.name.endswith(".___temp"):
                shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                shard = TenantShardId.parse(path.name)
                conf = LocationConf.load(path)
            except (ValueError, CorruptionError) as error:
                log.error("ignoring %s: %s", path, error)
            except FileNotFoundError:
                log.warning("removing %s, which has no %s: its attachment was never finished", path, CONFIG_NAME)
                shutil.rmtree(path, ignore_errors=True)
            else:
                assigned = conf if assignments is None else self._as_assigned(shard, conf, assignments.get(shard))
                if assigned is not None:
                    self._spawn(shard, assigned)

    def _as_assigned(self, shard: TenantShardId, conf: LocationConf, assignment: Assignment | None) -> LocationConf | None:
        directory = self._directory / str(shard)
        if assignment is None:
            log.info("tenant %s is no longer assigned to this node: removing its local files", shard)
            shutil.rmtree(directory, ignore_errors=True)
            return None
        if assignment.generation is not None and assignment.generation < (conf.generation or 0):
            log.error(
                "tenant %s: generation %d is below the one on disk; keeping it as secondary", shard, assignment.generation
            )
            assignment = Assignment("Secondary", None)
        assigned = dataclasses.replace(conf, mode=assignment.mode, generation=assignment.generation)
        assigned.save(directory, sync=self._node.environment.sync)
        return assigned

    async def shutdown(self) -> None:
        """Stop all tenants, in-memory data flushed."""
        self.stopping = True
        await asyncio.gather(*(tenant.shutdown(flush=True) for tenant in self.tenants.values()))

    def _spawn(self, shard: TenantShardId, conf: LocationConf) -> None:
        if conf.attached:
            tenant = Tenant(self._node, shard, conf, self._directory / str(shard))
            self.tenants[shard] = tenant
            tenant.start()
        else:
            self.secondaries[shard] = conf

    # -- lookup

    def tenant_here(self, shard: TenantShardId) -> Tenant:
        """An attached tenant in any state. Raises ApiError 404 only when it really is not here, 503 while it changes."""
        tenant = self.tenants.get(shard)
        if tenant is None:
            if self.starting or self.stopping or shard in self._busy:
                raise ApiError(503, f"tenant {shard} is being changed, or the pageserver is starting or stopping: try again")
            raise ApiError(404, f"tenant {shard} was not found on this pageserver")
        return tenant

    async def active_tenant(self, shard: TenantShardId, timeout_s: float = ACTIVE_TIMEOUT_S) -> Tenant:
        """An attached tenant, once it is Active. Raises ApiError 404, 500 (broken), 503 (not active in time)."""
        tenant = self.tenant_here(shard)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await tenant.ready.wait()
        if tenant.state == "Broken":
            raise ApiError(500, f"tenant {shard} is broken: {tenant.broken_reason}")
        if tenant.state != "Active":
            raise ApiError(503, f"tenant {shard} is not active, it is {tenant.state}: try again")
        return tenant

    def shards_of(self, tenant_id: TenantId) -> list[Tenant]:
        """The attached shards of a tenant."""
        return [tenant for shard, tenant in sorted(self.tenants.items()) if shard.tenant_id == tenant_id]

    def timelines(self) -> list[Timeline]:
        """All timelines of all tenants."""
        return [timeline for tenant in self.tenants.values() for timeline in tenant.timelines.values()]

    @contextlib.contextmanager
    def _changing(self, shard: TenantShardId) -> Iterator[None]:
        if self.starting or self.stopping:
            raise ApiError(503, f"the pageserver is {'starting' if self.starting else 'shutting down'}: try again")
        if shard in self._busy:
            raise ApiError(409, f"tenant {shard} is already being changed: try again")
        self._busy.add(shard)
        try:
            yield
        finally:
            self._busy.discard(shard)

    # -- changes

    async def set_location(self, shard: TenantShardId, conf: LocationConf | None, *, flush_ms: int | None = None) -> None:
        """Carry out PUT location_config; None detaches. Idempotent. Raises ApiError 400 for a generation that went down."""
        with self._changing(shard):
            if conf is None:
                await self._detach(shard)
                return
            conf = dataclasses.replace(conf, shard_number=shard.number, shard_count=shard.count)
            tenant = self.tenants.get(shard)
            if tenant is not None and conf.attached:
                assert conf.generation is not None
                if conf.generation < tenant.generation:
                    raise ApiError(
                        400, f"tenant {shard} is attached with generation {tenant.generation}; {conf.generation} is older"
                    )
                if conf.generation == tenant.generation and tenant.state != "Broken":
                    await self._save(shard, conf)
                    if flush_ms is not None and conf.mode == "AttachedStale":
                        await self._flush_all(tenant, flush_ms)
                    tenant.reconfigure(conf)
                    return
            if tenant is not None:
                await tenant.shutdown(flush=flush_ms is not None, upload_timeout_s=(flush_ms or 0) / 1000)
                del self.tenants[shard]
            await self._save(shard, conf)
            self.secondaries.pop(shard, None)
            self._spawn(shard, conf)

    async def _flush_all(self, tenant: Tenant, flush_ms: int) -> None:
        try:
            async with asyncio.timeout(flush_ms / 1000):
                for timeline in list(tenant.timelines.values()):
                    await timeline.wait_uploaded(await timeline.freeze_and_flush())
        except TimeoutError:
            log.warning("tenant %s: not everything was uploaded within %d ms", tenant.shard, flush_ms)

    async def set_overrides(self, shard: TenantShardId, overrides: dict[str, Any]) -> None:
        """Replace a tenant's own settings."""
        with self._changing(shard):
            tenant = self.tenant_here(shard)
            conf = tenant.conf.with_overrides(overrides)
            await self._save(shard, conf)
            tenant.reconfigure(conf)

    async def delete_tenant(self, tenant_id: TenantShardId) -> None:
        """Remove a tenant shard here and all its objects. Raises ApiError 404, RemoteStorageError."""
        with self._changing(tenant_id):
            tenant = self.tenants.get(tenant_id)
            if tenant is None:
                raise ApiError(404, f"tenant {tenant_id} was not found on this pageserver")
            await tenant.shutdown(flush=False)
            # the local directory goes last: as long as it is there the same request can be made again
            keys = await self._node.remote.list_keys(tenant_prefix(tenant_id))
            await self._node.remote.delete(keys)
            await self._detach(tenant_id)

    async def _detach(self, shard: TenantShardId) -> None:
        tenant = self.tenants.get(shard)
        if tenant is not None:
            await tenant.shutdown(flush=False)
            self.tenants.pop(shard, None)
        self.secondaries.pop(shard, None)
        await remove_directory_durably(self._directory / str(shard))

    async def _save(self, shard: TenantShardId, conf: LocationConf) -> None:
        directory, sync = self._directory / str(shard), self._node.environment.sync

        def save() -> None:
            if not directory.is_dir():
                directory.mkdir(parents=True)
                if sync:
                    sync_directory(directory.parent)
            conf.save(directory, sync=sync)

        await asyncio.to_thread(save)

"""A running safekeeper: data directory, WAL service, HTTP API and background loops."""

import asyncio
import logging
import shutil
from pathlib import Path
from typing import Any

import prometheus_client

from neon_services.ground.durable import sync_filesystem
from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.remote_storage import RemoteStorage, open_remote_storage
from neon_services.safekeeper.broker_loops import BrokerLoops
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.disk_guard import DiskGuard
from neon_services.safekeeper.http_api import HttpApi
from neon_services.safekeeper.interpreted_sender import Fanout
from neon_services.safekeeper.listeners import Listeners
from neon_services.safekeeper.manager import Manager
from neon_services.safekeeper.offload import Offload
from neon_services.safekeeper.peer_recovery import PeerRecovery
from neon_services.safekeeper.pull_timeline import TimelinePuller
from neon_services.safekeeper.remote_deletion import RemoteDeletion
from neon_services.safekeeper.startup_recovery import StartupRecovery
from neon_services.safekeeper.timeline_metrics import TimelineCollector
from neon_services.safekeeper.timelines import Timelines
from neon_services.safekeeper.traffic import TRAFFIC
from neon_services.safekeeper.wal_service import WalServiceHandler
from neon_services.storage_broker.client import BrokerClient

log = logging.getLogger(__name__)


class SafekeeperServer:
    """Starts and stops everything. The caller holds the lock of the data directory."""

    def __init__(self, config: SafekeeperConfig) -> None:
        self._config = config
        self.timelines = Timelines(config.datadir, config.node_id, sync=config.sync)
        self._offload: Offload | None = None
        self._remote_deletion: RemoteDeletion | None = None
        self._fanout = Fanout(config.wal_reader_fanout, config.max_delta_for_fanout)
        config.access.peers().check()
        self._listeners = Listeners(config)
        self._broker = BrokerClient(
            config.broker_endpoint,
            keepalive_interval_ms=config.broker_keepalive_interval_ms,
            ca_file=config.access.ssl_ca_file,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load the timelines and listen. Raises ConfigError when an address is taken."""
        config = self._config
        if config.sync:
            # what a killed process wrote may still be in the page cache only, and it will be reported as flushed
            await asyncio.to_thread(sync_filesystem, config.datadir)
        if config.remote_storage is not None:
            storage = self._open_storage(config.remote_storage)
            self.timelines.storage = storage
            self._offload = Offload(config.offload, config.node_id)
            self._remote_deletion = RemoteDeletion(self.timelines, storage, config.datadir, sync=config.sync)
        else:
            log.warning("without --remote-storage no WAL is ever removed from the disk")
        self.timelines.load()
        self.timelines.discard = lambda path: asyncio.get_running_loop().run_in_executor(None, _discard, path)
        log.info("loaded %d timelines, %d are broken", len(self.timelines.all()), len(self.timelines.broken))
        manager = Manager(
            self.timelines,
            save_interval_s=config.control_file_save_interval_s,
            walsenders_keep_horizon=config.walsenders_keep_horizon,
            offload=self._offload,
            max_timeline_disk_usage_bytes=config.max_timeline_disk_usage_bytes,
        )
        guard = DiskGuard(
            self.timelines,
            config.datadir,
            max_ratio=config.max_global_disk_usage_ratio,
            ratio_interval_s=config.global_disk_check_interval_s,
        )
        if self._remote_deletion is not None:
            self._remote_deletion.resume()
        loops = BrokerLoops(config, self.timelines, self._broker)
        recovery = self._startup_recovery()  # before anybody can create timelines
        api = HttpApi(config, self.timelines, self._remote_deletion)
        await self._listeners.start(
            lambda connection, access: WalServiceHandler(self.timelines, connection, access, self._fanout), api.application
        )
        TRAFFIC.availability_zone = config.availability_zone
        prometheus_client.REGISTRY.register(TRAFFIC)
        prometheus_client.REGISTRY.register(TimelineCollector(self.timelines))
        self._tasks = [
            asyncio.create_task(manager.run(), name="manager"),
            asyncio.create_task(loops.run(), name="broker loops"),
            asyncio.create_task(guard.run(), name="disk guard"),
            asyncio.create_task(self._listeners.run(), name="reloading of keys and certificates"),
        ]
        if recovery is not None:
            self._tasks.append(asyncio.create_task(recovery.run(), name="startup recovery"))
        if not config.force_metric_collection_on_scrape:
            self._tasks.append(asyncio.create_task(api.metrics.run(), name="metrics collection"))
        if config.peer_recovery:
            self._tasks.append(asyncio.create_task(PeerRecovery(config, self.timelines).run(), name="peer recovery"))

    def _startup_recovery(self) -> StartupRecovery | None:
        config = self._config
        if config.startup_recovery_url is None:
            return None
        peers = config.access.peers()
        puller = TimelinePuller(self.timelines, config.node_id, sync=config.sync, access=peers)
        return StartupRecovery(config.node_id, self.timelines, puller, config.startup_recovery_url, access=peers)

    @staticmethod
    def _open_storage(table: dict[str, Any]) -> RemoteStorage:
        try:
            return open_remote_storage(table)
        except OSError as error:
            raise ConfigError(f"--remote-storage: {table.get('local_path')}: {error.strerror or error}") from error

    async def wait(self) -> None:
        """Until one of the background tasks ends, which none should. Raises NeonError."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = None if task.cancelled() else task.exception()
            log.error("%s ended", task.get_name(), exc_info=error)
            raise NeonError(f"the {task.get_name()} task ended: {error}")

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a thread still waits for the object store."""
        return self.timelines.storage is not None and self.timelines.storage.busy

    async def stop(self) -> None:
        """Stop listening, flush and close the timelines."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._offload is not None:
            await self._offload.stop()
        if self._remote_deletion is not None:
            await self._remote_deletion.stop()
        self.timelines.close()
        await self._listeners.stop_pg()
        await self._listeners.stop_http()
        await self._broker.close()
        if self.timelines.storage is not None:
            await self.timelines.storage.close()


def _discard(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except OSError as error:
        log.error("deleting %s failed, it goes at the next start: %s", directory, error)

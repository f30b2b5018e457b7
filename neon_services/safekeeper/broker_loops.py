"""Gossip: telling the broker about active timelines, learning from other members, answering who looks for a timeline.

Invariant: gossip is advice. Nothing here waits for it, and a loop that fails tries again no sooner than after a second.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from neon_services.consensus.acceptor import PeerInfo
from neon_services.ground.errors import NeonError
from neon_services.protocols import broker_messages as bm
from neon_services.safekeeper import metrics
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.connections import Peer
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines
from neon_services.storage_broker.client import RETRY_INTERVAL_S, BrokerClient

log = logging.getLogger(__name__)

PUSH_INTERVAL_S = 1.0
SILENCE_WARNING_S = 10.0


def timeline_info(config: SafekeeperConfig, timeline: Timeline) -> Any:
    """What the broker is told about a timeline: a full snapshot."""
    acceptor = timeline.acceptor
    return bm.SafekeeperTimelineInfo(
        safekeeper_id=config.node_id,
        tenant_timeline_id=bm.encode_ttid(timeline.ttid),
        term=acceptor.term,
        last_log_term=acceptor.last_log_term,
        flush_lsn=acceptor.flush_lsn,
        commit_lsn=acceptor.commit_lsn,
        backup_lsn=acceptor.backup_lsn,
        remote_consistent_lsn=acceptor.remote_consistent_lsn,
        peer_horizon_lsn=acceptor.peer_horizon_lsn,
        local_start_lsn=acceptor.state.local_start_lsn,
        safekeeper_connstr=config.advertise_pg,
        http_connstr=config.http_connstr,
        https_connstr=config.access.https_connstr,
        availability_zone=config.availability_zone,
        standby_horizon=timeline.standby_horizon,
    )


def peer_of(info: Any) -> Peer:
    """A member's snapshot, as it arrived just now."""
    return Peer(
        sk_id=info.safekeeper_id,
        term=info.term,
        flush_lsn=info.flush_lsn,
        local_start_lsn=info.local_start_lsn,
        info=PeerInfo(
            last_log_term=info.last_log_term,
            commit_lsn=info.commit_lsn,
            backup_lsn=info.backup_lsn,
            remote_consistent_lsn=info.remote_consistent_lsn,
            peer_horizon_lsn=info.peer_horizon_lsn,
        ),
        pg_connstr=info.safekeeper_connstr,
        http_connstr=info.http_connstr,
        https_connstr=info.https_connstr if info.HasField("https_connstr") else None,
        seen_at=time.monotonic(),
    )


class BrokerLoops:
    """The three loops of one safekeeper."""

    def __init__(self, config: SafekeeperConfig, timelines: Timelines, client: BrokerClient) -> None:
        self._config = config
        self._timelines = timelines
        self._client = client

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._again(self._pull, "pulling"))
            tasks.create_task(self._again(self._discover, "answering discovery"))
            if self._config.periodic_broker_push:
                tasks.create_task(self._again(self._push, "pushing"))

    async def _again(self, loop: Callable[[], Awaitable[None]], what: str) -> None:
        """Run a loop for ever; it ends only by failing."""
        failing = False
        while True:
            started = time.monotonic()
            try:
                await loop()
            except NeonError as error:
                # said once per outage, not once per second
                log.log(logging.DEBUG if failing else logging.WARNING, "%s at the broker failed: %s", what, error)
            except Exception:
                log.exception("%s at the broker failed", what)  # gossip must never take the WAL service with it
            failing = time.monotonic() - started < RETRY_INTERVAL_S * 10
            await asyncio.sleep(RETRY_INTERVAL_S)

    # -- push

    async def _push(self) -> None:
        await self._client.publish_infos(self._infos())

    async def _infos(self) -> AsyncIterator[Any]:
        while True:
            started = time.perf_counter()
            pushed = 0
            for timeline in self._timelines.all():
                if (timeline.active or timeline.push_once) and not timeline.cancelled:
                    timeline.push_once = False
                    yield timeline_info(self._config, timeline)
                    pushed += 1
                    metrics.BROKER_PUSHED_UPDATES.inc()
            metrics.BROKER_PUSH_UPDATE_SECONDS.observe(time.perf_counter() - started)
            metrics.BROKER_ITERATION_TIMELINES.observe(pushed)
            await asyncio.sleep(PUSH_INTERVAL_S)

    # -- pull

    async def _pull(self) -> None:
        infos = self._client.subscribe_all()
        silent = False
        while True:
            news = asyncio.ensure_future(anext(infos))
            try:
                while not (await asyncio.wait({news}, timeout=SILENCE_WARNING_S))[0]:
                    if not silent and any(timeline.active for timeline in self._timelines.all()):
                        log.warning("the broker has been silent for %.0f s", SILENCE_WARNING_S)
                        silent = True
            finally:
                if not news.done():
                    news.cancel()
            info = news.result()
            silent = False
            timeline = self._timelines.find(bm.ttid_of(info))
            metrics.BROKER_PULLED_UPDATES.labels("not_found" if timeline is None else "ok").inc()
            if timeline is not None:
                timeline.record_peer(peer_of(info))

    # -- discovery

    async def _discover(self) -> None:
        async for message in self._client.subscribe(None, {bm.SAFEKEEPER_DISCOVERY_REQUEST}):
            ttid = bm.ttid_of(message.safekeeper_discovery_request)
            timeline = self._timelines.find(ttid)
            if timeline is not None:
                await self._client.publish_one(
                    bm.SafekeeperDiscoveryResponse(
                        safekeeper_id=self._config.node_id,
                        tenant_timeline_id=bm.encode_ttid(ttid),
                        commit_lsn=timeline.acceptor.commit_lsn,
                        safekeeper_connstr=self._config.advertise_pg,
                        availability_zone=self._config.availability_zone,
                        standby_horizon=0,
                    )
                )

"""Keeps a timeline supplied with WAL: learns from the broker who has it, connects, changes over when another is better.

Invariant: at most one connection feeds a timeline, and the next one begins where its last record ends. Nothing that a
safekeeper or the broker sends ends this task: errors are logged once, the safekeeper cools down, and another attempt follows.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from prometheus_client import Counter

from neon_services.ground.errors import Cancelled, NeonError, ProtocolViolation
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import format_lsn
from neon_services.ground.tls import ClientTls
from neon_services.pageserver.relations import Relations
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.wal_candidates import Candidates, Rules
from neon_services.pageserver.wal_connection import WalConnection
from neon_services.protocols import broker_messages as bm
from neon_services.protocols.pgwire import ServerError
from neon_services.storage_broker.client import RETRY_INTERVAL_S, BrokerClient, BrokerError

log = logging.getLogger(__name__)

_TICK_S = 0.5  # how often timeouts are looked at; news wake the task at once
_RESTART_S = 5.0
_NORMAL_END = "ending streaming"

_SWITCHES = Counter("pageserver_walreceiver_switches", "Changes of the safekeeper", ["reason"])
_STARTED = Counter("pageserver_walreceiver_started_connections", "Connections to safekeepers")
_UPDATES = Counter("pageserver_walreceiver_broker_updates", "Messages from the broker")


class WalReceiver:
    """Receives the WAL of one timeline. Make it when the timeline is active, ``await stop()`` before that ends."""

    def __init__(
        self,
        timeline: Timeline,
        broker: BrokerClient,
        node_id: int,
        availability_zone: str | None = None,
        *,
        tls: ClientTls | None = None,
    ) -> None:
        self._timeline = timeline
        self._ttid = TenantTimelineId(timeline.tenant_id, timeline.timeline_id)
        self._broker = broker
        self._tls = tls
        self._node_id = node_id
        self._availability_zone = availability_zone
        self._candidates = Candidates()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._connection: WalConnection | None = None
        self._connection_task: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        self._last_connection: WalConnection | None = None

    def start(self) -> None:
        """Begin."""
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._guard(self._listen), name=f"broker {self._timeline}"),
            loop.create_task(self._guard(self._manage), name=f"walreceiver {self._timeline}"),
            loop.create_task(self._guard(self._measure), name=f"logical size {self._timeline}"),
        ]

    async def stop(self) -> None:
        """End the connection; nothing is ingested after this."""
        tasks = [*self._tasks, *([self._connection_task] if self._connection_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []
        self._connection = self._connection_task = None

    # -- what the API shows

    @property
    def wal_source_connstr(self) -> str | None:
        """The safekeeper that WAL comes from."""
        return self._connection.connstr if self._connection is not None else None

    @property
    def last_received_msg_lsn(self) -> int | None:
        """The end of the WAL in the last message that brought some."""
        return self._last_connection.last_message_lsn or None if self._last_connection is not None else None

    @property
    def last_received_msg_ts(self) -> int | None:
        """When that was: microseconds since the Unix epoch."""
        return self._last_connection.last_message_at_us or None if self._last_connection is not None else None

    @property
    def status(self) -> str:
        """One line for people."""
        connection = self._connection
        if connection is not None:
            verb = "streaming" if connection.streaming else "connecting"
            text = f"{verb} from safekeeper {connection.view.safekeeper_id} at {connection.connstr}"
        else:
            text = "not connected"
        known = [f"{c.safekeeper_id}: {format_lsn(c.commit_lsn)}" for c in self._candidates.all()]
        return f"{text}; candidates [{', '.join(known)}]"

    # -- tasks

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a task for as long as the timeline lives, whatever happens."""
        while True:
            try:
                return await work()
            except asyncio.CancelledError:
                raise
            except Cancelled as error:
                log.info("timeline %s: %s", self._timeline, error)
                return None
            except Exception:
                log.exception("timeline %s: WAL receiving failed, trying again in %g s", self._timeline, _RESTART_S)
                await asyncio.sleep(_RESTART_S)

    async def _measure(self) -> None:
        """The logical size, which safekeepers hand on to computes."""
        try:
            await Relations.of(self._timeline).compute_logical_size()
        except Cancelled:
            raise
        except NeonError as error:
            log.error("timeline %s: its logical size cannot be computed: %s", self._timeline, error)

    async def _listen(self) -> None:
        """Keep a subscription at the broker."""
        wanted = (bm.SAFEKEEPER_TIMELINE_INFO, bm.SAFEKEEPER_DISCOVERY_RESPONSE)
        complained = False
        while True:
            try:
                async for message in self._broker.subscribe(self._ttid, wanted):
                    complained = False
                    _UPDATES.inc()
                    self._candidates.update(bm.payload_of(message), time.monotonic())
                    self._wake.set()
            except (BrokerError, ProtocolViolation) as error:
                if not complained:
                    log.warning("timeline %s: %s; trying again every %g s", self._timeline, error, RETRY_INTERVAL_S)
                    complained = True
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _manage(self) -> None:
        while True:
            now = time.monotonic()
            rules = self._rules()
            self._candidates.expire(now, rules)
            if self._connection_task is not None and self._connection_task.done():
                self._connection = self._connection_task = None
            if self._connection is not None:
                reason = self._candidates.why_switch(self._connection.view, self._timeline.last_record_lsn, now, rules)
                if reason is not None:
                    await self._disconnect(reason)
                    continue
            else:
                self._connect(now, rules)
            if self._connection is None and not len(self._candidates):
                await self._ask(now, rules)
            self._wake.clear()
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _rules(self) -> Rules:
        conf = self._timeline.conf
        return Rules(
            conf.seconds("walreceiver_connect_timeout"),
            conf.seconds("lagging_wal_timeout"),
            conf.integer("max_lsn_wal_lag"),
            self._availability_zone,
        )

    def _connect(self, now: float, rules: Rules) -> None:
        candidate = self._candidates.choose(now, rules)
        if candidate is None:
            return
        connection = WalConnection(self._timeline, candidate, self._node_id, self._availability_zone, tls=self._tls)
        self._connection = self._last_connection = connection
        _STARTED.inc()
        loop = asyncio.get_running_loop()
        self._connection_task = loop.create_task(self._run(connection), name=f"WAL of {self._timeline}")
        self._connection_task.add_done_callback(lambda _: self._wake.set())

    async def _disconnect(self, reason: str) -> None:
        assert self._connection is not None and self._connection_task is not None
        log.warning("timeline %s: leaving safekeeper %d: %s", self._timeline, self._connection.view.safekeeper_id, reason)
        _SWITCHES.labels(reason.split(" ", 1)[0]).inc()
        self._connection_task.cancel()
        await asyncio.gather(self._connection_task, return_exceptions=True)
        self._candidates.connection_failed(self._connection.view.safekeeper_id, time.monotonic())
        self._connection = self._connection_task = None

    async def _run(self, connection: WalConnection) -> None:
        """One connection; how it ended decides when the safekeeper is tried again."""
        number = connection.view.safekeeper_id
        try:
            await connection.run()
            log.info("timeline %s: safekeeper %d has ended the stream", self._timeline, number)
            self._failed(connection)
        except ServerError as error:
            if _NORMAL_END in str(error):
                log.info("timeline %s: safekeeper %d: %s", self._timeline, number, error)
                self._candidates.made_progress(number)
                self._candidates.forget(number)
            else:
                log.warning("timeline %s: safekeeper %d: %s", self._timeline, number, error)
                self._failed(connection)
        except Cancelled as error:
            log.info("timeline %s: %s", self._timeline, error)
            self._failed(connection)
        except (OSError, TimeoutError) as error:
            log.warning(
                "timeline %s: connection to safekeeper %d at %s: %s",
                self._timeline,
                number,
                connection.connstr,
                str(error) or "timeout",
            )
            self._failed(connection)
        except NeonError as error:
            log.error("timeline %s: cannot ingest WAL of safekeeper %d, trying again: %s", self._timeline, number, error)
            self._failed(connection, healthy=False)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("timeline %s: cannot ingest WAL of safekeeper %d, trying again", self._timeline, number)
            self._failed(connection, healthy=False)

    def _failed(self, connection: WalConnection, *, healthy: bool = True) -> None:
        if connection.progressed and healthy:
            self._candidates.made_progress(connection.view.safekeeper_id)
        # counted from now: a stream that breaks after an hour must not be tried again in the same instant
        self._candidates.connection_failed(connection.view.safekeeper_id, time.monotonic())

    async def _ask(self, now: float, rules: Rules) -> None:
        """Somebody waits for WAL and no safekeeper has spoken: idle ones answer when asked."""
        if not self._timeline.has_lsn_waiters or now - self._asked_at < rules.lagging_wal_timeout_s:
            return
        self._asked_at = now
        try:
            await self._broker.publish_one(bm.SafekeeperDiscoveryRequest(tenant_timeline_id=bm.encode_ttid(self._ttid)))
        except BrokerError as error:
            log.warning("timeline %s: cannot ask for safekeepers: %s", self._timeline, error)

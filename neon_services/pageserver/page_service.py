"""The page service: what computes speak to a pageserver, over the Postgres wire protocol.

Commands: ``pagestream_v2|v3 TENANT TIMELINE``, ``basebackup TENANT TIMELINE [LSN] [--gzip] [--replica] [--skeleton]``,
``fullbackup TENANT TIMELINE [LSN] [PREV_LSN]``, ``lease lsn TENANT TIMELINE LSN``, ``set ...``. A connection is bound to the
first tenant that it names.

Invariant: responses of a pagestream are in the order of its requests. While a batch is being answered the next requests pile up
and become the next batch, so batches are as large as the client's pipelining and there are no timers.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

from prometheus_client import Counter, Histogram

from neon_services.ground.errors import Cancelled, NeonError
from neon_services.ground.http import ApiError
from neon_services.ground.ids import TenantId, TimelineId
from neon_services.ground.lsn import format_lsn, parse_lsn
from neon_services.pageserver.basebackup import BasebackupOptions, basebackup
from neon_services.pageserver.page_requests import PageRequests
from neon_services.pageserver.timeline import DEFAULT_WAIT_LSN_TIMEOUT_S, Timeline
from neon_services.protocols import pagestream
from neon_services.protocols.pgserver import EndConnection, PgServer, ServerConnection
from neon_services.protocols.pgwire import COPY_DONE, TEXT_OID, ServerError, StartupMessage, copy_data_header

log = logging.getLogger(__name__)

MAX_BATCH = 32
_QUEUE_HIGH, _QUEUE_LOW = 1024, 256  # requests; above, the socket is not read
_SHUTDOWN = "57P01"

_REQUESTS = Counter("pageserver_smgr_query_started_count", "Pagestream requests", ["smgr_query_type"])
_REQUEST_SECONDS = Histogram(
    "pageserver_smgr_query_seconds_global",
    "Time to answer a batch of pagestream requests",
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
_BATCH_SIZE = Histogram("pageserver_page_service_batch_size", "Requests per batch", buckets=(1, 2, 4, 8, 16, 32))
_BASEBACKUPS = Histogram("pageserver_basebackup_query_seconds", "Time of a basebackup", ["result"])
_QUERY_TYPES = {
    pagestream.EXISTS: _REQUESTS.labels("get_rel_exists"),
    pagestream.NBLOCKS: _REQUESTS.labels("get_rel_size"),
    pagestream.GET_PAGE: _REQUESTS.labels("get_page_at_lsn"),
    pagestream.DB_SIZE: _REQUESTS.labels("get_db_size"),
    pagestream.GET_SLRU_SEGMENT: _REQUESTS.labels("get_slru_segment"),
}

#: Finds an active timeline of a tenant. Raises ApiError 404 when it is not here, 503 when it is not active in time.
FindTimeline = Callable[[TenantId, TimelineId], Awaitable[Timeline]]


class PageService:
    """The listening side; one per process."""

    def __init__(self, find_timeline: FindTimeline, *, wait_lsn_timeout_s: float = DEFAULT_WAIT_LSN_TIMEOUT_S) -> None:
        self.find_timeline = find_timeline
        self.wait_lsn_timeout_s = wait_lsn_timeout_s
        self._server = PgServer(lambda connection: _Session(self, connection))

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError when the address cannot be bound."""
        await self._server.start(host, port)

    @property
    def port(self) -> int:
        return self._server.port

    async def stop(self) -> None:
        """End all connections."""
        await self._server.stop()


class _Session:
    """One client's connection."""

    def __init__(self, service: PageService, connection: ServerConnection) -> None:
        self._service = service
        self._tenant_id: TenantId | None = None
        self._application = ""

    async def startup(self, message: StartupMessage) -> None:
        self._application = message.parameters.get("application_name", "")

    def connection_lost(self) -> None:
        pass

    async def query(self, connection: ServerConnection, sql: str) -> None:
        words = sql.strip().rstrip(";").split()
        verb = words[0].lower() if words else ""
        if verb in ("pagestream_v2", "pagestream_v3"):
            timeline = await self._timeline(words[1:3], sql)
            await _Pagestream(connection, timeline, int(verb[-1]), self._service.wait_lsn_timeout_s).run()
        elif verb == "basebackup":
            await self._basebackup(connection, words[1:], sql)
        elif verb == "fullbackup":
            await self._fullbackup(connection, words[1:], sql)
        elif verb == "lease":
            await self._lease(connection, words[1:], sql)
        elif verb == "set":
            connection.send_command_complete("SELECT 1")
        else:
            raise ServerError("XX000", f"unknown command {verb!r}")

    async def _timeline(self, ids: list[str], sql: str) -> Timeline:
        if len(ids) != 2:
            raise ServerError("XX000", f"expected a tenant id and a timeline id: {sql[:200]!r}")
        try:
            tenant_id, timeline_id = TenantId.parse(ids[0]), TimelineId.parse(ids[1])
        except ValueError as error:
            raise ServerError("XX000", str(error)) from error
        if self._tenant_id not in (None, tenant_id):
            raise ServerError("XX000", f"this connection is bound to tenant {self._tenant_id}, not {tenant_id}")
        self._tenant_id = tenant_id
        try:
            return await self._service.find_timeline(tenant_id, timeline_id)
        except ApiError as error:
            raise ServerError(_SHUTDOWN if error.status == 503 else "XX000", str(error)) from error

    async def _basebackup(self, connection: ServerConnection, words: list[str], sql: str) -> None:
        flags = {word for word in words if word.startswith("--")}
        unknown = flags - {"--gzip", "--replica", "--skeleton"}
        if unknown:
            raise ServerError("XX000", f"basebackup: unknown option {min(unknown)}")
        plain = [word for word in words if word not in flags]
        timeline = await self._timeline(plain[:2], sql)
        options = BasebackupOptions(gzip="--gzip" in flags, replica="--replica" in flags, skeleton="--skeleton" in flags)
        await self._send_basebackup(connection, timeline, _lsn(plain[2:3]), options)

    async def _lease(self, connection: ServerConnection, words: list[str], sql: str) -> None:
        lsn = _lsn(words[3:4])
        if len(words) != 4 or words[0].lower() != "lsn" or lsn is None:
            raise ServerError("XX000", f"expected lease lsn TENANT TIMELINE LSN: {sql[:200]!r}")
        timeline = await self._timeline(words[1:3], sql)
        valid_until_ms = timeline.leases.grant(
            lsn,
            cutoff_lsn=timeline.latest_gc_cutoff_lsn,
            now_ms=time.time_ns() // 1_000_000,
            length_ms=int(timeline.conf.seconds("lsn_lease_length") * 1000),
        )
        connection.send_rows([("valid_until", TEXT_OID)], [[None if valid_until_ms is None else str(valid_until_ms)]])

    async def _fullbackup(self, connection: ServerConnection, words: list[str], sql: str) -> None:
        timeline = await self._timeline(words[:2], sql)
        options = BasebackupOptions(full=True, previous_lsn=_lsn(words[3:4]))
        await self._send_basebackup(connection, timeline, _lsn(words[2:3]), options)

    async def _send_basebackup(
        self, connection: ServerConnection, timeline: Timeline, lsn: int | None, options: BasebackupOptions
    ) -> None:
        started = asyncio.get_running_loop().time()
        result = "error"
        try:
            if lsn is None:
                at = await timeline.latest_lsn(self._service.wait_lsn_timeout_s)
            else:
                await timeline.wait_lsn(lsn, self._service.wait_lsn_timeout_s)
                at = lsn
            copying = False
            try:
                async for chunk in basebackup(timeline, at, options):
                    if not copying:
                        connection.begin_copy_out()
                        copying = True
                    connection.send_copy_data(chunk)
                    await connection.drain()
            except NeonError as error:
                if not copying:
                    raise
                log.error("basebackup of %s at %s: %s", timeline, format_lsn(at), error)
                connection.fail(f"basebackup failed: {error}")
                raise EndConnection(str(error)) from error
            connection.end_copy_out()
            result = "ok"
        finally:
            _BASEBACKUPS.labels(result).observe(asyncio.get_running_loop().time() - started)


def _lsn(words: list[str]) -> int | None:
    """An optional LSN argument; ``latest`` and nothing mean the tip."""
    if not words or words[0].lower() == "latest":
        return None
    try:
        return parse_lsn(words[0])
    except ValueError as error:
        raise ServerError("XX000", str(error)) from error


class _Pagestream:
    """One pagestream: requests in, responses out, until either side ends it."""

    def __init__(self, connection: ServerConnection, timeline: Timeline, version: int, wait_lsn_timeout_s: float) -> None:
        self._connection = connection
        self._timeline = timeline
        self._version = version
        self._requests = PageRequests(timeline, version, wait_lsn_timeout_s)
        self._queue: deque[pagestream.Request] = deque()
        self._wake = asyncio.Event()
        self._ended = False
        self._paused = False

    async def run(self) -> None:
        connection = self._connection
        connection.copy_sink = self._receive
        connection.copy_batch_end = self._received
        connection.begin_copy_both()
        end = asyncio.get_running_loop().create_task(self._watch_for_end(), name="end of pagestream")
        try:
            while True:
                if not self._queue:
                    if self._ended or connection.closed:
                        break
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._answer_batch()
        except Cancelled as error:
            connection.fail(f"the timeline is shutting down: {error}", _SHUTDOWN)
            raise EndConnection(str(error)) from error
        finally:
            end.cancel()
            await asyncio.gather(end, return_exceptions=True)
        connection.write(COPY_DONE)
        connection.send_command_complete("COPY 0")

    def _receive(self, body: memoryview) -> None:
        self._queue.append(pagestream.parse_request(body, self._version))

    def _received(self) -> None:
        self._wake.set()
        if len(self._queue) > _QUEUE_HIGH and not self._paused and self._connection.transport is not None:
            self._paused = True
            self._connection.transport.pause_reading()

    async def _watch_for_end(self) -> None:
        """CopyDone, CopyFail or the end of the connection."""
        try:
            await self._connection.next_copy_data()
        except (NeonError, ConnectionError) as error:
            log.info("pagestream of %s from %s: %s", self._timeline, self._connection.peer, error)
        self._ended = True
        self._wake.set()

    async def _answer_batch(self) -> None:
        queue, connection = self._queue, self._connection
        batch = [queue.popleft()]
        if batch[0].tag == pagestream.GET_PAGE:
            while queue and len(batch) < MAX_BATCH and queue[0].tag == pagestream.GET_PAGE:
                batch.append(queue.popleft())
        _BATCH_SIZE.observe(len(batch))
        _QUERY_TYPES[batch[0].tag].inc(len(batch))
        with _REQUEST_SECONDS.time():
            try:
                answers = await self._requests.answer(batch)
            except Cancelled:
                raise
            except NeonError as error:
                log.error("pagestream of %s: %s", self._timeline, error)
                answers = [pagestream.error_response(request, f"Read error: {error}", self._version) for request in batch]
        connection.write(b"".join([part for answer in answers for part in (copy_data_header(len(answer)), answer)]))
        await connection.drain()
        if self._paused and len(queue) < _QUEUE_LOW and connection.transport is not None and not connection.closed:
            self._paused = False
            connection.transport.resume_reading()

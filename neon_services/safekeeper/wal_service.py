"""The Postgres-wire port of a safekeeper: which command does what.

Commands: START_WAL_PUSH (proposers), START_REPLICATION (readers), IDENTIFY_SYSTEM, TIMELINE_STATUS, ``set datestyle``, and
the SHOW that stock receivers need. START_REPLICATION gives plain WAL or, by the option ``protocol``, interpreted WAL.
The timeline is named by ``tenant_id`` and ``timeline_id`` in the startup packet's options.
"""

import asyncio
import contextlib
import logging
import re

from neon_services.ground.auth import Claims
from neon_services.ground.errors import NeonError, ProtocolViolation
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn, format_lsn, parse_lsn
from neon_services.protocols import pgwire
from neon_services.protocols.interpreted_options import BadProtocolOption, InterpretedProtocol, parse_protocol_options
from neon_services.protocols.pgserver import EndConnection, ServerConnection
from neon_services.protocols.safekeeper_messages import PROTOCOL_VERSION
from neon_services.protocols.safekeeper_messages_v2 import PROTOCOL_VERSION_2
from neon_services.safekeeper import metrics, pg_access
from neon_services.safekeeper.interpreted_sender import NO_FANOUT, Fanout, InterpretedSender
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines
from neon_services.safekeeper.traffic import TRAFFIC
from neon_services.safekeeper.walreceiver import V2, V3, WalReceiver
from neon_services.safekeeper.walsender import WalSender

log = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 600.0

_START_REPLICATION = re.compile(
    r"START_REPLICATION(?:\s+SLOT\s+(?:\"[^\"]*\"|\S+))?(?:\s+PHYSICAL)?\s+(?P<lsn>[0-9A-Fa-f]+/[0-9A-Fa-f]+)"
    r"(?:\s+TIMELINE\s+\d+)?(?:\s*\(term='(?P<term>\d+)'\))?\s*;?\s*"
)
_OPTION = re.compile(r"([a-z_]+)\s+'([^']*)'")


def parse_wal_push_options(sql: str) -> tuple[int, bool]:
    """(protocol version, may the timeline be created) of a START_WAL_PUSH command. Raises ServerError."""
    options = dict(_OPTION.findall(sql))
    version = options.get("proto_version", "2")
    if version not in (str(PROTOCOL_VERSION_2), str(PROTOCOL_VERSION)):
        raise pgwire.ServerError("XX000", f"unsupported protocol version {version}: this safekeeper speaks 2 and 3")
    creation = options.get("allow_timeline_creation", "true")
    if creation not in ("true", "false"):
        raise pgwire.ServerError("XX000", f"allow_timeline_creation must be 'true' or 'false', not {creation!r}")
    return int(version), creation == "true"


class WalServiceHandler:
    """One connection to the WAL port."""

    def __init__(
        self,
        timelines: Timelines,
        connection: ServerConnection,
        access: pg_access.PgAccess | None = None,
        fanout: Fanout = NO_FANOUT,
    ) -> None:
        self._timelines = timelines
        self._connection = connection
        self._access = access or pg_access.PgAccess()
        self._claims: Claims | None = None
        self._fanout = fanout
        self._protocol: InterpretedProtocol | None = None
        self._options: dict[str, str] = {}
        self._appname: str | None = None
        self._receiver: WalReceiver | None = None

    async def startup(self, message: pgwire.StartupMessage) -> None:
        """Remember which timeline the connection is about; commands that need none work without."""
        self._claims = await self._access.admit(self._connection)
        self._options = message.options()
        self._appname = message.parameters.get("application_name") or None
        TRAFFIC.begin(self._connection, self._options.get("availability_zone"), self._appname)
        try:
            self._protocol = parse_protocol_options(self._options)
        except BadProtocolOption as error:
            raise pgwire.ServerError("22023", str(error)) from error

    def _ttid(self) -> TenantTimelineId:
        """The timeline that commands are about, if this connection may reach it."""
        tenant = self._options.get("tenant_id") or self._options.get("ztenantid")
        timeline = self._options.get("timeline_id") or self._options.get("ztimelineid")
        if tenant is None or timeline is None:
            raise pgwire.ServerError("XX000", "tenant_id and timeline_id must be given in the options of the startup packet")
        try:
            ttid = TenantTimelineId(TenantId.parse(tenant), TimelineId.parse(timeline))
        except ValueError as error:
            raise pgwire.ServerError("XX000", str(error)) from error
        pg_access.check(self._claims, ttid.tenant_id)
        return ttid

    async def query(self, connection: ServerConnection, sql: str) -> None:
        """Carry out one command; they are matched by case-sensitive prefix."""
        name = next((known for known in _COMMANDS if sql.startswith(known)), None)
        if name is None:
            raise pgwire.ServerError("42601", f"unknown command {sql[:100]!r}")
        metrics.PG_QUERIES_RECEIVED.labels(name).inc()
        try:
            await _COMMANDS[name](self, sql)
        finally:
            metrics.PG_QUERIES_FINISHED.labels(name).inc()

    def connection_lost(self) -> None:
        """Flush what a proposer wrote."""
        if self._receiver is not None:
            self._receiver.close()
        TRAFFIC.end(self._connection)

    # -- commands

    async def _start_wal_push(self, sql: str) -> None:
        version, allow_creation = parse_wal_push_options(sql)
        codec = V2 if version == PROTOCOL_VERSION_2 else V3
        receiver = WalReceiver(self._timelines, self._connection, self._ttid(), codec, allow_creation=allow_creation)
        self._receiver = receiver
        timeline = self._timelines.find(self._ttid())
        async with contextlib.AsyncExitStack() as needs:
            needs.callback(receiver.close)  # also when the connection goes on with another command
            if timeline is not None:
                await needs.enter_async_context(timeline.residence())
            await self._follow_proposer(receiver)

    async def _follow_proposer(self, receiver: WalReceiver) -> None:
        receiver.start()
        while True:
            try:
                async with asyncio.timeout_at(receiver.heard_at + IDLE_TIMEOUT_S):
                    # messages go to the receiver; what remains in the queue is the end of the COPY
                    await self._connection.next_copy_data()
                raise EndConnection("the proposer ended the stream")
            except TimeoutError:
                if receiver.heard_at + IDLE_TIMEOUT_S <= asyncio.get_running_loop().time():
                    self._connection.fail(f"nothing received for {IDLE_TIMEOUT_S:.0f} s")
                    raise EndConnection("the proposer is silent") from None
            except pgwire.ServerError as error:
                raise pgwire.ServerError("00000", str(error)) from error

    async def _start_replication(self, sql: str) -> None:
        command = _START_REPLICATION.fullmatch(sql)
        if command is None:
            raise pgwire.ServerError("42601", f"cannot read {sql!r}: expected START_REPLICATION PHYSICAL X/X [(term='N')]")
        term = None if command["term"] is None else int(command["term"])
        timeline = self._timelines.get(self._ttid())
        try:
            async with timeline.residence():
                await self._sender(timeline, term).run(parse_lsn(command["lsn"]))
        except (EndConnection, ConnectionError, asyncio.CancelledError, ProtocolViolation):
            raise
        except (NeonError, OSError) as error:
            # inside COPY an error ends the connection
            log.warning("reader %s (%s) of %s: %s", self._connection.peer, self._appname, timeline.ttid, error)
            sqlstate = error.sqlstate if isinstance(error, pgwire.ServerError) else "XX000"
            self._connection.fail(str(error), sqlstate)
            raise EndConnection(str(error)) from error

    def _sender(self, timeline: Timeline, term: int | None) -> WalSender:
        if self._protocol is None:
            return WalSender(timeline, self._connection, self._appname, term)
        return InterpretedSender(timeline, self._connection, self._appname, term, self._protocol, self._fanout)

    async def _identify_system(self, _: str) -> None:
        timeline = self._timelines.get(self._ttid())
        lsn = self._readable_end(timeline)
        columns = [
            ("systemid", pgwire.TEXT_OID),
            ("timeline", pgwire.INT4_OID),
            ("xlogpos", pgwire.TEXT_OID),
            ("dbname", pgwire.TEXT_OID),
        ]
        self._connection.send_rows(columns, [[str(timeline.acceptor.state.system_id), "1", format_lsn(lsn), None]])

    def _readable_end(self, timeline: Timeline) -> Lsn:
        """Recovery of proposers and safekeepers reads uncommitted WAL; nobody else does."""
        name = self._appname or ""
        if name == "wal_proposer_recovery" or name.startswith("safekeeper"):
            return timeline.acceptor.flush_lsn
        return timeline.acceptor.commit_lsn

    async def _timeline_status(self, _: str) -> None:
        timeline = self._timelines.find(self._ttid())
        rows = []
        if timeline is not None:
            rows.append([format_lsn(timeline.acceptor.flush_lsn), format_lsn(timeline.acceptor.commit_lsn)])
        self._connection.send_rows([("flush_lsn", pgwire.TEXT_OID), ("commit_lsn", pgwire.TEXT_OID)], rows)

    async def _show(self, sql: str) -> None:
        """The two settings that Postgres's own receivers (pg_receivewal) ask for."""
        name = sql.removeprefix("SHOW ").strip(" ;")
        if name == "wal_segment_size":
            value = f"{self._timelines.get(self._ttid()).segment_size >> 20}MB"
        elif name == "data_directory_mode":
            value = "0700"
        else:
            raise pgwire.ServerError("42704", f"unrecognized configuration parameter {name!r}")
        self._connection.send_rows([(name, pgwire.TEXT_OID)], [[value]])

    async def _set_datestyle(self, _: str) -> None:
        self._connection.send_command_complete("SELECT 1")


_COMMANDS = {
    "START_WAL_PUSH": WalServiceHandler._start_wal_push,
    "START_REPLICATION": WalServiceHandler._start_replication,
    "IDENTIFY_SYSTEM": WalServiceHandler._identify_system,
    "TIMELINE_STATUS": WalServiceHandler._timeline_status,
    "SHOW ": WalServiceHandler._show,
    "set datestyle to ": WalServiceHandler._set_datestyle,
}

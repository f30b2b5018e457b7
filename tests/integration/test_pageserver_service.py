"""The page service and WAL receiving on a bootstrapped timeline: real initdb and libraries, fake broker and safekeeper."""

import asyncio
import contextlib
import io
import struct
import tarfile
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from neon_services.compute import block_map
from neon_services.ground.http import ApiError
from neon_services.ground.ids import TenantId, TimelineId
from neon_services.ground.lsn import Lsn, format_lsn, parse_lsn, skip_page_header
from neon_services.ground.remote_storage import LocalFsStorage
from neon_services.pageserver import keys, native_records, wal_connection
from neon_services.pageserver.bootstrap import bootstrap_timeline, initdb_archive_key
from neon_services.pageserver.ingest import WalIngest
from neon_services.pageserver.keys import RelTag
from neon_services.pageserver.lsn_waiters import LsnTimeout
from neon_services.pageserver.page_service import PageService
from neon_services.pageserver.reconstruct import Reconstructor
from neon_services.pageserver.relations import Relations
from neon_services.pageserver.timeline import Timeline, in_memory_timeline
from neon_services.pageserver.walreceiver import WalReceiver
from neon_services.protocols import broker_messages as bm
from neon_services.protocols import pagestream, pgclient, pgwire
from neon_services.protocols.pagestream import Request
from neon_services.protocols.pgserver import PgServer, ServerConnection
from neon_services.protocols.replication_stream import Keepalive, XLogData, parse_receiver_message
from neon_services.storage_broker.client import BrokerError
from neon_services.wal import framing
from neon_services.wal.control_data import ControlFile, DBState
from tests.integration.real_postgres import PG_BIN, PG_MAJOR, give_to_postgres
from tests.waiting import eventually

pytestmark = [pytest.mark.postgres, pytest.mark.asyncio(loop_scope="module")]

MAX = (1 << 64) - 1
PG_CLASS = (1663, 5, 1259, 0)
TENANT, TIMELINE = TenantId.generate(), TimelineId.generate()
IDS = f"{TENANT} {TIMELINE}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def timeline(tmp_path_factory: pytest.TempPathFactory) -> Timeline:
    base = tmp_path_factory.mktemp("bootstrap")
    give_to_postgres(base)
    base.chmod(0o755)
    remote = LocalFsStorage(base / "remote")
    made = await bootstrap_timeline(
        tenant_id=TENANT,
        timeline_id=TIMELINE,
        pg_version=PG_MAJOR,
        pg_bin_dir=PG_BIN,
        work_dir=base / "work",
        remote=remote,
        make=lambda lsn: in_memory_timeline(PG_MAJOR, lsn, reconstructor=Reconstructor(None, native_records.apply)),
    )
    assert list((base / "work").iterdir()) == []
    assert (await remote.get(initdb_archive_key(TENANT, TIMELINE)))[:4] == b"\x28\xb5\x2f\xfd"  # zstd
    return made


@pytest_asyncio.fixture(loop_scope="module")
async def service(timeline: Timeline) -> AsyncIterator[PageService]:
    async def find(tenant_id: TenantId, timeline_id: TimelineId) -> Timeline:
        if timeline_id != TIMELINE:
            raise ApiError(404, f"timeline {timeline_id} was not found")
        return timeline

    found = PageService(find, wait_lsn_timeout_s=0.3)
    await found.start("127.0.0.1", 0)
    yield found
    await found.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def client(service: PageService) -> AsyncIterator[pgclient.PgClient]:
    connection = await pgclient.connect("127.0.0.1", service.port)
    yield connection
    connection.close()


async def ask(client: pgclient.PgClient, version: int, *requests: Request) -> list[pagestream.Response]:
    """Pipelined requests and their responses."""
    for request in requests:
        client.send_copy_data(pagestream.encode_request(request, version))
    answers = []
    for _ in requests:
        async with asyncio.timeout(10):
            payload = await client.next_copy_data()
        assert payload is not None
        answers.append(pagestream.parse_response(payload, version))
    return answers


@pytest.mark.parametrize("version", [2, 3])
async def test_pagestream(client: pgclient.PgClient, timeline: Timeline, version: int) -> None:
    await client.start_copy_both(f"pagestream_v{version} {IDS}")
    lsn = timeline.last_record_lsn
    size = (await Relations.of(timeline).size(RelTag(*PG_CLASS), lsn)) or 0
    assert size > 5
    requests = [
        Request(pagestream.EXISTS, MAX, lsn, PG_CLASS, 1),
        Request(pagestream.EXISTS, MAX, lsn, (1663, 5, 99999, 0), 2),
        Request(pagestream.NBLOCKS, lsn, lsn, PG_CLASS, 3),
        Request(pagestream.NBLOCKS, lsn, lsn, (1663, 5, 99999, 2), 4),
        Request(pagestream.DB_SIZE, MAX, 0, (5,), 5),
        Request(pagestream.GET_SLRU_SEGMENT, MAX, 0, (keys.CLOG, 0), 6),
        *(Request(pagestream.GET_PAGE, MAX, lsn, (*PG_CLASS, block), 10 + block) for block in range(size + 1)),
        Request(pagestream.NBLOCKS, MAX, lsn, PG_CLASS, 99),
    ]
    answers = await ask(client, version, *requests)
    if version == 3:
        assert [answer.request for answer in answers] == requests
    payloads = [answer.payload for answer in answers]
    assert payloads[:4] == [b"\1", b"\0", struct.pack("!I", size), bytes(4)]
    assert struct.unpack("!q", payloads[4])[0] > 6 << 20
    assert len(payloads[5]) == 4 + 8192 and payloads[5][:4] == struct.pack("!I", 1)
    for block in range(size):
        assert payloads[6 + block] == await timeline.get(*keys.relation_block(RelTag(*PG_CLASS), block), lsn)
    assert payloads[6 + size] == bytes(8192)  # beyond the end
    assert payloads[-1] == payloads[2]


async def test_errors_of_requests_leave_the_stream_open(client: pgclient.PgClient, timeline: Timeline) -> None:
    await client.start_copy_both(f"pagestream_v3 {IDS}")
    tip = timeline.last_record_lsn
    page = (*PG_CLASS, 0)
    answers = await ask(
        client,
        3,
        Request(pagestream.GET_PAGE, tip, tip + 8, page, 1),
        Request(pagestream.GET_PAGE, 0, 0, page, 2),
        Request(pagestream.GET_PAGE, 8, 0, page, 3),
        Request(pagestream.GET_PAGE, MAX, tip + 8, page, 4),
        Request(pagestream.NBLOCKS, MAX, tip, (1663, 5, 99999, 0), 5),
        Request(pagestream.NBLOCKS, MAX, tip, (1663, 5, 0, 0), 6),
        Request(pagestream.GET_SLRU_SEGMENT, MAX, tip, (0, 77), 7),
        Request(pagestream.GET_PAGE, MAX, tip, page, 8),
    )
    errors = [answer.error for answer in answers]
    assert errors[-1] is None and len(answers[-1].payload) == 8192
    expected = (
        *("Bad request: ", "Bad request: invalid LSN(0)", "Bad request: tried to request a page version that was garbage"),
        *("LSN timeout: ", "Not found: ", "Bad request: ", "Not found: "),
    )
    for error, prefix in zip(errors[:-1], expected, strict=True):
        assert error is not None and error.startswith(prefix), (error, prefix)


async def test_commands_that_are_refused(service: PageService) -> None:
    client = await pgclient.connect("127.0.0.1", service.port)
    for command, text in (
        ("nonsense", "unknown command"),
        ("pagestream_v3 x y", "not a tenant id"),
        (f"pagestream_v3 {TENANT} {TimelineId.generate()}", "was not found"),
        (f"basebackup {TenantId.generate()} {TIMELINE}", "bound to tenant"),
        (f"basebackup {IDS} --wrong", "unknown option --wrong"),
        (f"basebackup {IDS} 0/8", "invalid basebackup lsn"),
        (f"basebackup {IDS} 7F/0", "did not reach 7F/0"),
        (f"basebackup {IDS} seven", "not an LSN"),
    ):
        with pytest.raises(pgwire.ServerError, match=text):
            await client.query(command)
    assert await client.query("set statement_timeout=1") == []
    client.close()


async def test_a_malformed_request_ends_only_its_connection(service: PageService) -> None:
    client = await pgclient.connect("127.0.0.1", service.port)
    await client.start_copy_both(f"pagestream_v3 {IDS}")
    client.send_copy_data(b"\x63 not a request")
    with pytest.raises(pgwire.ServerError, match="unknown pagestream request tag 99"):
        await client.next_copy_data()
    again = await pgclient.connect("127.0.0.1", service.port)
    await again.start_copy_both(f"pagestream_v3 {IDS}")
    assert (await ask(again, 3, Request(pagestream.EXISTS, MAX, 0, PG_CLASS)))[0].payload == b"\1"
    again.close()


async def fetch(service: PageService, options: str) -> dict[str, bytes]:
    """The members of a basebackup in order; directories have no content."""
    client = await pgclient.connect("127.0.0.1", service.port)
    content = b"".join([chunk async for chunk in client.copy_out(f"basebackup {IDS} {options}")])
    client.close()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {m.name: (f.read() if (f := archive.extractfile(m)) else b"") for m in archive.getmembers()}


async def test_a_lease_is_granted_above_the_cutoff_only(client: pgclient.PgClient, timeline: Timeline) -> None:
    command = f"lease lsn {IDS}"
    ((first,),) = await client.query(f"{command} {format_lsn(timeline.last_record_lsn)}")
    ((second,),) = await client.query(f"{command} {format_lsn(timeline.last_record_lsn)}")
    assert first is not None and second is not None and int(first) <= int(second)
    assert timeline.leases.held(int(second) - 1) == [timeline.last_record_lsn]
    assert timeline.leases.held(int(second)) == []
    assert await client.query(f"{command} {format_lsn(timeline.latest_gc_cutoff_lsn - 8)}") == [[None]]
    with pytest.raises(pgwire.ServerError, match="expected lease lsn"):
        await client.query(f"{command}")


async def test_basebackup(service: PageService, timeline: Timeline) -> None:
    lsn = timeline.last_record_lsn
    members = await fetch(service, f"{format_lsn(lsn)} --gzip")
    names = list(members)
    assert names[-2] == "global/pg_control" and names[-1].startswith("pg_wal/0000000100000000000000")
    assert {"base/1", "base/5/PG_VERSION", "base/5/pg_filenode.map", "global/pg_filenode.map", "pg_xact/0000"} <= set(names)
    assert {"pg_multixact/offsets/0000", "pg_multixact/members/0000", "pg_hba.conf", "postgresql.auto.conf"} <= set(names)
    assert members["PG_VERSION"] == b"15\n" and len(members["base/5/pg_filenode.map"]) == 512
    assert members["neon.signal"] == members["zenith.signal"] == f"PREV LSN: {format_lsn(timeline.prev_record_lsn)}".encode()
    control = ControlFile.parse(members["global/pg_control"])
    assert (control.state, control.checkpoint_lsn, control.checkpoint.redo) == (DBState.SHUTDOWNED, 0, skip_page_header(lsn))
    segment = members[names[-1]]
    header = framing.parse_page_header(segment)
    assert len(segment) == 16 << 20 and header.system_identifier == control.system_identifier
    page = framing.parse_page_header(segment[lsn % (16 << 20) // 8192 * 8192 :])
    assert page.page_addr == lsn - lsn % 8192 and page.remaining_len == lsn % 8192 - page.size


async def test_skeleton(service: PageService, timeline: Timeline) -> None:
    members = await fetch(service, "--skeleton")
    assert list(members)[-3:] == ["neon.relation_sizes", "neon.catalog_pages", "global/pg_control"]
    sizes = block_map.parse_relation_sizes(members["neon.relation_sizes"])
    known = await Relations.of(timeline).relation_sizes(timeline.last_record_lsn)
    assert {tuple(row)[:4]: row["nblocks"] for row in sizes} == {tuple(tag): blocks for tag, blocks in known.items()}
    pages = block_map.parse_catalog_pages(members["neon.catalog_pages"])
    assert 60 < len(pages) < 200
    for row in pages[:: max(len(pages) // 10, 1)]:
        tag = RelTag(*(int(row[name]) for name in ("spc", "db", "rel", "fork")))
        assert row["block"] < known[tag]
        expected = await timeline.get(*keys.relation_block(tag, int(row["block"])), timeline.last_record_lsn)
        assert row["page"].tobytes() == expected
    databases = {int(row["db"]) for row in pages}
    assert databases == {0, 5}  # not the templates


# --- WAL receiving


class FakeBroker:
    """A broker that says what the test puts in."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.asked: asyncio.Queue[Any] = asyncio.Queue()
        self.subscriptions = 0

    async def subscribe(self, ttid: Any, types: Any) -> AsyncIterator[Any]:
        self.subscriptions += 1
        while True:
            message = await self.messages.get()
            if message is None:
                raise BrokerError("the broker is gone")
            yield message

    async def publish_one(self, payload: Any) -> None:
        self.asked.put_nowait(payload)

    def announce(self, number: int, port: int, commit_lsn: int) -> None:
        info = bm.SafekeeperTimelineInfo(safekeeper_id=number, commit_lsn=commit_lsn, safekeeper_connstr=f"127.0.0.1:{port}")
        self.messages.put_nowait(bm.typed(info))


class FakeSafekeeper:
    """Streams bytes of WAL; ``cut_after`` bytes it breaks the connection; after feedback it sends what it had ``kept_back``.

    That goes in two messages, the second when ``goes_on`` is set.
    """

    def __init__(self, start: int, wal: bytes) -> None:
        self.start, self.wal = start, wal
        self.cut_after: int | None = None
        self.end_normally = False
        self.starts: list[int] = []
        self.feedback: list[Any] = []
        self.kept_back: bytes | None = None
        self.fed, self.goes_on = asyncio.Event(), asyncio.Event()
        self.server = PgServer(lambda connection: _SafekeeperSession(self, connection))

    @property
    def end(self) -> int:
        return self.start + len(self.wal)

    def on_feedback(self, body: memoryview) -> None:
        self.feedback.append(parse_receiver_message(bytes(body)))
        if self.kept_back is not None:
            self.wal, self.kept_back = self.kept_back, None
            self.fed.set()


class _SafekeeperSession:
    def __init__(self, safekeeper: FakeSafekeeper, connection: ServerConnection) -> None:
        self._safekeeper = safekeeper

    async def startup(self, message: pgwire.StartupMessage) -> None:
        assert message.parameters["application_name"] == "pageserver-7"
        options = message.options()
        assert options["protocol"] == '{"type":"vanilla"}' and len(options["timeline_id"]) == len(options["tenant_id"]) == 32

    def connection_lost(self) -> None:
        pass

    async def query(self, connection: ServerConnection, sql: str) -> None:
        safekeeper = self._safekeeper
        if sql == "IDENTIFY_SYSTEM":
            columns = [("systemid", pgwire.TEXT_OID), ("timeline", pgwire.INT4_OID), ("xlogpos", pgwire.TEXT_OID)]
            connection.send_rows(columns, [["1", "1", format_lsn(safekeeper.end)]])
            return
        start = parse_lsn(sql.removeprefix("START_REPLICATION PHYSICAL "))
        safekeeper.starts.append(start)
        connection.copy_sink = safekeeper.on_feedback
        connection.begin_copy_both()
        sent = 0
        for at in range(start, safekeeper.end, 3001):
            part = safekeeper.wal[at - safekeeper.start : min(at + 3001, safekeeper.end) - safekeeper.start]
            connection.send_copy_data(XLogData(Lsn(at), Lsn(safekeeper.end), 0, part).pack())
            sent += len(part)
            if safekeeper.cut_after is not None and sent >= safekeeper.cut_after:
                await asyncio.sleep(0.05)  # let the bytes arrive: an aborted connection may lose them
                connection.abort()
                return
        if safekeeper.end_normally:
            connection.fail('ending streaming to Some("pageserver-7") at 0/0, receiver is caughtup', "00000")
            return
        while not connection.closed:
            if (at := start + sent) < safekeeper.end:  # it has grown
                part = safekeeper.wal[at - safekeeper.start :]
                if safekeeper.fed.is_set():
                    first, part = part[: len(part) // 2], part[len(part) // 2 :]
                    connection.send_copy_data(XLogData(Lsn(at), Lsn(safekeeper.end), 0, first).pack())
                    sent += len(first)
                    await safekeeper.goes_on.wait()
                    safekeeper.fed.clear()
                connection.send_copy_data(XLogData(Lsn(start + sent), Lsn(safekeeper.end), 0, part).pack())
                sent += len(part)
            connection.send_copy_data(Keepalive(Lsn(safekeeper.end), 0, True).pack())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(safekeeper.fed.wait(), 0.05)


def make_wal(timeline: Timeline, messages: int, size: int = 900) -> tuple[int, bytes, list[int]]:
    """(start, bytes, record ends) of WAL that follows the timeline's last record: logical messages that nobody reads."""
    start = position = framing.record_start(timeline.last_record_lsn)
    previous, parts, ends = timeline.prev_record_lsn, bytearray(), []
    for number in range(messages):
        main = struct.pack("<IIQQ", 5, 0, 2, size) + b"x\0" + bytes([number % 251]) * size
        record = framing.build_record(21, 0, main, prev_lsn=previous)
        where = framing.record_start(position)
        for lsn, content in framing.place_record(where, record, pg_major=PG_MAJOR, system_identifier=1):
            at = lsn - start
            parts += bytes(max(at - len(parts), 0))
            parts[at : at + len(content)] = content
        previous, position = where, framing.record_end(where, len(record))
        ends.append(position)
    return start, bytes(parts[: position - start]), ends


@contextlib.asynccontextmanager
async def receiving(timeline: Timeline, broker: FakeBroker, safekeeper: FakeSafekeeper) -> AsyncIterator[WalReceiver]:
    """A receiver of WAL, and the safekeeper, which the broker has not announced yet."""
    await safekeeper.server.start("127.0.0.1", 0)
    receiver = WalReceiver(timeline, broker, 7)  # type: ignore[arg-type]
    receiver.start()
    try:
        yield receiver
    finally:
        await receiver.stop()
        await safekeeper.server.stop()


async def test_wal_is_received_through_failures(timeline: Timeline) -> None:
    start, wal, ends = make_wal(timeline, 200)
    broker, safekeeper = FakeBroker(), FakeSafekeeper(start, wal)
    safekeeper.cut_after = len(wal) // 3
    async with receiving(timeline, broker, safekeeper) as receiver:
        broker.announce(1, 1, safekeeper.end + 1)  # nobody listens there, though it claims to be ahead
        broker.announce(2, safekeeper.server.port, safekeeper.end)
        await eventually(lambda: len(safekeeper.starts) >= 2, "a second connection")
        assert safekeeper.starts[0] == start and safekeeper.starts[1] in {framing.record_start(end) for end in ends}
        broker.messages.put_nowait(None)  # the broker goes away and comes back: the connection does not care
        safekeeper.cut_after = None
        broker.announce(2, safekeeper.server.port, safekeeper.end)
        await eventually(lambda: timeline.last_record_lsn == ends[-1], "all WAL ingested")
        await eventually(lambda: safekeeper.feedback and safekeeper.feedback[-1].last_received_lsn == ends[-1], "feedback")
        last = safekeeper.feedback[-1]
        assert last.current_timeline_size == await Relations.of(timeline).compute_logical_size() > 20 << 20
        assert "streaming from safekeeper 2" in receiver.status
        assert receiver.wal_source_connstr == f"127.0.0.1:{safekeeper.server.port}"
        assert receiver.last_received_msg_lsn == safekeeper.end


async def test_damaged_wal_stops_at_the_damage_and_is_retried(timeline: Timeline, caplog: pytest.LogCaptureFixture) -> None:
    start, wal, ends = make_wal(timeline, 50)
    damaged = bytearray(wal)
    damaged[ends[24] - start + 100] ^= 0xFF
    broker, safekeeper = FakeBroker(), FakeSafekeeper(start, bytes(damaged))
    async with receiving(timeline, broker, safekeeper):
        broker.announce(1, safekeeper.server.port, safekeeper.end)
        await eventually(lambda: len(safekeeper.starts) >= 3, "retries")
        assert timeline.last_record_lsn < ends[25]
        assert "cannot ingest WAL of safekeeper 1, trying again" in caplog.text
        safekeeper.wal = wal
        broker.announce(1, safekeeper.server.port, safekeeper.end)
        await eventually(lambda: timeline.last_record_lsn == ends[-1], "the rest after the repair", 20)


async def test_an_idle_safekeeper_is_asked_for_when_somebody_waits(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    start, wal, ends = make_wal(timeline, 3)
    broker, safekeeper = FakeBroker(), FakeSafekeeper(start, wal)
    safekeeper.end_normally = True
    async with receiving(timeline, broker, safekeeper) as receiver:
        waiter = asyncio.create_task(timeline.wait_lsn(ends[-1], 20))
        async with asyncio.timeout(5):
            request = await broker.asked.get()
        assert bm.ttid_of(request).timeline_id == timeline.timeline_id
        response = bm.SafekeeperDiscoveryResponse(
            safekeeper_id=3, commit_lsn=safekeeper.end, safekeeper_connstr=f"127.0.0.1:{safekeeper.server.port}"
        )
        broker.messages.put_nowait(bm.typed(response))
        await waiter
        # the stream ends in the normal way: no reconnection until the safekeeper speaks again
        await eventually(lambda: receiver.wal_source_connstr is None, "the end of the stream")
        await eventually(lambda: "not connected; candidates []" in receiver.status, "the safekeeper being forgotten")
        assert len(safekeeper.starts) == 1


async def test_the_latest_lsn_waits_for_what_was_received_and_no_longer(
    timeline: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal_connection, "GATHER_S", 3600.0)
    monkeypatch.setattr(wal_connection, "ASKED_S", 0.0)
    start, wal, ends = make_wal(timeline, 4)
    begun, allowed = asyncio.Semaphore(0), asyncio.Semaphore(0)
    ingest = WalIngest.ingest

    async def slow_ingest(self: WalIngest, batch: Any) -> None:
        begun.release()
        await allowed.acquire()
        await ingest(self, batch)

    monkeypatch.setattr(WalIngest, "ingest", slow_ingest)
    broker, safekeeper = FakeBroker(), FakeSafekeeper(start, wal[: ends[0] - start])
    assert await timeline.latest_lsn(0.01) == timeline.last_record_lsn  # nobody ingests yet
    async with receiving(timeline, broker, safekeeper) as receiver:
        broker.announce(1, safekeeper.server.port, safekeeper.end)
        await asyncio.wait_for(begun.acquire(), 30)
        with pytest.raises(LsnTimeout, match="ingest did not reach"):
            await timeline.latest_lsn(0.01)
        asked_meanwhile = asyncio.create_task(timeline.latest_lsn(20))
        await asyncio.sleep(0)
        safekeeper.wal = wal[: ends[1] - start]
        await eventually(lambda: receiver.last_received_msg_lsn == ends[1], "more WAL, while a batch is being ingested")
        asked_later = asyncio.create_task(timeline.latest_lsn(20))
        await asyncio.sleep(0)
        allowed.release()
        await asyncio.wait_for(begun.acquire(), 30)
        assert not asked_meanwhile.done()
        safekeeper.wal = wal[: ends[2] - start]
        await eventually(lambda: receiver.last_received_msg_lsn == ends[2], "more WAL than was there after the first batch")
        allowed.release()
        assert await asked_meanwhile == ends[1]
        await asyncio.wait_for(begun.acquire(), 30)
        assert not asked_later.done()
        allowed.release()
        assert await asked_later == ends[2]
        safekeeper.wal = wal
        await eventually(lambda: receiver.last_received_msg_lsn == ends[3], "WAL that is left lying")
        asked_at_the_end = asyncio.create_task(timeline.latest_lsn(20))
        await asyncio.wait_for(begun.acquire(), 30)
    assert await asked_at_the_end == ends[2]
    assert await timeline.latest_lsn(20) == ends[2]


async def test_the_latest_lsn_is_that_of_what_the_safekeeper_kept_back(
    timeline: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal_connection, "GATHER_S", 3600.0)
    monkeypatch.setattr(wal_connection, "ASKED_S", 0.3)
    start, wal, ends = make_wal(timeline, 40)
    broker, safekeeper = FakeBroker(), FakeSafekeeper(start, wal[: ends[0] - start])
    async with receiving(timeline, broker, safekeeper) as receiver:
        broker.announce(1, safekeeper.server.port, safekeeper.end)
        await eventually(lambda: timeline.last_record_lsn == ends[0], "the first batch, at once")
        safekeeper.wal = wal[: ends[1] - start]
        await eventually(lambda: receiver.last_received_msg_lsn == ends[1], "WAL that is left lying")
        safekeeper.kept_back = wal
        asked = asyncio.create_task(timeline.latest_lsn(20))
        await eventually(lambda: ends[1] < timeline.last_record_lsn < ends[-1], "the first half of what was kept back")
        with pytest.raises(TimeoutError):  # the rest was offered, and is waited for much longer than for an answer
            await asyncio.wait_for(asyncio.shield(asked), 0.9)
        safekeeper.goes_on.set()
        assert await asked == ends[-1]
        assert await timeline.latest_lsn(20) == ends[-1]  # there is nothing more


async def test_a_little_wal_is_left_to_become_more_unless_somebody_waits(
    timeline: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal_connection, "GATHER_S", 3600.0)
    start, wal, ends = make_wal(timeline, 600)
    broker, safekeeper = FakeBroker(), FakeSafekeeper(start, wal[: ends[0] - start])

    async def grow(end: int) -> None:
        safekeeper.wal = wal[: end - start]
        await eventually(lambda: receiver.last_received_msg_lsn == end, "the WAL at the pageserver")

    async with receiving(timeline, broker, safekeeper) as receiver:
        broker.announce(1, safekeeper.server.port, safekeeper.end)
        await eventually(lambda: timeline.last_record_lsn == ends[0], "the first batch, at once")
        await grow(ends[1])
        await grow(ends[2])
        assert timeline.last_record_lsn == ends[0]
        await timeline.wait_lsn(ends[1], 20)
        assert timeline.last_record_lsn == ends[2]
        waiter = asyncio.create_task(timeline.wait_lsn(ends[3], 20))  # before the WAL is here
        await grow(ends[3])
        await waiter
        await grow(ends[4])
        assert timeline.last_record_lsn == ends[3]
        assert await timeline.latest_lsn(20) == ends[4]
        await grow(ends[-1])  # more than is left lying
        await eventually(lambda: timeline.last_record_lsn == ends[-1], "a large batch, without anybody waiting")
        assert await timeline.latest_lsn(20) == ends[-1]

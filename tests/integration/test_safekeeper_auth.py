"""Tokens at the ports of real safekeepers: every endpoint and every command with every kind of token."""

import asyncio
import itertools
import re
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from neon_services.ground.errors import NeonError
from neon_services.ground.ids import TenantTimelineId, TimelineId
from neon_services.ground.lsn import format_lsn
from neon_services.protocols import pgclient, pgwire
from neon_services.protocols.replication_stream import XLogData, parse_sender_message
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP, MembershipConfiguration, ProposerGreeting
from neon_services.safekeeper.http_access import Needs, needs
from neon_services.safekeeper.openapi import document
from tests.credentials import TokenKey
from tests.integration.cluster import http
from tests.integration.safekeeper_support import dead, new_ttid, until
from tests.integration.secure_support import SecureFleet, secure_fleet
from tests.integration.test_pull_timeline import SEGMENT, START, create, members, proposer
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

pytestmark = pytest.mark.cluster

COMMANDS = (
    "IDENTIFY_SYSTEM",
    "TIMELINE_STATUS",
    "SHOW wal_segment_size",
    "START_REPLICATION",
    "START_WAL_PUSH 2",
    "START_WAL_PUSH 3",
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureFleet]:
    with secure_fleet(tmp_path_factory.mktemp("auth"), 1, "--no-sync", tls=False) as fleet:
        yield fleet


class Timelines:
    """Two tenants' timelines with WAL in them, and tokens."""

    def __init__(self, fleet: SecureFleet) -> None:
        self.fleet = fleet
        self.own, self.other = new_ttid(), new_ttid()
        key = fleet.key
        self.tokens: dict[str, str | None] = {
            "none": None,
            "garbage": "garbage",
            "stranger": TokenKey().token("safekeeperdata"),
            "expired": key.expired("safekeeperdata"),
            "pageserverapi": key.token("pageserverapi"),
            "admin": key.token("admin", self.own.tenant_id),
            "other tenant": key.token("tenant", self.other.tenant_id),
            "tenant": key.token("tenant", self.own.tenant_id),
            "safekeeperdata": key.token("safekeeperdata"),
        }
        self.wal = WalMaker(START, SEGMENT).until(START + 100_000, 5_000)

    async def fill(self) -> None:
        node = self.fleet.members[0].node
        mconf = MembershipConfiguration(1, members(node))
        for ttid in (self.own, self.other):
            create(ttid, mconf, [node])
            leader = proposer(ttid, self.wal, mconf)
            await leader.elect([node])
            await leader.stream(self.wal.end)
            leader.leave()


@pytest.fixture
async def timelines(fleet: SecureFleet) -> Timelines:
    made = Timelines(fleet)
    await made.fill()
    return made


# -- HTTP


def answer(method: str, url: str, token: str | None, body: bytes) -> tuple[int, str]:
    request = urllib.request.Request(url, data=body if method != "GET" else None, method=method)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return found.status, found.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def test_every_endpoint_with_every_token(timelines: Timelines) -> None:
    """Requests whose tokens are refused change nothing; those with good tokens are refused for their bodies, or harmless."""
    node, own = timelines.fleet.members[0].node, timelines.own
    before = node.status(own)
    values = {"tenant_id": own.tenant_id, "timeline_id": own.timeline_id, "source_timeline_id": own.timeline_id}
    body = f'{{"tenant_id": "{own.tenant_id}"}}'.encode()
    for path, operations in document()["paths"].items():
        for method, (name, token) in itertools.product(map(str.upper, operations), timelines.tokens.items()):
            needed = needs(method, path)
            accepted = name == "safekeeperdata" or (name == "tenant" and needed is Needs.TENANT)
            if accepted and (method == "DELETE" or "backup_partial" in path or "term_bump" in path):
                continue  # these would be carried out
            query = "?seconds=0" if path.startswith("/profile/") else ""  # refused at once, but not for want of a token
            status, text = answer(method, node.url(path.format(**values, destination_id=7)) + query, token, body)
            what = f"{method} {path} with {name}: {status} {text[:300]}"
            if needed is Needs.NOTHING:
                assert status == (400 if path == "/profile/cpu" else 412 if query else 200), what
            elif accepted:
                assert status not in (401, 403), what
            elif name in ("none", "garbage", "stranger", "expired"):
                assert status == 401, what
            else:
                assert status == 403, what
            if status in (401, 403):
                assert re.fullmatch(r'\{"msg": ".*"\}', text), what
                assert token is None or (token not in text and token.split(".")[-1] not in text), what
    assert node.status(own) == before


async def test_a_tenant_deletes_and_makes_its_own_only(timelines: Timelines) -> None:
    node, own, other = timelines.fleet.members[0].node, timelines.own, timelines.other
    token = timelines.tokens["tenant"]

    def request(method: str, ttid: TenantTimelineId, suffix: str = "") -> int:
        return answer(method, node.timeline_url(ttid, suffix), token, b"{}")[0]

    assert request("POST", own, "/term_bump") == 200
    assert request("POST", other, "/term_bump") == 403
    assert request("DELETE", other) == 403
    assert request("DELETE", own) == 200
    assert answer("DELETE", node.url(f"/v1/tenant/{other.tenant_id}"), token, b"")[0] == 403
    assert answer("DELETE", node.url(f"/v1/tenant/{own.tenant_id}"), token, b"")[0] == 200
    assert node.status(other)["flush_lsn"] == format_lsn(timelines.wal.end)


# -- the WAL service


async def connect(port: int, token: str | None, options: str, name: str = "test") -> pgclient.PgClient:
    parameters = {"application_name": name, "options": options}
    return await pgclient.connect("127.0.0.1", port, parameters=parameters, password=token)


def options_of(ttid: TenantTimelineId) -> str:
    return f"-c tenant_id={ttid.tenant_id} timeline_id={ttid.timeline_id}"


async def carry_out(client: pgclient.PgClient, command: str, wal: WalMaker) -> Any:
    """Use the timeline; what came of it. Raises ServerError when it is refused."""
    if command == "START_REPLICATION":
        await client.start_copy_both(f"START_REPLICATION PHYSICAL {format_lsn(START)}")
        payload = await asyncio.wait_for(client.next_copy_data(), 10)
        assert payload is not None
        message = parse_sender_message(payload)
        assert isinstance(message, XLogData)
        return bytes(message.data) == bytes(wal.data[: len(message.data)])
    if command.startswith("START_WAL_PUSH"):
        await client.start_copy_both(f"START_WAL_PUSH (proto_version '{command[-1]}', allow_timeline_creation 'true')")
        return True
    return await client.query(command)


async def outcome(port: int, token: str | None, options: str, command: str, wal: WalMaker) -> str:
    """Whether it is done ("yes"), or where it is refused."""
    try:
        client = await connect(port, token, options)
    except pgwire.ServerError as error:
        assert str(error).startswith("JWT authentication error: ") and error.sqlstate == "XX000"
        assert token is None or token not in str(error)
        return "at the door"
    except NeonError as error:
        assert "none was given" in str(error)
        return "at the door"
    try:
        assert await carry_out(client, command, wal)
    except pgwire.ServerError as error:
        assert str(error) == "permission denied: the token is for another tenant"
        return "at the command"
    finally:
        client.abort()
    return "yes"


@pytest.mark.parametrize("command", COMMANDS)
async def test_every_command_with_every_token(timelines: Timelines, command: str) -> None:
    member, options = timelines.fleet.members[0], options_of(timelines.own)
    for name, token in timelines.tokens.items():
        main = {"safekeeperdata": "yes", "tenant": "yes", "other tenant": "at the command"}.get(name, "at the door")
        assert await outcome(member.node.pg_port, token, options, command, timelines.wal) == main, name
        tenants = {"tenant": "yes", "other tenant": "at the command"}.get(name, "at the door")
        assert await outcome(member.tenant_port, token, options, command, timelines.wal) == tenants, name


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_tenant_cannot_reach_another_one_by_any_option(timelines: Timelines, command: str) -> None:
    own, other, member = timelines.own, timelines.other, timelines.fleet.members[0]
    token = timelines.tokens["tenant"]
    for options in (
        options_of(other),
        f"-c ztenantid={other.tenant_id} ztimelineid={other.timeline_id}",
        f"-ctenant_id={other.tenant_id} -ctimeline_id={other.timeline_id}",
        f"-c tenant_id={own.tenant_id} tenant_id={other.tenant_id} timeline_id={other.timeline_id}",
        f"-c tenant_id={other.tenant_id} ztenantid={own.tenant_id} timeline_id={other.timeline_id}",
        f"-c tenant_id={str(other.tenant_id).upper()} timeline_id={str(other.timeline_id).upper()}",
    ):
        for port in (member.node.pg_port, member.tenant_port):
            assert await outcome(port, token, options, command, timelines.wal) == "at the command", options
    # its own tenant with the other's timeline: no such timeline, whatever is asked
    mixed = f"-c tenant_id={own.tenant_id} timeline_id={other.timeline_id}"
    client = await connect(member.node.pg_port, token, mixed)
    try:
        if command == "TIMELINE_STATUS":
            assert await client.query(command) == []
        elif not command.startswith("START_WAL_PUSH"):
            with pytest.raises(pgwire.ServerError, match=r"not found|not here|no timeline|does not exist"):
                await carry_out(client, command, timelines.wal)
    finally:
        client.abort()


async def test_a_greeting_cannot_name_another_timeline(timelines: Timelines) -> None:
    own, other, node = timelines.own, timelines.other, timelines.fleet.members[0].node
    before = node.status(other)
    unknown = TenantTimelineId(other.tenant_id, TimelineId.generate())
    for version, target in itertools.product((2, 3), (other, unknown)):
        client = await connect(node.pg_port, timelines.tokens["tenant"], options_of(own), "walproposer")
        await client.start_copy_both(f"START_WAL_PUSH (proto_version '{version}', allow_timeline_creation 'true')")
        greeting = ProposerGreeting(target, NO_MEMBERSHIP, PG_VERSION, SYSTEM_ID, SEGMENT)
        client.send_copy_data(greeting.pack() if version == 3 else greeting_v2(target))
        assert "greets timeline" in await dead(client)
    assert node.status(other) == before
    with pytest.raises(urllib.error.HTTPError):
        node.status(unknown)


def greeting_v2(ttid: TenantTimelineId) -> bytes:
    """A ProposerGreeting of protocol 2."""
    ids = bytes.fromhex(str(ttid.timeline_id)) + bytes.fromhex(str(ttid.tenant_id))
    return struct.pack("<QII16sQ", ord("g"), 2, PG_VERSION, bytes(16), SYSTEM_ID) + ids + struct.pack("<II", 1, SEGMENT)


async def test_libpq_sends_the_token_as_its_password(timelines: Timelines) -> None:
    node = timelines.fleet.members[0].node

    def identify(password: str | None) -> list[Any]:
        with psycopg.connect(
            host="127.0.0.1",
            port=node.pg_port,
            user="no_user",
            dbname="replication",
            password=password,
            options=options_of(timelines.own),
            autocommit=True,
        ) as connection:
            return connection.pgconn.exec_(b"IDENTIFY_SYSTEM").get_value(0, 0)  # type: ignore[return-value]

    for name in ("tenant", "safekeeperdata"):
        assert await asyncio.to_thread(identify, timelines.tokens[name]) == str(SYSTEM_ID).encode()
    for name in ("none", "garbage", "expired", "stranger", "pageserverapi"):
        with pytest.raises(psycopg.OperationalError):
            await asyncio.to_thread(identify, timelines.tokens[name])


async def test_keys_are_rotated_while_it_runs(timelines: Timelines) -> None:
    fleet, node = timelines.fleet, timelines.fleet.members[0].node
    new = TokenKey()
    own = timelines.own

    async def accepted(token: str) -> bool | None:
        """By HTTP and by the WAL service; None when they do not agree (yet)."""
        by_http = answer("GET", node.url("/v1/utilization"), token, b"")[0]
        assert by_http in (200, 401)
        by_pg = await outcome(node.pg_port, token, options_of(own), "TIMELINE_STATUS", timelines.wal) == "yes"
        return by_pg if by_pg == (by_http == 200) else None

    async def becomes(token: str, wanted: bool) -> None:
        await until(lambda: asyncio.run(accepted(token)) is wanted, f"the token to be {'accepted' if wanted else 'refused'}")

    old_token, new_token = fleet.key.token("safekeeperdata"), new.token("safekeeperdata")
    assert (await accepted(old_token), await accepted(new_token)) == (True, False)
    client = await connect(node.pg_port, old_token, options_of(own))
    (fleet.keys / "second.pem").write_bytes(new.public_pem)
    try:
        await becomes(new_token, True)
        assert await accepted(old_token)
        (fleet.keys / "first.pem").unlink()
        await becomes(old_token, False)
        assert await accepted(new_token)
        assert await client.query("TIMELINE_STATUS")  # who is connected stays so
        (fleet.keys / "second.pem").write_bytes(b"half a k")
        await until(lambda: "not read again" in node.log.read_text(), "the log to tell of the broken key")
        assert await accepted(new_token)
    finally:
        client.abort()
        (fleet.keys / "first.pem").write_bytes(fleet.key.public_pem)
        (fleet.keys / "second.pem").unlink()
    await becomes(old_token, True)
    await becomes(new_token, False)


def test_no_token_is_ever_shown(fleet: SecureFleet) -> None:
    """Runs last: neither the log nor the debug dump knows a token, or the signature of one."""
    node = fleet.members[0].node
    shown = node.log.read_text() + str(http("GET", node.url("/v1/debug_dump?dump_all=true"), token=node.token))
    assert "JWT" in shown or "refused" in shown
    header = node.token.split(".")[0] if node.token else ""
    assert header and header not in shown

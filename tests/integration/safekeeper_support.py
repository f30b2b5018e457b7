"""Safekeepers and a broker as real processes of the current user, and a scripted proposer that elects and streams."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neon_services.consensus.term_history import divergence_lsn
from neon_services.ground.errors import NeonError
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import INVALID_LSN, WAL_SEGMENT_SIZE, Lsn, parse_lsn
from neon_services.ground.tls import ClientTls
from neon_services.protocols import pgclient
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.replication_stream import XLogData, parse_sender_message
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    MembershipConfiguration,
    ProposerElected,
    ProposerGreeting,
    TermLsn,
    VoteRequest,
    VoteResponse,
    parse_acceptor_message,
)
from tests.integration.cluster import LIBRARIES, SCRIPTS, free_port, http
from tests.waiting import until as until
from tests.waiting import wait_until


class Service:
    """One process with its log."""

    def __init__(self, name: str, argv: list[str], log: Path) -> None:
        self.name = name
        self.argv = argv
        self.log = log
        self.environment: dict[str, str] = {}
        self.popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self.popen is None or self.popen.poll() is not None
        with self.log.open("ab") as log:
            environment = {**os.environ, "NEON_LIB_DIR": str(LIBRARIES), **self.environment}
            self.popen = subprocess.Popen(self.argv, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.popen is not None and self.popen.poll() is None:
            self.popen.kill()
        if self.popen is not None:
            self.popen.wait(10)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.popen is not None
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(10)

    def wait_http(self, url: str) -> None:
        """Until it answers."""

        def answers() -> bool:
            assert self.popen is not None and self.popen.poll() is None, f"{self.name} exited:\n{self.log.read_text()}"
            http("GET", url)
            return True

        wait_until(answers, f"{self.name} at {url}", 20)


class Node(Service):
    """One safekeeper."""

    def __init__(self, base: Path, node_id: int, broker_port: int, *options: str) -> None:
        self.id = node_id
        self.directory = base / f"sk{node_id}"
        self.directory.mkdir(exist_ok=True)
        self.pg_port, self.http_port = free_port(), free_port()
        #: What this test presents itself with.
        self.token: str | None = None
        self.pg_tls: ClientTls | None = None
        argv = [str(SCRIPTS / "safekeeper"), "-D", str(self.directory), "--id", str(node_id)]
        argv += ["--listen-pg", f"127.0.0.1:{self.pg_port}", "--listen-http", f"127.0.0.1:{self.http_port}"]
        argv += ["--broker-endpoint", f"http://127.0.0.1:{broker_port}", *options]
        super().__init__(f"safekeeper {node_id}", argv, base / f"sk{node_id}.log")

    def start(self) -> None:
        super().start()
        self.wait_http(self.url("/v1/status"))

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http_port}{path}"

    def timeline_url(self, ttid: TenantTimelineId, suffix: str = "") -> str:
        return self.url(f"/v1/tenant/{ttid.tenant_id}/timeline/{ttid.timeline_id}{suffix}")

    def http(self, method: str, path: str, body: Any = None, timeout: float = 60.0) -> Any:
        """One request to this safekeeper."""
        return http(method, self.url(path), body, timeout, token=self.token)

    def status(self, ttid: TenantTimelineId) -> dict[str, Any]:
        return http("GET", self.timeline_url(ttid), token=self.token)

    def lsn(self, ttid: TenantTimelineId, name: str) -> Lsn:
        return parse_lsn(self.status(ttid)[name])

    def digest(self, ttid: TenantTimelineId, begin: int, end: int) -> str:
        query = f"?from_lsn={begin >> 32:X}/{begin & 0xFFFFFFFF:X}&until_lsn={end >> 32:X}/{end & 0xFFFFFFFF:X}"
        return http("GET", self.timeline_url(ttid, "/digest" + query), token=self.token)["sha256"]

    async def connect(self, ttid: TenantTimelineId, application_name: str = "test", **parameters: str) -> pgclient.PgClient:
        options = f"-c tenant_id={ttid.tenant_id} timeline_id={ttid.timeline_id}"
        return await pgclient.connect(
            "127.0.0.1",
            self.pg_port,
            parameters={"options": options, "application_name": application_name, **parameters},
            password=self.token,
            tls=self.pg_tls,
        )


@dataclass
class Fleet:
    """A broker and safekeepers."""

    base: Path
    broker: Service
    broker_port: int
    nodes: list[Node]

    def close(self) -> None:
        for service in [*self.nodes, self.broker]:
            service.kill()


@contextlib.contextmanager
def running_fleet(base: Path, count: int = 3, *options: str, environment: dict[str, str] | None = None) -> Iterator[Fleet]:
    """Everything started; everything killed at the end."""
    port = free_port()
    broker = Service("broker", [str(SCRIPTS / "storage_broker"), "-l", f"127.0.0.1:{port}"], base / "broker.log")
    fleet = Fleet(base, broker, port, [Node(base, number + 1, port, *options) for number in range(count)])
    try:
        broker.start()
        for node in fleet.nodes:
            node.environment = environment or {}
            node.start()
        yield fleet
    finally:
        fleet.close()


def new_ttid() -> TenantTimelineId:
    return TenantTimelineId(TenantId.generate(), TimelineId.generate())


@dataclass
class Member:
    """The scripted proposer's view of one safekeeper."""

    node: Node
    client: pgclient.PgClient
    greeting: AcceptorGreeting | None = None
    vote: VoteResponse | None = None
    sent: Lsn = INVALID_LSN
    flushed: Lsn = INVALID_LSN
    feedbacks: list[PageserverFeedback] = field(default_factory=list)
    answers: list[AppendResponse] = field(default_factory=list)


@dataclass
class ScriptedProposer:
    """Elects itself among the nodes it can reach and streams from a fixed source of WAL, one step at a time."""

    ttid: TenantTimelineId
    start: Lsn
    wal: bytes | bytearray
    pg_version: int
    system_id: int
    generation: int = 0
    mconf: MembershipConfiguration = NO_MEMBERSHIP
    segment_size: int = WAL_SEGMENT_SIZE
    term: int = 0
    term_start: Lsn = INVALID_LSN
    commit: Lsn = INVALID_LSN
    members: list[Member] = field(default_factory=list)

    async def elect(self, nodes: list[Node]) -> None:
        """Phase one with these nodes, which must all be up; ends with Elected sent to all."""
        greeting = ProposerGreeting(self.ttid, self.mconf, self.pg_version, self.system_id, self.segment_size)
        creation = "false" if self.generation else "true"
        for node in nodes:
            client = await node.connect(self.ttid, "walproposer")
            await client.start_copy_both(f"START_WAL_PUSH (proto_version '3', allow_timeline_creation '{creation}')")
            client.send_copy_data(greeting.pack())
            member = Member(node, client)
            self.members.append(member)
            answer = await self._receive(member)
            assert isinstance(answer, AcceptorGreeting)
            assert answer.node_id == node.id
            member.greeting = answer
            self.term = max(self.term, answer.term + 1)
        for member in self.members:
            member.client.send_copy_data(VoteRequest(self.generation, self.term).pack())
            vote = await self._receive(member)
            assert isinstance(vote, VoteResponse) and vote.vote_given, f"{member.node.name} refused: {vote}"
            member.vote = vote
        votes = [member.vote for member in self.members if member.vote is not None]
        donor = max(votes, key=lambda v: (v.term_history[-1].term if v.term_history else 0, v.flush_lsn))
        self.term_start = donor.flush_lsn or self.start
        history = (*donor.term_history, TermLsn(self.term, self.term_start))
        for member in self.members:
            assert member.vote is not None
            parting = divergence_lsn(history, member.vote.term_history, member.vote.flush_lsn)
            member.sent = history[0].lsn if parting is None else parting
            member.client.send_copy_data(ProposerElected(self.generation, self.term, member.sent, history).pack())

    async def _receive(self, member: Member) -> Any:
        payload = await asyncio.wait_for(member.client.next_copy_data(), 10)
        if payload is None:
            raise ConnectionResetError(f"{member.node.name} closed the connection")
        return parse_acceptor_message(payload)

    def send(self, member: Member, end: int, chunk: int = 100_000) -> None:
        """Appends up to ``end``; nothing new is a heartbeat."""
        end = min(end, self.start + len(self.wal))
        while True:
            upto = Lsn(min(end, member.sent + chunk))
            data = bytes(self.wal[member.sent - self.start : upto - self.start])
            request = AppendRequest(self.generation, self.term, member.sent, upto, self.commit, self.start, data)
            member.client.send_copy_data(request.pack())
            member.sent = upto
            if upto >= end:
                return

    async def stream(self, end: int, *, members: list[Member] | None = None, chunk: int = 100_000) -> None:
        """Append up to ``end`` to all, wait until all have flushed the last record in it, and spread the commit."""
        members = self.members if members is None else members
        for member in members:
            self.send(member, end, chunk)
        for member in members:
            while member.flushed < end:
                await self.answer(member)
        quorum = len(self.members) // 2
        commit = sorted((m.flushed for m in self.members), reverse=True)[quorum]
        if commit >= self.term_start:
            self.commit = max(self.commit, commit)
        for member in members:
            self.send(member, member.sent)
            await self.answer(member)

    async def answer(self, member: Member) -> AppendResponse:
        """The next AppendResponse."""
        response = await self._receive(member)
        assert isinstance(response, AppendResponse)
        assert response.term == self.term, f"deposed by term {response.term}"
        member.answers.append(response)
        member.flushed = max(member.flushed, response.flush_lsn)
        if response.pageserver_feedback is not None:
            member.feedbacks.append(response.pageserver_feedback)
        return response

    def leave(self) -> None:
        """Drop all connections."""
        for member in self.members:
            member.client.abort()
        self.members.clear()


async def read_stream(client: pgclient.PgClient, begin: int, end: int, command: str = "") -> bytes:
    """The WAL that START_REPLICATION gives, from ``begin`` to ``end``."""
    if command or client.copy_sink is None:
        await client.start_copy_both(command or f"START_REPLICATION PHYSICAL {begin >> 32:X}/{begin & 0xFFFFFFFF:X}")
    received = bytearray()
    while begin + len(received) < end:
        payload = await asyncio.wait_for(client.next_copy_data(), 10)
        assert payload is not None, "the stream ended early"
        message = parse_sender_message(payload)
        if isinstance(message, XLogData):
            assert message.start_lsn == begin + len(received)
            received += message.data
    return bytes(received)


async def dead(client: pgclient.PgClient) -> str:
    """Read until the server ends the connection; the text of its error, or "" when there was none."""
    try:
        while await asyncio.wait_for(client.next_copy_data(), 10) is not None:
            pass
    except NeonError as error:
        return str(error)
    return ""

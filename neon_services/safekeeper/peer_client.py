"""Another safekeeper's HTTP API, as other safekeepers and operators' commands use it. Every answer is bounded."""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from neon_services.ground.auth import TokenSource
from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn, parse_lsn
from neon_services.ground.net import parse_endpoint
from neon_services.ground.tls import ClientTls, client_context
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, TermHistory, TermLsn

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024  # a status carries the whole term history


class PeerError(NeonError):
    """The other safekeeper cannot be reached or refused. ``status`` is its HTTP status, None when there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """What matters of a TimelineStatus: the membership, the promise, and how good the log is."""

    mconf: MembershipConfiguration
    term: int
    last_log_term: int
    flush_lsn: Lsn
    commit_lsn: Lsn
    term_history: TermHistory = ()

    @property
    def rank(self) -> tuple[int, int, int, int]:
        """The higher, the better a donor."""
        return self.last_log_term, self.flush_lsn, self.term, self.commit_lsn

    @classmethod
    def from_json(cls, value: Any) -> "PeerStatus":
        """Read a TimelineStatus. Raises ValueError."""
        try:
            acceptor = value["acceptor_state"]
            return cls(
                MembershipConfiguration.from_json(value["mconf"]),
                int(acceptor["term"]),
                int(acceptor["epoch"]),
                parse_lsn(value["flush_lsn"]),
                parse_lsn(value["commit_lsn"]),
                tuple(TermLsn(int(entry["term"]), parse_lsn(entry["lsn"])) for entry in acceptor["term_history"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the status of a timeline: {error!r}") from error


@dataclass(frozen=True, slots=True)
class PeerAccess:
    """How this process presents itself to safekeepers, and whom it trusts to be one."""

    token: TokenSource = field(default_factory=TokenSource)
    #: Authorities that sign the certificates of safekeepers; None: the system's.
    ca_file: Path | None = None
    use_https: bool = False
    pg_tls: ClientTls = field(default_factory=ClientTls)

    def check(self) -> None:
        """Whether token and authorities can be read. Raises ConfigError."""
        self.token.read()
        if self.ca_file is not None:
            client_context(self.ca_file)

    def session(self) -> aiohttp.ClientSession:
        """A session for clients; close it. Raises PeerError when the authorities cannot be read."""
        try:
            return PeerClient.session(client_context(self.ca_file) if self.ca_file is not None else None)
        except ConfigError as error:
            raise PeerError(f"no other safekeeper can be asked: {error}") from error

    def client(self, session: aiohttp.ClientSession, url: str) -> "PeerClient":
        """A client with this process's token. Raises ConfigError for the URL, PeerError when the token cannot be read."""
        return PeerClient(session, url, self.password())

    def password(self) -> str | None:
        """The token. Raises PeerError."""
        try:
            return self.token.read()
        except ConfigError as error:
            raise PeerError(f"no other safekeeper can be asked: {error}") from error


class PeerClient:
    """One safekeeper. ``url`` is ``http://HOST:PORT`` or ``https://HOST:PORT``; raises ConfigError when it is not.

    The token goes to exactly that address: redirections are not followed, and the session knows nothing of it.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, token: str | None = None) -> None:
        self.url = parse_endpoint(url, what="safekeeper's HTTP address").url
        self._session = session
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    @staticmethod
    def session(context: ssl.SSLContext | None = None) -> aiohttp.ClientSession:
        """A session for such clients; close it."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=ANSWER_TIMEOUT_S)
        connector = aiohttp.TCPConnector(ssl=True if context is None else context)
        return aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False, auto_decompress=False)

    async def request(self, method: str, path: str, body: Any = None, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """One request; its JSON answer. Raises PeerError."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method,
                    self.url + path,
                    json=body,
                    headers=self._headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_S),
                ) as answer,
            ):
                text = await _bounded(answer)
                if answer.status != 200:
                    raise PeerError(f"{method} {self.url}{path}: {answer.status} {_message(text)}", answer.status)
                return json.loads(text)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError) as error:
            raise PeerError(f"{method} {self.url}{path}: {error or type(error).__name__}") from error

    async def status(self, ttid: TenantTimelineId) -> PeerStatus:
        """The timeline there. Raises PeerError."""
        path = timeline_path(ttid)
        try:
            return PeerStatus.from_json(await self.request("GET", path))
        except ValueError as error:
            raise PeerError(f"GET {self.url}{path}: {error}") from error

    async def snapshot(self, ttid: TenantTimelineId, destination: int) -> AsyncGenerator[bytes]:
        """The timeline's snapshot in pieces; it is whole only if its archive has an end mark. Raises PeerError."""
        url = f"{self.url}{timeline_path(ttid)}/snapshot/{destination}"
        try:
            async with self._session.get(url, headers=self._headers, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise PeerError(f"GET {url}: {answer.status} {_message(await _bounded(answer))}", answer.status)
                async for piece in answer.content.iter_chunked(1024 * 1024):
                    yield piece
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise PeerError(f"GET {url}: {error or type(error).__name__}") from error


def timeline_path(ttid: TenantTimelineId) -> str:
    """The path of everything about one timeline."""
    return f"/v1/tenant/{ttid.tenant_id}/timeline/{ttid.timeline_id}"


async def _bounded(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in answer.content.iter_chunked(64 * 1024):
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise PeerError(f"{answer.method} {answer.url}: the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["msg"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return body[:200].decode(errors="replace")

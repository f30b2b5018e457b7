"""A safekeeper with an empty disk asks the control plane which timelines it should hold, and copies them from their members.

The control plane's answer (Neon's shape) to ``GET /control/v1/safekeeper/<id>/timelines?id=<id>``::

    {"timelines": [{"tenant_id": "...", "timeline_id": "...", "peers": [1, 2, 3]}],
     "safekeeper_peers": [{"node_id": 1, "listen_http_addr": "10.0.0.1", "http_port": 7676, "https_port": 7677}]}

``https_port`` is ours, and needed with ``--use-https-safekeeper-api``.

Invariant: a disk that was lost took promises with it, so a timeline that this node should hold and does not have is never made
here as a new one: it is copied when all its other members answer, with the highest term that any of them has promised
(pull_timeline.py says why that suffices), or admitted as new when every one of them says that it does not have it either and
there is nothing of it in object storage.
Until the answer is known that goes for every timeline that is not here. Neon copies from any one member, and after a
hundred failures goes on without the copy; here there is no giving up, and nothing else waits for it.
"""

import asyncio
import logging
import os
from dataclasses import dataclass
from typing import Any

import aiohttp

from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.net import Endpoint
from neon_services.ground.tls import client_context
from neon_services.safekeeper.peer_client import CONNECT_TIMEOUT_S, PeerAccess, PeerClient, PeerError
from neon_services.safekeeper.pull_timeline import PullRequest, TimelinePuller
from neon_services.safekeeper.remote_wal import timeline_prefix
from neon_services.safekeeper.timelines import TimelineDeleted, Timelines

log = logging.getLogger(__name__)

FIRST_RETRY_S, MAX_RETRY_S = 1.0, 30.0
TOKEN_VARIABLE = "HCC_AUTH_TOKEN"


@dataclass(frozen=True, slots=True)
class Assigned:
    """A timeline that this node should hold, and where its other members answer; None: nobody knows where one does."""

    ttid: TenantTimelineId
    hosts: tuple[str, ...] | None


def parse_answer(value: Any, node_id: int, *, use_https: bool = False) -> list[Assigned]:
    """Read the control plane's answer. With HTTPS a peer without ``https_port`` is one whose address nobody knows.

    Raises ValueError that says what is wrong.
    """
    try:
        addresses: dict[int, str] = {}
        for peer in value["safekeeper_peers"]:
            host, port, https_port = peer["listen_http_addr"], peer["http_port"], peer.get("https_port")
            ports = [port] if https_port is None else [port, https_port]
            if not isinstance(host, str) or not host or not all(type(p) is int and 0 < p < 65536 for p in ports):
                raise ValueError(f"not the address of a safekeeper: {peer!r}")
            endpoint = Endpoint(host, https_port, tls=True) if use_https else Endpoint(host, port)
            if endpoint.port is not None:
                addresses[_node_id(peer["node_id"])] = endpoint.url
        found = []
        for timeline in value["timelines"]:
            ttid = TenantTimelineId(TenantId.parse(timeline["tenant_id"]), TimelineId.parse(timeline["timeline_id"]))
            others = sorted({_node_id(peer) for peer in timeline["peers"]} - {node_id})
            known = tuple(addresses[other] for other in others if other in addresses)
            found.append(Assigned(ttid, known if len(known) == len(others) else None))
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a list of timelines: {error!r}") from error


def _node_id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"not the id of a safekeeper: {value!r}")
    return value


class StartupRecovery:
    """Runs once per process, beside everything else. Make it before anybody can create timelines."""

    def __init__(
        self,
        node_id: int,
        timelines: Timelines,
        puller: TimelinePuller,
        base_url: str,
        *,
        access: PeerAccess | None = None,
        first_retry_s: float = FIRST_RETRY_S,
    ) -> None:
        self._node_id = node_id
        self._timelines = timelines
        self._puller = puller
        self._base_url = base_url
        self._access = access or PeerAccess()
        self._first_retry_s = first_retry_s
        #: What is to be copied; None as long as nobody has said.
        self._awaited: dict[TenantTimelineId, Assigned] | None = None
        timelines.why_not_new = self._why_not_new

    def _why_not_new(self, ttid: TenantTimelineId) -> str | None:
        if self._awaited is None:
            return f"timeline {ttid} is not here, and {self._base_url} has not said yet which timelines should be: try again"
        if ttid in self._awaited:
            return f"timeline {ttid} is to be copied here from its other members: it cannot be created as a new one"
        return None

    async def run(self) -> None:
        """Until everything is here; then wait for ever, as a task of the process does."""
        awaited = await self._ask()
        self._awaited = {assigned.ttid: assigned for assigned in awaited if self._timelines.find(assigned.ttid) is None}
        log.info("%d timelines should be here, %d of them are not", len(awaited), len(self._awaited))
        delay = self._first_retry_s
        while self._awaited:
            for assigned in list(self._awaited.values()):
                await self._try(assigned)
            if self._awaited:
                log.warning("%d timelines are still to be copied, trying again in %.0f s", len(self._awaited), delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RETRY_S)
        log.info("every timeline that should be here is here")
        await asyncio.get_running_loop().create_future()

    async def _ask(self) -> list[Assigned]:
        path = f"/control/v1/safekeeper/{self._node_id}/timelines?id={self._node_id}"
        token = os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        delay = self._first_retry_s
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        while True:
            try:
                context = None if self._access.ca_file is None else client_context(self._access.ca_file)
                connector = aiohttp.TCPConnector(ssl=True if context is None else context)
                async with aiohttp.ClientSession(
                    headers=headers, timeout=timeout, connector=connector, trust_env=False
                ) as session:
                    answer = await PeerClient(session, self._base_url).request("GET", path)
                    return parse_answer(answer, self._node_id, use_https=self._access.use_https)
            except (PeerError, ConfigError, ValueError) as error:
                log.warning("which timelines should be here is not known yet, asking again in %.0f s: %s", delay, error)
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RETRY_S)

    async def _try(self, assigned: Assigned) -> None:
        assert self._awaited is not None
        ttid = assigned.ttid
        try:
            if self._timelines.find(ttid) is None:
                if not assigned.hosts:
                    why = "it has no other members" if assigned.hosts is not None else "the address of a member is unknown"
                    raise NeonError(f"timeline {ttid} cannot be copied: {why}")
                if await self._nobody_has(ttid, assigned.hosts):
                    await self._check_bucket(ttid)
                    log.warning("no member has timeline %s: it may be created as a new one", ttid)
                else:
                    await self._puller.pull(PullRequest(ttid, assigned.hosts, require_all_hosts=True))
            del self._awaited[ttid]
        except TimelineDeleted as error:
            del self._awaited[ttid]  # somebody decided so meanwhile; its tombstone keeps it away
            log.warning("timeline %s is not copied: %s", ttid, error)
        except (NeonError, OSError) as error:
            log.error("timeline %s should be here and is not: %s", ttid, error)

    async def _nobody_has(self, ttid: TenantTimelineId, hosts: tuple[str, ...]) -> bool:
        async with self._access.session() as session:
            clients = [self._access.client(session, host) for host in hosts]
            answers = await asyncio.gather(*(client.status(ttid) for client in clients), return_exceptions=True)
        return all(isinstance(answer, PeerError) and answer.status == 404 for answer in answers)

    async def _check_bucket(self, ttid: TenantTimelineId) -> None:
        """Raises NeonError when the timeline has had WAL: then all its members have lost it."""
        storage = self._timelines.storage
        if storage is not None and (keys := await storage.list_keys(timeline_prefix(ttid))):
            raise NeonError(
                f"no member has it, but object storage has {len(keys)} objects of it, first {keys[0]}: all its members have "
                f"lost it. Recover it from there, or delete the timeline at the control plane"
            )

"""Peer recovery (``--peer-recovery true``): a member that lags catches up from another one while no compute streams to it.

What the last leader would do when it came back, another member does in its stead: it shows the leader's history and streams the
leader's log. Invariants:

1. Only the log of the leader of the donor's current term is taken (donor.term == donor.last_log_term), and only when this node
   has promised no higher term: every step is one that this leader could still take here.
2. Only between members under the same membership generation, and it goes through the acceptor's own checks: the logs part where
   both say, nothing committed is cut, and who streams last announced itself last.
3. Nothing is committed by it and nobody is voted for. A leader that comes meanwhile takes over, and this ends.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

from neon_services.consensus import term_history
from neon_services.consensus.acceptor import Acceptor, ProposerConnection
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import INVALID_LSN, Lsn, format_lsn
from neon_services.ground.net import parse_host_port
from neon_services.protocols import pgclient
from neon_services.protocols.replication_stream import XLogData, parse_sender_message
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    AppendRequest,
    ProposerElected,
    ProposerGreeting,
    ProposerMessage,
    TermHistory,
)
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.connections import Peer
from neon_services.safekeeper.peer_client import PeerStatus
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 2.0
CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 30.0
MAX_AT_ONCE = 8


def is_led(timeline: Timeline) -> bool:
    """Whether a proposer streams to this timeline."""
    return any(timeline.acceptor.is_streaming(receiver.proposer) for receiver in timeline.receivers.values())


def choose_peer(acceptor: Acceptor, peers: list[Peer]) -> Peer | None:
    """The best of the peers that have more of the newest leader's log, if this node may follow that leader."""
    mine = (acceptor.last_log_term, acceptor.flush_lsn)
    fit = [
        peer
        for peer in peers
        if peer.sk_id != acceptor.node_id
        and (peer.info.last_log_term, peer.flush_lsn) > mine
        and peer.term == peer.info.last_log_term >= acceptor.term
    ]
    return max(fit, key=lambda peer: (peer.info.last_log_term, peer.flush_lsn), default=None)


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """Follow the leader of ``term``, whose log has this history, from ``start_lsn`` up to ``end_lsn``."""

    generation: int
    term: int
    history: TermHistory
    start_lsn: Lsn
    end_lsn: Lsn


def plan(acceptor: Acceptor, donor: PeerStatus) -> RecoveryPlan | None:
    """What to take from a donor in this state; None when nothing may be taken. Raises CorruptionError."""
    mine = (acceptor.last_log_term, acceptor.flush_lsn)
    if donor.mconf.generation != acceptor.state.mconf.generation or donor.rank[:2] <= mine:
        return None
    history = term_history.up_to(donor.term_history, donor.flush_lsn)
    if not history or not donor.term == donor.last_log_term == history[-1].term >= acceptor.term:
        return None
    own = term_history.up_to(acceptor.state.term_history, acceptor.flush_lsn)
    parting = term_history.divergence_lsn(history, own, acceptor.flush_lsn)
    start_lsn = history[0].lsn if parting is None else parting
    if start_lsn < acceptor.commit_lsn:
        return None
    return RecoveryPlan(acceptor.state.mconf.generation, donor.term, history, start_lsn, donor.flush_lsn)


class PeerRecovery:
    """Looks at all timelines every two seconds."""

    def __init__(self, config: SafekeeperConfig, timelines: Timelines) -> None:
        self._config = config
        self._timelines = timelines
        self._access = config.access.peers()
        self._running: dict[Timeline, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._look()
                await asyncio.sleep(CHECK_INTERVAL_S)
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _look(self) -> None:
        fresh = time.monotonic() - self._config.heartbeat_timeout_s
        for timeline in self._timelines.all():
            if len(self._running) >= MAX_AT_ONCE:
                return
            if timeline in self._running or timeline.cancelled or is_led(timeline):
                continue
            if self._timelines.disk_refusal or timeline.wal_refusal:
                continue  # a full disk takes no WAL from peers either
            peer = choose_peer(timeline.acceptor, [p for p in timeline.peers.values() if p.seen_at >= fresh])
            if peer is not None:
                task = asyncio.create_task(self._attempt(timeline, peer))
                self._running[timeline] = task
                task.add_done_callback(lambda _, timeline=timeline: self._running.pop(timeline, None))  # type: ignore[misc]

    async def _attempt(self, timeline: Timeline, peer: Peer) -> None:
        try:
            async with timeline.residence():
                await self._recover(timeline, peer)
        except (NeonError, OSError) as error:
            log.warning("timeline %s does not catch up from safekeeper %d: %s", timeline.ttid, peer.sk_id, error)
        except Exception:
            log.exception("timeline %s does not catch up from safekeeper %d", timeline.ttid, peer.sk_id)

    def _http_url(self, peer: Peer) -> str:
        if not self._access.use_https:
            return peer.http_connstr
        if peer.https_connstr is None:
            raise NeonError(f"safekeeper {peer.sk_id} has no --listen-https, and --use-https-safekeeper-api is set here")
        return f"https://{peer.https_connstr}"

    async def _recover(self, timeline: Timeline, peer: Peer) -> None:
        async with self._access.session() as session:
            donor = await self._access.client(session, self._http_url(peer)).status(timeline.ttid)
        wanted = plan(timeline.acceptor, donor)
        if wanted is None:
            return
        host, port = parse_host_port(peer.pg_connstr, what="safekeeper_connstr of a peer")
        ids = f"-c tenant_id={timeline.ttid.tenant_id} timeline_id={timeline.ttid.timeline_id}"
        parameters = {"options": ids, "application_name": f"safekeeper_{self._config.node_id}"}
        client = await pgclient.connect(
            host,
            port,
            parameters=parameters,
            password=self._access.password(),
            timeout=CONNECT_TIMEOUT_S,
            tls=self._access.pg_tls,
        )
        follower = _Follower(timeline, wanted, f"peer recovery from safekeeper {peer.sk_id}")
        try:
            await client.start_copy_both(f"START_REPLICATION PHYSICAL {format_lsn(wanted.start_lsn)} (term='{wanted.term}')")
            while timeline.acceptor.flush_lsn < wanted.end_lsn or not follower.following:
                async with asyncio.timeout(SILENCE_TIMEOUT_S):
                    payload = await client.next_copy_data()
                if payload is None:
                    raise NeonError("the stream ended early")
                message = parse_sender_message(payload)
                if isinstance(message, XLogData):
                    follower.take(message)
        finally:
            client.abort()
            follower.leave()
        log.info(
            "timeline %s caught up from safekeeper %d: %s to %s of term %d",
            timeline.ttid,
            peer.sk_id,
            format_lsn(wanted.start_lsn),
            format_lsn(timeline.acceptor.flush_lsn),
            wanted.term,
        )


class _Follower:
    """Plays the leader of the plan's term towards the acceptor of this node."""

    def __init__(self, timeline: Timeline, wanted: RecoveryPlan, name: str) -> None:
        self._timeline = timeline
        self._wanted = wanted
        self._connection = ProposerConnection(name)
        self.following = False

    def take(self, message: XLogData) -> None:
        """WAL has come. Raises NeonError when a leader or a new configuration came first."""
        if not self.following:
            self._begin()  # the log is cut only when there is something to put there
        begin, end = message.start_lsn, Lsn(message.start_lsn + len(message.data))
        wanted, data = self._wanted, bytes(message.data)
        self._say(AppendRequest(wanted.generation, wanted.term, begin, end, INVALID_LSN, INVALID_LSN, data))
        self._check_following()
        self._timeline.run(self._timeline.acceptor.flush_batch(self._connection))
        self._timeline.store.write_out()

    def _begin(self) -> None:
        timeline, wanted = self._timeline, self._wanted
        if is_led(timeline):
            raise NeonError("a proposer streams now")
        state = timeline.acceptor.state
        self._say(ProposerGreeting(timeline.ttid, NO_MEMBERSHIP, state.pg_version, 0, state.wal_seg_size))
        self._say(ProposerElected(wanted.generation, wanted.term, wanted.start_lsn, wanted.history))
        self._check_following()
        self.following = True

    def _check_following(self) -> None:
        acceptor = self._timeline.acceptor
        if not acceptor.is_streaming(self._connection):
            raise NeonError(f"term {acceptor.term} has been promised meanwhile")

    def _say(self, message: ProposerMessage) -> None:
        self._timeline.run(self._timeline.acceptor.handle(self._connection, message))

    def leave(self) -> None:
        """Flush what was written."""
        if not self._timeline.cancelled:
            self._timeline.run(self._timeline.acceptor.flush_on_disconnect(self._connection))

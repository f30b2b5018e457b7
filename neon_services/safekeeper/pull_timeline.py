"""pull_timeline: become a copy of the best of the other members.

Invariants:

1. The copy is made in tmp/ and appears by one rename when it is whole, checked and durable: an interruption anywhere leaves
   nothing, or the whole timeline.
2. The copy carries the promises (the highest term) of everybody who was heard and the newest membership configuration; it is
   never older than the status by which the donor was chosen, and all but one of the hosts asked have been heard. So
   whatever a quorum had acknowledged before is in it; and when it takes the place of a lost disk of the same member and all
   the others were heard, it votes in no term in which the lost one helped to elect a leader: one of the others did, too.
3. A request with an older generation than a donor's, than this node's, or than a tombstone here is refused.
"""

import asyncio
import contextlib
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from neon_services.ground.errors import CorruptionError, NeonError, StaleGeneration
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import WAL_SEGMENT_SIZE, format_lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration
from neon_services.safekeeper import metrics
from neon_services.safekeeper.offloaded_segment import bring_back
from neon_services.safekeeper.peer_client import PeerAccess, PeerClient, PeerError, PeerStatus
from neon_services.safekeeper.remote_wal import RemoteWal
from neon_services.safekeeper.snapshot_unpack import SnapshotUnpacker, Unpacked, make_resident
from neon_services.safekeeper.timelines import Timelines

log = logging.getLogger(__name__)

MAX_HOSTS = 64


class NotMember(NeonError):
    """This node is not in the configuration under which it was asked to hold the timeline."""


class PullFailed(NeonError):
    """Too few of the other members answered, or the copy was cut or not fit. Nothing was left behind; try again."""


@dataclass(frozen=True, slots=True)
class PullRequest:
    """``hosts`` are the HTTP addresses of the current members."""

    ttid: TenantTimelineId
    hosts: tuple[str, ...]
    mconf: MembershipConfiguration | None = None
    #: Every host must answer: the copy takes the place of a lost disk, whose promises only the others together know.
    require_all_hosts: bool = False

    @property
    def generation(self) -> int:
        """The membership generation of whoever asks; 0 without one."""
        return self.mconf.generation if self.mconf is not None else 0


def choose_donor(request: PullRequest, statuses: dict[str, PeerStatus], node_id: int) -> str:
    """The host with the best copy. Raises PullFailed, StaleGeneration or NotMember."""
    required = len(request.hosts) if request.require_all_hosts else max(len(request.hosts) - 1, 1)
    if len(statuses) < required:
        raise PullFailed(
            f"timeline {request.ttid}: {len(statuses)} of {len(request.hosts)} hosts gave its status, {required} are needed"
        )
    newest = max((status.mconf for status in statuses.values()), key=lambda mconf: mconf.generation)
    if request.mconf is not None and newest.generation > request.mconf.generation:
        raise StaleGeneration(
            f"timeline {request.ttid} is at membership generation {newest.generation}, "
            f"newer than the requested {request.mconf.generation}"
        )
    if request.mconf is None and newest.generation and not newest.contains(node_id):
        raise NotMember(
            f"safekeeper {node_id} is not a member of generation {newest.generation} of timeline {request.ttid}: "
            f"give the configuration that makes it one as mconf"
        )
    return max(statuses, key=lambda host: statuses[host].rank)


@dataclass(slots=True)
class _Turn:
    """Who pulls a timeline now, and how many pull or wait."""

    lock: asyncio.Lock
    interested: int = 0


class TimelinePuller:
    """Pulls timelines to this node; one pull per timeline at a time."""

    def __init__(self, timelines: Timelines, node_id: int, *, sync: bool = True, access: PeerAccess | None = None) -> None:
        self._timelines = timelines
        self._node_id = node_id
        self._sync = sync
        self._access = access or PeerAccess()
        self._turns: dict[TenantTimelineId, _Turn] = {}

    async def pull(self, request: PullRequest) -> str | None:
        """The donor's address, or None when the timeline was here. Raises NeonError or OSError; nothing is left behind."""
        started = time.perf_counter()
        turn = self._turns.setdefault(request.ttid, _Turn(asyncio.Lock()))
        turn.interested += 1
        try:
            async with turn.lock:
                donor = await self._pull(request)
        except (NeonError, OSError):
            metrics.PULL_TIMELINE_ERRORS.inc()
            raise
        finally:
            turn.interested -= 1
            if not turn.interested:
                del self._turns[request.ttid]
        metrics.PULL_TIMELINE_OKS.inc()
        metrics.PULL_TIMELINE_SECONDS.observe(time.perf_counter() - started)
        return donor

    async def _pull(self, request: PullRequest) -> str | None:
        if request.mconf is not None and not request.mconf.contains(self._node_id):
            raise NotMember(f"safekeeper {self._node_id} is not a member of generation {request.mconf.generation}")
        if self._found_here(request):
            return None
        async with self._access.session() as session:
            clients = {host: self._access.client(session, host) for host in request.hosts}
            statuses = await self._statuses(request, clients)
            donor = choose_donor(request, statuses, self._node_id)
            log.info("pulling timeline %s from %s", request.ttid, donor)
            staged = self._timelines.stage(request.ttid)
            try:
                promised = max(status.term for status in statuses.values())
                unpacked = await self._copy(request, clients[donor], staged, promised)
                if unpacked.position < statuses[donor].rank[:2]:
                    raise PullFailed(f"timeline {request.ttid}: the log of {donor} went back while it was copied")
                return self._publish(request, staged, unpacked, clients[donor])
            except (CorruptionError, PeerError) as error:
                raise PullFailed(f"the copy of timeline {request.ttid} from {donor} is not whole: {error}") from error
            except OSError as error:
                raise NeonError(f"the copy of timeline {request.ttid} could not be written: {error}") from error
            finally:
                await asyncio.to_thread(shutil.rmtree, staged, True)

    def _found_here(self, request: PullRequest) -> bool:
        """The timeline is here; it follows the request's configuration now."""
        timeline = self._timelines.find_or_admit(request.ttid, request.generation)
        if timeline is not None and request.mconf is not None:
            timeline.run(timeline.acceptor.membership_switch(request.mconf))
        return timeline is not None

    async def _statuses(self, request: PullRequest, clients: dict[str, PeerClient]) -> dict[str, PeerStatus]:
        answers = await asyncio.gather(*(c.status(request.ttid) for c in clients.values()), return_exceptions=True)
        found: dict[str, PeerStatus] = {}
        for host, answer in zip(clients, answers, strict=True):
            if isinstance(answer, PeerStatus):
                found[host] = answer
            elif not isinstance(answer, PeerError):
                raise answer
            else:
                log.warning("pulling timeline %s: %s", request.ttid, answer)
        return found

    async def _copy(self, request: PullRequest, donor: PeerClient, staged: Path, promised: int) -> Unpacked:
        storage = self._timelines.storage
        unpacker = SnapshotUnpacker(staged, request.ttid, sync=self._sync, node_id=self._node_id, bucket=storage is not None)
        try:
            async with contextlib.aclosing(donor.snapshot(request.ttid, self._node_id)) as pieces:
                async for piece in pieces:
                    await asyncio.to_thread(unpacker.feed, piece)
            unpacked = await asyncio.to_thread(unpacker.finish, request.mconf, promised)
        finally:
            unpacker.close()
        control = unpacked.control
        if control.offloaded_flush_lsn is None:
            return unpacked
        # the copy of an evicted timeline is checked like any other, and evicted again by this node when it is time
        size = control.acceptor.wal_seg_size or WAL_SEGMENT_SIZE
        assert storage is not None
        await bring_back(staged, control, size, RemoteWal(storage, request.ttid), sync=self._sync)
        return await asyncio.to_thread(make_resident, staged, unpacked, size, sync=self._sync)

    def _publish(self, request: PullRequest, staged: Path, unpacked: Unpacked, donor: PeerClient) -> str | None:
        mconf = unpacked.control.acceptor.mconf
        if request.mconf is not None and mconf.generation > request.mconf.generation:
            raise StaleGeneration(
                f"timeline {request.ttid} went to membership generation {mconf.generation} while it was pulled "
                f"for generation {request.mconf.generation}"
            )
        if mconf.generation and not mconf.contains(self._node_id):
            raise NotMember(f"safekeeper {self._node_id} is not a member of generation {mconf.generation} of {request.ttid}")
        if self._found_here(request):
            return None
        self._timelines.publish(request.ttid, staged, mconf.generation)
        log.info(
            "timeline %s: a copy of %s with %d segments up to %s, membership generation %d",
            request.ttid,
            donor.url,
            unpacked.segments,
            format_lsn(unpacked.flush_lsn),
            mconf.generation,
        )
        return donor.url

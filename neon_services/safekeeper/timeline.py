"""One timeline on this safekeeper: the acceptor, its log and control file, and everybody who is connected to it.

Invariant: acceptor, log and control file change only inside ``run``, which carries out the effects of one method at a time,
synchronously, on the event loop: so no lock is needed, and whoever is told of a change sees all of it. While the loop waits, a
proposer's lane may move the log's end (append_lane.py); ``run`` recalls it first.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from neon_services.consensus.acceptor import Acceptor, Effect, PeerInfo, ProposerConnection, run
from neon_services.ground.errors import Cancelled, NeonError
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import INVALID_LSN, Lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.safekeeper_messages import AcceptorMessage, AppendRequest
from neon_services.safekeeper import metrics
from neon_services.safekeeper.connections import (
    LATER_S,
    Peer,
    WalReceiverState,
    WalSenderState,
    aggregate_standby_feedback,
    standby_horizon,
)
from neon_services.safekeeper.control_file import FILE_NAME, ControlFile, PartialSegment
from neon_services.safekeeper.interpreted_chunks import InterpretedReaders
from neon_services.safekeeper.offloaded_segment import bring_back
from neon_services.safekeeper.remote_wal import RemoteWal
from neon_services.safekeeper.timeline_storage import TimelineStorage
from neon_services.safekeeper.wal_reader import WalReader

Result = TypeVar("Result")

RESIDENCE_TIMEOUT_S = 30.0
FEEDBACK_S = 0.1  # so often at most computes hear of the progress of pageservers


class Timeline(TimelineStorage):
    """See the module's text. Make it with ``Timeline.open``."""

    def __init__(self, node_id: int, directory: Path, control: ControlFile, *, sync: bool) -> None:
        super().__init__(directory, control, sync=sync)
        self.ttid: TenantTimelineId = control.ttid
        self.acceptor = Acceptor(node_id, control.ttid, control.acceptor, self.store)
        self.receivers: dict[int, WalReceiverState] = {}
        self.senders: dict[int, WalSenderState] = {}
        self.peers: dict[int, Peer] = {}
        self.interpreted = InterpretedReaders(self.reader)
        self.cancelled = False
        self.active = False
        #: Tell the broker once more although the timeline is not active: a peer does not know what we know.
        self.push_once = False
        self.removed_segment = 0  # the highest segment that is not here any more
        #: Its WAL in object storage; None when this safekeeper has none.
        self.remote: RemoteWal | None = None
        #: Why no WAL is accepted at the moment; None when it is. Read for every message of a proposer.
        self.wal_refusal: str | None = None
        self.offloading = False  # this safekeeper sends the timeline's full segments
        self.guards = 0  # operations that need the WAL on the disk
        self.resident_since = time.monotonic()
        self._residence = asyncio.Lock()
        self._removal_holds = 0
        self._unbroken: set[asyncio.Future[Any]] = set()
        #: Held by whoever changes the partial segments in the bucket.
        self.partial_backup_lock = asyncio.Lock()
        self.ps_feedback_count = 0
        self.ps_corruption_detected = False
        self.last_ps_feedback: PageserverFeedback | None = None
        self._untold_feedback: dict[int, PageserverFeedback] = {}  # by shard
        self._feedback_rests = False
        #: Called whenever something moved; the manager looks at the timeline soon after.
        self.on_change: Callable[[Timeline], None] = lambda _: None
        self._seen = (INVALID_LSN, INVALID_LSN, 0)

    @classmethod
    def open(cls, node_id: int, directory: Path, *, sync: bool) -> "Timeline":
        """Load a timeline and find the end of its log. Raises OSError, CorruptionError."""
        timeline = cls(node_id, directory, ControlFile.load(directory / FILE_NAME), sync=sync)
        timeline.recover()
        timeline.removed_segment = timeline._find_removed_segment()
        return timeline

    def _find_removed_segment(self) -> int:
        """What was removed by earlier processes: everything below the lowest segment that is here."""
        first = min(self.store.segments.existing(), default=self.store.flush_lsn // self.segment_size)
        return max(0, first - 1)

    # -- carrying out the acceptor's effects

    def save_partial_backup(self, segments: tuple[PartialSegment, ...]) -> None:
        """Remember durably which partial segments are, or may be, in the bucket. Raises WalStoreError."""
        self.save_control(replace(self.control, partial_backup=segments))

    def save_eviction(self, offloaded_flush_lsn: Lsn | None) -> None:
        """Remember durably whether the WAL is in the bucket only, and where it ends. Raises WalStoreError."""
        self.save_control(replace(self.control, offloaded_flush_lsn=offloaded_flush_lsn))
        self.resident_since = time.monotonic()

    def run(self, steps: Generator[Effect, Any, Result]) -> Result:
        """Run one method of the acceptor and tell everybody who waits. Raises what the method or an effect raises."""
        if self.cancelled:
            raise Cancelled(f"timeline {self.ttid} is being deleted or shut down")
        self.store.recall()
        try:
            return run(steps, self.perform)
        finally:
            self.changed()

    def append(self, connection: ProposerConnection, message: AppendRequest) -> list[AcceptorMessage]:
        """``run`` for an append, which nobody can see before it is flushed: there is nothing to tell anybody."""
        if self.cancelled:
            raise Cancelled(f"timeline {self.ttid} is being deleted or shut down")
        self.store.recall()
        return run(self.acceptor.append_request(connection, message), self.perform)

    def flush(self, connection: ProposerConnection, answer: Callable[[AcceptorMessage], None]) -> None:
        """``run`` for the end of a batch, of which no byte is in memory only afterwards.

        The proposer is answered first, for commits wait for it.
        """
        if self.cancelled:
            raise Cancelled(f"timeline {self.ttid} is being deleted or shut down")
        self.store.recall()
        try:
            for reply in run(self.acceptor.flush_batch(connection), self.perform):
                answer(reply)
            self.store.write_out()
        finally:
            self.changed()

    def changed(self) -> None:
        """Wake readers when a position or the term moved, and the manager."""
        seen = (self.acceptor.commit_lsn, self.store.flush_lsn, self.acceptor.state.term)
        if seen != self._seen:
            self._seen = seen
            for sender in self.senders.values():
                sender.wake()
            self.on_change(self)

    # -- what others ask

    @property
    def computes(self) -> int:
        """How many proposers are connected."""
        return len(self.receivers)

    @property
    def news_s(self) -> float:
        """How long news of WAL may take to reach those who read here; 0: each append is told at once."""
        return min((sender.news_s for sender in self.senders.values()), default=LATER_S)

    def retime(self) -> None:
        """``news_s`` is not what it was: who takes appends tells of them accordingly."""
        for receiver in self.receivers.values():
            receiver.retime()

    @property
    def standby_horizon(self) -> Lsn:
        """The lowest position replayed by a replica; 0 without replicas."""
        return standby_horizon(list(self.senders.values()))

    def reader(self) -> WalReader:
        """A new reader of this timeline's WAL."""
        state = self.acceptor.state
        # in its first segment the timeline has no WAL below its start, here or elsewhere
        joined_later = state.local_start_lsn if state.local_start_lsn > state.timeline_start_lsn else INVALID_LSN
        return WalReader(self.directory, self.segment_size, remote=self.remote, local_start_lsn=joined_later)

    @property
    def first_available_lsn(self) -> Lsn:
        """The first position of the oldest segment that a reader may ask for, here or in object storage."""
        start = self.acceptor.state.timeline_start_lsn
        if self.remote is None:
            return Lsn(max(start - start % self.segment_size, self.first_local_segment * self.segment_size))
        return Lsn(start - start % self.segment_size)

    @property
    def first_local_segment(self) -> int:
        """The lowest segment that can be on this disk."""
        return max(self.acceptor.state.local_start_lsn // self.segment_size, self.removed_segment + 1)

    @property
    def disk_usage_bytes(self) -> int:
        """Bytes of the segments that are here: from the first that was not removed to the one being written."""
        if self.offloaded:
            return 0
        return max(0, self.acceptor.flush_lsn // self.segment_size - self.first_local_segment + 1) * self.segment_size

    # -- what is on the disk

    @contextlib.contextmanager
    def hold_removal(self) -> Iterator[None]:
        """No WAL is removed meanwhile, because somebody copies the files."""
        self._removal_holds += 1
        try:
            yield
        finally:
            self._removal_holds -= 1
            self.on_change(self)

    @property
    def removal_held(self) -> bool:
        """Whether WAL must not be removed just now."""
        return self._removal_holds > 0

    @property
    def offloaded(self) -> bool:
        """Whether the WAL is in the bucket only."""
        return self.control.offloaded_flush_lsn is not None

    @contextlib.asynccontextmanager
    async def residence(self) -> AsyncIterator[None]:
        """The WAL is on this disk while the context lasts; an evicted timeline is brought back first.

        Raises NeonError when that fails or takes longer than 30 s; OSError.
        """
        self.guards += 1
        try:
            if self.offloaded:
                try:
                    async with asyncio.timeout(RESIDENCE_TIMEOUT_S):
                        await self.unbroken(self._bring_back())
                except TimeoutError:
                    raise NeonError(
                        f"timeline {self.ttid} is in object storage and did not come back within {RESIDENCE_TIMEOUT_S:.0f} s"
                    ) from None
            yield
        finally:
            self.guards -= 1
            self.on_change(self)

    async def _bring_back(self) -> None:
        async with self._residence:
            if not self.offloaded:
                return
            metrics.EVICTION_EVENTS_STARTED.labels("restore").inc()
            await bring_back(self.directory, self.control, self.segment_size, self.remote, sync=self._sync)
            if self.cancelled:
                raise Cancelled(f"timeline {self.ttid} is being deleted or shut down")
            self.save_eviction(None)
            metrics.EVICTION_EVENTS_COMPLETED.labels("restore").inc()

    async def unbroken(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await a change of the bucket that goes on to its end when the waiter is cancelled; see bucket_is_quiet()."""
        task = asyncio.ensure_future(work)
        self._unbroken.add(task)
        task.add_done_callback(self._unbroken.discard)
        return await asyncio.shield(task)

    async def bucket_is_quiet(self) -> None:
        """Wait until nothing of this timeline is on its way to the bucket."""
        if self._unbroken:
            await asyncio.wait(self._unbroken)

    # -- feedback

    def pageserver_feedback(self, feedback: PageserverFeedback) -> None:
        """A pageserver's progress: remember it and hand it on to the connected computes."""
        metrics.RECEIVED_PS_FEEDBACKS.inc()
        self.ps_feedback_count += 1
        self.last_ps_feedback = feedback
        self.ps_corruption_detected |= feedback.corruption_detected
        acceptor = self.acceptor
        if feedback.remote_consistent_lsn > acceptor.remote_consistent_lsn:
            acceptor.remote_consistent_lsn = feedback.remote_consistent_lsn
            self.on_change(self)
        self._untold_feedback[feedback.shard_number] = feedback
        if not self._feedback_rests:
            self._hand_on_feedback()

    def _hand_on_feedback(self) -> None:
        """Computes use it to slow down, and to show it: each message of it costs them more than a commit."""
        told, self._untold_feedback = self._untold_feedback, {}
        self._feedback_rests = bool(told)
        if told:
            asyncio.get_running_loop().call_later(FEEDBACK_S, self._hand_on_feedback)
        acceptor = self.acceptor
        for receiver in self.receivers.values():
            if acceptor.is_streaming(receiver.proposer):
                for feedback in told.values():
                    response = acceptor.append_response()
                    response.pageserver_feedback = feedback
                    receiver.send(receiver.pack(response))

    def standby_feedback_changed(self) -> None:
        """A replica reported or left: what all of them need goes into the next answer to the compute."""
        self.store.recall()  # a lane has the former one in its answers
        self.acceptor.standby_feedback = aggregate_standby_feedback(list(self.senders.values()))

    def record_peer(self, peer: Peer) -> None:
        """What the broker says about a member, ourselves included."""
        self.peers[peer.sk_id] = peer
        ours, size = self.acceptor, self.segment_size
        if (
            peer.info.remote_consistent_lsn < ours.remote_consistent_lsn
            or peer.info.backup_lsn // size < ours.backup_lsn // size
        ):
            self.push_once = True  # else it stays active for ever, waiting for what only we were told
        if peer.sk_id != self.acceptor.node_id and self.acceptor.peer_info(peer.info):
            self.changed()
            self.on_change(self)
        elif self.active:
            self.on_change(self)  # who sends WAL to the bucket depends on who is heard

    def learn(self, info: PeerInfo) -> None:
        """Adopt a peer's positions (tests inject them by HTTP)."""
        if self.acceptor.peer_info(info):
            self.changed()
            self.on_change(self)

    # -- the end

    def close(self, reason: str) -> None:
        """End all connections and let go of the files. Nothing runs afterwards."""
        if self.cancelled:
            return
        failure: NeonError | None = None
        if self.store.write_lsn > self.store.flush_lsn:
            try:
                self.store.flush()
            except NeonError as error:
                failure = error
        self.cancelled = True
        self.store.recall()
        for receiver in list(self.receivers.values()):
            receiver.close(reason)
        for sender in list(self.senders.values()):
            sender.close(reason)
        self.store.close()
        if failure is not None:
            raise failure

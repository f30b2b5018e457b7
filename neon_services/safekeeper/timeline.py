"""One timeline on this safekeeper: the acceptor, its log and control file, and everybody who is connected to it.

Invariant: acceptor, log and control file change only inside ``run``, which carries out the effects of one method at a time,
synchronously, on the event loop: so no lock is needed, and whoever is told of a change sees all of it.
"""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from neon_services.consensus.acceptor import Acceptor, Effect, PeerInfo, run
from neon_services.ground.errors import Cancelled, NeonError
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import INVALID_LSN, Lsn
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.safekeeper import metrics
from neon_services.safekeeper.connections import (
    Peer,
    WalReceiverState,
    WalSenderState,
    aggregate_standby_feedback,
    standby_horizon,
)
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.timeline_storage import TimelineStorage
from neon_services.safekeeper.wal_reader import WalReader

Result = TypeVar("Result")


class Timeline(TimelineStorage):
    """See the module's text. Make it with ``Timeline.open``."""

    def __init__(self, node_id: int, directory: Path, control: ControlFile, *, sync: bool) -> None:
        super().__init__(directory, control, sync=sync)
        self.ttid: TenantTimelineId = control.ttid
        self.acceptor = Acceptor(node_id, control.ttid, control.acceptor, self.store)
        self.receivers: dict[int, WalReceiverState] = {}
        self.senders: dict[int, WalSenderState] = {}
        self.peers: dict[int, Peer] = {}
        self.cancelled = False
        self.active = False
        #: Tell the broker once more although the timeline is not active: a peer does not know what we know.
        self.push_once = False
        self.removed_segment = 0  # the highest segment removed in this process's life
        self.ps_feedback_count = 0
        self.ps_corruption_detected = False
        self.last_ps_feedback: PageserverFeedback | None = None
        #: Called whenever something moved; the manager looks at the timeline soon after.
        self.on_change: Callable[[Timeline], None] = lambda _: None
        self._seen = (INVALID_LSN, INVALID_LSN, 0)

    @classmethod
    def open(cls, node_id: int, directory: Path, *, sync: bool) -> "Timeline":
        """Load a timeline and find the end of its log. Raises OSError, CorruptionError."""
        control = ControlFile.load(directory / "safekeeper.control")
        timeline = cls(node_id, directory, control, sync=sync)
        timeline.store.recover(control.acceptor.commit_lsn)
        return timeline

    # -- carrying out the acceptor's effects

    def run(self, steps: Generator[Effect, Any, Result]) -> Result:
        """Run one method of the acceptor and tell everybody who waits. Raises what the method or an effect raises."""
        if self.cancelled:
            raise Cancelled(f"timeline {self.ttid} is being deleted or shut down")
        try:
            return run(steps, self.perform)
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
    def standby_horizon(self) -> Lsn:
        """The lowest position replayed by a replica; 0 without replicas."""
        return standby_horizon(list(self.senders.values()))

    def reader(self) -> WalReader:
        """A new reader of this timeline's WAL."""
        return WalReader(self.directory, self.segment_size)

    @property
    def first_available_lsn(self) -> Lsn:
        """The first position of the oldest segment that a reader may ask for."""
        start = self.acceptor.state.local_start_lsn
        return Lsn(max(start - start % self.segment_size, (self.removed_segment + 1) * self.segment_size))

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
        answer: bytes | None = None
        for receiver in self.receivers.values():
            if acceptor.is_streaming(receiver.proposer):
                if answer is None:
                    response = acceptor.append_response()
                    response.pageserver_feedback = feedback
                    answer = response.pack()
                receiver.send(answer)

    def standby_feedback_changed(self) -> None:
        """A replica reported or left: what all of them need goes into the next answer to the compute."""
        self.acceptor.standby_feedback = aggregate_standby_feedback(list(self.senders.values()))

    def record_peer(self, peer: Peer) -> None:
        """What the broker says about a member, ourselves included."""
        self.peers[peer.sk_id] = peer
        if peer.info.remote_consistent_lsn < self.acceptor.remote_consistent_lsn:
            self.push_once = True  # else it stays active for ever, waiting for what the pageserver told only us
        if peer.sk_id != self.acceptor.node_id and self.acceptor.peer_info(peer.info):
            self.changed()
            self.on_change(self)

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
        for receiver in list(self.receivers.values()):
            receiver.close(reason)
        for sender in list(self.senders.values()):
            sender.close(reason)
        self.store.close()
        if failure is not None:
            raise failure

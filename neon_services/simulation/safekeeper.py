"""A safekeeper of the simulation: the production acceptor on a simulated disk, which may crash before and after any effect."""

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from neon_services.consensus.acceptor import (
    AcceptorState,
    Effect,
    FlushWal,
    PeerInfo,
    PersistState,
    ProposerConnection,
    TruncateWal,
    WriteWal,
)
from neon_services.ground.errors import NeonError
from neon_services.protocols.safekeeper_messages import (
    AppendRequest,
    MembershipConfiguration,
    ProposerMessage,
    VoteResponse,
)
from neon_services.simulation.network import Connection
from neon_services.simulation.wal import SimulatedDisk, SimulatedWal

if TYPE_CHECKING:
    from neon_services.simulation.world import World


class Crashed(Exception):
    """The node lost power in the middle of something."""


class DiskFailed(NeonError):
    """The disk refused to replace the state; whether the old or the new one is on it now, nobody knows."""


class SimulatedSafekeeper:
    """One node."""

    def __init__(self, world: "World", node_id: int, state: AcceptorState | None) -> None:
        self.world = world
        self.node_id = node_id
        #: It has the timeline.
        self.present = state is not None
        self.disk = SimulatedDisk(state or AcceptorState())
        self.up = False
        self.sessions: dict[Connection, ProposerConnection] = {}
        self.flush_due: set[Connection] = set()
        self.acknowledged_term, self.acknowledged_lsn = -1, 0
        self.boot()

    def __str__(self) -> str:
        return f"s{self.node_id}"

    def boot(self) -> None:
        """Start on what the disk holds."""
        if self.up:
            return
        self.up = True
        world = self.world
        self.acceptor = world.kinds.acceptor(self.node_id, world.ttid, self.disk.state, self.disk.wal)
        self.seen_term = self.seen_commit = 0
        world.trace(
            "%s boots: term %d, flush %d, commit %d",
            self,
            self.acceptor.term,
            self.acceptor.flush_lsn,
            self.disk.state.commit_lsn,
        )
        world.checker.acceptor(self)

    def crash(self) -> None:
        """Lose the memory, and of the unsynced log a random end."""
        world = self.world
        self.up = False
        self.disk.wal.crash(world.random)
        world.stats.crashes += 1
        world.trace("%s crashes; %d bytes of log survive", self, len(self.disk.wal.data))
        for connection in list(self.sessions):
            connection.close_by_safekeeper()
        self.sessions.clear()
        self.flush_due.clear()
        world.after(world.random.randint(10_000, 400_000), self.boot)

    # -- connections

    def accept(self, connection: Connection) -> None:
        """A proposer has connected."""
        self.sessions[connection] = ProposerConnection(str(connection))

    def closed(self, connection: Connection) -> None:
        """A connection ended: what came over it is flushed."""
        session = self.sessions.pop(connection, None)
        self.flush_due.discard(connection)
        if session is not None and self.up:
            self._attempt(self.acceptor.flush_on_disconnect(session))

    def deliver(self, connection: Connection, message: ProposerMessage) -> None:
        """One message from a proposer."""
        session = self.sessions.get(connection)
        if session is None or not self.up:
            return
        world = self.world
        world.trace("%s <- %s: %s", self, connection.proposer, message)
        try:
            replies = self._run(self.acceptor.handle(session, message))
        except NeonError as error:
            world.trace("%s refuses: %s", self, error)
            connection.close_by_safekeeper()
            self.closed(connection)
            return
        if replies is None:
            return
        for reply in replies:
            if isinstance(reply, VoteResponse):
                world.checker.vote(self, reply)
            connection.send_to_proposer(reply)
        if isinstance(message, AppendRequest) and connection not in self.flush_due:
            self.flush_due.add(connection)
            world.after(world.random.randint(0, 4000), self._flush, connection)

    def _flush(self, connection: Connection) -> None:
        session = self.sessions.get(connection)
        if session is None or connection not in self.flush_due:
            return
        self.flush_due.discard(connection)
        try:
            replies = self._run(self.acceptor.flush_batch(session))
        except DiskFailed:
            connection.close_by_safekeeper()
            self.closed(connection)
            return
        for reply in replies or ():
            self.world.checker.acknowledged(self, reply)
            connection.send_to_proposer(reply)

    # -- the rest of the process

    def gossip(self, peer: PeerInfo) -> None:
        """What the broker brings."""
        if self.up and self.present:
            self.acceptor.peer_info(peer)
            self.world.checker.acceptor(self)

    def peer_info(self) -> PeerInfo:
        """What the broker takes."""
        a = self.acceptor
        return PeerInfo(a.last_log_term, a.commit_lsn, a.backup_lsn, a.remote_consistent_lsn, a.peer_horizon_lsn)

    def save(self) -> None:
        """The manager's lazy save."""
        if self.up and self.present:
            self._attempt(self.acceptor.persist_volatile())

    # -- membership

    def position(self) -> tuple[int, int]:
        """How good the log is."""
        return self.acceptor.last_log_term, self.acceptor.flush_lsn

    def switch(self, mconf: MembershipConfiguration) -> bool:
        """The control plane brings a configuration. True when it is in force here."""
        if not self.up or not self.present:
            return False
        return self._attempt(self.acceptor.membership_switch(mconf)) is not None

    def bump(self, term: int) -> bool:
        """term_bump; False when the node went down over it."""
        return self._attempt(self.acceptor.term_bump(term)) is not None

    def install(self, donor: "SimulatedSafekeeper", mconf: MembershipConfiguration) -> None:
        """pull_timeline: become a copy of what the donor has on disk."""
        wal = donor.disk.wal
        self.world.trace("%s becomes a copy of %s at %d", self, donor, wal.flush_lsn)
        self.disk = SimulatedDisk(replace(donor.disk.state, mconf=mconf))
        self.disk.wal = SimulatedWal()
        self.disk.wal.initialize(wal.base)
        self.disk.wal.write(wal.base, wal.read(wal.base, wal.flush_lsn))
        self.disk.wal.flush()
        self.present = True
        self._restart()

    def exclude(self) -> None:
        """Forget the timeline."""
        self.world.trace("%s is excluded", self)
        for connection in list(self.sessions):
            connection.close_by_safekeeper()
        self.sessions.clear()
        self.flush_due.clear()
        self.present = False
        self.disk = SimulatedDisk(AcceptorState())

    def _restart(self) -> None:
        self.acknowledged_term, self.acknowledged_lsn = -1, 0
        self.up = False
        self.boot()

    def _attempt(self, steps: Generator[Effect, Any, Any]) -> Any:
        """Carry out one method; None when it failed or the node crashed meanwhile."""
        try:
            return self._run(steps)
        except NeonError:
            return None

    def _run(self, steps: Generator[Effect, Any, Any]) -> Any:
        """Carry out one method; None when the node crashed meanwhile."""
        try:
            result = self._carry_out(steps)
        except Crashed:
            return None
        self.world.checker.acceptor(self)
        return result

    def _carry_out(self, steps: Generator[Effect, Any, Any]) -> Any:
        outcome: Any = None
        while True:
            try:
                effect = steps.send(outcome)
            except StopIteration as done:
                return done.value
            self._maybe_crash(effect)
            self.world.checker.effect(self, effect)
            if type(effect) is PersistState and self.world.random.random() < self.world.profile.disk_failure:
                self._fail_to_persist(effect)
            outcome = self.disk.perform(effect)
            self._maybe_crash(effect)

    def _fail_to_persist(self, effect: PersistState) -> None:
        self.world.stats.disk_failures += 1
        if self.world.random.random() < 0.5:
            self.disk.perform(effect)
        self.world.trace("%s fails to persist its state", self)
        raise DiskFailed(f"{self}: no space left on device")

    def _maybe_crash(self, effect: Effect) -> None:
        world = self.world
        if world.random.random() < world.profile.crash_at_effect[type(effect)]:
            world.trace("%s loses power at %s", self, type(effect).__name__)
            self.crash()
            raise Crashed


#: Crashes are much likelier around the rare steps that a promise hangs on.
CRASH_WEIGHT: dict[type[Any], float] = {WriteWal: 0.2, FlushWal: 1.0, TruncateWal: 4.0}

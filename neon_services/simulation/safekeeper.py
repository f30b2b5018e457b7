"""A safekeeper of the simulation: the production acceptor over model or real storage, which may crash anywhere.

Invariant of the simulation itself: what a node says (answers, gossip) is what the code under test said, at the time it said it;
nothing is said after a crash until the node has booted again.
"""

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from neon_services.consensus.acceptor import (
    AcceptorState,
    Effect,
    PeerInfo,
    ProposerConnection,
)
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import INVALID_LSN, Lsn
from neon_services.protocols.pgwire import copy_data
from neon_services.protocols.safekeeper_messages import (
    AppendRequest,
    MembershipConfiguration,
    ProposerMessage,
    VoteResponse,
    parse_append_response,
)
from neon_services.safekeeper.append_lane import AppendLane
from neon_services.safekeeper.manager import must_save
from neon_services.safekeeper.wal_store import WalStoreError
from neon_services.simulation.disk import PowerLost, SimulatedDisk
from neon_services.simulation.model_storage import ModelStorage
from neon_services.simulation.network import Connection
from neon_services.simulation.platters import DiskWeather
from neon_services.simulation.real_storage import RealStorage

if TYPE_CHECKING:
    from neon_services.simulation.world import World

SAVE_INTERVAL_S = 0.3
COPY_CHUNK_BYTES = 300  # of a pull; small, so that much can happen between two


class Crashed(Exception):
    """The node went down in the middle of something."""


class SimulatedSafekeeper:
    """One node."""

    def __init__(self, world: "World", node_id: int, state: AcceptorState | None) -> None:
        self.world = world
        self.node_id = node_id
        self.weather = DiskWeather(world.random)
        self.storage: ModelStorage | RealStorage
        if world.profile.real:
            self.storage = world.kinds.storage(world.ttid, state, self.weather, self._later)
        else:
            self.storage = ModelStorage(state, world.random)
        self.up = False
        self.boots = 0
        self.sessions: dict[Connection, ProposerConnection] = {}
        self.flush_due: set[Connection] = set()
        self.lanes: dict[Connection, AppendLane] = {}
        #: What was spoken and must stay true.
        self.promised_term = self.promised_generation = 0
        self.acknowledged_term, self.acknowledged_lsn = -1, INVALID_LSN
        #: Seconds by which this node's clock is off, and when it saved its state by that clock.
        self.clock_offset_s = 0.0
        self.saved_at_s = 0.0
        #: Removal of WAL waits while somebody copies the timeline from here.
        self.snapshots = 0
        self.boot()

    def __str__(self) -> str:
        return f"s{self.node_id}"

    @property
    def present(self) -> bool:
        """It has the timeline."""
        return self.storage.present

    @property
    def clock_s(self) -> float:
        """This node's clock."""
        return self.world.now_us / 1e6 + self.clock_offset_s

    def arm(self, power_loss: float, sync_failure: float, short_write: float) -> None:
        """The unruly part begins: the disk may fail from now on."""
        self.weather.power_loss, self.weather.sync_failure, self.weather.short_write = power_loss, sync_failure, short_write
        if isinstance(self.storage, ModelStorage):
            self.storage.failure = self.world.profile.disk_failure

    def calm(self) -> None:
        """Nothing fails any more."""
        self.weather.calm()
        if isinstance(self.storage, ModelStorage):
            self.storage.failure = 0.0

    # -- life and death

    def boot(self) -> None:
        """Start on what the disk holds."""
        if self.up:
            return
        try:
            self.storage.boot()
        except PowerLost as lost:
            self._fell("goes down while it boots", power=lost.power)
            return
        except OSError as error:
            self._fell(f"cannot read its disk: {error}", power=False)
            return
        except NeonError as error:
            self.world.checker.fail("a restart succeeds", "%s cannot boot: %s", self, error)
        self.up = True
        self.boots += 1
        self.saved_at_s = self.clock_s
        if self.present:
            self._open()

    def _open(self) -> None:
        """The timeline was loaded."""
        world = self.world
        self.lanes.clear()
        self.acceptor = world.kinds.acceptor(self.node_id, world.ttid, self.storage.state, self.storage.wal)
        self.seen_term = self.seen_commit = 0
        self.seen_flush = -1
        self.same_lsn = INVALID_LSN
        state = self.storage.state
        world.trace("%s boots: term %d, flush %d, commit %d", self, state.term, self.acceptor.flush_lsn, state.commit_lsn)
        world.checker.booted(self)

    def crash(self, *, power: bool = True) -> None:
        """Lose the memory, and with ``power`` also some of what is not synced."""
        if self.up:
            self._fell("stops" if power else "is killed", power=power)

    def _fell(self, why: str, *, power: bool) -> None:
        world = self.world
        self.up = False
        world.trace("%s %s%s", self, why, "; its power is gone" if power else "")
        self.storage.crash(power=power)
        world.stats.crashes += 1
        world.stats.kills += not power
        self.hang_up()
        self.snapshots = 0
        world.after(world.random.randint(10_000, 400_000), self.boot)

    def hang_up(self) -> None:
        """End all connections."""
        for connection in list(self.sessions):
            connection.close_by_safekeeper()
        self.sessions.clear()
        self.flush_due.clear()
        self.lanes.clear()

    def _later(self, disk: SimulatedDisk, work: Any) -> None:
        """Work ahead of the storage, on its other thread."""
        self.world.after(self.world.random.randint(0, 30_000), self._work_ahead, disk, work)

    def _work_ahead(self, disk: SimulatedDisk, work: Any) -> None:
        if not disk.dead:
            try:
                work()
            except PowerLost as lost:
                self._fell("goes down while it works ahead", power=lost.power)

    # -- connections

    def accept(self, connection: Connection) -> None:
        """A proposer has connected."""
        self.sessions[connection] = ProposerConnection(str(connection))

    def closed(self, connection: Connection) -> None:
        """A connection ended: what came over it is flushed."""
        session = self.sessions.pop(connection, None)
        self.flush_due.discard(connection)
        self.lanes.pop(connection, None)
        if session is not None and self.up:
            self._attempt(self.acceptor.flush_on_disconnect(session))

    def deliver(self, connection: Connection, message: ProposerMessage) -> None:
        """One message from a proposer."""
        session = self.sessions.get(connection)
        if session is None or not self.up:
            return
        world = self.world
        world.trace("%s <- %s: %s", self, connection.proposer, message)
        if isinstance(message, AppendRequest) and self._take(connection, session, message):
            return
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
            world.after(world.soon_us(4000), self._flush, connection)

    def _take(self, connection: Connection, session: ProposerConnection, append: AppendRequest) -> bool:
        """Offer every other append to the lane, as the bytes that come through a socket. True when it is dealt with."""
        world = self.world
        if not isinstance(self.storage, RealStorage) or connection in self.flush_due or world.random.random() < 0.5:
            return False
        received = memoryview(bytearray(copy_data(append.pack())))
        try:
            if connection not in self.lanes:
                self.lanes[connection] = world.kinds.lane(self.acceptor, self.storage.wal, session)
            _, answer = self.lanes[connection].take(received, len(received))
        except PowerLost as lost:
            self._fell("goes down in an append", power=lost.power)
            return True
        except NeonError as error:
            world.trace("%s refuses: %s", self, error)
            connection.close_by_safekeeper()
            self.closed(connection)
            return True
        if not answer:
            return False
        world.stats.short_ways += 1
        world.checker.acceptor(self)
        reply = parse_append_response(answer[5:])
        world.checker.acknowledged(self, reply)
        connection.send_to_proposer(reply)
        return True

    def _flush(self, connection: Connection) -> None:
        session = self.sessions.get(connection)
        if session is None or connection not in self.flush_due:
            return
        self.flush_due.discard(connection)
        try:
            replies = self._run(self.acceptor.flush_batch(session))
        except WalStoreError as error:
            self.world.trace("%s fails: %s", self, error)
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

    def manage(self) -> None:
        """The manager's look at the timeline: the lazy save, by this node's clock, and the removal of WAL."""
        if not self.up or not self.present:
            return
        size = self.world.writer.segment_size
        if must_save(self.acceptor, size, self.clock_s - self.saved_at_s, SAVE_INTERVAL_S):
            if self._attempt(self.acceptor.persist_volatile()) is not None:
                self.saved_at_s = self.clock_s
            if not self.up:
                return
        if isinstance(self.storage, RealStorage) and not self.snapshots:
            horizon = self.world.kinds.removal_horizon(self, walsenders_keep_horizon=False)  # type: ignore[arg-type]
            self._remove_below(self.storage, horizon // size, size)

    def _remove_below(self, storage: RealStorage, segment: int, size: int) -> None:
        if segment * size <= max(storage.first_lsn, self.world.start_lsn):
            return
        try:
            removed = storage.remove_below(segment, size)
        except PowerLost as lost:
            self._fell("goes down while it removes WAL", power=lost.power)
            return
        except WalStoreError:
            return
        self.world.trace("%s removes %d segments of WAL below number %d", self, removed, segment)
        self.world.checker.removed(self, Lsn(segment * size))

    # -- membership

    def position(self) -> tuple[int, int]:
        """How good the log is."""
        return self.acceptor.last_log_term, self.acceptor.flush_lsn

    def switch(self, mconf: MembershipConfiguration) -> bool:
        """The control plane brings a configuration. True when it is in force here."""
        if not self.up or not self.present:
            return False
        if self._attempt(self.acceptor.membership_switch(mconf)) is None:
            return False
        self.world.checker.promised(self, generation=mconf.generation)
        return True

    def bump(self, term: int) -> bool:
        """term_bump; False when the node went down over it."""
        if self._attempt(self.acceptor.term_bump(term)) is None:
            return False
        self.world.checker.promised(self, term=term)
        return True

    def pull(self, donor: "SimulatedSafekeeper", mconf: MembershipConfiguration, promised: int = 0) -> Iterator[int]:
        """pull_timeline: become a copy of the donor. Yields delays, between which anything may happen, also to the donor.

        ``promised``: the highest term of the members that were heard; the copy keeps that promise.

        Only what the donor held when the copy began is taken, and only if its last_log_term is the same in the end: every cut
        that takes something away changes it. (The promised term is no such sign: it is raised long before the cut.)
        """
        world, acceptor = self.world, donor.acceptor
        boots, donor_boots = self.boots, donor.boots
        term, end = donor.snapshot_term(), acceptor.flush_lsn
        begin = max(world.start_lsn, donor.storage.first_lsn)
        world.trace("%s begins to copy %s up to %d", self, donor, end)
        donor.snapshots += 1
        state = donor.storage.state
        state = replace(state, mconf=mconf, term=max(state.term, promised))
        steps = self.storage.install(begin, self._chunks(donor, begin, end), state)
        try:
            for _ in steps:
                yield world.delay_us()
                fit = self.up and self.boots == boots and donor.up and donor.boots == donor_boots and donor.present
                if not fit or donor.snapshot_term() != term:
                    world.trace("%s gives up the copy of %s", self, donor)
                    world.stats.pulls_given_up += 1
                    return
        except PowerLost as lost:
            self._fell("goes down while it copies", power=lost.power)
            return
        except (NeonError, OSError) as error:
            world.trace("%s fails to copy: %s", self, error)
            return
        finally:
            donor.snapshots = max(0, donor.snapshots - 1)
        world.trace("%s is a copy of %s at %d", self, donor, end)
        world.stats.pulls += 1
        self.promised_term = self.promised_generation = 0
        self.acknowledged_term, self.acknowledged_lsn = -1, INVALID_LSN
        self._open()

    def snapshot_term(self) -> int:
        """What must not change while this node's timeline is copied."""
        return self.acceptor.last_log_term

    @staticmethod
    def _chunks(donor: "SimulatedSafekeeper", begin: Lsn, end: Lsn) -> Iterator[bytes]:
        while begin < end:
            upto = Lsn(min(end, begin + COPY_CHUNK_BYTES))
            yield donor.storage.read(begin, upto)
            begin = upto

    def exclude(self) -> None:
        """Forget the timeline."""
        self.world.trace("%s is excluded", self)
        self.hang_up()
        try:
            self.storage.remove()
        except PowerLost as lost:
            self._fell("goes down while it deletes", power=lost.power)
        except OSError as error:
            self.world.trace("%s fails to delete: %s", self, error)

    # -- carrying out

    def _attempt(self, steps: Generator[Effect, Any, Any]) -> Any:
        """Carry out one method; None when it failed or the node crashed meanwhile, else what it returns, or True."""
        try:
            result = self._run(steps)
        except NeonError:
            return None
        return result if result is not None or not self.up else True

    def _recall(self) -> None:
        """As Timeline.run: what is lent to a lane is about to change."""
        if isinstance(self.storage, RealStorage):
            self.storage.wal.recall()

    def _run(self, steps: Generator[Effect, Any, Any]) -> Any:
        """Carry out one method; None when the node crashed meanwhile."""
        self._recall()
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
            try:
                outcome = self.storage.perform(effect)
            except PowerLost as lost:
                self._fell(f"goes down in {type(effect).__name__}", power=lost.power)
                raise Crashed from None
            self.world.checker.carried_out(self, effect)
            self._maybe_crash(effect)

    def _maybe_crash(self, effect: Effect) -> None:
        world = self.world
        if world.random.random() < world.profile.crash_at_effect[type(effect)]:
            self._fell(f"goes down at {type(effect).__name__}", power=world.random.random() < 0.7)
            raise Crashed

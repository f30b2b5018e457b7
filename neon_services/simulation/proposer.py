"""A proposer of the simulation: the production state machine, a Postgres that writes, connections that come and go."""

from typing import TYPE_CHECKING

from neon_services.consensus.proposer import Deposed, MemberPhase, ProposerConfig
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import AcceptorMessage, ProposerElected, parse_append_request
from neon_services.simulation.network import Connection

if TYPE_CHECKING:
    from neon_services.simulation.world import World

TICK_US = 100_000


class SimulatedProposer:
    """One run of a proposer; ``sync`` ones write nothing and end when the safekeepers agree."""

    def __init__(self, world: "World", number: int, *, sync: bool) -> None:
        self.world = world
        self.number = number
        self.sync = sync
        self.alive = True
        self.synchronised: Lsn | None = None
        profile = world.profile
        #: Where it was told to find the safekeepers; it is not told again.
        self.nodes = world.addresses()
        config = ProposerConfig(
            ttid=world.ttid,
            safekeepers=len(self.nodes),
            pg_version=150000,
            use_generations=not profile.legacy,
            wal_seg_size=world.writer.segment_size,
            bootstrap_lsn=Lsn(0) if sync or not profile.legacy else world.start_lsn,
        )
        self.core = world.kinds.proposer(config)
        self.connections: dict[int, Connection] = {}
        self.connecting: set[int] = set()
        #: The whole log as the omniscient world knows it, from world.start_lsn on.
        self.log = bytearray()
        self.elected = False
        #: Write before everything of former terms is committed, which a real compute does not.
        self.eager = world.random.random() < 0.5
        self._pump_due: set[int] = set()
        self._tick()

    def __str__(self) -> str:
        return f"p{self.number}"

    @property
    def end_lsn(self) -> Lsn:
        """End of the log that this proposer has."""
        return Lsn(self.world.start_lsn + len(self.log))

    def die(self, why: str) -> None:
        """End of the process."""
        if self.alive:
            self.alive = False
            self.world.trace("%s ends: %s", self, why)
            for connection in list(self.connections.values()):
                connection.close_by_proposer()
            self.connections.clear()

    # -- connections

    def _tick(self) -> None:
        if not self.alive:
            return
        world = self.world
        for slot in range(len(self.nodes)):
            if slot not in self.connections:
                self._connect_soon(slot)
            elif self.core.members[slot].phase is MemberPhase.ACTIVE:
                self._heartbeat(slot)
        world.after(TICK_US, self._tick)

    def _connect_soon(self, slot: int) -> None:
        if slot not in self.connecting:
            self.connecting.add(slot)
            self.world.after(self.world.delay_us(), self._connect, slot)

    def _connect(self, slot: int) -> None:
        self.connecting.discard(slot)
        world = self.world
        node = self.nodes[slot]
        if (
            not self.alive
            or not node.up
            or not node.present
            or world.unreachable(self, node)
            or world.random.random() < world.profile.connect_failure
        ):
            return
        connection = world.connection(self, slot, node)
        self.connections[slot] = connection
        node.accept(connection)
        for _, message in self.core.connected(slot):
            connection.send_to_safekeeper(message)

    def closed(self, connection: Connection) -> None:
        """The connection ended at this side."""
        if self.connections.get(connection.slot) is connection:
            del self.connections[connection.slot]
            self.core.disconnected(connection.slot)
            if self.alive and self.world.random.random() < 0.5:
                self._connect_soon(connection.slot)  # at once; else with the next tick

    def deliver(self, connection: Connection, message: AcceptorMessage) -> None:
        """One message from a safekeeper."""
        if not self.alive or self.connections.get(connection.slot) is not connection:
            return
        world, core = self.world, self.core
        world.trace("%s <- %s: %s", self, connection.node, message)
        before = core.commit_lsn
        try:
            outgoing = core.received(connection.slot, message)
        except Deposed as error:
            world.stats.deposed += 1
            self.die(str(error))
            return
        except NeonError as error:
            world.trace("%s drops the connection: %s", self, error)
            connection.close_by_proposer()
            self.closed(connection)
            return
        if core.elected and not self.elected:
            self.elected = True
            self.log += world.checker.elected(self)
            if not self.sync:
                world.after(world.random.randint(0, 30_000), self._write)
        for slot, answer in outgoing:
            self.connections[slot].send_to_safekeeper(answer)
            if isinstance(answer, ProposerElected) and world.random.random() < world.profile.stalled_elected:
                world.stall(self.connections[slot])
        for slot in core.must_reconnect():
            old = self.connections.get(slot)
            if old is not None:
                old.close_by_proposer()
                self.closed(old)
        if core.commit_lsn > before:
            world.checker.committed(self)
            for slot in self.connections:
                self._pump_soon(slot)
        if self.sync and (lsn := core.synchronised()) is not None:
            self.synchronised = lsn
            world.checker.synchronised(self, lsn)
            for slot in list(self.connections):
                self._heartbeat(slot)
            self.die(f"synchronised at {lsn}")
            return
        self._pump_soon(connection.slot)

    # -- WAL

    def _write(self) -> None:
        """Postgres writes a transaction."""
        world = self.world
        if not self.alive or not world.writing:
            return
        if self.core.ready or self.eager:
            for _ in range(world.random.randint(1, 4)):
                self.log += world.writer.record(self.end_lsn, self.core.term)
            for slot in self.connections:
                self._pump_soon(slot)
        world.after(world.random.randint(1000, world.profile.write_gap_us), self._write)

    def _heartbeat(self, slot: int) -> None:
        if slot in self.connections and self.core.members[slot].phase is MemberPhase.ACTIVE:
            self.connections[slot].send_to_safekeeper(self.core.heartbeat(slot))

    def _pump_soon(self, slot: int) -> None:
        if slot not in self._pump_due:
            self._pump_due.add(slot)
            self.world.after(self.world.soon_us(3000), self._pump, slot)

    def _pump(self, slot: int) -> None:
        self._pump_due.discard(slot)
        connection = self.connections.get(slot)
        core = self.core
        member = core.members[slot]
        if not self.alive or connection is None or member.phase is not MemberPhase.ACTIVE:
            return
        world = self.world
        begin = member.sent_lsn
        end = Lsn(min(self.end_lsn, begin + 1 + world.soon_us(world.profile.chunk * world.writer.stretch)))
        if begin < core.term_start_lsn:
            end = Lsn(min(end, core.term_start_lsn))
            data = self._from_donor(slot, begin, end)
            if data is None:
                world.after(20_000, self._pump_soon, slot)
                return
            end = Lsn(begin + len(data))
        else:
            data = bytes(self.log[begin - world.start_lsn : end - world.start_lsn])
        if end > begin:
            connection.send_to_safekeeper(parse_append_request(core.append_header(slot, end) + data))
        elif member.told_commit_lsn < core.commit_lsn:
            self._heartbeat(slot)
        if member.sent_lsn < self.end_lsn:
            self._pump_soon(slot)

    def _from_donor(self, slot: int, begin: Lsn, end: Lsn) -> bytes | None:
        """WAL of former terms, read from a safekeeper in term mode; None while no donor can be reached."""
        core, world = self.core, self.world
        for donor in core.donors():
            node = self.nodes[donor]
            known = min(end, core.donor_end(donor))
            if donor == slot or known <= begin or not node.up or not node.present or world.unreachable(self, node):
                continue
            if node.acceptor.term == core.term and node.acceptor.flush_lsn >= known:
                if begin < node.storage.first_lsn:
                    return world.bucket(begin, known)
                return node.storage.read(begin, known)
        return None

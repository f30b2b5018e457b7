"""The deterministic world: one seed gives the clock, the network, the crashes and the schedule.

Only the production state machines decide; everything here is weather. A schedule has an unruly part and an end in which all
faults stop: then everything that was ever acknowledged must still be there, and work must go on.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neon_services.consensus.acceptor import Acceptor, AcceptorState, PeerInfo
from neon_services.consensus.proposer import Proposer
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId
from neon_services.safekeeper.append_lane import AppendLane
from neon_services.safekeeper.manager import removal_horizon
from neon_services.simulation.checker import Checker
from neon_services.simulation.controller import SimulatedController
from neon_services.simulation.network import TO_PROPOSER, TO_SAFEKEEPER, Connection
from neon_services.simulation.profile import EFFECTS, Profile
from neon_services.simulation.proposer import SimulatedProposer
from neon_services.simulation.real_storage import RealStorage
from neon_services.simulation.records import ModelWriter, WalWriter, Writer
from neon_services.simulation.safekeeper import SimulatedSafekeeper
from neon_services.simulation.stats import Stats
from neon_services.simulation.trace import brief

TTID = TenantTimelineId(TenantId(bytes(16)), TimelineId(bytes(15) + b"\x01"))
SETTLE_LIMIT_US = 60_000_000


@dataclass(frozen=True, slots=True)
class Kinds:
    """The state machines under test; the tests put broken ones here to see that they are caught."""

    proposer: type[Proposer] = Proposer
    acceptor: type[Acceptor] = Acceptor
    controller: type[SimulatedController] = SimulatedController
    node: type[SimulatedSafekeeper] = SimulatedSafekeeper
    storage: type[RealStorage] = RealStorage
    lane: type[AppendLane] = AppendLane
    removal_horizon: Callable[..., Lsn] = removal_horizon


class World:
    """One schedule. ``run()`` raises InvariantViolation, which names the seed."""

    def __init__(
        self,
        seed: int,
        *,
        kinds: Kinds | None = None,
        draw: Callable[[random.Random], Profile] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.kinds = kinds or Kinds()
        self.log = log
        self.ttid = TTID
        self.now_us = 0
        self.stats = Stats()
        self.profile = (draw or Profile.draw)(self.random)
        self.writer: Writer = WalWriter(self.random) if self.profile.real else ModelWriter(self.random)
        self.start_lsn = self.writer.start_lsn()
        self.trace("%s", self.profile)
        self.checker = Checker(self)
        self.writing = True
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._calm = False
        self._partitions: dict[tuple[int, int, int], int] = {}  # proposer, node, direction -> until when
        self._connections: list[Connection] = []
        self._infos: list[PeerInfo] = []
        self.proposers: list[SimulatedProposer] = []
        self.nodes = [self.kinds.node(self, i + 1, state) for i, state in enumerate(self._initial_states())]

    def _initial_states(self) -> list[AcceptorState | None]:
        profile = self.profile
        if profile.legacy:
            return [AcceptorState(wal_seg_size=self.writer.segment_size) for _ in range(profile.nodes)]
        members = tuple(SafekeeperId(i + 1, f"s{i + 1}", 5454) for i in range(profile.members))
        self.controller = self.kinds.controller(self, MembershipConfiguration(2, members))
        states: list[AcceptorState | None] = []
        for _ in members:
            # some members lag by a generation and must learn the newest one from the proposer's greeting
            generation = 1 if self.random.random() < 0.2 else 2
            mconf, start, size = MembershipConfiguration(generation, members), self.start_lsn, self.writer.segment_size
            states.append(AcceptorState.create(mconf, pg_version=150000, system_id=0, wal_seg_size=size, start_lsn=start))
        return states + [None] * (profile.nodes - profile.members)

    def addresses(self) -> list[SimulatedSafekeeper]:
        """The safekeepers that a new proposer is told: both sets while the membership changes."""
        if self.profile.legacy:
            return self.nodes
        row = self.controller.row
        ids = {member.node_id for member in (*row.members, *(row.new_members or ()))}
        return [node for node in self.nodes if node.node_id in ids]

    # -- time

    def at(self, time_us: int, action: Callable[..., None], *arguments: Any) -> None:
        """Do something at a time."""
        self._sequence += 1
        heapq.heappush(self._events, (time_us, self._sequence, action, arguments))

    def after(self, delay_us: int, action: Callable[..., None], *arguments: Any) -> None:
        """Do something later."""
        self.at(self.now_us + delay_us, action, *arguments)

    def trace(self, text: str, *values: object) -> None:
        """A line for the reader of a replayed seed."""
        if self.log is not None:
            self.log(f"{self.now_us / 1000:9.3f} ms  {text % tuple(map(brief, values))}")

    def _run_until(self, time_us: int, done: Callable[[], bool] | None = None) -> bool:
        events = self._events
        while events and events[0][0] <= time_us:
            self.now_us, _, action, arguments = heapq.heappop(events)
            self.stats.events += 1
            action(*arguments)
            if done is not None and done():
                return True
        self.now_us = max(self.now_us, time_us)
        return False

    # -- what the inhabitants ask

    def delay_us(self) -> int:
        """How long something takes to arrive."""
        low, high = self.profile.delay_us
        return low + int(self.random.random() * (high - low))

    def soon_us(self, limit_us: int) -> int:
        """A time below the limit; cheaper than ``randint``."""
        return int(self.random.random() * limit_us)

    def connection(self, proposer: SimulatedProposer, slot: int, node: SimulatedSafekeeper) -> Connection:
        """A new connection."""
        made = Connection(self, len(self._connections), proposer, slot, node)
        self._connections.append(made)
        return made

    def blocked_until(self, connection: Connection, direction: int) -> int:
        """When a partition lets this connection's messages through again, or its own congestion does."""
        parted = 0
        if self._partitions:
            parted = self._partitions.get((connection.proposer.number, connection.node.node_id, direction), 0)
        return max(parted, connection.stalled_until_us)

    def unreachable(self, proposer: SimulatedProposer, node: SimulatedSafekeeper) -> bool:
        """Whether a partition parts the two, in either direction."""
        parted = [self._partitions.get((proposer.number, node.node_id, way), 0) for way in (TO_SAFEKEEPER, TO_PROPOSER)]
        return max(parted) > self.now_us

    def bucket(self, begin: Lsn, end: Lsn) -> bytes | None:
        """WAL that safekeepers have removed, as far as it was offloaded."""
        end = Lsn(min(end, self.checker.offloaded_lsn))
        return bytes(self.checker.log[begin - self.start_lsn : end - self.start_lsn]) if end > begin else None

    # -- the schedule

    def run(self) -> Stats:
        """Run the schedule to its end."""
        self._spawn(sync=False)
        quiet_us = 200_000 + 12 * self.profile.delay_us[1]  # time enough for a first leader
        self.after(quiet_us, self._begin_unrest)
        self._run_until(quiet_us + self.profile.duration_us)
        self.stats.unruly_commits = self.stats.commits
        self._settle()
        self._count()
        if not self.stats.elections or not self.stats.commits:
            self.checker.fail("something happens", "nothing was elected or committed: this schedule proves nothing")
        return self.stats

    def _count(self) -> None:
        """What the disks did."""
        stats = self.stats
        stats.real = int(self.profile.real)
        for node in self.nodes:
            weather = node.weather
            stats.disk_operations += weather.operations
            stats.disk_failures += weather.failures + getattr(node.storage, "failures", 0)
            stats.disk_full += weather.refusals
            stats.power_losses += weather.power_losses
            stats.torn += weather.torn

    def _begin_unrest(self) -> None:
        profile = self.profile
        for node in self.nodes:
            node.arm(profile.power_loss, profile.sync_failure, profile.short_write)
        self._unrest()

    def _spawn(self, *, sync: bool) -> SimulatedProposer:
        made = SimulatedProposer(self, len(self.proposers) + 1, sync=sync)
        self.proposers.append(made)
        self.trace("%s starts%s", made, " (sync)" if sync else "")
        return made

    def _alive(self) -> list[SimulatedProposer]:
        return [proposer for proposer in self.proposers if proposer.alive]

    def _unrest(self) -> None:
        """One event that breaks something, and the time of the next."""
        if self._calm:
            return
        rng, weights = self.random, self.profile.weights
        (what,) = rng.choices(list(weights), list(weights.values()))
        getattr(self, f"_{what}")()
        if not self._alive():
            self._spawn(sync=rng.random() < 0.2)
        self.after(int(rng.expovariate(1 / self.profile.gap_us)) + 1, self._unrest)

    def _crash(self) -> None:
        up = [node for node in self.nodes if node.up]
        if up:
            self.random.choice(up).crash()

    def _break(self) -> None:
        live = [connection for proposer in self._alive() for connection in proposer.connections.values()]
        if live:
            self.stats.broken += 1
            chosen = self.random.choice(live)
            self.trace("%s breaks", chosen)
            chosen.break_off()

    def _partition(self) -> None:
        until = self.now_us + self.random.randint(20_000, 500_000)
        alive = self._alive()
        if not alive:
            return
        proposer = self.random.choice(alive)
        for node in self.random.sample(self.nodes, self.random.randint(1, len(self.nodes) - 1)):
            ways = self.random.choice(((TO_SAFEKEEPER, TO_PROPOSER), (TO_SAFEKEEPER,), (TO_PROPOSER,)))
            self._part(proposer, node, until, ways)

    def _part(self, proposer: SimulatedProposer, node: SimulatedSafekeeper, until: int, ways: tuple[int, ...]) -> None:
        for way in ways:
            self._partitions[proposer.number, node.node_id, way] = until
        text = "both ways" if len(ways) == 2 else "to the safekeeper" if TO_SAFEKEEPER in ways else "to the proposer"
        self.trace("%s and %s are parted %s until %.1f ms", proposer, node, text, until / 1000)

    def _isolate(self) -> None:
        """A leader reaches one safekeeper only: what it writes from now on lands on a minority."""
        leaders = [proposer for proposer in self._alive() if proposer.elected]
        if leaders:
            leader, kept = self.random.choice(leaders), self.random.choice(self.nodes)
            until = self.now_us + self.random.randint(20_000, 500_000)
            for node in self.nodes:
                if node is not kept:
                    self._part(leader, node, until, (TO_SAFEKEEPER, TO_PROPOSER))
            self.trace("%s reaches %s only until %.1f ms", leader, kept, until / 1000)

    def _stall(self) -> None:
        live = [connection for proposer in self._alive() for connection in proposer.connections.values()]
        if live:
            self.stall(self.random.choice(live))

    def stall(self, connection: Connection) -> None:
        """A connection's messages are late by much while the proposer gives it up: an old and a new connection overlap."""
        connection.stalled_until_us = self.now_us + self.random.randint(20_000, 300_000)
        self.trace("%s stalls until %.1f ms", connection, connection.stalled_until_us / 1000)
        self.after(self.random.randint(0, 5_000), self._give_up, connection)

    def _give_up(self, connection: Connection) -> None:
        if connection.proposer.connections.get(connection.slot) is connection:
            connection.close_by_proposer()
            connection.proposer.closed(connection)

    def _propose(self) -> None:
        if len(self._alive()) < 3:
            self._spawn(sync=self.random.random() < 0.2)

    def _kill(self) -> None:
        alive = self._alive()
        if alive:
            self.random.choice(alive).die("killed")

    def _gossip(self) -> None:
        """The broker brings news, or old news, once or twice."""
        source, target = self.random.sample(self.nodes, 2)
        if source.up and source.present:
            self._infos.append(source.peer_info())
            news = self._infos[-1] if self.random.random() < 0.6 else self.random.choice(self._infos)
            for _ in range(self.random.choice((1, 1, 2))):
                self.after(self.delay_us(), target.gossip, news)

    def _control(self) -> None:
        self.controller.act()

    def _manage(self) -> None:
        self.random.choice(self.nodes).manage()

    def _stop(self) -> None:
        """kill -9: what the kernel was given is still there."""
        self.random.choice(self.nodes).crash(power=False)

    def _fill(self) -> None:
        """A disk is full, for a while."""
        node = self.random.choice(self.nodes)
        node.weather.full = True
        self.trace("the disk of %s is full", node)
        self.after(self.random.randint(10_000, 300_000), self._make_room, node)

    def _make_room(self, node: SimulatedSafekeeper) -> None:
        node.weather.full = False

    def _clock(self) -> None:
        """A node's clock jumps, forwards or back."""
        node = self.random.choice(self.nodes)
        node.clock_offset_s += self.random.choice((-100.0, -0.2, 0.2, 100.0))
        self.stats.clock_jumps += 1

    def _offload(self) -> None:
        """A safekeeper uploads its committed segments; a pageserver that hears of it makes its layers durable."""
        node = self.random.choice(self.nodes)
        if not node.up or not node.present:
            return
        size, commit_lsn, checker = self.writer.segment_size, node.acceptor.commit_lsn, self.checker
        if self.random.random() < 0.5:
            checker.offloaded_lsn = max(checker.offloaded_lsn, Lsn(commit_lsn - commit_lsn % size))
            node.acceptor.backup_lsn = max(node.acceptor.backup_lsn, checker.offloaded_lsn)
        else:
            checker.layers_lsn = max(checker.layers_lsn, commit_lsn)
            node.acceptor.remote_consistent_lsn = max(node.acceptor.remote_consistent_lsn, checker.layers_lsn)

    # -- the end

    def _settle(self) -> None:
        """All faults stop: what was committed is there, and work goes on."""
        self.trace("all faults stop; committed up to %d", self.checker.committed_lsn)
        self._calm = True
        self._partitions.clear()
        self.profile.connect_failure = self.profile.stalled_elected = self.profile.disk_failure = 0.0
        self.profile.delay_us = (100, 1000)
        self.profile.write_gap_us = 3000
        self.profile.crash_at_effect = dict.fromkeys(EFFECTS, 0.0)
        for proposer in self._alive():
            proposer.die("the unruly part is over")
        for node in self.nodes:
            node.calm()
            node.boot()
        if not self.profile.legacy:
            self._finish_migration()
        sync = self._until("sync-safekeepers", True, lambda p: p.synchronised is not None)
        if sync.synchronised:
            holds = sync.synchronised >= self.checker.committed_lsn
            self.checker.require(holds, "committed bytes are kept", "the end lost committed WAL")
        goal = self.checker.committed_lsn + 1
        last = self._until("a new leader commits", False, lambda p: p.core.commit_lsn >= goal)
        self.writing = False
        limit = self.now_us + SETTLE_LIMIT_US
        level = self._run_until(limit, lambda: all(n.acceptor.flush_lsn == last.end_lsn for n in last.nodes))
        self.checker.require(level, "work goes on", "the safekeepers did not catch up to %d", last.end_lsn)
        self.checker.final()

    def _finish_migration(self) -> None:
        """A change of the membership that was begun comes to its end."""
        controller, limit = self.controller, self.now_us + SETTLE_LIMIT_US
        controller.process = None
        told = False
        while not told and self.now_us < limit:
            told = controller.row.new_members is None
            helper = self._spawn(sync=False)
            controller.finish()
            self._run_until(limit, lambda helper=helper: controller.process is None or not helper.alive)  # type: ignore[misc]
            helper.die("the membership has changed")
        self.checker.require(told, "work goes on", "the change of membership did not end")
        # a member of a final set that was away when the others were told is made equal by pulling the timeline
        for node in self.addresses():
            if not node.present:
                holders = [n for n in self.addresses() if n.present]
                self.checker.require(bool(holders), "committed bytes are kept", "no member holds the timeline any more")
                donor = max(holders, key=lambda n: n.position())
                for _ in node.pull(donor, controller.row):
                    pass

    def _until(self, what: str, sync: bool, done: Callable[[SimulatedProposer], bool]) -> SimulatedProposer:
        """Run proposers, each after the former was deposed, until one is done."""
        limit = self.now_us + SETTLE_LIMIT_US
        while self.now_us < limit:
            proposer = self._spawn(sync=sync)
            self._run_until(limit, lambda proposer=proposer: done(proposer) or not proposer.alive)  # type: ignore[misc]
            if done(proposer):
                return proposer
        self.checker.fail("work goes on", "no progress after all faults stopped: %s", what)
        raise AssertionError

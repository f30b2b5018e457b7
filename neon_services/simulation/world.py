"""The deterministic world: one seed gives the clock, the network, the crashes and the schedule.

Only the production state machines decide; everything here is weather. A schedule has an unruly part and an end in which all
faults stop: then everything that was ever acknowledged must still be there, and work must go on.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from neon_services.consensus.acceptor import (
    Acceptor,
    AcceptorState,
    FlushWal,
    InitializeWal,
    PersistState,
    TruncateWal,
    WriteWal,
)
from neon_services.consensus.proposer import Proposer
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId
from neon_services.simulation.checker import Checker, InvariantViolation
from neon_services.simulation.controller import SimulatedController
from neon_services.simulation.network import Connection
from neon_services.simulation.proposer import SimulatedProposer
from neon_services.simulation.safekeeper import CRASH_WEIGHT, SimulatedSafekeeper

TTID = TenantTimelineId(TenantId(bytes(16)), TimelineId(bytes(15) + b"\x01"))
START_LSN = Lsn(4096)
SETTLE_LIMIT_US = 60_000_000
EFFECTS: tuple[type[Any], ...] = (FlushWal, WriteWal, TruncateWal, InitializeWal, PersistState)


@dataclass(frozen=True, slots=True)
class Kinds:
    """The state machines under test; the tests put broken ones here to see that they are caught."""

    proposer: type[Proposer] = Proposer
    acceptor: type[Acceptor] = Acceptor
    controller: type[SimulatedController] = SimulatedController


@dataclass(slots=True)
class Stats:
    """That a schedule did something."""

    events: int = 0
    elections: int = 0
    commits: int = 0
    committed_bytes: int = 0
    unruly_commits: int = 0
    crashes: int = 0
    deposed: int = 0
    broken: int = 0
    migrations: int = 0
    disk_failures: int = 0


@dataclass(slots=True)
class Profile:
    """The weather of one schedule."""

    nodes: int
    #: Without membership generations; the safekeepers start empty.
    legacy: bool
    #: Safekeepers that are members at first; when fewer than nodes, the membership changes.
    members: int
    duration_us: int
    delay_us: tuple[int, int]
    #: Mean time between two of the events that break things.
    gap_us: int
    write_gap_us: int
    #: Most WAL bytes in one append: small ones make catching up slow, and leave partial logs behind.
    chunk: int
    connect_failure: float
    #: How often the announcement of a leader gets stuck on its way.
    stalled_elected: float
    #: How often replacing the state fails, leaving the old or the new one.
    disk_failure: float
    crash_at_effect: dict[type[Any], float]
    #: Relative frequency of what breaks.
    weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def draw(cls, rng: random.Random) -> "Profile":
        """Choose a weather."""
        if rng.random() < 0.3:
            return cls.contested(rng)
        nodes = rng.choice((3, 3, 3, 5, 5))
        return cls._stormy(rng, nodes, reconfigure=nodes == 5 and rng.random() < 0.6)

    @classmethod
    def moving(cls, rng: random.Random) -> "Profile":
        """The membership changes."""
        return cls._stormy(rng, 5, reconfigure=True)

    @classmethod
    def _stormy(cls, rng: random.Random, nodes: int, *, reconfigure: bool) -> "Profile":
        crash = rng.choice((0.0, 0.002, 0.005, 0.01))
        return cls(
            nodes=nodes,
            legacy=not reconfigure and rng.random() < 0.2,
            members=3 if reconfigure else nodes,
            duration_us=rng.randint(800_000, 3_000_000),
            delay_us=rng.choice(((100, 2000), (500, 10_000), (1000, 60_000))),
            gap_us=rng.choice((15_000, 40_000, 100_000)),
            write_gap_us=rng.choice((5_000, 20_000, 80_000)),
            chunk=rng.choice((24, 96, 400)),
            connect_failure=rng.choice((0.0, 0.1, 0.5)),
            stalled_elected=rng.choice((0.0, 0.05, 0.3)),
            disk_failure=rng.choice((0.0, 0.0, 0.02, 0.1)),
            crash_at_effect={effect: crash * CRASH_WEIGHT.get(effect, 4.0) for effect in EFFECTS},
            weights={
                "crash": rng.choice((0.2, 1, 3)),
                "break": rng.choice((0.5, 2, 4)),
                "partition": rng.choice((0, 1, 3)),
                "propose": rng.choice((0.5, 1, 3)),
                "kill": rng.choice((0.5, 1, 2)),
                "isolate": rng.choice((0, 1, 6)),
                "stall": rng.choice((0, 1, 3)),
                "gossip": 2,
                "save": 1,
                "control": rng.choice((1, 4)) if reconfigure else 0,
            },
        )

    @classmethod
    def contested(cls, rng: random.Random) -> "Profile":
        """Short-lived leaders that each leave a different tail on a minority: where the rules about terms are needed."""
        return cls(
            nodes=3,
            legacy=False,
            members=3,
            duration_us=1_500_000,
            delay_us=(100, 2000),
            gap_us=rng.choice((15_000, 30_000)),
            write_gap_us=rng.choice((3_000, 10_000)),
            chunk=rng.choice((16, 32)),
            connect_failure=rng.choice((0.0, 0.3)),
            stalled_elected=0.0,
            disk_failure=0.0,
            crash_at_effect=dict.fromkeys(EFFECTS, 0.0),
            weights={
                "isolate": 6,
                "propose": 3,
                "kill": 3,
                "partition": 2,
                "break": 1,
                "crash": 0.3,
                "stall": 1,
                "gossip": 0.5,
            },
        )


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
        self.start_lsn = START_LSN
        self.now_us = 0
        self.stats = Stats()
        self.profile = (draw or Profile.draw)(self.random)
        self.checker = Checker(self)
        self.writing = True
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._calm = False
        self._partitions: dict[tuple[int, int], int] = {}
        self._connections: list[Connection] = []
        self._records = 0
        self.proposers: list[SimulatedProposer] = []
        self.nodes = [SimulatedSafekeeper(self, i + 1, state) for i, state in enumerate(self._initial_states())]

    def _initial_states(self) -> list[AcceptorState | None]:
        profile = self.profile
        if profile.legacy:
            return [AcceptorState() for _ in range(profile.nodes)]
        members = tuple(SafekeeperId(i + 1, f"s{i + 1}", 5454) for i in range(profile.members))
        self.controller = self.kinds.controller(self, MembershipConfiguration(2, members))
        states: list[AcceptorState | None] = []
        for _ in members:
            # some members lag by a generation and must learn the newest one from the proposer's greeting
            generation = 1 if self.random.random() < 0.2 else 2
            mconf, start = MembershipConfiguration(generation, members), self.start_lsn
            states.append(AcceptorState.create(mconf, pg_version=150000, system_id=0, wal_seg_size=1 << 24, start_lsn=start))
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
            self.log(f"{self.now_us / 1000:9.3f} ms  {text % values}")

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

    def connection(self, proposer: SimulatedProposer, slot: int, node: SimulatedSafekeeper) -> Connection:
        """A new connection."""
        made = Connection(self, len(self._connections), proposer, slot, node)
        self._connections.append(made)
        return made

    def blocked_until(self, connection: Connection) -> int:
        """When a partition lets this connection's messages through again, or its own congestion does."""
        parted = self._partitions.get((connection.proposer.number, connection.node.node_id), 0) if self._partitions else 0
        return max(parted, connection.stalled_until_us)

    def unreachable(self, proposer: SimulatedProposer, node: SimulatedSafekeeper) -> bool:
        """Whether a partition parts the two."""
        return self._partitions.get((proposer.number, node.node_id), 0) > self.now_us

    def record(self, term: int) -> bytes:
        """A new record, unlike all others."""
        self._records += 1
        units = 1 + int(self.random.random() * 5)
        return bytes((units, term & 0xFF)) + self._records.to_bytes(6, "big") + bytes((term & 0xFF,)) * (units * 8 - 8)

    # -- the schedule

    def run(self) -> Stats:
        """Run the schedule to its end."""
        self._spawn(sync=False)
        quiet_us = 200_000 + 12 * self.profile.delay_us[1]  # time enough for a first leader
        self.after(quiet_us, self._unrest)
        self._run_until(quiet_us + self.profile.duration_us)
        self.stats.unruly_commits = self.stats.commits
        self._settle()
        if not self.stats.elections or not self.stats.commits:
            raise InvariantViolation(f"seed {self.seed}: nothing was elected or committed: this schedule proves nothing")
        return self.stats

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
            self._partitions[proposer.number, node.node_id] = until
            self.trace("%s and %s are parted until %.1f ms", proposer, node, until / 1000)

    def _isolate(self) -> None:
        """A leader reaches one safekeeper only: what it writes from now on lands on a minority."""
        leaders = [proposer for proposer in self._alive() if proposer.elected]
        if leaders:
            leader, kept = self.random.choice(leaders), self.random.choice(self.nodes)
            until = self.now_us + self.random.randint(20_000, 500_000)
            for node in self.nodes:
                if node is not kept:
                    self._partitions[leader.number, node.node_id] = until
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
        source, target = self.random.sample(self.nodes, 2)
        if source.up and source.present:
            self.after(self.delay_us(), target.gossip, source.peer_info())

    def _control(self) -> None:
        self.controller.act()

    def _save(self) -> None:
        self.random.choice(self.nodes).save()

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
            node.boot()
        if not self.profile.legacy:
            self._finish_migration()
        sync = self._until("sync-safekeepers", True, lambda p: p.synchronised is not None)
        if sync.synchronised:
            self.checker.require(sync.synchronised >= self.checker.committed_lsn, "the end lost committed WAL")
        goal = self.checker.committed_lsn + 1
        last = self._until("a new leader commits", False, lambda p: p.core.commit_lsn >= goal)
        self.writing = False
        limit = self.now_us + SETTLE_LIMIT_US
        level = self._run_until(limit, lambda: all(n.acceptor.flush_lsn == last.end_lsn for n in last.nodes))
        self.checker.require(level, "the safekeepers did not catch up to %d", last.end_lsn)
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
        self.checker.require(told, "the change of membership did not end")
        # a member of a final set that was away when the others were told is made equal by pulling the timeline
        for node in self.addresses():
            if not node.present:
                donor = max((n for n in self.addresses() if n.present), key=lambda n: n.position())
                node.install(donor, controller.row)

    def _until(self, what: str, sync: bool, done: Callable[[SimulatedProposer], bool]) -> SimulatedProposer:
        """Run proposers, each after the former was deposed, until one is done."""
        limit = self.now_us + SETTLE_LIMIT_US
        while self.now_us < limit:
            proposer = self._spawn(sync=sync)
            self._run_until(limit, lambda proposer=proposer: done(proposer) or not proposer.alive)  # type: ignore[misc]
            if done(proposer):
                return proposer
        raise InvariantViolation(f"seed {self.seed}: no progress after all faults stopped: {what}")

"""The proposer process: joins the state machine, the safekeepers' connections and the local Postgres.

Invariants:

* Postgres is told a position only when the state machine has it committed: fsynced by a quorum in our own term.
* WAL is forgotten (overwritten in the ring) only below commit_lsn: a quorum has it, and a safekeeper that lags gets it from
  another safekeeper. Above, reading from Postgres stops when the ring is full, and Postgres's slot keeps the rest.
* A member that the quorum does not need is fed late by at most ``lazy_s``, and only while all are well; rather one that a
  pageserver reads from.

Speed: small appends wait for the answer to the one before and then go as one (group commit at the proposer). Every commit waits
for what ``on_wal`` and ``acknowledged`` do, so they do what it waits for first and in few steps. While processors are short,
what came while an append was under way may wait until ``gather_s`` after it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from neon_services.compute.walproposer_config import WalProposerConfig
from neon_services.compute.walproposer_lanes import ProposerLanes
from neon_services.compute.walproposer_postgres import PostgresAddress, PostgresLink
from neon_services.compute.walproposer_ring import WalRing
from neon_services.compute.walproposer_safekeeper import SafekeeperLink, append_message
from neon_services.consensus.proposer import MemberPhase, Proposer
from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.lsn import Lsn, format_lsn
from neon_services.protocols.lanes import MAX_MEMBERS, LaneEventLoop
from neon_services.protocols.pgframe import LARGEST_BUFFER
from neon_services.protocols.safekeeper_messages import (
    MAX_APPEND_BYTES,
    NO_STANDBY_FEEDBACK,
    HotStandbyFeedback,
)

log = logging.getLogger(__name__)

# of the ring; the half of it takes the one read that may come before reading stops
RING_RESERVE = 2 * (LARGEST_BUFFER + 512 * 1024)
RING_MAX = 4 * 1024 * 1024 * 1024
LAZY_BYTES = 256 * 1024
LAZY_MARGIN_S = 0.002  # differences below come from who had a processor
PAGESERVER_READS_S = 5.0  # a safekeeper that told of a pageserver within this time has one
COMMIT_BROADCAST_S = 0.003
TICK_S = 0.1
REATTACH_S = 0.2
SETTLED_S = 1.0
Emit = Callable[[dict[str, Any]], None]


def _stopped(timer: asyncio.TimerHandle | None) -> float:
    """Stop this timer; when it would have rung on the loop's clock, 0 without one."""
    if timer is None:
        return 0.0
    timer.cancel()
    return timer.when()


class WalProposer:
    """One run: from the campaign to the end of the compute."""

    def __init__(self, config: WalProposerConfig, emit: Emit) -> None:
        self.config = config
        self.core = Proposer(config.proposer())
        self.ring: WalRing | None = None
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self.links: list[SafekeeperLink] = [SafekeeperLink(self, slot) for slot in range(len(config.safekeepers))]
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.postgres: PostgresLink | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        #: The member that is fed late; -1 when all are fed at once.
        self.lazy_slot = -1
        self._lazy_timer: asyncio.TimerHandle | None = None
        self._broadcast_timer: asyncio.TimerHandle | None = None
        self._commit_moved_s = 0.0
        self._announced_elected = self._announced_ready = False
        self._full_since_s: float | None = None
        self._stopping = False
        self._postgres_done = asyncio.Event()
        self._standby_feedback = NO_STANDBY_FEEDBACK
        self._reported_commit = Lsn(0)
        self._seen_lsn = Lsn(0)  # up to where the WAL in the ring was looked at
        self.lanes = self._make_lanes()

    def _make_lanes(self) -> ProposerLanes | None:
        if not isinstance(self._loop, LaneEventLoop) or len(self.links) > MAX_MEMBERS:
            return None
        return ProposerLanes(
            self,
            self._loop,
            gather_s=self.config.gather_s,
            lazy_s=self.config.lazy_s,
            lazy_bytes=LAZY_BYTES,
            broadcast_s=COMMIT_BROADCAST_S,
            reserve_bytes=RING_RESERVE,
        )

    # -- life

    def start(self) -> None:
        """Begin the campaign."""
        for link in self.links:
            self._spawn(link.run())
        self._spawn(self._tick())

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """The process cannot go on; the first cause counts."""
        if not self.ended.done():
            self.ended.set_exception(error)

    async def close(self) -> None:
        """End all connections."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.lanes is not None:
            self.lanes.close()
            self.lanes = None

    def attach(self, address: PostgresAddress, start_lsn: Lsn) -> None:
        """Begin to take WAL from Postgres. Raises ConfigError when it does not continue the log."""
        if self.ring is None or not self.core.ready:
            raise ConfigError("attach: not ready yet; wait for the ready event")
        if self.postgres is not None:
            raise ConfigError("attach: already attached")
        if start_lsn > self.ring.end:
            raise ConfigError(
                f"attach: start_lsn {format_lsn(start_lsn)} leaves a gap behind the end of the log {format_lsn(self.ring.end)}"
            )
        self._seen_lsn = self.ring.end
        lane = None if self.lanes is None else self.lanes.postgres
        self.postgres = PostgresLink(self.ring, self.on_wal, self._positions, lane)
        self._spawn(self._stream(self.postgres, address))

    async def _stream(self, postgres: PostgresLink, address: PostgresAddress) -> None:
        complaint = ""
        while True:
            try:
                ended = await postgres.stream(address, lambda: self._emit({"event": "attached"}))
                log.info("Postgres ended its WAL stream at %s", format_lsn(postgres.ring.end))
                if ended:
                    self._postgres_done.set()
                    return
            except (OSError, TimeoutError, NeonError) as error:
                text = str(error) or type(error).__name__
                if text != complaint:
                    log.warning("Postgres at %s port %d: %s", address.host, address.port, text)
                complaint = text
            if self._stopping:
                self._postgres_done.set()
                return
            await asyncio.sleep(REATTACH_S)

    async def stop(self, timeout_s: float) -> Lsn:
        """Wait until Postgres has ended its stream and all its WAL is committed, at most so long; then commit_lsn."""
        self._stopping = True
        try:
            async with asyncio.timeout(timeout_s):
                if self.postgres is not None:
                    await self._postgres_done.wait()
                await self._until(self._settled)
                for link in self.links:
                    # the next start finds all healthy ones, the lazy too, with the same WAL and commit_lsn
                    self.pump(link.slot, now=True)
                    link.heartbeat()
                await self._until(lambda: not any(link.awaiting for link in self.links))
        except TimeoutError:
            received = format_lsn(self.ring.end if self.ring else 0)
            log.warning("stopped with WAL up to %s and commit_lsn %s", received, format_lsn(self.core.commit_lsn))
        return self.core.commit_lsn

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - rare, short, and many events could make it true
            await asyncio.sleep(0.005)

    def _settled(self) -> bool:
        """All WAL is committed; or what is left is a part of a record that will never be complete."""
        ring = self.ring
        if ring is None or self.core.commit_lsn >= ring.end:
            return True
        return self._quorum_has_all() and self._loop.time() - self._commit_moved_s > SETTLED_S

    def _quorum_has_all(self) -> bool:
        """More than half of the members have been sent everything and have answered."""
        ring = self.ring
        assert ring is not None
        complete = [link for link in self.links if link.writable and link.member.sent_lsn == ring.end and not link.awaiting]
        return len(complete) > len(self.links) // 2

    # -- SafekeeperLink's owner

    def member_changed(self, link: SafekeeperLink) -> None:
        """Follow the election, and be eager at once when a member is lost."""
        core = self.core
        for slot in core.must_reconnect():
            self.links[slot].reconnect("it has an older membership configuration: greeting it again")
        if core.elected and not self._announced_elected:
            self._announced_elected = True
            if not core.term_start_lsn:
                self.fail(
                    ConfigError("no safekeeper has any WAL of this timeline: create it with a start_lsn, or set bootstrap_lsn")
                )
                return
            self.ring = WalRing(self.config.ring_bytes, core.term_start_lsn)
            event = {"event": "elected", "term": core.term, "start_lsn": format_lsn(core.term_start_lsn)}
            self._emit(event | {"donor_term": core.donor_term})
        self._choose_lazy()
        for other in self.links:
            self.pump(other.slot)

    def acknowledged(self, link: SafekeeperLink, moved: bool) -> None:
        """Tell Postgres first, then send what was waiting for this answer."""
        if moved:
            self._commit_moved_s = self._loop.time()
            if self.postgres is not None:
                self.postgres.send_status()
                if self.postgres.paused:
                    self.check_room()
            self._arm_broadcast()
            if not self._announced_ready and self.core.ready:
                self._announced_ready = True
                truncate_lsn = format_lsn(self.core.truncate_lsn)
                self._emit({"event": "ready", "lsn": format_lsn(self.core.term_start_lsn), "truncate_lsn": truncate_lsn})
        if self.ring is not None and link.member.sent_lsn < self.ring.end:
            self.pump(link.slot)

    def pump(self, slot: int, *, now: bool = False) -> None:
        """Send this member the WAL that is due; ``now``: all there is, without waiting for answers or company."""
        ring, link = self.ring, self.links[slot]
        if ring is None:
            return
        sent_lsn = link.member.sent_lsn
        pending = ring.end - sent_lsn
        if pending <= 0:
            return
        if not now:
            if slot == self.lazy_slot:
                if pending < LAZY_BYTES:
                    self._arm_lazy()
                    return
            elif link.awaiting and pending < MAX_APPEND_BYTES:
                return
        if link.feeding or not link.writable:
            return
        if sent_lsn < ring.start:
            link.feeding = True
            self._spawn(link.feed())
            return
        if link.send_wal(ring):
            self._loop.call_soon(self.pump, slot)

    # -- Postgres

    def on_wal(self) -> None:
        """New WAL is in the ring."""
        ring = self.ring
        assert ring is not None
        begin, end, lazy_slot = self._seen_lsn, ring.end, self.lazy_slot
        self._seen_lsn = end
        is_small = 0 < end - begin <= MAX_APPEND_BYTES
        made, message = b"", b""
        for link in self.links:
            if is_small and link.slot != lazy_slot and link.due_now(begin):
                # nothing else is due to it: what is new goes as it is, and is the same message for all of these
                header = self.core.append_header(link.slot, end)
                if header != made:
                    made, message = header, append_message(header, ring.views(begin, end), end - begin)
                link.send_append(message)
            else:
                self.pump(link.slot)
        self.check_room()

    def lanes_worked(self, commit_moved_s: float | None, *, told_postgres: bool) -> None:
        """What the lanes did is in the ring, the links and the state machine."""
        ring = self.ring
        assert ring is not None
        self._seen_lsn = ring.end
        if commit_moved_s is not None:
            self._commit_moved_s = commit_moved_s
        if told_postgres and self.postgres is not None:
            self.postgres.last_status_s = time.time()

    def lend_timers(self) -> tuple[float, float, float] | None:
        """What the timers wait for is the lanes' to do: when the lazy member is due, when commit_lsn is to be told (0: neither;
        None: no timer runs), and when commit_lsn moved last. On the loop's clock.
        """
        lazy, broadcast = self._lazy_timer, self._broadcast_timer
        if lazy is None and broadcast is None:
            return None
        self._lazy_timer = self._broadcast_timer = None
        return _stopped(lazy), _stopped(broadcast), self._commit_moved_s

    def take_over_timers(self, *, gathered: bool, lazy: bool, broadcast: bool) -> None:
        """The lanes stop, and with them what they would have done a little later."""
        if gathered:
            for link in self.links:
                self.pump(link.slot)
        if lazy:
            self._arm_lazy()
        if broadcast:
            self._arm_broadcast()

    def _positions(self) -> tuple[Lsn, Lsn]:
        """commit_lsn, and up to where every pageserver shard has received WAL (commit_lsn when none has told)."""
        commit_lsn, received_lsn = self.core.commit_lsn, self.core.pageservers_received_lsn
        return commit_lsn, commit_lsn if received_lsn is None else min(commit_lsn, received_lsn)

    def check_room(self) -> None:
        """Stop reading from Postgres before the ring would come round to what is not committed; or read on."""
        ring, postgres = self.ring, self.postgres
        assert ring is not None
        if postgres is None:
            return
        uncommitted = ring.end - self.core.commit_lsn
        if uncommitted < ring.size - RING_RESERVE and not postgres.paused:
            return
        if uncommitted > ring.size - RING_RESERVE // 2:
            if not postgres.paused:
                postgres.pause()
                self._full_since_s = self._loop.time()
        elif postgres.paused and uncommitted < ring.size - RING_RESERVE:
            self._full_since_s = None
            postgres.resume()

    def _check_giant_record(self) -> None:
        """A record larger than the ring is never acknowledged before its end: make the ring larger."""
        ring = self.ring
        if ring is None or self._full_since_s is None or self._loop.time() - self._full_since_s < TICK_S:
            return
        if self._quorum_has_all() and ring.size < RING_MAX:
            log.info("a WAL record exceeds %d MiB: doubling the buffer", ring.size >> 20)
            ring.grow()
            self.check_room()

    # -- timers

    def _arm_lazy(self) -> None:
        if self._lazy_timer is None:
            self._lazy_timer = self._loop.call_later(self.config.lazy_s, self._feed_lazy)

    def _feed_lazy(self) -> None:
        self._lazy_timer = None
        if self.lazy_slot >= 0:
            self.pump(self.lazy_slot, now=True)

    def _choose_lazy(self) -> None:
        """The slowest of the healthy: with one set of voters, all active, and more of them than the quorum needs.

        Of those that are about as fast, the one with a pageserver: it has more to do, and its answers should not be waited for.
        """
        before = self.lazy_slot
        healthy = all(link.member.phase is MemberPhase.ACTIVE and not link.feeding for link in self.links)
        if not self.config.lazy_s or not healthy or len(self.links) < 3 or self.core.mconf.new_members is not None:
            self.lazy_slot = -1
        else:
            now_s = self._loop.time()
            lag_s = [link.lag_s(now_s) for link in self.links]
            slowest = max(range(len(lag_s)), key=lambda slot: (lag_s[slot], slot))
            read = [now_s - link.pageserver_at_s < PAGESERVER_READS_S for link in self.links]

            def is_slower(slot: int, other: int) -> bool:
                return lag_s[slot] > 2 * lag_s[other] + LAZY_MARGIN_S

            if before < 0 or is_slower(slowest, before):
                self.lazy_slot = slowest
            elif any(read) and not read[before] and not is_slower(before, read.index(True)):
                self.lazy_slot = read.index(True)
        if before >= 0 and self.lazy_slot != before:
            self.pump(before, now=True)

    def _arm_broadcast(self) -> None:
        if self._broadcast_timer is None:
            self._broadcast_timer = self._loop.call_later(COMMIT_BROADCAST_S, self._broadcast_later)

    def _broadcast_later(self) -> None:
        self._broadcast_timer = None
        if self._loop.time() - self._commit_moved_s < COMMIT_BROADCAST_S:
            self._arm_broadcast()  # not the exact rest: the loop's clock counts milliseconds, and less would make it spin
        else:
            self.broadcast_commit()

    def broadcast_commit(self) -> None:
        """Safekeepers, and through them pageservers, learn commit_lsn soon when no append carries it."""
        for link in self.links:
            if link.member.phase is MemberPhase.ACTIVE and link.member.told_commit_lsn < self.core.commit_lsn:
                link.heartbeat()

    async def _tick(self) -> None:
        """Heartbeats, silence, choice of the lazy member, reports."""
        last_second_s = self._loop.time()
        while True:
            await asyncio.sleep(min(TICK_S, self.config.reconnect_timeout_s))
            now_s = self._loop.time()
            for link in self.links:
                link.check_silence(now_s)
                if now_s - link.last_sent_s >= self.config.reconnect_timeout_s:
                    link.heartbeat()
            self._choose_lazy()
            self._check_giant_record()
            if now_s - last_second_s >= 1:
                last_second_s = now_s
                self._every_second()

    def _every_second(self) -> None:
        core = self.core
        if self.postgres is not None:
            self.postgres.send_status()
            feedback = self._aggregate_standby_feedback()
            if feedback[1:] != self._standby_feedback[1:]:
                self._standby_feedback = feedback
                self.postgres.send_standby_feedback(feedback)
        if core.commit_lsn != self._reported_commit:
            self._reported_commit = core.commit_lsn
            self._emit({"event": "commit", "lsn": format_lsn(core.commit_lsn)})

    def _aggregate_standby_feedback(self) -> HotStandbyFeedback:
        """The oldest transactions that any read replica needs."""
        told = [link.member.hs_feedback for link in self.links if link.member.phase is MemberPhase.ACTIVE]
        return HotStandbyFeedback(
            max((f.ts_us for f in told), default=0),
            min((f.xmin for f in told if f.xmin), default=0),
            min((f.catalog_xmin for f in told if f.catalog_xmin), default=0),
        )

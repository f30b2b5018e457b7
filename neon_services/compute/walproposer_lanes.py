"""The proposer's lanes: WAL from Postgres to the safekeepers and acknowledgements back, in C while the event loop waits.

Invariant: before each wait the lanes are lent what the state machine, the ring and the links say, and nothing that was lent
before; after it, the state machine is given the last acknowledgement of every member, and must come to the commit_lsn that
Postgres was told. What needs more than sending and counting (a phase, a donor, bytes that wait for room, pausing) is Python's.
"""

import ctypes
import os
from typing import TYPE_CHECKING

from neon_services.consensus.proposer import MemberPhase
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn, format_lsn
from neon_services.ground.pgtime import to_postgres_us
from neon_services.protocols.lanes import (
    STANDBY_BYTES,
    CProposerLane,
    CProposerMember,
    Lane,
    LaneEventLoop,
    function_address,
    library,
)
from neon_services.protocols.pgframe import FrameConnection
from neon_services.protocols.safekeeper_messages import FRAMED_APPEND_RESPONSE, AppendResponse, HotStandbyFeedback

if TYPE_CHECKING:
    from neon_services.compute.walproposer import WalProposer

_NOBODY = (1 << 64) - 1
_CLOSED, _DIRECT, _PYTHON = range(3)


def _open_statistics() -> int:
    """Where the lanes see whether processors are short; -1 where that is not to be known."""
    try:
        return os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


class _MemberLane(Lane):
    def __init__(self, lanes: "ProposerLanes", slot: int) -> None:
        super().__init__(CProposerMember())
        self._lanes = lanes
        self.c.slot = slot
        self.standby: HotStandbyFeedback | None = None

    def settle(self) -> bool:
        self._lanes.settle()
        return bool(self.base.leaves)

    def attend(self) -> None:
        self.hand_over()


class _PostgresLane(Lane):
    def __init__(self, lanes: "ProposerLanes") -> None:
        super().__init__(CProposerLane())
        self._lanes = lanes

    def settle(self) -> bool:
        self._lanes.settle()
        wanted, self.base.wants = self.base.wants, 0
        return bool(wanted or self.base.leaves)

    def attend(self) -> None:
        if self.base.leaves:
            self.hand_over()
        self._lanes.attend()


class ProposerLanes:
    """The lanes of one proposer: one for Postgres's connection and one for each safekeeper's."""

    def __init__(
        self,
        owner: "WalProposer",
        loop: LaneEventLoop,
        *,
        gather_s: float,
        lazy_s: float,
        lazy_bytes: int,
        broadcast_s: float,
        reserve_bytes: int,
    ) -> None:
        compiled = library()
        self._owner = owner
        self._reserve_bytes = reserve_bytes
        self.postgres = _PostgresLane(self)
        self.members = [_MemberLane(self, slot) for slot in range(len(owner.links))]
        self._lent = False
        self._commit_lsn = Lsn(0)  # as it was lent
        c = self.c = self.postgres.c
        self.postgres.base.readable = function_address(compiled.proposer_lane_postgres_readable)
        self.postgres.base.due = function_address(compiled.proposer_lane_due)
        c.members = len(self.members)
        c.lazy_ns, c.lazy_bytes, c.broadcast_ns = int(lazy_s * 1e9), lazy_bytes, int(broadcast_s * 1e9)
        c.gather_ns = int(gather_s * 1e9)
        self._statistics = c.processors.statistics = _open_statistics()
        c.postgres_epoch_us = -to_postgres_us(0)
        for slot, lane in enumerate(self.members):
            lane.base.readable = function_address(compiled.proposer_lane_member_readable)
            lane.c.proposer = self.postgres.address
            c.member[slot] = lane.address
        self._arm = compiled.proposer_lane_arm
        self._selector = loop.lanes
        self._selector.before_wait.append(self.lend)

    def close(self) -> None:
        """Nothing is lent any more."""
        self._lent = False
        self._selector.before_wait.remove(self.lend)
        self.c.processors.statistics = -1
        if self._statistics >= 0:
            os.close(self._statistics)
            self._statistics = -1
        for lane in (self.postgres, *self.members):
            lane.detach()

    # -- lending

    def shut(self) -> None:
        """Everything is Python's until the next wait."""
        self.postgres.shut()
        for lane in self.members:
            lane.shut()

    def lend(self) -> None:
        """Lend what Python knows, if WAL is streaming."""
        self._lent = False
        self.shut()
        owner, core, c = self._owner, self._owner.core, self.c
        ring, postgres = owner.ring, self.postgres
        # without Postgres's lane nobody would hear what the others leave to Python
        sizes = core.voters()
        streams = postgres.connection is not None and not postgres.connection.closed
        if ring is None or not core.ready or not all(sizes) or not streams or owner.ended.done():
            self._give_up_timers()
            return
        self._lent = True
        c.ring, c.ring_size, c.ring_start, c.ring_end = ring.address, ring.size, ring.start, ring.end
        c.room_bytes = max(0, ring.size - self._reserve_bytes)
        c.generation, c.term, c.term_start_lsn = core.mconf.generation, core.term, core.term_start_lsn
        self._commit_lsn = core.commit_lsn
        c.commit_lsn, c.truncate_lsn = core.commit_lsn, core.truncate_lsn
        received_lsn = core.pageservers_received_lsn
        c.applied_lsn = _NOBODY if received_lsn is None else received_lsn
        c.lazy = c.members if owner.lazy_slot < 0 else owner.lazy_slot
        c.voters[0], c.voters[1] = sizes[0], sizes[1] if len(sizes) > 1 else 0
        c.paused = owner.postgres is not None and owner.postgres.paused
        for lane in self.members:
            self._lend_member(lane)
        if (timers := owner.lend_timers()) is not None:
            lazy_ns, broadcast_ns, moved_ns = (int(at_s * 1e9) for at_s in timers)
            c.commit_moved_ns = max(c.commit_moved_ns, moved_ns)
            self._arm(postgres.address, lazy_ns, broadcast_ns)
        connection = postgres.connection
        postgres.base.open = connection is not None and connection.idle and not c.paused

    def _give_up_timers(self) -> None:
        c = self.c
        gathered, lazy, broadcast = c.gather_due_ns != 0, c.lazy_due_ns != 0, c.broadcast_due_ns != 0
        if gathered or lazy or broadcast:
            c.gather_due_ns = c.lazy_due_ns = c.broadcast_due_ns = self.postgres.base.due_ns = 0
            self._owner.take_over_timers(gathered=gathered, lazy=lazy, broadcast=broadcast)

    def _lend_member(self, lane: _MemberLane) -> None:
        c, core = lane.c, self._owner.core
        link = self._owner.links[c.slot]
        member = link.member
        c.sent_lsn, c.flush_lsn, c.told_commit_lsn = member.sent_lsn, member.flush_lsn, member.told_commit_lsn
        c.voter, c.awaiting, c.answer_s = core.voter_bits(c.slot), link.awaiting, link.answer_s
        c.sent_at_ns = int(link.sent_at_s * 1e9)
        c.active = member.phase is MemberPhase.ACTIVE
        connection: FrameConnection | None = lane.connection
        if link.feeding or not link.writable:
            c.mode = _CLOSED
        else:
            c.mode = _DIRECT if connection is not None and not connection.closed else _PYTHON
        if member.hs_feedback is not lane.standby:
            lane.standby = member.hs_feedback
            answer = FRAMED_APPEND_RESPONSE.pack(b"d", 0, b"a", 0, 0, 0, 0, *member.hs_feedback)
            ctypes.memmove(c.standby, answer[-STANDBY_BYTES:], STANDBY_BYTES)
        lane.base.open = bool(c.active) and connection is not None and connection.idle

    # -- settling

    def settle(self) -> None:
        """Take over what all lanes did since they were lent."""
        if not self._lent:
            return
        self._lent = False
        owner, core, c = self._owner, self._owner.core, self.c
        assert owner.ring is not None
        owner.ring.extended_to(Lsn(c.ring_end))
        for lane in self.members:
            self._settle_member(lane)
        self.postgres.count_traffic()
        if c.unsent and self.postgres.connection is not None:
            self.postgres.connection.write(bytes(c.status)[-c.unsent :])
        c.unsent = 0
        owner.lanes_worked(
            commit_moved_s=c.commit_moved_ns / 1e9 if c.commit_lsn > self._commit_lsn else None, told_postgres=c.statuses > 0
        )
        c.statuses = 0
        if core.commit_lsn != c.commit_lsn:
            told, known = format_lsn(c.commit_lsn), format_lsn(core.commit_lsn)
            owner.fail(NeonError(f"Postgres was told that {told} is committed, and the acknowledgements say {known}: stopping"))

    def _settle_member(self, lane: _MemberLane) -> None:
        c, owner = lane.c, self._owner
        link = owner.links[c.slot]
        member = link.member
        if c.sent_lsn != member.sent_lsn or c.told_commit_lsn != member.told_commit_lsn:
            member.sent_lsn, member.told_commit_lsn = Lsn(c.sent_lsn), Lsn(c.told_commit_lsn)
            link.last_sent_s, link.sent_at_s = c.last_sent_ns / 1e9, c.sent_at_ns / 1e9
        if c.heard:
            c.heard = 0
            core = owner.core
            # what it acknowledged on an earlier connection may be more than it has been sent on this one
            flush_lsn = Lsn(min(c.flush_lsn, c.sent_lsn))
            response = AppendResponse(
                core.mconf.generation, core.term, flush_lsn, Lsn(c.persisted_commit_lsn), member.hs_feedback
            )
            core.append_response(c.slot, response)
            link.heard()
        link.awaiting, link.answer_s = bool(c.awaiting), c.answer_s
        if c.unsent:
            unsent, c.unsent = c.unsent, 0
            if lane.connection is not None:
                lane.connection.write(bytes(memoryview(c.message)[c.message_bytes - unsent : c.message_bytes]))
        lane.count_traffic()

    def attend(self) -> None:
        """Do what the lanes left to Python."""
        c, owner = self.c, self._owner
        pump, c.pump = c.pump, 0
        status_due, c.status_due = c.status_due, 0
        broadcast_due, c.broadcast_due = c.broadcast_due, 0
        if status_due and owner.postgres is not None:
            owner.postgres.send_status()
        if broadcast_due:
            owner.broadcast_commit()
        for slot in range(len(self.members)):
            if pump >> slot & 1:
                owner.pump(slot, now=slot == owner.lazy_slot)
        owner.check_room()

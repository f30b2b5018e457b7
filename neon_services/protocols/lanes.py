"""Lanes: what every commit waits for, done in C while the event loop waits (postgres_ext/lane).

Invariant: Python and lanes never run at the same time. While the event loop waits, an open lane works on a copy of the state
that was lent to it; before any other Python code runs, the selector has called ``settle`` of every lane that did something.
Whoever changes that state by other ways recalls the lane first (``shut``).

Costs: a wait that a lane ends takes no step of Python, where a callback of the event loop takes 20 to 50 us in a process that
sleeps between commits.
"""

import asyncio
import ctypes
import errno
import functools
import logging
import mmap
import os
import selectors
from typing import Any

import uvloop

from neon_services.ground.errors import ConfigError
from neon_services.protocols.pgframe import FrameConnection
from neon_services.wal.libraries import load_any_waldec

log = logging.getLogger(__name__)

_MOST_EVENTS = 256
_EPOLLIN, _EPOLLOUT = 1, 4
BUFFER_BYTES = 2 * 1024 * 1024
MAX_MEMBERS = 16
#: Offsets and sizes of what the C side calls by the same names.
APPEND_ANSWER_BYTES = 58
APPEND_WRITES = 1024
STANDBY_BYTES = 24
_MESSAGE_BYTES = 50 + 128 * 1024 + 2
_STATUS_BYTES = 39


class CLane(ctypes.Structure):
    """``Lane`` of lane.h."""

    _fields_ = [
        ("readable", ctypes.c_void_p),
        ("due", ctypes.c_void_p),
        ("loop", ctypes.c_void_p),
        ("buffer", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("filled", ctypes.c_uint64),
        ("due_ns", ctypes.c_int64),
        ("received", ctypes.c_uint64),
        ("sent", ctypes.c_uint64),
        ("fd", ctypes.c_int32),
        ("open", ctypes.c_uint32),
        ("touched", ctypes.c_uint32),
        ("wants", ctypes.c_uint32),
        ("leaves", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


class CAppendLane(ctypes.Structure):
    """``AppendLane`` of append_lane.h."""

    _fields_ = [
        ("lane", CLane),
        ("writer", ctypes.c_void_p),
        ("scanner", ctypes.c_void_p),
        ("term", ctypes.c_uint64),
        ("segment_lsn", ctypes.c_uint64),
        ("plain_end", ctypes.c_uint64),
        ("write_lsn", ctypes.c_uint64),
        ("flush_lsn", ctypes.c_uint64),
        ("timeline_start_lsn", ctypes.c_uint64),
        ("commit_lsn", ctypes.c_uint64),
        ("truncate_lsn", ctypes.c_uint64),
        ("tell_ns", ctypes.c_int64),
        ("told_ns", ctypes.c_int64),
        ("early_bytes", ctypes.c_uint64),
        ("appends", ctypes.c_uint64),
        ("generation", ctypes.c_uint32),
        ("file", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("unsent", ctypes.c_uint32),
        ("writes", ctypes.c_uint32),
        ("sizes", ctypes.c_uint64 * APPEND_WRITES),
        ("took_ns", ctypes.c_int64 * APPEND_WRITES),
        ("answer", ctypes.c_uint8 * APPEND_ANSWER_BYTES),
    ]


class CProposerMember(ctypes.Structure):
    """``ProposerMember`` of proposer_lane.h."""

    _fields_ = [
        ("lane", CLane),
        ("proposer", ctypes.c_void_p),
        ("sent_lsn", ctypes.c_uint64),
        ("flush_lsn", ctypes.c_uint64),
        ("told_commit_lsn", ctypes.c_uint64),
        ("persisted_commit_lsn", ctypes.c_uint64),
        ("last_sent_ns", ctypes.c_int64),
        ("sent_at_ns", ctypes.c_int64),
        ("answer_s", ctypes.c_double),
        ("slot", ctypes.c_uint32),
        ("voter", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("active", ctypes.c_uint32),
        ("awaiting", ctypes.c_uint32),
        ("heard", ctypes.c_uint32),
        ("unsent", ctypes.c_uint32),
        ("message_bytes", ctypes.c_uint32),
        ("standby", ctypes.c_uint8 * STANDBY_BYTES),
        ("message", ctypes.c_uint8 * _MESSAGE_BYTES),
    ]


class CProcessors(ctypes.Structure):
    """``Processors`` of processors.h."""

    _fields_ = [
        ("looked_ns", ctypes.c_int64),
        ("all_ticks", ctypes.c_uint64),
        ("idle_ticks", ctypes.c_uint64),
        ("statistics", ctypes.c_int32),
        ("are_short", ctypes.c_uint32),
    ]


class CProposerLane(ctypes.Structure):
    """``ProposerLane`` of proposer_lane.h."""

    _fields_ = [
        ("lane", CLane),
        ("ring", ctypes.c_void_p),
        ("ring_size", ctypes.c_uint64),
        ("ring_start", ctypes.c_uint64),
        ("ring_end", ctypes.c_uint64),
        ("room_bytes", ctypes.c_uint64),
        ("term", ctypes.c_uint64),
        ("term_start_lsn", ctypes.c_uint64),
        ("commit_lsn", ctypes.c_uint64),
        ("truncate_lsn", ctypes.c_uint64),
        ("statuses", ctypes.c_uint64),
        ("applied_lsn", ctypes.c_uint64),
        ("postgres_epoch_us", ctypes.c_int64),
        ("lazy_ns", ctypes.c_int64),
        ("lazy_bytes", ctypes.c_uint64),
        ("lazy_due_ns", ctypes.c_int64),
        ("broadcast_ns", ctypes.c_int64),
        ("broadcast_due_ns", ctypes.c_int64),
        ("commit_moved_ns", ctypes.c_int64),
        ("gather_ns", ctypes.c_int64),
        ("gather_due_ns", ctypes.c_int64),
        ("processors", CProcessors),
        ("generation", ctypes.c_uint32),
        ("members", ctypes.c_uint32),
        ("lazy", ctypes.c_uint32),
        ("voters", ctypes.c_uint32 * 2),
        ("pump", ctypes.c_uint32),
        ("status_due", ctypes.c_uint32),
        ("broadcast_due", ctypes.c_uint32),
        ("paused", ctypes.c_uint32),
        ("unsent", ctypes.c_uint32),
        ("status", ctypes.c_uint8 * _STATUS_BYTES),
        ("pad", ctypes.c_uint8),
        ("member", ctypes.c_void_p * MAX_MEMBERS),
    ]


class _Event(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int32), ("events", ctypes.c_uint32)]


#: Writes all pieces durably at the offset: (fd, pieces, count, offset, flags) -> 0 or an errno.
WRITER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int)


def library() -> ctypes.CDLL:
    """The compiled lanes. Raises ConfigError when there are none, or when they are of another version of these services."""
    return _bind(load_any_waldec())


@functools.cache
def _bind(lib: ctypes.CDLL) -> ctypes.CDLL:
    if not hasattr(lib, "lane_layout"):
        raise ConfigError(f"{lib._name} has no lanes: it is older than these services; build or install it again")
    lib.lane_layout.restype = ctypes.POINTER(ctypes.c_uint32 * 4)
    mirrored = [ctypes.sizeof(kind) for kind in (CLane, CAppendLane, CProposerMember, CProposerLane)]
    if list(lib.lane_layout().contents) != mirrored:
        raise ConfigError(f"{lib._name} is of another version than these services: build or install it again")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    lib.lane_loop_new.restype, lib.lane_loop_new.argtypes = pointer, [number]
    lib.lane_loop_free.restype, lib.lane_loop_free.argtypes = None, [pointer]
    lib.lane_loop_watch.argtypes = [pointer, number, ctypes.c_uint32]
    lib.lane_loop_attach.argtypes = [pointer, pointer]
    lib.lane_loop_detach.restype, lib.lane_loop_detach.argtypes = None, [pointer, pointer]
    lib.lane_loop_wait.argtypes = [pointer, ctypes.c_int64, pointer, number]
    lib.lane_loop_touched.argtypes = [pointer, pointer, number]
    for name in ("append_lane_take", "proposer_lane_take_wal", "proposer_lane_take_answers"):
        function = getattr(lib, name)
        function.restype, function.argtypes = ctypes.c_size_t, [pointer, pointer, ctypes.c_size_t]
    lib.processors_are_short.restype, lib.processors_are_short.argtypes = ctypes.c_bool, [pointer, ctypes.c_int64]
    lib.proposer_lane_arm.restype, lib.proposer_lane_arm.argtypes = None, [pointer, ctypes.c_int64, ctypes.c_int64]
    lib.proposer_lane_quorum_lsn.restype, lib.proposer_lane_quorum_lsn.argtypes = ctypes.c_uint64, [pointer]
    return lib


def function_address(function: Any) -> int:
    """The address of a C function, for a structure."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


class Lane:
    """The Python side of one lane. ``c`` is its C structure, and ``base`` the CLane at the beginning of it."""

    def __init__(self, c: Any) -> None:
        self.c = c
        self.base: CLane = c.lane
        self.base.fd = -1
        self.address = ctypes.addressof(c)
        self.connection: FrameConnection | None = None
        self._selector: LaneSelector | None = None
        self._buffer: Any = None
        self._view: memoryview | None = None

    def attach(self, connection: FrameConnection) -> bool:
        """Serve this connection; False where that cannot be: in TLS, or on an event loop without lanes."""
        loop = asyncio.get_running_loop()
        transport = connection.transport
        if not isinstance(loop, LaneEventLoop) or transport is None or transport.get_extra_info("sslcontext") is not None:
            return False
        sock = transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            return False
        if self._buffer is None:
            self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # memory is taken when it is used
            self._view = memoryview(self._buffer)
            self.base.buffer = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
            self.base.size = BUFFER_BYTES
        self.base.fd, self.base.filled = sock.fileno(), 0
        self.base.open = self.base.leaves = self.base.wants = 0
        self.base.due_ns = 0
        self.connection = connection
        self._selector = loop.lanes
        loop.lanes.attach(self)
        return True

    def detach(self) -> None:
        """The connection is gone, or is not this lane's any more."""
        self.base.open = 0
        if self._selector is not None:
            self._selector.detach(self)
            self._selector = None
        self.count_traffic()
        self.connection = None
        self.base.filled, self.base.size, self.base.buffer = 0, 0, None
        self._buffer = self._view = None

    @property
    def attached(self) -> bool:
        """Whether the event loop runs this lane."""
        return self._selector is not None

    def shut(self) -> None:
        """What was lent is about to change."""
        self.base.open = 0

    def settle(self) -> bool:
        """Take over what the lane did; whether attend() is to be called."""
        raise NotImplementedError

    def attend(self) -> None:
        """Do what the lane left to do. Runs as a callback of the event loop, before what is read next."""
        raise NotImplementedError

    def count_traffic(self) -> None:
        """Add what the lane received and sent to its connection's figures."""
        base, connection = self.base, self.connection
        if connection is not None:
            connection.received_bytes += base.received
            connection.sent_bytes += base.sent
        base.received = base.sent = 0

    def hand_over(self) -> None:
        """Give the connection what the lane has received and left."""
        base, connection = self.base, self.connection
        base.leaves = 0
        if base.filled and connection is not None:
            assert self._view is not None
            base.open = 0
            filled, base.filled = base.filled, 0
            connection.feed(self._view[:filled])


class LaneSelector(selectors.EpollSelector):
    """The selector of an event loop whose wait runs lanes."""

    def __init__(self) -> None:
        self._library = library()
        super().__init__()
        self._c_loop = self._library.lane_loop_new(self.fileno())
        if not self._c_loop:
            raise MemoryError("no memory for an event loop")
        self._wait, self._touched = self._library.lane_loop_wait, self._library.lane_loop_touched
        self._found = (_Event * _MOST_EVENTS)()
        self._list = (ctypes.c_void_p * 16)()  # room for all lanes
        self._lanes: dict[int, Lane] = {}
        #: Called before each wait: who lends its state each time lends it here.
        self.before_wait: list[Any] = []
        self.loop: asyncio.AbstractEventLoop | None = None

    def _watch(self, key: selectors.SelectorKey, events: int) -> None:
        mask = (_EPOLLIN if events & selectors.EVENT_READ else 0) | (_EPOLLOUT if events & selectors.EVENT_WRITE else 0)
        if self._library.lane_loop_watch(self._c_loop, key.fd, mask):
            raise MemoryError("no memory for an event loop")

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = super().register(fileobj, events, data)
        self._watch(key, events)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = super().unregister(fileobj)
        self._watch(key, 0)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = super().modify(fileobj, events, data)
        self._watch(key, events)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for what Python has to see to, running lanes meanwhile."""
        for lend in self.before_wait:
            lend()
        wait_ns = -1 if timeout is None else max(0, int(timeout * 1e9))
        count = self._wait(self._c_loop, wait_ns, ctypes.byref(self._found), _MOST_EVENTS)
        if count < 0:
            raise OSError(errno.EIO, "epoll_wait failed")
        self._settle()
        ready: list[tuple[selectors.SelectorKey, int]] = []
        keys = self.get_map()
        for event in self._found[:count]:
            key = keys.get(event.fd)
            if key is not None:
                events = event.events
                mask = (events & ~_EPOLLIN and selectors.EVENT_WRITE) | (events & ~_EPOLLOUT and selectors.EVENT_READ)
                ready.append((key, mask & key.events))
        return ready

    def _settle(self) -> None:
        count = self._touched(self._c_loop, ctypes.byref(self._list), len(self._list))
        for address in self._list[:count]:
            lane, loop = self._lanes[address or 0], self.loop
            assert loop is not None
            try:
                if lane.settle():
                    loop.call_soon(lane.attend)
            except Exception as error:
                self._fail(lane, error)

    def _fail(self, lane: Lane, error: Exception) -> None:
        """What the lane did is not known for sure: its connection cannot go on."""
        assert self.loop is not None
        lane.shut()
        if lane.connection is not None:
            lane.connection.abort()
        self.loop.call_exception_handler({"message": "what a lane did could not be taken over", "exception": error})

    def attach(self, lane: Lane) -> None:
        """See Lane.attach()."""
        if self._library.lane_loop_attach(self._c_loop, lane.address):
            raise OSError(errno.EEXIST, f"descriptor {lane.base.fd} has a lane: {os.strerror(errno.EEXIST)}")
        self._lanes[lane.address] = lane
        if len(self._lanes) > len(self._list):
            self._list = (ctypes.c_void_p * (len(self._list) * 2))()

    def detach(self, lane: Lane) -> None:
        """See Lane.detach()."""
        if self._lanes.pop(lane.address, None) is not None:
            self._library.lane_loop_detach(self._c_loop, lane.address)

    def close(self) -> None:
        for lane in list(self._lanes.values()):
            self.detach(lane)
        super().close()
        handle, self._c_loop = self._c_loop, None
        if handle:
            self._library.lane_loop_free(handle)


class LaneEventLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop with lanes. Raises ConfigError when the compiled library is missing."""

    def __init__(self) -> None:
        self.lanes = LaneSelector()
        super().__init__(self.lanes)
        self.lanes.loop = self


def make_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop with lanes; uvloop, on which everything goes the long way, when there is no compiled library."""
    try:
        library()
    except ConfigError as error:
        log.warning("no lanes: every commit takes the long way: %s", error)
        return uvloop.new_event_loop()
    return LaneEventLoop()

"""Where a running service spends its processor time, and what its memory holds.

The CPU profiler is a thread that looks at the stacks of all others, so many times a second. What it counts is not how often
a thread was seen but how much processor time it has used since the last look, by its own clock: a thread that waits counts
nothing. The cost is some ten microseconds of the interpreter per look and thread, and none while nobody profiles.
"""

import sys
import threading
import time
import tracemalloc
from collections import defaultdict
from types import CodeType, FrameType

from neon_services.ground.errors import NeonError
from neon_services.ground.pprof import Frame, ProfileBuilder

MAX_DEPTH = 200


class HeapProfilingOff(NeonError):
    """Nobody writes down where memory comes from."""


def _cpu_clock(native_id: int) -> int:
    """The number of the clock that Linux keeps for a thread: unlike pthread_getcpuclockid it is safe for one that has ended."""
    return (~native_id << 3) | 6


def _cpu_ns(native_id: int) -> int | None:
    try:
        return time.clock_gettime_ns(_cpu_clock(native_id))
    except OSError:
        return None  # it has ended


# where the interpreter was: the code objects stay alive with the sample, so equal keys are equal places
_Stack = tuple[tuple[CodeType, int], ...]


def _stack_of(frame: FrameType | None) -> _Stack:
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < MAX_DEPTH:
        found.append((frame.f_code, frame.f_lineno or frame.f_code.co_firstlineno))
        frame = frame.f_back
    return tuple(found)


def _frames(stack: _Stack) -> list[Frame]:
    return [(code.co_qualname, code.co_filename, code.co_firstlineno, line) for code, line in stack]


class CpuProfiler:
    """One profile. ``run`` blocks its thread until the time is over or ``stop`` is called; then ``result`` is the file."""

    def __init__(self, seconds: float, frequency_hz: int) -> None:
        self._seconds = seconds
        self._interval_s = 1 / frequency_hz
        self._stopped = threading.Event()
        self._used: defaultdict[tuple[_Stack, str], list[int]] = defaultdict(lambda: [0, 0])

    def stop(self) -> None:
        """End early; what was seen until now is the result."""
        self._stopped.set()

    def run(self) -> bytes:
        """The gzipped profile."""
        me = threading.get_ident()
        started = time.monotonic()
        last: dict[int, int] = {}
        self._look(me, last)  # what was used before the profile began does not count
        self._used.clear()
        looks = 0
        while not self._stopped.is_set():
            looks += 1
            due = started + min(looks * self._interval_s, self._seconds)
            if self._stopped.wait(max(0.0, due - time.monotonic())):
                break
            self._look(me, last)
            behind = int((time.monotonic() - started) / self._interval_s)
            looks = max(looks, behind)  # a look that came late is not made up for
            if time.monotonic() >= started + self._seconds:
                break
        return self._write(round((time.monotonic() - started) * 1e9))

    def _look(self, me: int, last: dict[int, int]) -> None:
        stacks = sys._current_frames()
        for thread in threading.enumerate():
            native_id, frame = thread.native_id, stacks.get(thread.ident or 0)
            if native_id is None or frame is None or thread.ident == me:
                continue
            now = _cpu_ns(native_id)
            if now is None:
                continue
            used = now - last.get(native_id, 0)
            last[native_id] = now
            if used > 0:
                entry = self._used[_stack_of(frame), thread.name]
                entry[0] += 1
                entry[1] += used

    def _write(self, duration_ns: int) -> bytes:
        period = ("cpu", "nanoseconds", round(self._interval_s * 1e9))
        builder = ProfileBuilder((("samples", "count"), ("cpu", "nanoseconds")), period=period, program=sys.argv[0])
        for (stack, thread), values in self._used.items():
            builder.add(_frames(stack), values, thread)
        return builder.finish(duration_ns)


def heap_profile() -> bytes:
    """What Python's allocator has handed out and not got back, by where it was asked for. Raises HeapProfilingOff.

    Taking the snapshot holds the interpreter, some tenths of a second per million blocks. C libraries' memory is not in it.
    """
    if not tracemalloc.is_tracing():
        raise HeapProfilingOff(
            "heap profiling not enabled: start the process with the environment variable PYTHONTRACEMALLOC set to the number "
            "of frames to keep, for example 25; Python then needs about twice the time and memory for small objects"
        )
    started = time.monotonic()
    snapshot = tracemalloc.take_snapshot()
    kinds = (("inuse_objects", "count"), ("inuse_space", "bytes"))
    builder = ProfileBuilder(kinds, period=("space", "bytes", 1), program=sys.argv[0])
    for statistic in snapshot.statistics("traceback"):
        # tracemalloc knows files and lines, no functions; its newest frame comes last
        stack = [
            (f"{frame.filename}:{frame.lineno}", frame.filename, frame.lineno, frame.lineno) for frame in statistic.traceback
        ]
        builder.add(reversed(stack), (statistic.count, statistic.size))
    return builder.finish(round((time.monotonic() - started) * 1e9))

"""Where a running service spends its processor time, and what its memory holds.

The CPU profiler looks at all stacks whenever the process has used some more milliseconds of processor time: SIGPROF comes, and
Python runs its handler on the main thread at the next instruction. So the event loop, where the work is done, is seen where it
works; a thread that looked at it from outside would see it only where it lets go of the interpreter: in system calls. What is
counted is not how often a thread was seen but the processor time it has used since the last look, by its own clock: a thread
that waits counts nothing. Time inside C code that calls no Python (uvloop's own) goes to the Python code that it calls next.
The cost is some ten microseconds per look and thread, and none while nobody profiles.
"""

import asyncio
import contextlib
import logging
import signal
import sys
import threading
import time
import tracemalloc
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType

from neon_services.ground.errors import NeonError
from neon_services.ground.pprof import Frame, ProfileBuilder

log = logging.getLogger(__name__)

MAX_DEPTH = 200
_LOOK_UP_S = 0.01


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
    """One profile; only one at a time runs in a process, on the main thread's event loop."""

    _running: "CpuProfiler | None" = None

    def __init__(self, seconds: float, frequency_hz: int) -> None:
        self._seconds = seconds
        self._interval_s = 1 / frequency_hz
        self._stopped = asyncio.Event()
        self._looking = False
        self._failure: Exception | None = None  # it could not look at a stack; what was seen before is the result
        self._last: dict[int, int] = {}  # processor time that a thread had used at the last look
        self._used: defaultdict[tuple[_Stack, str], list[int]] = defaultdict(lambda: [0, 0])

    def stop(self) -> None:
        """End early; what was seen until now is the result."""
        self._stopped.set()

    async def run(self) -> bytes:
        """The gzipped profile."""
        assert CpuProfiler._running is None
        started = time.monotonic()
        # the handler stays: a signal that comes late must not meet the default, which is to end the process
        signal.signal(signal.SIGPROF, CpuProfiler._on_signal)
        signal.siginterrupt(signal.SIGPROF, False)  # C libraries need not know of it
        self._look(None)  # what was used before does not count
        self._used.clear()
        CpuProfiler._running = self
        try:
            signal.setitimer(signal.ITIMER_PROF, self._interval_s, self._interval_s)
            while (left := started + self._seconds - time.monotonic()) > 0 and not self._stopped.is_set():
                # a signal that another thread took does not wake a main thread that waits: it has to look up by itself
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, _LOOK_UP_S)):
                        await self._stopped.wait()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            CpuProfiler._running = None
        if self._failure is not None:
            log.error("the CPU profile ended early", exc_info=self._failure)
        return await asyncio.to_thread(self._write, round((time.monotonic() - started) * 1e9))

    @staticmethod
    def _on_signal(_: int, frame: FrameType | None) -> None:
        profiler = CpuProfiler._running
        if profiler is None or profiler._looking:
            return
        profiler._looking = True
        try:
            profiler._look(frame)
        except Exception as error:  # it would come out of whatever code the signal interrupted; run() logs it
            profiler.stop()
            profiler._failure = error
        finally:
            profiler._looking = False

    def _look(self, main_frame: FrameType | None) -> None:
        stacks = sys._current_frames()
        for thread in threading.enumerate():
            is_main = thread is threading.main_thread()
            native_id, frame = thread.native_id, main_frame if is_main else stacks.get(thread.ident or 0)
            now = None if native_id is None else _cpu_ns(native_id)
            if native_id is None or now is None:
                continue
            used = now - self._last.get(native_id, 0)
            self._last[native_id] = now
            if used > 0 and frame is not None:
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
            (f"{Path(frame.filename.strip('<>')).name}:{frame.lineno}", frame.filename, frame.lineno, frame.lineno)
            for frame in statistic.traceback
        ]
        builder.add(reversed(stack), (statistic.count, statistic.size))
    return builder.finish(round((time.monotonic() - started) * 1e9))

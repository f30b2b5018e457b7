"""Waiting for a timeline to reach an LSN."""

import asyncio
import heapq
import itertools
from collections.abc import Callable

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import format_lsn


class LsnTimeout(NeonError):
    """The timeline did not reach the LSN in time."""


class LsnWaiters:
    """A monotone LSN that tasks can wait for."""

    def __init__(self, lsn: int) -> None:
        self.lsn = lsn
        self._heap: list[tuple[int, int, asyncio.Future[None]]] = []
        self._sequence = itertools.count()
        self._closed: NeonError | None = None
        self._abandoned = 0  # waiters in the heap that gave up
        #: Called when somebody begins to wait: who brings the LSN forward may be taking its time.
        self.on_wait: Callable[[], None] = lambda: None

    @property
    def waiting(self) -> bool:
        """Whether some task waits for an LSN that is not reached."""
        return any(not future.done() for _, _, future in self._heap)

    def advance(self, lsn: int) -> None:
        """Move forward and wake who waited for that. Moving backwards is ignored."""
        if lsn <= self.lsn:
            return
        self.lsn = lsn
        while self._heap and self._heap[0][0] <= lsn:
            _, _, future = heapq.heappop(self._heap)
            if not future.done():
                future.set_result(None)

    def close(self, error: NeonError) -> None:
        """Fail all present and future waiters with this error."""
        self._closed = error
        for _, _, future in self._heap:
            if not future.done():
                future.set_exception(error)
        self._heap.clear()

    async def wait(self, lsn: int, timeout_s: float | None, what: str) -> None:
        """Return when the LSN is reached. Raises LsnTimeout naming ``what`` and both LSNs."""
        if lsn <= self.lsn:
            return
        if self._closed is not None:
            raise self._closed.with_traceback(None)  # the same each time
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, (lsn, next(self._sequence), future))
        self.on_wait()
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except asyncio.CancelledError:
            self._give_up()
            raise
        except TimeoutError:
            self._give_up()
            raise LsnTimeout(
                f"{what} did not reach {format_lsn(lsn)} within {timeout_s:g} s: it is at {format_lsn(self.lsn)}"
            ) from None

    def _give_up(self) -> None:
        """Forget waiters that gave up, once they are most of the heap."""
        self._abandoned += 1
        if 2 * self._abandoned > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].done()]
            heapq.heapify(self._heap)
            self._abandoned = 0

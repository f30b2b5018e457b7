"""WAL redo of pages by a pool of helper processes.

Invariant: one request, one result, in the order of the requests, whatever happens to a helper. A request that kills its
helper or makes it hang costs its own page and nothing else: the unfinished pages of its frame are tried one by one, and
a page that fails twice that way is reported.
"""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from neon_services.ground.errors import Cancelled
from neon_services.wal.redo_frames import PAGE_SIZE, RedoRequest, RedoResult, RedoStatus, cut_into_frames
from neon_services.wal.redo_helper import RedoHelper, RedoHelperError

__all__ = ["PAGE_SIZE", "RedoHelper", "RedoHelperError", "RedoPool", "RedoRequest", "RedoResult", "RedoStatus"]

log = logging.getLogger(__name__)

FRAMES_IN_FLIGHT = 3


class _Slot:
    """The place of one helper, which comes and goes."""

    def __init__(self) -> None:
        self.helper: RedoHelper | None = None
        self.starting = asyncio.Lock()
        self.room = asyncio.Semaphore(FRAMES_IN_FLIGHT)
        self.load = 0


class RedoPool:
    """A fixed number of helpers of one Postgres major, each started when first needed and again after it has ended.

    `timeout_s` bounds one frame of up to 64 pages; a helper that takes longer is ended and replaced.
    """

    def __init__(self, pg_bin_dir: Path | str, pg_major: int, size: int = 1, timeout_s: float = 60.0) -> None:
        if size < 1:
            raise ValueError("a redo pool needs at least one helper")
        self._pg_bin_dir = pg_bin_dir
        self._pg_major = pg_major
        self._timeout_s = timeout_s
        self._slots = [_Slot() for _ in range(size)]
        self._closed = False
        self.restarts = 0
        """Helpers that had to be replaced since the pool was made."""

    async def apply(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        """Reconstruct pages; result i belongs to request i, and holds the page or its error.

        Any number of calls may be under way. Raises ConfigError when no helper can be started, Cancelled after close(),
        ValueError when a base is not 8192 bytes.
        """
        cuts = cut_into_frames(requests)
        if len(cuts) == 1:
            return await self._frame(requests)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._frame(requests[cut.start : cut.stop])) for cut in cuts]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [result for task in tasks for result in task.result()]

    async def _frame(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        slot = min(self._slots, key=lambda one: one.load)
        slot.load += 1
        try:
            async with slot.room:
                helper = await self._helper(slot)
                try:
                    return await helper.apply(requests)
                except RedoHelperError as error:
                    await self._discard(slot, helper, error)
                return await self._one_by_one(requests)
        finally:
            slot.load -= 1

    async def _one_by_one(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        """The pages of a frame that ended its helper, in a process that no other frame uses, so that each death has one cause.

        A page is blamed after its second try, because the first death may have come from outside.
        """
        results: list[RedoResult] = []
        helper: RedoHelper | None = None
        try:
            for request in requests:
                result = None
                for attempt in (1, 2):
                    if self._closed:
                        raise Cancelled("the redo pool is closed")
                    if helper is None:
                        helper = await self._start()
                    try:
                        (result,) = await helper.apply([request])
                        break
                    except RedoHelperError as error:
                        log.error("attempt %d at WAL redo of %s: %s", attempt, request.describe(), error)
                        text = f"{error}, twice, while redoing {request.nrecords} records of {request.describe()}"
                        await helper.kill()
                        helper = None
                results.append(result or RedoResult(RedoStatus.ERROR, None, text))
        finally:
            if helper is not None:
                await helper.kill()
        return results

    async def _start(self) -> RedoHelper:
        return await RedoHelper.start(self._pg_bin_dir, self._pg_major, timeout_s=self._timeout_s)

    async def _helper(self, slot: _Slot) -> RedoHelper:
        async with slot.starting:
            if self._closed:
                raise Cancelled("the redo pool is closed")
            if slot.helper is None or not slot.helper.alive:
                gone, slot.helper = slot.helper, None
                if gone is not None:
                    self.restarts += 1
                    await gone.kill()
                slot.helper = await self._start()
            return slot.helper

    async def _discard(self, slot: _Slot, helper: RedoHelper, error: RedoHelperError) -> None:
        if slot.helper is helper:
            slot.helper = None
            if not self._closed:
                self.restarts += 1
                log.warning("%s; starting another", error)
        await helper.kill()

    async def close(self) -> None:
        """End the helpers. Calls under way fail with Cancelled. Idempotent."""
        self._closed = True
        for slot in self._slots:
            async with slot.starting:
                helper, slot.helper = slot.helper, None
            if helper is not None:
                await helper.kill()

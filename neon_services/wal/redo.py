"""WAL redo of single pages by helper processes: the distribution's `postgres` binary with neon_redo.so preloaded.

Invariant: one request, one result, in the order of the requests, whatever happens to a helper. A request that kills its
helper or makes it hang costs its own page and nothing else: the unfinished pages of its frame are tried one by one.

A frame carries up to 64 pages. Reading and writing go on at the same time, so that a helper that answers while it is still
being written to cannot block both sides.
"""

import asyncio
import contextlib
import enum
import fcntl
import logging
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from neon_services.ground.errors import Cancelled, ConfigError, NeonError
from neon_services.wal.libraries import REDO, library_path

log = logging.getLogger(__name__)

PAGE_SIZE = 8192
FRAME_PAGES = 64
FRAME_BYTES = 8 * 1024 * 1024
_MAGIC = 0x314F4452
_OP_REDO, _OP_VERIFY, _OP_MASK, _OP_PING = 1, 2, 3, 4
_FRAME = struct.Struct("<IIII")  # magic, op, n, bytes of the body
_REQUEST = struct.Struct("<IIIIBBHIII")  # spc, db, rel, blk, fork, has_base, 0, nrecords, entries length, 0
_ANSWER = struct.Struct("<IIII")  # status, compared, mismatches, first mismatch; then a page or the text of an error
_ANSWER_SIZE = _ANSWER.size + PAGE_SIZE
_MASK = struct.Struct("<II")  # rmid, blk; then a page
_PIPE_SIZE = 1 << 20
_START_TIMEOUT_S = 20.0


class RedoStatus(enum.IntEnum):
    """What became of one page. The first three are the helper's own numbers."""

    OK = 0
    ERROR = 1
    MISSING_BASE = 2


@dataclass(frozen=True, slots=True)
class RedoRequest:
    """One page to reconstruct.

    `base` is the 8192-byte page to start from, None when the first record makes the page. `entries` are `nrecords` entries
    [u64 end_lsn][raw record][zeros to 8], ascending by LSN, as they are in `WalBatch.blob`.
    """

    spc: int
    db: int
    rel: int
    fork: int
    blk: int
    base: bytes | None
    entries: bytes
    nrecords: int

    def describe(self) -> str:
        """The page's name for logs and errors."""
        return f"{self.spc}/{self.db}/{self.rel} fork {self.fork} block {self.blk}"

    @property
    def size(self) -> int:
        """Bytes of this request in a frame."""
        return _REQUEST.size + (PAGE_SIZE if self.base is not None else 0) + len(self.entries)


@dataclass(frozen=True, slots=True)
class RedoResult:
    """The page, or why there is none. `page` has no valid checksum in its header: whoever stores it adds one."""

    status: RedoStatus
    page: bytes | None = None
    error: str = ""
    compared: int = 0
    """When verifying: consistency images compared with the page after their record."""
    mismatches: int = 0
    first_mismatch: int = 0
    """When verifying and mismatches > 0: index of the first record after which the page differed."""


class RedoHelperError(NeonError):
    """A helper process ended or hung. The pool handles it; only direct users of RedoHelper see it."""


def _encode(request: RedoRequest) -> list[bytes]:
    if request.base is not None and len(request.base) != PAGE_SIZE:
        raise ValueError(f"base page of {request.describe()} has {len(request.base)} bytes")
    header = _REQUEST.pack(
        request.spc,
        request.db,
        request.rel,
        request.blk,
        request.fork,
        request.base is not None,
        0,
        request.nrecords,
        len(request.entries),
        0,
    )
    return [header, request.entries] if request.base is None else [header, request.base, request.entries]


def _decode(answers: bytes | memoryview, count: int) -> list[RedoResult]:
    results = []
    view = memoryview(answers)
    for offset in range(0, count * _ANSWER_SIZE, _ANSWER_SIZE):
        status, compared, mismatches, first = _ANSWER.unpack_from(view, offset)
        body = bytes(view[offset + _ANSWER.size : offset + _ANSWER_SIZE])
        if status == RedoStatus.OK:
            results.append(RedoResult(RedoStatus.OK, body, "", compared, mismatches, first))
        else:
            text = body[: body.index(0)].decode(errors="replace")
            results.append(RedoResult(RedoStatus(status), None, text))
    return results


def frames(requests: Sequence[RedoRequest]) -> list[range]:
    """Cut requests into frames of at most 64 pages and about 8 MiB (a single larger request is a frame of its own)."""
    cuts, start, size = [], 0, 0
    for index, request in enumerate(requests):
        if index > start and (index - start == FRAME_PAGES or size + request.size > FRAME_BYTES):
            cuts.append(range(start, index))
            start, size = index, 0
        size += request.size
    if start < len(requests):
        cuts.append(range(start, len(requests)))
    return cuts


class _HelperProtocol(asyncio.SubprocessProtocol):
    """The bytes of one helper: answers are handed to the futures of the frames in the order they were sent."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._waiting: deque[asyncio.Future[tuple[int, int, bytes]]] = deque()
        self._writable = asyncio.Event()
        self._writable.set()
        self.transport: asyncio.SubprocessTransport | None = None
        self.exited = asyncio.Event()
        self.complaint = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self.complaint = (self.complaint + data)[-1000:]
            return
        self._buffer += data
        while len(self._buffer) >= _FRAME.size:
            magic, op, n, length = _FRAME.unpack_from(self._buffer)
            if magic != _MAGIC or not self._waiting:
                self.fail(RedoHelperError("a WAL redo helper answered with something that is not an answer"))
                return
            if len(self._buffer) < _FRAME.size + length:
                return
            body = bytes(memoryview(self._buffer)[_FRAME.size : _FRAME.size + length])
            del self._buffer[: _FRAME.size + length]
            future = self._waiting.popleft()
            if not future.done():
                future.set_result((op, n, body))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def process_exited(self) -> None:
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        # the process has ended and all that it wrote has been read
        self.fail(None)

    def fail(self, error: RedoHelperError | None) -> None:
        """Nothing more will be answered."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error or RedoHelperError(self._how_it_ended()))
        self._writable.set()

    def _how_it_ended(self) -> str:
        code = self.transport.get_returncode() if self.transport else None
        complaint = self.complaint.decode(errors="replace").strip()
        return f"a WAL redo helper ended (exit status {code}){': ' + complaint if complaint else ''}"

    def expect(self) -> asyncio.Future[tuple[int, int, bytes]]:
        """The future answer of the frame that is written next."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return future

    async def writable(self) -> None:
        """Wait until the pipe's buffer has room."""
        await self._writable.wait()


class RedoHelper:
    """One helper process. Use `await RedoHelper.start(...)`; calls may overlap and are answered in order."""

    def __init__(self, transport: asyncio.SubprocessTransport, protocol: _HelperProtocol, timeout_s: float) -> None:
        self._transport = transport
        self._protocol = protocol
        self._timeout_s = timeout_s
        stdin = transport.get_pipe_transport(0)
        self._stdin = cast(asyncio.WriteTransport, stdin)
        self.server_version_num = 0
        """PG_VERSION_NUM that the helper was compiled for, such as 150020."""

    @classmethod
    async def start(cls, pg_bin_dir: Path | str, pg_major: int, *, timeout_s: float = 60.0) -> "RedoHelper":
        """Start a helper and wait for its first answer.

        Raises ConfigError when the server binary or the library is missing or they do not fit each other.
        """
        binary = Path(pg_bin_dir) / "postgres"
        if not binary.is_file():
            raise ConfigError(f"{binary} is missing: install the Postgres {pg_major} server or correct pg_distrib_dir")
        environment = {"LD_PRELOAD": str(library_path(pg_major, REDO))}
        transport, protocol = await asyncio.get_running_loop().subprocess_exec(
            _HelperProtocol, str(binary), env=environment, cwd="/", close_fds=True
        )
        helper = cls(transport, protocol, timeout_s)
        for descriptor in (0, 1):
            helper._widen_pipe(descriptor)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                helper.server_version_num = await helper._ping()
        except (RedoHelperError, TimeoutError) as error:
            await helper.kill()
            raise ConfigError(
                f"{binary} does not work as a WAL redo helper: {error or 'no answer'}; "
                "build the libraries for exactly this server"
            ) from None
        return helper

    def _widen_pipe(self, descriptor: int) -> None:
        pipe = self._transport.get_pipe_transport(descriptor)
        file = pipe.get_extra_info("pipe") if pipe is not None else None
        if file is not None:
            # a limit on pipe memory only costs speed
            with contextlib.suppress(OSError):
                fcntl.fcntl(file.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._transport.get_pid()

    @property
    def alive(self) -> bool:
        """False once the process has ended."""
        return self._transport.get_returncode() is None and not self._stdin.is_closing()

    async def _call(self, op: int, n: int, parts: list[bytes]) -> tuple[int, int, bytes]:
        if not self.alive:
            raise RedoHelperError("a WAL redo helper ended before it was asked")
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._protocol.writable()
                if not self.alive:
                    raise RedoHelperError("a WAL redo helper ended before it was asked")
                answer = self._protocol.expect()
                body = b"".join(parts)
                self._stdin.write(_FRAME.pack(_MAGIC, op, n, len(body)) + body)
                return await answer
        except TimeoutError:
            raise RedoHelperError(f"a WAL redo helper did not answer within {self._timeout_s:g} s") from None

    async def _ping(self) -> int:
        return (await self._call(_OP_PING, 0, []))[1]

    async def _pages(self, op: int, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        parts = [part for request in requests for part in _encode(request)]
        answered, n, body = await self._call(op, len(requests), parts)
        if answered != op or n != len(requests) or len(body) != n * _ANSWER_SIZE:
            raise RedoHelperError("a WAL redo helper answered another question")
        return _decode(body, n)

    async def apply(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        """Reconstruct the pages of one frame. Raises RedoHelperError when the process ends or hangs."""
        return await self._pages(_OP_REDO, requests)

    async def verify(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        """The same, and after each record compare the page with the record's consistency image, if it has one."""
        return await self._pages(_OP_VERIFY, requests)

    async def mask(self, pages: Sequence[tuple[int, int, bytes]]) -> list[bytes]:
        """Blank in each (rmid, block number, page) what redo need not reproduce, such as hint bits."""
        parts = [part for rmid, blk, page in pages for part in (_MASK.pack(rmid, blk), page)]
        _, n, body = await self._call(_OP_MASK, len(pages), parts)
        return [body[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] for i in range(n)]

    async def kill(self) -> None:
        """End the process at once and wait for it. Unanswered calls fail."""
        if self._transport.get_returncode() is None:
            with contextlib.suppress(ProcessLookupError):
                self._transport.kill()
        await self._protocol.exited.wait()
        self._protocol.fail(None)
        self._transport.close()


class RedoPool:
    """A fixed number of helpers of one Postgres major, started when first needed and again when they end."""

    def __init__(self, pg_bin_dir: Path | str, pg_major: int, size: int = 1, timeout_s: float = 60.0) -> None:
        if size < 1:
            raise ValueError("a redo pool needs at least one helper")
        self._pg_bin_dir = pg_bin_dir
        self._pg_major = pg_major
        self._timeout_s = timeout_s
        self._helpers: list[RedoHelper | None] = [None] * size
        self._starting = [asyncio.Lock() for _ in range(size)]
        self._in_flight = [0] * size
        self._closed = False
        self.restarts = 0
        """Helpers that had to be replaced since the pool was made."""

    async def apply(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        """Reconstruct pages; result i belongs to request i. Errors of a page are in its result.

        Any number of calls may be under way. Raises ConfigError when no helper can be started, Cancelled after close().
        """
        cuts = frames(requests)
        if len(cuts) == 1:
            return await self._frame(requests)
        results: list[RedoResult] = []
        for part in await asyncio.gather(*(self._frame(requests[cut.start : cut.stop]) for cut in cuts)):
            results += part
        return results

    async def _frame(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        slot = min(range(len(self._helpers)), key=self._in_flight.__getitem__)
        self._in_flight[slot] += 1
        try:
            helper = await self._helper(slot)
            try:
                return await helper.apply(requests)
            except RedoHelperError as error:
                await self._discard(slot, helper, error)
            if len(requests) == 1:
                return [await self._last_try(requests[0])]
            return [await self._single(slot, request) for request in requests]
        finally:
            self._in_flight[slot] -= 1

    async def _single(self, slot: int, request: RedoRequest) -> RedoResult:
        helper = await self._helper(slot)
        try:
            return (await helper.apply([request]))[0]
        except RedoHelperError as error:
            await self._discard(slot, helper, error)
        return await self._last_try(request)

    async def _last_try(self, request: RedoRequest) -> RedoResult:
        """One more time, in a fresh process: the page may only have stood beside the one that is to blame."""
        if self._closed:
            raise Cancelled("the redo pool is closed")
        fresh = await RedoHelper.start(self._pg_bin_dir, self._pg_major, timeout_s=self._timeout_s)
        try:
            return (await fresh.apply([request]))[0]
        except RedoHelperError as error:
            log.error("WAL redo of %s ends its helper: %s", request.describe(), error)
            return RedoResult(RedoStatus.ERROR, None, f"{error}, twice, on the page {request.describe()}")
        finally:
            await fresh.kill()

    async def _helper(self, slot: int) -> RedoHelper:
        async with self._starting[slot]:
            if self._closed:
                raise Cancelled("the redo pool is closed")
            helper = self._helpers[slot]
            if helper is None or not helper.alive:
                helper = await RedoHelper.start(self._pg_bin_dir, self._pg_major, timeout_s=self._timeout_s)
                self._helpers[slot] = helper
            return helper

    async def _discard(self, slot: int, helper: RedoHelper, error: RedoHelperError) -> None:
        if self._helpers[slot] is helper:
            self._helpers[slot] = None
            if not self._closed:
                self.restarts += 1
                log.warning("%s; starting another", error)
        await helper.kill()

    async def close(self) -> None:
        """End the helpers. Calls under way fail with Cancelled. Idempotent."""
        self._closed = True
        for slot, lock in enumerate(self._starting):
            async with lock:
                helper, self._helpers[slot] = self._helpers[slot], None
            if helper is not None:
                await helper.kill()

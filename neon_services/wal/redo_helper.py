"""One WAL redo helper: the distribution's `postgres` binary with neon_redo.so preloaded, and the pipes to it.

Invariant: answers are given to the calls in the order in which the frames were written. Reading and writing go on at the
same time, so a helper that answers while it is still being written to cannot block both sides. Once one call has failed,
the process is of no more use: kill it.
"""

import asyncio
import contextlib
import fcntl
import os
import subprocess
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from neon_services.ground.errors import ConfigError, NeonError
from neon_services.wal import redo_frames
from neon_services.wal.libraries import REDO, library_path
from neon_services.wal.redo_frames import FRAME, MAGIC, PAGE_SIZE, RedoRequest, RedoResult

_PIPE_SIZE = 1 << 20
_START_TIMEOUT_S = 20.0
_WRITEV_MAX = 512
_NO_MORE = "a WAL redo helper ended before it was asked"


class RedoHelperError(NeonError):
    """A helper process ended, hung, or answered nonsense."""


def _open_pipe(descriptor: int) -> None:
    os.set_blocking(descriptor, False)
    # a limit on pipe memory only costs speed
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


class _Answer:
    """A frame on its way in: the header, then the body, each read straight into a buffer of its size."""

    __slots__ = ("body", "have", "head")

    def __init__(self) -> None:
        self.head: tuple[int, int, int, int] | None = None
        self.body = bytearray(FRAME.size)
        self.have = 0


class _Pipes:
    """Non-blocking frames over two descriptors on the running loop."""

    def __init__(self, stdin: int, stdout: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._stdin, self._stdout = stdin, stdout
        self._out: deque[memoryview] = deque()
        self._writing = False
        self._waiting: deque[asyncio.Future[tuple[int, int, bytearray]]] = deque()
        self._answer = _Answer()
        self.failure: str | None = None
        self._loop.add_reader(stdout, self._on_readable)

    def send(self, parts: list[bytes]) -> asyncio.Future[tuple[int, int, bytearray]]:
        """Queue a frame; the future gets (op, n, body) of its answer, or RedoHelperError."""
        future: asyncio.Future[tuple[int, int, bytearray]] = self._loop.create_future()
        self._waiting.append(future)
        self._out.extend(memoryview(part) for part in parts if part)
        if not self._writing:
            self._on_writable()
        return future

    def fail(self, why: str) -> None:
        """Stop: every call that waits fails, and so does every later one. Idempotent."""
        if self.failure is None:
            self.failure = why
            self._loop.remove_reader(self._stdout)
            if self._writing:
                self._loop.remove_writer(self._stdin)
        self._out.clear()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(RedoHelperError(self.failure))

    def _on_writable(self) -> None:
        out = self._out
        try:
            while out:
                written = os.writev(self._stdin, [out[i] for i in range(min(len(out), _WRITEV_MAX))])
                while out and written >= len(out[0]):
                    written -= len(out.popleft())
                if written:
                    out[0] = out[0][written:]
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._stdin, self._on_writable)
            return
        except OSError:
            out.clear()  # the process has ended: its last answers and then the end of its output are still to be read
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._stdin)

    def _on_readable(self) -> None:
        answer = self._answer
        try:
            count = os.readv(self._stdout, [memoryview(answer.body)[answer.have :]])
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(f"reading from a WAL redo helper: {error}")
            return
        if count == 0:
            self.fail("a WAL redo helper ended")
            return
        answer.have += count
        if answer.have < len(answer.body):
            return
        if answer.head is None:
            answer.head = FRAME.unpack(answer.body)
            if answer.head[0] != MAGIC or not self._waiting:
                self.fail("a WAL redo helper wrote something that is not an answer")
                return
            answer.body, answer.have = bytearray(answer.head[3]), 0
            if answer.body:
                return
        self._answer = _Answer()
        future = self._waiting.popleft()
        if not future.done():
            future.set_result((answer.head[1], answer.head[2], answer.body))


class RedoHelper:
    """One helper process. Use `await RedoHelper.start(...)`. Calls may overlap; they are answered in order."""

    def __init__(self, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._timeout_s = timeout_s
        for pipe in (process.stdin, process.stdout):
            _open_pipe(pipe.fileno())
        self._pipes = _Pipes(process.stdin.fileno(), process.stdout.fileno())
        self.server_version_num = 0
        """PG_VERSION_NUM that the library was compiled for, such as 150020."""

    @classmethod
    async def start(cls, pg_bin_dir: Path | str, pg_major: int, *, timeout_s: float = 60.0) -> "RedoHelper":
        """Start a helper and wait for its first answer (some 10 ms).

        The process has an empty environment but for the preloaded library, and dies with this one. Raises ConfigError when
        the server binary or the library is missing or they do not fit each other.
        """
        binary = Path(pg_bin_dir) / "postgres"
        if not binary.is_file():
            raise ConfigError(f"{binary} is missing: install the Postgres {pg_major} server or correct pg_distrib_dir")
        environment = {"LD_PRELOAD": str(library_path(pg_major, REDO))}
        pipe = subprocess.PIPE
        process = subprocess.Popen([binary], stdin=pipe, stdout=pipe, stderr=pipe, env=environment, cwd="/", bufsize=0)  # noqa: ASYNC220
        helper = cls(process, timeout_s)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                helper.server_version_num = (await helper._pipes.send(redo_frames.frame_parts(redo_frames.OP_PING, 0, [])))[1]
        except (RedoHelperError, TimeoutError) as error:
            complaint = await helper.kill()
            raise ConfigError(
                f"{binary} does not work as a WAL redo helper: {complaint or error or 'no answer'}; "
                "build the libraries for exactly this server (`make ext`)"
            ) from None
        except asyncio.CancelledError:
            await helper.kill()
            raise
        return helper

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """False once the process is known to have ended."""
        return self._pipes.failure is None

    async def _call(self, op: int, n: int, parts: list[bytes]) -> bytearray:
        if not self.alive:
            raise RedoHelperError(_NO_MORE)
        try:
            async with asyncio.timeout(self._timeout_s):
                answered, count, body = await self._pipes.send(redo_frames.frame_parts(op, n, parts))
        except TimeoutError:
            raise RedoHelperError(f"a WAL redo helper did not answer within {self._timeout_s:g} s") from None
        if answered != op or count != n:
            raise RedoHelperError("a WAL redo helper answered another question")
        return body

    async def _pages(self, op: int, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        body = await self._call(op, len(requests), redo_frames.encode_requests(requests))
        if len(body) != len(requests) * redo_frames.ANSWER_SIZE:
            raise RedoHelperError("a WAL redo helper gave an answer of the wrong length")
        return redo_frames.decode_answers(body, len(requests))

    async def apply(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        """Reconstruct the pages of one frame. Raises RedoHelperError when the process ends or hangs."""
        return await self._pages(redo_frames.OP_REDO, requests)

    async def verify(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        """The same, and after each record compare the page with the record's consistency image, if it has one."""
        return await self._pages(redo_frames.OP_VERIFY, requests)

    async def mask(self, pages: Sequence[tuple[int, int, bytes]]) -> list[bytes]:
        """Blank in each (rmid, block number, page) what redo need not reproduce, such as hint bits."""
        body = await self._call(redo_frames.OP_MASK, len(pages), redo_frames.encode_masks(pages))
        return [bytes(body[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]) for i in range(len(pages))]

    async def kill(self) -> str:
        """End the process and wait for it; unanswered calls fail. Returns what it wrote to stderr. Idempotent."""
        process = self._process
        self._pipes.fail("a WAL redo helper was stopped")
        process.kill()
        await asyncio.to_thread(process.wait)
        complaint = ""
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            if pipe is process.stderr and not pipe.closed:
                os.set_blocking(pipe.fileno(), False)
                complaint = (pipe.read() or b"").decode(errors="replace").strip()
            pipe.close()
        return complaint

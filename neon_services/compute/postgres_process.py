"""The one Postgres of a compute: start it, wait until it serves, stop it. It is never restarted here."""

import asyncio
import contextlib
import logging
import os
import re
import resource
import signal
import subprocess
from pathlib import Path

from neon_services.compute.children import die_with_parent
from neon_services.ground.errors import ConfigError, NeonError

log = logging.getLogger(__name__)

POLL_S = 0.002
FAST_STOP_S = 30.0  # without a quorum, Postgres waits for ever for its last WAL to be taken
DESCRIPTORS = 4096  # above the two that the guard needs
_STATUS_LINE = 7


def server_version(binary: str) -> int:
    """The version of a server binary, like 150020. Raises ConfigError when it is none."""
    try:
        text = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"--pgbin: cannot run {binary}: {error}") from None
    match = re.search(r"(\d+)\.(\d+)", text)
    if not match:
        raise ConfigError(f"--pgbin: {binary} --version says {text.strip()!r}, which is not understood")
    return int(match[1]) * 10000 + int(match[2])


def library_path(major: int) -> Path:
    """The library for this major. Raises ConfigError when it is not installed."""
    path = Path(os.environ.get("NEON_LIB_DIR", "/usr/lib/neon")) / f"pg{major}" / "neon.so"
    if not path.exists():
        raise ConfigError(f"{path} does not exist: install the compiled libraries for Postgres {major}, or set NEON_LIB_DIR")
    return path.absolute()


class PostgresProcess:
    """One run of the server."""

    def __init__(self, binary: str, pgdata: Path) -> None:
        self._binary = binary
        self._pgdata = pgdata
        self._process: asyncio.subprocess.Process | None = None
        #: Done with the exit code when it has ended.
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, environment: dict[str, str], settings: dict[str, str]) -> None:
        """Start it on the directory, with settings that nothing overrides; its log goes where ours goes."""
        dies = die_with_parent(os.getpid(), "QUIT")

        def prepare() -> None:
            dies()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if 0 <= soft < DESCRIPTORS:
                wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

        self._process = await asyncio.create_subprocess_exec(
            self._binary,
            "-D",
            str(self._pgdata),
            *(part for name, value in settings.items() for part in ("-c", f"{name}={value}")),
            stdin=asyncio.subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            preexec_fn=prepare,
        )
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        assert self._process is not None
        self.ended.set_result(await self._process.wait())

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and not self.ended.done()

    async def wait_ready(self) -> None:
        """Wait until it accepts connections. Raises NeonError when it ends instead."""
        pid_file = self._pgdata / "postmaster.pid"
        while not self.ended.done():
            with contextlib.suppress(OSError):
                lines = pid_file.read_text().split("\n")
                if len(lines) > _STATUS_LINE and lines[_STATUS_LINE].strip() == "ready":
                    return
            await asyncio.wait([self.ended], timeout=POLL_S)
        raise NeonError(f"Postgres ended with exit code {self.ended.result()} while starting; its log says why")

    def reload(self) -> None:
        """Let it read its configuration again."""
        self._signal(signal.SIGHUP)

    async def stop(self, mode: str) -> int:
        """``fast``: end sessions, write the shutdown checkpoint, send all WAL; ``immediate``: end at once. Its exit code."""
        if self._process is None:
            return 0
        if mode == "fast":
            self._signal(signal.SIGINT)
            try:
                async with asyncio.timeout(FAST_STOP_S):
                    return await asyncio.shield(self.ended)
            except TimeoutError:
                log.error("Postgres did not stop in %.0f s; stopping it at once", FAST_STOP_S)
        self._signal(signal.SIGQUIT)
        try:
            async with asyncio.timeout(10):
                return await asyncio.shield(self.ended)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            return await asyncio.shield(self.ended)

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            assert self._process is not None
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

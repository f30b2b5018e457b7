"""The ``walproposer`` child process: started before anything else, spoken to in JSON lines.

Invariant: once it has said ``fatal`` or has ended without being asked to, no commit can be acknowledged any more, so the
compute must end.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neon_services.compute.children import die_with_parent
from neon_services.compute.spec import ComputeSpec
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn, format_lsn, parse_lsn
from neon_services.ground.units import parse_duration_ms

log = logging.getLogger(__name__)

KILL_AFTER_S = 5.0


class ProposerFailed(NeonError):
    """The walproposer cannot go on; the text says why."""


# Neon's settings of the walproposer, which there is a part of Postgres: milliseconds, or a number with a unit
_TIMEOUTS = {
    "neon.safekeeper_connect_timeout": "connect_timeout_ms",
    "neon.safekeeper_reconnect_timeout": "reconnect_timeout_ms",
}


def config_of(spec: ComputeSpec, pg_version: int) -> dict[str, Any]:
    """The walproposer's configuration. Raises ConfigError for a setting that is no duration."""
    timeouts: dict[str, int] = {}
    for setting, key in _TIMEOUTS.items():
        value = spec.setting(setting)
        if value is not None:
            what = f"spec.cluster.settings: {setting}"
            timeouts[key] = int(value) if value.isdecimal() else parse_duration_ms(value, what=what)
    conninfo = spec.setting("neon.safekeeper_conninfo_options")
    return {
        **timeouts,
        **({"safekeeper_conninfo_options": conninfo} if conninfo else {}),
        "tenant_id": str(spec.ttid.tenant_id),
        "timeline_id": str(spec.ttid.timeline_id),
        "safekeepers": list(spec.safekeepers),
        "generation": spec.safekeepers_generation,
        "pg_version": pg_version,
        "system_id": None,
    }


def default_command() -> list[str]:
    """The walproposer that belongs to this installation."""
    return [sys.executable, "-m", "neon_services.compute.walproposer_main"]


class ProposerChild:
    """One run of the process."""

    def __init__(self, on_commit: Callable[[Lsn], None]) -> None:
        self._on_commit = on_commit
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Lsn] = loop.create_future()
        self._attached: asyncio.Future[None] = loop.create_future()
        self._stopped: asyncio.Future[Lsn] = loop.create_future()
        self.reason: str | None = None
        #: Done when the process has ended, whatever the reason.
        self.ended: asyncio.Future[int] = loop.create_future()

    async def start(self, command: list[str], config_path: Path, environment: dict[str, str]) -> None:
        """Start it; it begins the election at once."""
        self._process = await asyncio.create_subprocess_exec(
            *command,
            "--config",
            str(config_path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid(), "KILL"),
        )
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        async for line in process.stdout:
            try:
                event = json.loads(line)
                self._handle(event)
            except (ValueError, KeyError, TypeError) as error:
                log.error("walproposer said %r, which is not understood: %s", line[:200], error)
        code = await process.wait()
        if self.reason is None:
            self.reason = f"walproposer ended with exit code {code}"
        self.ended.set_result(code)
        for waiting in (self._ready, self._attached, self._stopped):
            if not waiting.done():
                waiting.set_exception(ProposerFailed(self.reason))
                waiting.exception()  # nobody may be waiting: that is no error

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "commit":
            self._on_commit(parse_lsn(event["lsn"]))
        elif kind == "elected":
            log.info("elected with term %s, the log ends at %s", event["term"], event["start_lsn"])
        elif kind == "ready" and not self._ready.done():
            self._ready.set_result(parse_lsn(event["lsn"]))
        elif kind == "attached":
            if not self._attached.done():
                self._attached.set_result(None)
        elif kind == "stopped" and not self._stopped.done():
            self._stopped.set_result(parse_lsn(event["lsn"]))
        elif kind == "fatal":
            self.reason = str(event["reason"])

    def _send(self, command: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None or self.ended.done():
            raise ProposerFailed(self.reason or "walproposer is not running")
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    async def ready(self) -> Lsn:
        """The end of committed WAL, when this process has won the election and a quorum has it. Raises ProposerFailed."""
        lsn = await asyncio.shield(self._ready)
        if lsn == 0:
            raise ProposerFailed("the safekeepers have no WAL of this timeline: create the timeline first")
        return lsn

    async def attach(self, host: str, port: int, user: str, start_lsn: Lsn) -> None:
        """Let it take Postgres's WAL from ``start_lsn`` on; returns when it does. Raises ProposerFailed."""
        self._send({"command": "attach", "host": host, "port": port, "user": user, "start_lsn": format_lsn(start_lsn)})
        await asyncio.shield(self._attached)

    async def stop(self, timeout_s: float) -> Lsn | None:
        """Let it commit what it has, at most so long, and end. The last committed LSN, or None when it cannot say."""
        try:
            self._send({"command": "stop", "timeout_s": timeout_s})
            async with asyncio.timeout(timeout_s + KILL_AFTER_S):
                return await asyncio.shield(self._stopped)
        except (ProposerFailed, TimeoutError, ConnectionError) as error:
            log.warning("no final LSN from walproposer: %s", error or type(error).__name__)
            return None
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End it at once and reap it."""
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(KILL_AFTER_S):
                await asyncio.shield(self.ended)
        except TimeoutError:
            process.kill()
            await asyncio.shield(self.ended)

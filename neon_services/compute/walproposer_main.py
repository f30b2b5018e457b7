"""``walproposer``: proposes the local Postgres's WAL to the safekeepers, or only synchronises them.

Its parent (compute_ctl) talks to it in JSON lines: commands on stdin, events on stdout; logs go to stderr.

Commands: ``{"command":"attach","host":H,"port":N,"user":U,"start_lsn":"X/X"}``, ``{"command":"stop","timeout_s":S}``;
the end of stdin means: stop now. Events: ``elected``, ``ready``, ``attached``, ``commit``, ``stopped``, ``fatal``.
"""

import argparse
import asyncio
import json
import logging
import os
import select
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from neon_services.compute.walproposer import WalProposer
from neon_services.compute.walproposer_config import WalProposerConfig, read_config
from neon_services.compute.walproposer_postgres import PostgresAddress
from neon_services.consensus.proposer import Deposed
from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.lsn import Lsn, format_lsn, parse_lsn
from neon_services.ground.process import configure_logging, run_service
from neon_services.protocols.lanes import make_event_loop

log = logging.getLogger(__name__)

DEFAULT_STOP_TIMEOUT_S = 30.0


def emit(event: dict[str, Any]) -> None:
    """Write one event. A parent that does not read loses the monitoring events, never our time."""
    line = (json.dumps(event) + "\n").encode()
    if event["event"] != "commit" or select.select([], [1], [], 0)[1]:
        os.write(1, line)


class _Commands:
    """Lines of stdin, read by a thread of their own, as a queue; None at the end."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, daemon=True, name="stdin").start()

    def _read(self) -> None:
        rest = b""
        while chunk := os.read(0, 65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.strip():
                    self._put(self._parse(line))
        self._put(None)

    def _put(self, command: dict[str, Any] | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.queue.put_nowait, command)

    @staticmethod
    def _parse(line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        return value if isinstance(value, dict) else {"command": line.decode(errors="replace")}


def _attach(proposer: WalProposer, command: dict[str, Any]) -> None:
    try:
        address = PostgresAddress(str(command["host"]), int(command["port"]), str(command["user"]))
        start_lsn = parse_lsn(str(command["start_lsn"]))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"attach needs host, port, user and start_lsn: {error!r}") from None
    proposer.attach(address, start_lsn)


async def _obey(proposer: WalProposer) -> int:
    """Carry out the parent's commands until one of them ends the process."""
    commands = _Commands()
    while True:
        command = await commands.queue.get()
        if command is None:
            log.info("stdin ended: stopping")
            return 0
        if command.get("command") == "attach":
            _attach(proposer, command)
        elif command.get("command") == "stop":
            lsn = await proposer.stop(float(command.get("timeout_s", DEFAULT_STOP_TIMEOUT_S)))
            emit({"event": "stopped", "lsn": format_lsn(lsn)})
            return 0
        else:
            raise ConfigError(f"unknown command {command.get('command')!r}; known are attach and stop")


async def propose(config: WalProposerConfig) -> int:
    """Run until the parent stops us or something is fatal."""
    proposer = WalProposer(config, emit)
    loop = asyncio.get_running_loop()

    def unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        log.error("unhandled: %s", context.get("message"), exc_info=error)
        proposer.fail(error or NeonError(str(context.get("message"))))

    loop.set_exception_handler(unhandled)
    loop.add_signal_handler(signal.SIGINT, log.info, "ignoring SIGINT: the parent decides when to stop")
    proposer.start()
    obeying = loop.create_task(_obey(proposer))
    try:
        waiting: list[asyncio.Future[Any]] = [obeying, proposer.ended]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if proposer.ended.done():
            proposer.ended.result()
        return obeying.result()
    except NeonError as error:
        emit({"event": "fatal", "reason": str(error), "retry": isinstance(error, Deposed) and error.retry})
        log.error("%s", error)
        return 1
    except Exception as error:
        log.exception("unexpected error")
        emit({"event": "fatal", "reason": f"{type(error).__name__}: {error}", "retry": False})
        return 1
    finally:
        obeying.cancel()
        await proposer.close()


async def synchronise(config: WalProposerConfig) -> int:
    """sync-safekeepers: elect, bring all reachable safekeepers to the same end of committed WAL, print it."""
    proposer = WalProposer(config, lambda _: None)
    proposer.start()
    try:
        while (lsn := proposer.core.synchronised()) is None:
            await asyncio.wait([proposer.ended], timeout=0.005)
            if proposer.ended.done():
                proposer.ended.result()
        await proposer.stop(1.0)
        print(format_lsn(Lsn(lsn)), flush=True)
        return 0
    finally:
        await proposer.close()


def main() -> int:
    """The console script."""
    parser = argparse.ArgumentParser(prog="walproposer", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="JSON file: ids, safekeepers, generation, pg_version")
    parser.add_argument("--sync-safekeepers", action="store_true", help="print the end of committed WAL and exit")
    arguments = parser.parse_args()
    configure_logging()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)

    async def run() -> int:
        config = read_config(arguments.config)
        return await (synchronise(config) if arguments.sync_safekeepers else propose(config))

    return run_service(run, make_event_loop)


if __name__ == "__main__":
    sys.exit(main())

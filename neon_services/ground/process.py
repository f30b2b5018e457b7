"""What every service process does the same way: logging, signals, readiness, the pid file, one clear exit.

A service's ``main`` is ``run_service(name, coroutine_function)``; wrong input raises ConfigError, which becomes one line
on stderr and exit code 2.
"""

import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from neon_services.ground.errors import ConfigError, NeonError

log = logging.getLogger(__name__)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(log_format: str = "plain") -> None:
    """Log to stdout in Neon's plain format (UTC time, level, target, message) or as JSON lines."""
    handler = logging.StreamHandler(sys.stdout)
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)5s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(os.environ.get("NEON_LOG", "INFO").upper())
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def notify_systemd(state: str) -> None:
    """Send a state such as ``READY=1`` to systemd; does nothing when not started by it (Type=notify)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


class PidFile:
    """An exclusive lock on ``<name>.pid``, held as long as the object lives. Raises ConfigError when somebody holds it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise ConfigError(f"{path} is locked by another process (pid {holder or 'unknown'}): stop it first") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)


async def wait_for_stop_signal() -> signal.Signals:
    """Return when SIGINT, SIGTERM or SIGQUIT arrives."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[signal.Signals] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        if not stop.done():
            stop.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        loop.add_signal_handler(number, on_signal, number)
    return await stop


def run_service(
    main: Callable[[], Awaitable[int | None]], make_loop: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> int:
    """Run a service's coroutine on uvloop, or on another event loop; turn errors of the operator and of the world into one line
    and an exit code.

    Exit codes: what the coroutine returns (None is 0), 2 for ConfigError, 1 for any other error of ours or the system's.
    """
    import uvloop

    try:
        with asyncio.Runner(loop_factory=make_loop or uvloop.new_event_loop) as runner:
            return runner.run(main()) or 0  # type: ignore[arg-type]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NeonError, OSError) as error:
        log.error("%s", error)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0

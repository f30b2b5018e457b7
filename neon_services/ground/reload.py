"""What is made from files and follows them: keys, certificates.

Invariant: files that cannot be read or make no sense never replace what was made from good ones. Someone who replaces several
files is not atomic: whatever was read half-way is read again the next time.
"""

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any

from neon_services.ground.errors import ConfigError

log = logging.getLogger(__name__)


class Reloadable:
    """Base of such things. Subclasses say how to read the files, and how to make something of them."""

    def __init__(self, what: str) -> None:
        """``what`` names it in logs and errors. Reads for the first time; raises ConfigError."""
        self._what = what
        self._complaint = ""
        self._lock = threading.Lock()
        try:
            self._seen = self._read()
            self._take(self._seen)
        except ConfigError as error:
            raise ConfigError(f"{what}: {error}") from error

    def _read(self) -> Any:
        """The content of the files, to be compared. Raises ConfigError."""
        raise NotImplementedError

    def _take(self, content: Any) -> None:
        """Make it from the content and only then put it in place. Raises ConfigError."""
        raise NotImplementedError

    def reload(self) -> None:
        """Follow the files if they changed; if that fails, all stays as it is and the log says why, once. From any thread."""
        with self._lock:
            try:
                content = self._read()
                if content == self._seen:
                    return
                self._take(content)
                self._seen = content  # only now: what could not be taken is tried again
            except ConfigError as error:
                if str(error) != self._complaint:
                    log.error("%s: not read again, what was there before stays in use: %s", self._what, error)
                self._complaint = str(error)
                return
            self._complaint = ""
            log.info("%s: changed, and read again", self._what)


async def watch(items: Sequence[Reloadable], period_s: float) -> None:
    """Reload all of them every so many seconds, until cancelled; whatever fails, the service goes on with what it has."""
    while True:
        await asyncio.sleep(period_s)
        for item in items:
            try:
                await asyncio.to_thread(item.reload)
            except Exception:
                log.exception("reading keys or certificates again")

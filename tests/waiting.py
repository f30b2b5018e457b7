"""Waiting for something to become true: always with a deadline, and with a word about what did not happen."""

import asyncio
import inspect
import time
import urllib.error
from collections.abc import Callable
from typing import Any

import psycopg

INTERVAL_S = 0.05
#: What a service that is just starting, or under attack by a test, answers with.
_NOT_YET = (OSError, urllib.error.URLError, psycopg.Error, KeyError)


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 60.0) -> Any:
    """Poll until the condition gives a true value and return it; AssertionError naming ``what`` after the deadline."""
    deadline = time.monotonic() + timeout
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            value = condition()
            if value:
                return value
        except _NOT_YET as error:
            last = error
        time.sleep(INTERVAL_S)
    raise AssertionError(f"timed out after {timeout:.0f} s waiting for {what}" + (f" (last error: {last})" if last else ""))


async def until(condition: Callable[[], Any], what: str, timeout: float = 15.0) -> Any:
    """wait_until on another thread, so that the event loop goes on while the condition asks somebody."""
    return await asyncio.to_thread(wait_until, condition, what, timeout)


async def eventually(
    condition: Callable[[], Any],
    what: str,
    timeout: float = 15.0,
    *,
    interval: float = 0.01,
    errors: tuple[type[Exception], ...] = (),
) -> Any:
    """The same on the event loop: for a condition that is a coroutine function, or looks at something of the loop's.

    ``errors`` are those that mean "not yet".
    """
    last: Exception | None = None
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    value = condition()
                    if inspect.isawaitable(value):
                        value = await value
                    if value:
                        return value
                except errors as error:
                    last = error
                await asyncio.sleep(interval)
    except TimeoutError:
        text = f"timed out after {timeout:.0f} s waiting for {what}" + (f" (last error: {last})" if last else "")
        raise AssertionError(text) from None

"""Failpoints: named places in a service where a test makes it stop, wait, fail or die.

Invariant: while none is set, a failpoint costs one attribute look-up, and none can be set unless the process was started
with the environment variable ``FAILPOINTS``. Neon offers them in test builds and where that variable is set; here there is one
build, so the variable alone decides: nobody sets it by accident, and ``--dev``, which development clusters use for other
things, does not open a door through which any client can stop a safekeeper.

Syntax (that of the Rust crate ``fail`` and of Neon's own): ``action[->action...]``, each ``[p%][n*]task[(argument)]``: with a
chance of p percent, and at most n times; the first action of the chain whose turn it is happens. Tasks: ``off``, ``return``,
``sleep(ms)``, ``pause`` (until the failpoint is set anew), ``print(text)``, ``panic(text)``, ``exit``.
"""

import asyncio
import logging
import os
import random
import re
import threading
import time
from dataclasses import dataclass, field

from neon_services.ground.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "FAILPOINTS"
_ACTION = re.compile(
    r"\s*(?:(?P<percent>\d+(?:\.\d+)?)%)?(?:(?P<count>\d+)\*)?(?P<task>[a-z]+|\d+)(?:\((?P<argument>.*)\))?\s*", re.DOTALL
)
_TASKS = ("off", "return", "sleep", "pause", "print", "panic", "exit")
_MAX_SLEEP_MS = 3_600_000


class FailpointPanic(Exception):
    """What ``panic`` raises: no error of ours, so that nobody takes it for one that was foreseen."""


@dataclass(frozen=True, slots=True)
class Returned:
    """The place is to return early; what that means, and the meaning of the value, is the place's business."""

    value: str | None


@dataclass(slots=True)
class _Action:
    task: str
    argument: str | None
    chance: float = 1.0
    left: int | None = None  # how many times more; None: always

    def takes_turn(self) -> bool:
        if self.left == 0 or (self.chance < 1.0 and random.random() >= self.chance):
            return False
        if self.left is not None:
            self.left -= 1
        return True


def _parse_action(text: str) -> _Action:
    found = _ACTION.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text!r} is not an action: write [p%][n*]task[(argument)], for example 50%return or sleep(100)")
    task, argument = found["task"], found["argument"]
    if task.isdecimal() and argument is None:  # Neon's short form
        task, argument = "sleep", task
    if task not in _TASKS:
        raise ConfigError(f"there is no failpoint action {task!r}: choose from {', '.join(_TASKS)}")
    percent = float(found["percent"] or 100)
    if percent > 100:
        raise ConfigError(f"{text!r}: the chance is more than 100%")
    if task == "sleep":
        if argument is None or not argument.isascii() or not argument.isdecimal() or len(argument) > 9:
            raise ConfigError(f"{text!r}: sleep needs a number of milliseconds, for example sleep(100)")
        if int(argument) > _MAX_SLEEP_MS:
            raise ConfigError(f"{text!r}: the longest sleep is {_MAX_SLEEP_MS} ms; pause lasts until you say so")
    elif argument is not None and task in ("off", "pause", "exit"):
        raise ConfigError(f"{text!r}: {task} takes no argument")
    left = found["count"]
    if left is not None and len(left) > 9:
        raise ConfigError(f"{text!r}: the count is too large")
    return _Action(task, argument, percent / 100, None if left is None else int(left))


def _parse_actions(text: str) -> list[_Action]:
    return [_parse_action(part) for part in text.split("->")]


@dataclass(eq=False, slots=True)
class Failpoint:
    """One place. Code hits it with ``hit()``, or with ``reach()`` where it may wait without holding anybody up."""

    name: str
    can_wait: bool
    #: What to do when the place is reached; None when nothing is set.
    actions: list[_Action] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: set[asyncio.Event] = field(default_factory=set)

    def _next(self) -> _Action | None:
        with self._lock:
            action = next((action for action in self.actions or () if action.takes_turn()), None)
        if action is None or action.task == "off":
            return None
        log.info("at failpoint %s: %s", self.name, action.task)
        if action.task == "print":
            log.info("failpoint %s: %s", self.name, action.argument)
        elif action.task == "exit":
            os._exit(1)
        elif action.task == "panic":
            raise FailpointPanic(action.argument or f"failpoint {self.name} panic")
        return action

    def hit(self) -> Returned | None:
        """Do what is set, without an event loop; ``sleep`` blocks the thread. Raises FailpointPanic."""
        action = None if self.actions is None else self._next()
        if action is None:
            return None
        if action.task == "sleep":
            time.sleep(int(action.argument or 0) / 1000)
        return Returned(action.argument) if action.task == "return" else None

    async def reach(self) -> Returned | None:
        """Do what is set; ``sleep`` and ``pause`` end early when the failpoint is set anew. Raises FailpointPanic."""
        action = None if self.actions is None else self._next()
        if action is None:
            return None
        if action.task == "sleep":
            await self._wait(int(action.argument or 0) / 1000)
        elif action.task == "pause":
            await self._wait(None)
        return Returned(action.argument) if action.task == "return" else None

    async def wait_ms(self, value: str | None) -> None:
        """Sleep for the milliseconds that a place got by ``return(ms)``; no number is no sleep."""
        if value is not None and value.isascii() and value.isdecimal():
            await self._wait(min(int(value), _MAX_SLEEP_MS) / 1000)

    async def _wait(self, seconds: float | None) -> None:
        changed = asyncio.Event()
        self._waiting.add(changed)
        try:
            async with asyncio.timeout(seconds):
                await changed.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(changed)

    def _set(self, actions: list[_Action]) -> None:
        with self._lock:
            self.actions = None if all(action.task == "off" for action in actions) else actions
        for changed in self._waiting:
            changed.set()


_declared: dict[str, Failpoint] = {}
_enabled = False


def declare(name: str, *, can_wait: bool = False) -> Failpoint:
    """A place in the code, once per process, when its module is loaded. ``can_wait``: it is reached by ``reach()``."""
    assert name not in _declared
    _declared[name] = Failpoint(name, can_wait)
    return _declared[name]


def declared() -> list[str]:
    """The names of all places in this process."""
    return sorted(_declared)


def is_enabled() -> bool:
    """Whether failpoints may be set in this process."""
    return _enabled


def configure(settings: list[tuple[str, str]]) -> None:
    """Set failpoints by (name, actions): all of them or, when one is wrong, none. On the event loop. Raises ConfigError."""
    if not _enabled:
        raise ConfigError(f"failpoints are off: start the process with the environment variable {VARIABLE} set (to any value)")
    parsed = []
    for name, text in settings:
        place = _declared.get(name)
        if place is None:  # a typing error that is taken for a failpoint makes a test that tests nothing
            raise ConfigError(f"there is no failpoint {name!r} in this process: it has {', '.join(declared())}")
        actions = _parse_actions(text)
        if not place.can_wait and any(action.task == "pause" for action in actions):
            raise ConfigError(f"failpoint {name} cannot pause: the whole process would, and nobody could end it")
        parsed.append((place, actions, text))
    for place, actions, text in parsed:
        log.warning("failpoint %s is set to %s", place.name, text)
        place._set(actions)


def enable_from_environment() -> None:
    """Called once by a service's start: read ``FAILPOINTS``, ``name=actions;name=actions``. Raises ConfigError."""
    global _enabled
    text = os.environ.get(VARIABLE)
    if text is None:
        return
    _enabled = True
    log.warning("failpoints can be set in this process (%s is set): it is for tests only", VARIABLE)
    # a value without "=" only opens the door
    configure([(name.strip(), actions) for part in text.split(";") for name, equal, actions in [part.partition("=")] if equal])

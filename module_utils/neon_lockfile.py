"""The part of a lock file that one target needs.

Invariant: a requirement is taken over with its exact version and all its hashes; what the target's Python does not need is left
out by the lock file's own markers, evaluated for the target and not for the Python that runs here. The lock file is the
universal kind of ``uv pip compile`` or ``pip-compile``: pinned requirements, indented hashes, and ``# via`` comments.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Requirement:
    """One pinned requirement: its normalized name, its line with the marker, its hash options, and who needs it."""

    name: str
    pin: str
    marker: str
    hashes: tuple[str, ...]
    via: frozenset[str]


class LockfileError(Exception):
    """The lock file is not what we can read."""


def normalized(name: str) -> str:
    """A distribution's name as Python's packaging compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(text: str) -> list[Requirement]:
    """All requirements of a lock file. Raises LockfileError for a line that is neither pinned nor a comment nor a hash."""
    found: list[Requirement] = []
    pin, marker, hashes, via = "", "", [], set()

    def close() -> None:
        if pin:
            found.append(Requirement(normalized(pin.partition("==")[0]), pin, marker, tuple(hashes), frozenset(via)))

    in_via = False
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip().removesuffix("\\").strip()
        if raw.startswith((" ", "\t")):
            if line.startswith("--hash="):
                hashes.append(line)
            elif line.startswith("#"):
                comment = line.lstrip("# ")
                if comment.startswith("via"):
                    in_via, comment = True, comment.removeprefix("via").strip()
                if in_via and comment:
                    via.add(normalized(comment.split()[0]))
        elif line and not line.startswith("#"):
            close()
            requirement, _, condition = line.partition(";")
            if "==" not in requirement:
                raise LockfileError(f"line {number} of the lock file is no pinned requirement: {line!r}")
            pin, marker, hashes, via, in_via = requirement.strip(), condition.strip(), [], set(), False
    close()
    return found


def closure(requirements: Iterable[Requirement], roots: Iterable[str]) -> list[Requirement]:
    """The requirements named by ``roots`` (``name>=1`` and the like) and all that those need, in the lock file's order."""
    everything = list(requirements)
    wanted = {normalized(re.split(r"[^A-Za-z0-9._-]", root, maxsplit=1)[0]) for root in roots}
    missing = wanted - {requirement.name for requirement in everything}
    if missing:
        raise LockfileError(f"the lock file lacks {', '.join(sorted(missing))}: make it anew from pyproject.toml")
    while True:
        grown = wanted | {requirement.name for requirement in everything if requirement.via & wanted}
        if grown == wanted:
            return [requirement for requirement in everything if requirement.name in wanted]
        wanted = grown


def for_python(requirements: Iterable[Requirement], python_version: str, machine: str) -> str:
    """The requirements file for a target such as ``3.13`` on ``x86_64``, without markers."""
    from packaging.markers import Marker

    environment = {
        "python_version": python_version,
        "python_full_version": f"{python_version}.0",
        "implementation_name": "cpython",
        "implementation_version": f"{python_version}.0",
        "platform_python_implementation": "CPython",
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
    }
    lines: list[str] = []
    for requirement in requirements:
        if not requirement.marker or Marker(requirement.marker).evaluate(environment):
            lines.append(" \\\n    ".join((requirement.pin, *requirement.hashes)))
    return "\n".join(lines) + "\n"

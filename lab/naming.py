"""Names, numbers and addresses of labs and hosts, as pure functions.

Invariant: two labs never share a subnet, and two hosts of a lab never share a number, for as long as both exist.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lab.shell import LabError

# A network namespace is named lab-LAB-HOST and a cgroup LAB/HOST; both end up in file names.
_NAME = re.compile(r"[a-z][a-z0-9]{0,23}(-[a-z0-9]+)*")
_PREFIX = "10.203"
_FIRST_HOST, _LAST_HOST = 11, 249


def checked_name(kind: str, name: str) -> str:
    """The name itself. Raises LabError when it cannot be the name of a lab or a host."""
    if not _NAME.fullmatch(name) or len(name) > 32:
        raise LabError(
            f"{kind} name {name!r} will not do: use at most 32 lower-case letters, digits and dashes, a letter first"
        )
    return name


def free_subnet(taken: Iterable[str]) -> str:
    """The first three numbers of a /24 that no other lab has."""
    used = set(taken)
    for third in range(256):
        subnet = f"{_PREFIX}.{third}"
        if subnet not in used:
            return subnet
    raise LabError("all 256 subnets for labs are taken: destroy a lab first")


def free_numbers(taken: Iterable[int]) -> Iterator[int]:
    """The numbers that new hosts get, in order. Raises LabError when there is none left."""
    used = set(taken)
    yield from (number for number in range(_FIRST_HOST, _LAST_HOST + 1) if number not in used)
    raise LabError(f"a lab has room for {_LAST_HOST - _FIRST_HOST + 1} hosts: destroy some first")


@dataclass(frozen=True)
class Address:
    """Where a host is plugged in."""

    subnet: str
    number: int

    @property
    def ip(self) -> str:
        return f"{self.subnet}.{self.number}"

    @property
    def gateway(self) -> str:
        return f"{self.subnet}.1"

    @property
    def port(self) -> str:
        """The host's port on the lab's bridge; an interface name has at most 15 characters."""
        return f"port{self.number}"


def hosts_file(addresses: Iterable[tuple[str, str]]) -> str:
    """/etc/hosts of every host of a lab, from pairs of name and address."""
    return "127.0.0.1 localhost\n::1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses)


def split_list(text: str | None) -> list[str]:
    """The words of an option such as ``a,b c``."""
    return (text or "").replace(",", " ").split()

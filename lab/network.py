"""The lab's network: a namespace with one bridge, a namespace and a cable per host, partitions and loss.

Invariant: every interface, route and rule made here is inside a namespace of the lab's own and disappears with it.
"""

import ctypes
import os
import socket
from contextlib import suppress
from pathlib import Path

from lab.naming import Address
from lab.shell import LabError, sh

_DROPS = "lab_drops"


def _batch(namespace: str, commands: str) -> None:
    sh("ip", "-n", namespace, "-batch", "-", stdin=commands)


def enter(namespace: str) -> None:
    """Move this process into a network namespace. Raises LabError when there is none of that name."""
    try:
        with Path("/run/netns", namespace).open() as handle:
            if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0x40000000):  # CLONE_NEWNET
                raise LabError(f"cannot enter network namespace {namespace}: {os.strerror(ctypes.get_errno())}")
    except FileNotFoundError:
        raise LabError(f"the lab's network {namespace} is not there: bring the lab up first") from None


class LabNetwork:
    """The bridge that all hosts of a lab are plugged into."""

    def __init__(self, lab: str, subnet: str) -> None:
        self.namespace = f"lab-{lab}"
        self._subnet = subnet

    def host_namespace(self, host: str) -> str:
        return f"{self.namespace}-{host}"

    def exists(self) -> bool:
        return sh("ip", "-n", self.namespace, "link", "show", "br0", check=False).returncode == 0

    def ensure(self) -> None:
        """Make the bridge; a namespace that was left half made is made anew."""
        if self.exists():
            return
        self.destroy()
        sh("ip", "netns", "add", self.namespace)
        _batch(
            self.namespace,
            "link set lo up\nlink add br0 type bridge forward_delay 0\n"
            f"addr add {self._subnet}.1/24 dev br0\nlink set br0 up\n",
        )

    def destroy(self) -> None:
        if Path("/run/netns", self.namespace).exists():
            sh("ip", "netns", "del", self.namespace)

    def plug_in(self, host: str, address: Address) -> None:
        """A fresh namespace and cable for a host: what a power cut forgets is forgotten."""
        inside = self.host_namespace(host)
        sh("ip", "netns", "add", inside)
        _batch(
            self.namespace,
            f"link add {address.port} type veth peer name eth0 netns {inside}\nlink set {address.port} master br0 up\n",
        )
        _batch(
            inside,
            f"link set lo up\naddr add {address.ip}/24 dev eth0\nlink set eth0 up\nroute add default via {address.gateway}\n",
        )

    def unplug(self, host: str, address: Address) -> None:
        """Remove the host's cable and namespace, whatever of them is there."""
        sh("ip", "-n", self.namespace, "link", "del", address.port, check=False)
        if Path("/run/netns", self.host_namespace(host)).exists():
            sh("ip", "netns", "del", self.host_namespace(host))

    def set_link(self, address: Address, state: str) -> None:
        """Pull the cable (``down``: the host sees no carrier) or push it back in (``up``)."""
        sh("ip", "-n", self.namespace, "link", "set", address.port, state)

    def is_up(self, address: Address) -> bool:
        shown = sh("ip", "-n", self.namespace, "-br", "link", "show", address.port, check=False).stdout
        return "UP" in shown.replace("<", ",").replace(">", ",").split(",")

    def drop(self, pairs: list[tuple[Address, Address]], percent: int) -> None:
        """Lose so many percent of the packets from the first to the second of each pair, until healed."""
        some = f"numgen random mod 100 < {percent} " if percent < 100 else ""
        rules = [
            f"add rule bridge {_DROPS} forward ip saddr {source.ip} ip daddr {target.ip} {some}counter drop\n"
            for source, target in pairs
        ]
        table = f"table bridge {_DROPS} {{ chain forward {{ type filter hook forward priority 0; }}; }}\n"
        sh("ip", "netns", "exec", self.namespace, "nft", "-f", "-", stdin=table + "".join(rules))

    def heal_drops(self) -> None:
        """Forget every partition and loss of the lab."""
        tables = sh("ip", "netns", "exec", self.namespace, "nft", "list", "tables", "bridge", check=False).stdout
        if _DROPS in tables:
            sh("ip", "netns", "exec", self.namespace, "nft", "delete", "table", "bridge", _DROPS)

    def connect(self, address: str, port: int, timeout_s: float = 10) -> socket.socket:
        """A connection to a host of the lab, made on the lab's network; enters the namespace for good."""
        enter(self.namespace)
        try:
            connected = socket.create_connection((address, port), timeout=timeout_s)
        except OSError as error:
            raise LabError(f"{address} port {port}: {error}") from error
        connected.settimeout(None)
        return connected


def leftovers(lab: str) -> list[str]:
    """Namespaces of the lab that are still there."""
    found: list[str] = []
    with suppress(FileNotFoundError):
        names = sorted(path.name for path in Path("/run/netns").iterdir())
        found = [name for name in names if name == f"lab-{lab}" or name.startswith(f"lab-{lab}-")]
    return found

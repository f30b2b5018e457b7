"""A lab: its hosts, its network, its keys, and what Ansible needs to reach it.

Invariant: a lab's name belongs to one state directory at a time. ``/run/neon-lab/NAME`` says which, so two clones cannot take
over each other's hosts; labs of different names have different subnets and may run side by side.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import network
from lab.hosts import Host
from lab.images import Image, Images
from lab.naming import checked_name, free_numbers, free_subnet, hosts_file
from lab.processes import kill_group, remove_group
from lab.shell import LabError, locked, say, sh

RUN = Path("/run/neon-lab")
_AT_ONCE = 8


def default_state() -> Path:
    """Where images and disks are kept: LAB_STATE, or ``.cache/lab`` in the clone."""
    return Path(os.environ.get("LAB_STATE") or Path(__file__).resolve().parent.parent / ".cache/lab").absolute()


class Lab:
    """A lab by its name."""

    def __init__(self, name: str, state: Path) -> None:
        self.name = checked_name("lab", name)
        self.state = state
        self.home = state / "labs" / name
        self.run = RUN / name
        self.images = Images(state / "images")

    @property
    def subnet(self) -> str:
        try:
            return json.loads((self.run / "lab.json").read_text())["subnet"]
        except FileNotFoundError:
            raise LabError(f"there is no lab {self.name!r}: bring it up first") from None

    @property
    def key(self) -> Path:
        return self.home / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.home / "known_hosts"

    @property
    def network(self) -> network.LabNetwork:
        return network.LabNetwork(self.name, self.subnet)

    def exists(self) -> bool:
        return (self.run / "lab.json").exists()

    def _host(self, name: str) -> Host:
        return Host(self.name, self.network, self.subnet, name, self.home / "hosts" / name, self.run / name)

    def hosts(self) -> list[Host]:
        """All hosts that were created, by number."""
        if not self.exists():
            return []
        names = [path.parent.name for path in (self.home / "hosts").glob("*/host.json")]
        return sorted((self._host(name) for name in names), key=lambda host: host.number)

    def chosen(self, names: Iterable[str]) -> list[Host]:
        """The named hosts. Raises LabError for a name that the lab does not know."""
        known = {host.name: host for host in self.hosts()}
        missing = [name for name in names if name not in known]
        if missing:
            raise LabError(f"lab {self.name} has no host {', '.join(missing)}; it has: {', '.join(known) or 'none'}")
        return [known[name] for name in names]

    def _claim(self) -> None:
        """Take the name and a subnet for this state directory."""
        with locked(RUN / "lock"):
            record = self.run / "lab.json"
            if record.exists():
                owner = json.loads(record.read_text())["state"]
                if owner != str(self.state):
                    raise LabError(
                        f"lab {self.name!r} belongs to {owner}: choose another name with --lab, or destroy that one first"
                    )
                return
            taken = [json.loads(path.read_text())["subnet"] for path in RUN.glob("*/lab.json")]
            # A lab outlives the machine's reboot, and its subnet with it: hosts have their addresses in their files.
            kept = self.home / "subnet"
            subnet = kept.read_text().strip() if kept.exists() and kept.read_text().strip() not in taken else free_subnet(taken)
            self.home.mkdir(parents=True, exist_ok=True)
            kept.write_text(f"{subnet}\n")
            self.run.mkdir(parents=True, exist_ok=True)
            staged = self.run / "lab.json.new"
            staged.write_text(json.dumps({"subnet": subnet, "state": str(self.state)}))
            staged.rename(record)

    def up(self, names: list[str], image: Image, *, memory: str | None = None, suppress_sync: bool = False) -> None:
        """Create the hosts that are new and power on those that are off; the others are left as they are."""
        for name in names:
            checked_name("host", name)
        self._claim()
        with locked(self.run / "lock"):
            if not self.key.exists():
                sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"lab-{self.name}", "-f", self.key)
            self.network.ensure()
            known = {host.name: host for host in self.hosts()}
            numbers = free_numbers(host.number for host in known.values())
            public_key = Path(f"{self.key}.pub").read_text()
            for name in names:
                if name not in known:
                    self._host(name).create(next(numbers), image, public_key, memory, suppress_sync)
            everyone = self.hosts()
            table = hosts_file((host.name, host.address.ip) for host in everyone)
            for host in everyone:
                host.write("etc/hosts", table)
            self.known_hosts.write_text("".join(f"{host.address.ip},{host.name} {host.public_key()}" for host in everyone))
            say(f"powering on {', '.join(names)}")
            each([host for host in everyone if host.name in names], Host.power_on)

    def destroy(self, names: list[str]) -> None:
        """Remove the named hosts, or without names everything of the lab, in whatever state it is."""
        if names:
            with locked(self.run / "lock"):
                each(self.chosen(names), Host.destroy)
            return
        if self.exists():
            owner = json.loads((self.run / "lab.json").read_text())["state"]
            if owner != str(self.state):
                raise LabError(f"lab {self.name!r} belongs to {owner}: destroy it from there")
            with locked(self.run / "lock"):
                each([self._host(path.name) for path in (self.home / "hosts").glob("*/")], Host.destroy)
        kill_group(self.name)
        for namespace in network.leftovers(self.name):
            sh("ip", "netns", "del", namespace)
        remove_group(self.name)
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)

    def inventory(self) -> dict:
        """What an Ansible inventory script answers: how to reach each host."""
        proxy = f"{sys.executable} {Path(__file__).resolve().parent} --lab {self.name} --state {self.state} connect %h %p"
        shared = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={self.known_hosts} -o IdentitiesOnly=yes -o ProxyUseFdpass=yes "
            f"-o 'ProxyCommand={proxy}' "
            # A host that lost its power answers nothing, ever.
            "-o ConnectTimeout=10 -o ServerAliveInterval=3 -o ServerAliveCountMax=3",
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        hosts = self.hosts()
        hostvars = {
            host.name: {"ansible_host": host.address.ip, "ansible_control_path": str(host.ssh_control)} for host in hosts
        }
        return {
            "all": {"hosts": [host.name for host in hosts], "vars": shared},
            "_meta": {"hostvars": hostvars},
        }


def each(hosts: Iterable[Host], action: Callable[[Host], None]) -> None:
    """Do it to all of them, some at a time; the first error is raised when all have been tried."""
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        tasks = [pool.submit(action, host) for host in hosts]
    for task in tasks:
        task.result()

"""One host: created, powered on and off, destroyed.

Invariant: ``host.json`` is written last when a host is created and everything of a host is below its directory, in its cgroup
or in its network namespace; so a host that was left half made or half destroyed is found and cleaned from these alone.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import closing
from pathlib import Path

from lab.cable import set_delay
from lab.images import Image
from lab.naming import Address
from lab.network import LabNetwork
from lab.processes import CGROUP_TOP, child_of, kill, kill_group, memory_in_use, recall, remember, remove_group, wait_gone
from lab.shell import LabError, sh

# Everything below runs in a mount namespace of the host's own, which holds its overlay and a pure cgroup v2 tree whatever the
# machine uses; both vanish with the host. One cgroup per host is a must: systemd kills by cgroup.
_LAUNCH = """
    for controller in memory cpu; do
        if [ -e /sys/fs/cgroup/$controller/cgroup.procs ]; then
            mkdir -p /sys/fs/cgroup/$controller/$CGROUP
            echo $$ > /sys/fs/cgroup/$controller/$CGROUP/cgroup.procs
            [ $controller != memory ] || [ -z "$MEMORY" ] || echo $MEMORY > /sys/fs/cgroup/memory/$CGROUP/memory.limit_in_bytes
        fi
    done
    [ -e /sys/fs/cgroup/cgroup.controllers ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mkdir -p /sys/fs/cgroup/$CGROUP
    echo $$ > /sys/fs/cgroup/$CGROUP/cgroup.procs
    mount -t overlay overlay -o lowerdir=$LOWERS,upperdir=$DISK,workdir=$WORK $ROOT
    mkdir -p /run/systemd && mount -t tmpfs tmpfs /run/systemd
    status=133  # what nspawn returns when the host reboots itself
    while [ $status = 133 ]; do status=0; "$@" || status=$?; done
"""


class Host:
    """A host by its name; ``home`` holds its disk, ``run`` what is of this boot of the machine only."""

    def __init__(self, lab: str, network: LabNetwork, subnet: str, name: str, home: Path, run: Path) -> None:
        self.name, self.home, self.run = name, home, run
        self._network, self._subnet = network, subnet
        self._cgroup = f"{lab}/{name}"
        self.disk = home / "disk"

    @property
    def spec(self) -> dict:
        """What was decided when the host was created."""
        return json.loads((self.home / "host.json").read_text())

    @property
    def number(self) -> int:
        return self.spec["number"]

    @property
    def address(self) -> Address:
        return Address(self._subnet, self.number)

    @property
    def supervisor(self) -> int | None:
        return recall(self.run / "supervisor.pid")

    @property
    def init(self) -> int | None:
        """The pid, on this machine, of the host's PID 1; None when it is off."""
        return child_of(child_of(self.supervisor, "systemd-nspawn"), "systemd")

    @property
    def ssh_control(self) -> Path:
        """Where Ansible keeps its open connection: by host, as another lab may reuse the address."""
        return self.run / "ssh"

    def create(self, number: int, image: Image, authorized_key: str, memory: str | None, suppress_sync: bool) -> None:
        """Make the disk of a new host."""
        shutil.rmtree(self.home, ignore_errors=True)
        for directory in ("disk", "work", "root"):
            (self.home / directory).mkdir(parents=True)
        self.write("etc/hostname", f"{self.name}\n")
        key = self._inside("etc/ssh/ssh_host_ed25519_key")
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", key)
        self.write("root/.ssh/authorized_keys", authorized_key, 0o600)
        (self.disk / "root/.ssh").chmod(0o700)
        (self.disk / "root").chmod(0o700)
        # A host reaches no archive but the one it is given; without one it has the packages of its image.
        self.write("etc/apt/sources.list", "deb [trusted=yes] file:///srv/apt ./\n" if image.mirror else "")
        # A host has no console to log in on.
        for unit in ("console-getty.service", "getty@.service"):
            self._inside(f"etc/systemd/system/{unit}").symlink_to("/dev/null")
        spec = {
            "number": number,
            "suite": image.suite,
            "lowers": [str(path) for path in image.lowers],
            "mirror": str(image.mirror) if image.mirror else None,
            "memory": memory,
            "suppress_sync": suppress_sync,
        }
        staged = self.home / "host.json.new"
        staged.write_text(json.dumps(spec))
        staged.rename(self.home / "host.json")

    def _inside(self, path: str) -> Path:
        # While the overlay is mounted its upper directory is the kernel's: go through the host's own root.
        init = self.init
        where = (Path(f"/proc/{init}/root") if init else self.disk) / path
        where.parent.mkdir(parents=True, exist_ok=True)
        return where

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the host, whether it is on or off."""
        file = self._inside(path)
        file.write_text(text)
        file.chmod(mode)

    def public_key(self) -> str:
        return self._inside("etc/ssh/ssh_host_ed25519_key.pub").read_text()

    def power_on(self, timeout_s: float = 90) -> None:
        """Boot; returns when systemd in the host says that it is ready. A host that is on stays as it is."""
        if self.init:
            return
        self._clean_up()
        self.run.mkdir(parents=True, exist_ok=True)
        self._network.plug_in(self.name, self.address)
        spec = self.spec
        nspawn = [
            "systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", f"--directory={self.home / 'root'}",
            f"--machine={self.name}", f"--network-namespace-path=/run/netns/{self._network.host_namespace(self.name)}",
            # The network is the host's own, but nspawn cannot know that.
            "--capability=CAP_NET_ADMIN,CAP_NET_RAW", "--link-journal=no", "--resolv-conf=off", "--timezone=off",
            "--console=read-only", "--notify-ready=yes",
        ]  # fmt: skip
        if spec["mirror"]:
            nspawn.append(f"--bind-ro={spec['mirror']}:/srv/apt")
        if spec["suppress_sync"]:
            nspawn.append("--suppress-sync=yes")
        environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "NOTIFY_SOCKET": str(self.run / "notify"),
            # /proc/sys/net is the host's own; the rest of /proc/sys is the machine's.
            "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
            "CGROUP": f"{CGROUP_TOP}/{self._cgroup}",
            "MEMORY": spec["memory"] or "",
            "LOWERS": ":".join(spec["lowers"]),
            "DISK": str(self.disk),
            "WORK": str(self.home / "work"),
            "ROOT": str(self.home / "root"),
        }
        with (
            closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as ready,
            (self.home / "console.log").open("ab") as console,
        ):
            ready.bind(str(self.run / "notify"))
            child = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _LAUNCH, "sh", *nspawn],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True, env=environment,
            )  # fmt: skip
            remember(self.run / "supervisor.pid", child.pid)
            self._wait_ready(ready, child, time.monotonic() + timeout_s)
        (self.run / "notify").unlink()

    def _wait_ready(self, ready: socket.socket, child: subprocess.Popen, deadline: float) -> None:
        ready.settimeout(0.2)
        while True:
            try:
                if "READY=1" in ready.recv(4096).decode().splitlines():
                    return
            except TimeoutError:
                if child.poll() is not None or time.monotonic() > deadline:
                    tail = (self.home / "console.log").read_text(errors="replace")[-2000:]
                    raise LabError(f"{self.name} did not boot; its console said:\n{tail}") from None

    def power_off(self, *, soft: bool = False, timeout_s: float = 90) -> None:
        """Pull the plug, or with ``soft`` shut down properly."""
        supervisor, init = self.supervisor, self.init
        if soft and init:
            kill(init, signal.SIGRTMIN + 4)  # systemd: power off
            wait_gone(supervisor, timeout_s)
        self._clean_up()

    def _clean_up(self) -> None:
        """End and remove all that a host which is off should not have."""
        if self.ssh_control.exists():
            sh("ssh", "-S", self.ssh_control, "-O", "exit", self.name, check=False)
        if self._network.exists() and (self.home / "host.json").exists():
            # The cable first: a dead machine sends no FIN to its peers.
            sh("ip", "-n", self._network.namespace, "link", "set", self.address.port, "down", check=False)
        kill_group(self._cgroup)
        if (self.home / "host.json").exists():
            set_delay(self._network, self.address, self.run / "cable.pid", 0)
            self._network.unplug(self.name, self.address)
        remove_group(self._cgroup)
        for name in ("notify", "supervisor.pid", "ssh"):
            (self.run / name).unlink(missing_ok=True)

    def destroy(self) -> None:
        """Remove the host and its disk."""
        self._clean_up()
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)

    def set_link(self, state: str) -> None:
        self._network.set_link(self.address, state)

    def set_delay(self, milliseconds: float) -> None:
        set_delay(self._network, self.address, self.run / "cable.pid", milliseconds)

    def command(self, *argv: str) -> list[str]:
        """The command that runs ``argv`` in the host, as root and without ssh."""
        init = self.init
        if not init:
            raise LabError(f"{self.name} is off: turn it on first (lab on {self.name})")
        return ["nsenter", f"--target={init}", "--all", "--", *argv]

    def status(self) -> str:
        """``off``, ``on`` or ``cut``."""
        if not self.init:
            return "off"
        return "on" if self._network.is_up(self.address) else "cut"

    def memory(self) -> int | None:
        return memory_in_use(self._cgroup)

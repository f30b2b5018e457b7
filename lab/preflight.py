"""What the machine must have before a lab can be made.

Invariant: nothing on the machine changes here. Every check runs, and the answer names each thing that is missing together
with its repair, so that the user mends the machine once and not ten times.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from lab.shell import LabError

PACKAGES = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "nft": "nftables",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "dpkg-deb": "dpkg",
}
DISK_BYTES_NEEDED = 6 << 30
MEMORY_BYTES_NEEDED = 2 << 30


def _answers(*argv: str) -> bool:
    return subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def root() -> str | None:
    if os.geteuid() == 0:
        return None
    return "you are not root: hosts need mounts and network namespaces. Run the same command as root (sudo make cluster)."


def programs() -> str | None:
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program)})
    return f"programs are missing. Install them: apt-get install {' '.join(missing)}" if missing else None


def namespaces() -> str | None:
    if _answers("unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "true"):
        return None
    return (
        "the kernel refuses new mount, network or pid namespaces. In a container, run it privileged "
        "(docker run --privileged, podman run --privileged); a virtual machine needs nothing special."
    )


def networking() -> str | None:
    made = "ip link add b0 type bridge && ip link add v0 type veth peer name v1 && ip link set v0 master b0"
    if _answers("unshare", "--net", "sh", "-ec", made):
        return None
    return "the kernel has no bridge or veth devices. Load them: modprobe bridge veth (and add both to /etc/modules)."


def firewall() -> str | None:
    if _answers("unshare", "--net", "nft", "add table inet t; add chain inet t c { type filter hook input priority 0; }"):
        return None
    return "the kernel has no nftables. Load it: modprobe nf_tables nft_ct (and add both to /etc/modules)."


def overlays(state: Path) -> str | None:
    if any(character in str(state) for character in ":,\\ \"'"):
        return f"the path {state} has a character that overlayfs mounts cannot take. Move the clone or set LAB_STATE elsewhere."
    if any(line.split()[-1] == "overlay" for line in Path("/proc/filesystems").read_text().splitlines()):
        return None
    if _answers("modprobe", "--dry-run", "overlay"):
        return None  # mounting loads it
    return "the kernel has no overlayfs. Load it: modprobe overlay; use a kernel with CONFIG_OVERLAY_FS."


def cgroups() -> str | None:
    if _answers("unshare", "--mount", "--propagation", "private", "sh", "-ec",
                "[ -e /sys/fs/cgroup/cgroup.controllers ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup"):  # fmt: skip
        return None
    return (
        "there is no cgroup v2 tree. Boot with systemd.unified_cgroup_hierarchy=1, or run the container with --cgroupns=host."
    )


def space(state: Path) -> str | None:
    place = next(parent for parent in (state, *state.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free >= DISK_BYTES_NEEDED:
        return None
    needed = DISK_BYTES_NEEDED >> 20
    return f"{place} has {free >> 20} MiB free, a lab needs {needed} MiB. Free some, or point LAB_STATE to a larger disk."


def memory() -> str | None:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) << 10
    if available >= MEMORY_BYTES_NEEDED:
        return None
    needed = MEMORY_BYTES_NEEDED >> 20
    return f"{available >> 20} MiB of memory are available, a lab needs {needed} MiB. Stop something or add memory."


def complaints(checks: list[Callable[[], str | None]]) -> list[str]:
    """What the checks complain about, in order."""
    return [complaint for check in checks if (complaint := check())]


def require(state: Path, *, need_programs: bool = True) -> None:
    """Raise LabError naming everything that is missing; ``need_programs`` is false before the packages are installed."""
    found = complaints([root, lambda: overlays(state), lambda: space(state), memory])
    tools_missing = programs()
    if need_programs and tools_missing:
        found.append(tools_missing)
    if os.geteuid() == 0 and shutil.which("unshare"):
        found += complaints([namespaces, cgroups])
        if shutil.which("ip") and not namespaces():
            found += complaints([networking])
        if shutil.which("nft") and not namespaces():
            found += complaints([firewall])
    if found:
        raise LabError("this machine cannot run a lab yet:\n" + "\n".join(f"  - {complaint}" for complaint in found))

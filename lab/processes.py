"""Finding and ending the processes of hosts.

Invariant: a process is known by its pid and the time it started, so that a later process with the same pid is never killed
for it; and all processes of a host are in the host's cgroup, so that ending them needs no memory of having started them.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lab.shell import LabError

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_TOP = "neon-lab"


def start_time(pid: int) -> str | None:
    """Tells a process from a later one with the same pid; None once it has ended. A zombie has ended: PID 1 may reap late."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def remember(path: Path, pid: int) -> None:
    """Write down a process that we started."""
    path.write_text(f"{pid} {start_time(pid)} {_boot_id()}\n")


def recall(path: Path) -> int | None:
    """The pid written down by ``remember``, or None when that very process is no longer there."""
    try:
        pid, started, boot = path.read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return int(pid) if boot == _boot_id() and start_time(int(pid)) == started else None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def child_of(pid: int | None, name: str) -> int | None:
    """The child of a process that runs the named program. Hosts reboot, so pids inside them are looked up, never kept."""
    if pid is None:
        return None
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == name:
                return int(child)
    return None


def wait_gone(pid: int | None, seconds: float) -> None:
    """Return when the process has ended. Raises LabError after so many seconds."""
    deadline = time.monotonic() + seconds
    while pid is not None and start_time(pid):
        if time.monotonic() > deadline:
            raise LabError(f"process {pid} does not end")
        time.sleep(0.01)


def kill(pid: int | None, number: int = signal.SIGKILL) -> None:
    """Send a signal; a process that has ended is no error."""
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _hierarchies() -> list[Path]:
    """The roots of the machine's cgroup trees: one on a unified machine, one per controller on a legacy or hybrid one."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [path for path in sorted(CGROUPS.glob("*/")) if not path.is_symlink() and (path / "cgroup.procs").exists()]


def _groups(name: str) -> Iterator[Path]:
    """Every group below (and including) the named one, children first."""
    for root in _hierarchies():
        for where, _, _ in os.walk(root / CGROUP_TOP / name, topdown=False):
            yield Path(where)


def kill_group(name: str, seconds: float = 10) -> None:
    """Kill every process in the cgroup ``name`` (``lab`` or ``lab/host``) and wait until none is left."""
    deadline = time.monotonic() + seconds
    while True:
        members: set[int] = set()
        for group in _groups(name):
            with suppress(OSError):
                members |= {
                    int(pid) for pid in (group / "cgroup.procs").read_text().split() if int(pid) and start_time(int(pid))
                }
        if not members:
            return
        if time.monotonic() > deadline:
            raise LabError(f"processes {sorted(members)} of {name} do not end")
        for pid in members:
            kill(pid)
        time.sleep(0.01)


def remove_group(name: str, seconds: float = 5) -> None:
    """Remove the cgroup from every hierarchy, and the lab's top group with the last of them."""
    deadline = time.monotonic() + seconds
    for group in list(_groups(name)):
        while True:
            try:
                group.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError as error:  # the last process may still be leaving
                if time.monotonic() > deadline:
                    raise LabError(f"cannot remove {group}: {error}") from error
                time.sleep(0.02)
    for root in _hierarchies():
        for parent in (Path(name).parent, Path()):
            with suppress(OSError):  # not empty: other hosts and labs are still there
                (root / CGROUP_TOP / parent).rmdir()


def memory_in_use(name: str) -> int | None:
    """Bytes that the kernel accounts to the cgroup (page cache included), or None when it does not say."""
    for file in (
        CGROUPS / "memory" / CGROUP_TOP / name / "memory.usage_in_bytes",
        CGROUPS / CGROUP_TOP / name / "memory.current",
    ):
        with suppress(OSError):
            return int(file.read_text())
    return None

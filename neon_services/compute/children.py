"""Child processes that do not outlive compute_ctl, and what a killed compute_ctl has left behind."""

import ctypes
import hashlib
import logging
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

from neon_services.ground.errors import NeonError

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_IPC_RMID = 0
_libc = ctypes.CDLL(None, use_errno=True)
ORPHAN_GRACE_S = 5.0


def die_with_parent(parent_pid: int, signal_name: str) -> Callable[[], None]:
    """A function for the child between fork and exec: the kernel sends it the signal when its parent dies."""
    number = getattr(signal, f"SIG{signal_name}")

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare


def _orphan_pid(pgdata: Path) -> int | None:
    """The living postmaster of this data directory, verified by what it is and where it runs."""
    try:
        pid = int((pgdata / "postmaster.pid").read_text().split("\n", 1)[0])
        program = Path(f"/proc/{pid}/exe").readlink().name.removesuffix(" (deleted)")
        directory = Path(f"/proc/{pid}/cwd").stat()
        here = pgdata.stat()
    except (OSError, ValueError):
        return None
    same_place = (directory.st_dev, directory.st_ino) == (here.st_dev, here.st_ino)
    return pid if program in ("postgres", "postmaster") and same_place and pid != os.getpid() else None


def _remove_socket_lock(pgdata: Path) -> None:
    """Remove the lock of the Unix socket that a dead postmaster has left.

    Postgres does so itself, but not while the dead one is still a zombie, which it takes for a living one.
    """
    try:
        lines = (pgdata / "postmaster.pid").read_text().split("\n")
        port, directory = int(lines[3]), lines[4].strip()
        lock = Path(directory) / f".s.PGSQL.{port}.lock"
        if directory and lock.read_text().split("\n", 1)[0] == lines[0]:
            lock.unlink()
    except (OSError, ValueError, IndexError):
        return


def _remove_shared_memory(pgdata: Path) -> None:
    """Remove the System V segment of a killed postmaster.

    Postgres does so when it starts again in the same directory; ours is a new one each time.
    """
    try:
        lines = (pgdata / "postmaster.pid").read_text().split("\n")
        pid, (key, segment) = int(lines[0]), (int(word) for word in lines[6].split())
        rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    except (OSError, ValueError, IndexError):
        return
    for row in rows:  # key shmid perms size cpid lpid nattch ...
        if (int(row[0]) & 0xFFFF_FFFF, int(row[1]), int(row[4]), int(row[6])) == (key & 0xFFFF_FFFF, segment, pid, 0):
            _libc.shmctl(segment, _IPC_RMID, None)


def place_dynamic_shared_memory(pgdata: Path) -> Path | None:
    """Let ``pg_dynshmem`` lead to a directory in memory that is the same at each start, so that Postgres itself removes
    what a killed one has left. None when there is no such place: then it stays in the data directory.
    """
    place = Path("/dev/shm") / f"neon.{hashlib.sha256(str(pgdata).encode()).hexdigest()[:24]}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        status = place.lstat()
    except OSError:
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        log.warning("%s is not ours: dynamic shared memory stays in the data directory", place)
        return None
    (pgdata / "pg_dynshmem").rmdir()
    (pgdata / "pg_dynshmem").symlink_to(place)
    return place


def fence_orphan(pgdata: Path) -> int | None:
    """Stop a postmaster that a killed compute_ctl has left, so that the port is free and nothing writes any more.

    Its pid, or None when there was none. Raises NeonError when it cannot be stopped.
    """
    pid = _orphan_pid(pgdata)
    if pid is not None:
        log.warning("stopping the Postgres (pid %d) that an earlier run has left in %s", pid, pgdata)
        _end(pid, pgdata)
    _remove_socket_lock(pgdata)
    _remove_shared_memory(pgdata)
    return pid


def _end(pid: int, pgdata: Path) -> None:
    for number in (signal.SIGQUIT, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + ORPHAN_GRACE_S
        while time.monotonic() < deadline:
            if _orphan_pid(pgdata) != pid:
                return
            time.sleep(0.01)
    raise NeonError(f"Postgres with pid {pid}, which an earlier run has left in {pgdata}, does not end")

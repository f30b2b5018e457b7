"""A cable with a delay: frames cross between two taps, each one late by so many milliseconds.

Invariant: frames keep their order. Used where the kernel has no netem; runs as a process of its own inside the lab's namespace.
"""

import fcntl
import heapq
import os
import select
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from lab.naming import Address
from lab.network import LabNetwork
from lab.processes import kill, recall, remember, wait_gone
from lab.shell import LabError, sh

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_FRAME_BYTES_MAX = 65536


def _open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def carry(left: str, right: str, milliseconds: float) -> None:
    """Carry frames between the two taps until killed; says ``ready`` on stdout when both exist."""
    taps = [_open_tap(left), _open_tap(right)]
    print("ready", flush=True)
    other = {taps[0]: taps[1], taps[1]: taps[0]}
    queue: list[tuple[float, int, int, bytes]] = []
    count = 0
    poll = select.epoll()
    for tap in taps:
        poll.register(tap, select.EPOLLIN)
    while True:
        wait = max(0.0, queue[0][0] - time.monotonic()) if queue else -1
        for tap, _ in poll.poll(wait):
            with suppress(BlockingIOError):
                while True:
                    frame = os.read(tap, _FRAME_BYTES_MAX)
                    count += 1
                    heapq.heappush(queue, (time.monotonic() + milliseconds / 1000, count, other[tap], frame))
        while queue and queue[0][0] <= time.monotonic():
            _, _, tap, frame = heapq.heappop(queue)
            with suppress(OSError):  # a cable loses what the far end cannot take
                os.write(tap, frame)


def set_delay(network: LabNetwork, address: Address, pid_file: Path, milliseconds: float) -> None:
    """Splice a delaying cable in between the host's port and the bridge; 0 takes it out again."""
    middle, left, right = (f"{part}{address.number}" for part in ("mid", "tapl", "tapr"))
    running = recall(pid_file)
    if running:
        kill(running, signal.SIGTERM)
        wait_gone(running, 5)
        sh("ip", "-n", network.namespace, "link", "set", address.port, "master", "br0", check=False)
        sh("ip", "-n", network.namespace, "link", "del", middle, check=False)
    pid_file.unlink(missing_ok=True)
    if not milliseconds:
        return
    # Its complaints go to a file: it outlives us and must not hold our caller's stderr open.
    with pid_file.with_suffix(".log").open("wb") as complaints:
        child = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{network.namespace}", sys.executable, Path(__file__).parent, "cable",
             left, right, str(milliseconds)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True,
        )  # fmt: skip
    remember(pid_file, child.pid)
    assert child.stdout is not None
    if child.stdout.readline() != b"ready\n":
        raise LabError("the delaying cable did not start: is there a /dev/net/tun?")
    commands = (
        f"link add {middle} type bridge forward_delay 0\nlink set {middle} up\nlink set {left} master {middle} up\n"
        f"link set {right} master br0 up\nlink set {address.port} master {middle}\n"
    )
    sh("ip", "-n", network.namespace, "-batch", "-", stdin=commands)

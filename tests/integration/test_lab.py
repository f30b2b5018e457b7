"""The lab with real hosts: they boot, talk, are cut off and come back; destroying leaves nothing, whatever was cut off before.

Runs where the lab can (root, namespaces, its packages and image); says why when it cannot.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import preflight
from lab.labs import RUN, default_state
from lab.processes import CGROUPS
from lab.shell import LabError
from tests.waiting import wait_until

pytestmark = pytest.mark.lab
ROOT = Path(__file__).resolve().parents[2]
NAME = f"test-{os.getpid()}"
DEADLINE_S = 60


def lab(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, ROOT / "lab", "--lab", NAME, *arguments], capture_output=True, text=True, check=False
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def status() -> dict[str, str]:
    return {row["name"]: row["status"] for row in json.loads(lab("list", "--json").stdout)}


def ping(source: str, target: str) -> bool:
    return lab("exec", source, "--", "ping", "-c1", "-W1", target, check=False).returncode == 0


def leftovers() -> list[str]:
    """Everything of this lab that is still on the machine."""
    found = [str(path) for path in Path("/run/netns").glob(f"lab-{NAME}*")]
    found += [str(path) for path in (RUN / NAME, default_state() / "labs" / NAME) if path.exists()]
    found += [str(path) for path in CGROUPS.glob(f"**/neon-lab/{NAME}")]
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes()
        except OSError:
            continue
        if f"/labs/{NAME}/".encode() in words:
            found.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.fixture
def two_hosts() -> Iterator[None]:
    try:
        preflight.require(default_state())
    except LabError as error:
        pytest.skip(str(error))
    try:
        lab("up", "one", "two")
        yield
    finally:
        lab("destroy")
        assert leftovers() == []


def test_hosts_talk_are_cut_off_and_come_back(two_hosts: None) -> None:
    assert status() == {"one": "on", "two": "on"}
    assert lab("exec", "one", "--", "hostname").stdout == "one\n"
    assert lab("exec", "one", "--", "systemctl", "is-system-running", "--wait").stdout == "running\n"
    assert ping("one", "two")

    lab("cut", "two")
    assert status()["two"] == "cut"
    assert not ping("one", "two")
    lab("heal", "two")
    wait_until(lambda: ping("one", "two"), "two to answer again", DEADLINE_S)

    lab("drop", "one", "two", "--one-way")
    assert not ping("one", "two")
    lab("heal")
    assert ping("one", "two")

    lab("delay", "two", "--ms", "60")
    started = time.monotonic()
    wait_until(lambda: ping("one", "two"), "two to answer through the slow cable", DEADLINE_S)
    assert time.monotonic() - started > 0.12, "each way takes 60 ms"
    lab("delay", "two", "--ms", "0")
    assert ping("one", "two")


def test_a_power_cut_keeps_the_disk(two_hosts: None) -> None:
    lab("exec", "one", "--", "sh", "-c", "echo kept > /root/file; touch /run/forgotten; sync")
    boot_id = lab("exec", "one", "--", "cat", "/proc/1/stat").stdout.split()[21]
    lab("off", "one")
    assert status() == {"one": "off", "two": "on"}
    assert "is off" in lab("exec", "one", "--", "true", check=False).stderr
    lab("on", "one")
    assert lab("exec", "one", "--", "cat", "/root/file").stdout == "kept\n"
    assert lab("exec", "one", "--", "cat", "/proc/1/stat").stdout.split()[21] != boot_id
    assert lab("exec", "one", "--", "test", "-e", "/run/forgotten", check=False).returncode == 1


def test_lab_addresses_exist_inside_only(two_hosts: None) -> None:
    address = next(row["address"] for row in json.loads(lab("list", "--json").stdout) if row["name"] == "one")
    knock = f"import socket; socket.create_connection(('{address}', 22), 5)"
    lab("run", "--", sys.executable, "-c", knock)
    inside = lab("run", "--", "ip", "-4", "route").stdout
    outside = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True).stdout
    subnet = address.rpartition(".")[0]
    assert subnet in inside and subnet not in outside
    absent = lab("run", "--", "no-such-program", check=False)
    assert absent.returncode == 1 and absent.stderr.startswith("lab: cannot run no-such-program")
    refused = lab("connect", "192.0.2.1", "22", check=False)
    assert refused.returncode == 1 and "no host of lab" in refused.stderr


@pytest.mark.parametrize("after_s", [0.15, 0.4, 0.8])
def test_an_up_that_was_killed_is_finished_by_the_next(two_hosts: None, after_s: float) -> None:
    lab("destroy", "one", "two")
    killed = subprocess.Popen(
        [sys.executable, ROOT / "lab", "--lab", NAME, "up", "one", "two"], stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        killed.wait(after_s)  # whichever point that is: the next run must cope with all of them
    except subprocess.TimeoutExpired:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    lab("up", "one", "two")
    assert status() == {"one": "on", "two": "on"}
    assert ping("one", "two")

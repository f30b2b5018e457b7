"""A process is known by its pid and start time; a later one with the same pid is another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.processes import child_of, kill, recall, remember, start_time, wait_gone
from lab.shell import LabError


def sleeper() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)


def test_a_running_process_is_recalled_until_it_ends(tmp_path: Path) -> None:
    process = sleeper()
    remember(tmp_path / "pid", process.pid)
    assert recall(tmp_path / "pid") == process.pid
    kill(process.pid)
    wait_gone(process.pid, 5)  # a zombie counts as gone
    assert recall(tmp_path / "pid") is None
    process.communicate()


def test_another_process_with_the_same_pid_is_not_ours(tmp_path: Path) -> None:
    remember(tmp_path / "pid", os.getpid())
    pid, started, boot = (tmp_path / "pid").read_text().split()
    (tmp_path / "pid").write_text(f"{pid} {int(started) - 1} {boot}\n")
    assert recall(tmp_path / "pid") is None
    (tmp_path / "pid").write_text(f"{pid} {started} another-boot\n")
    assert recall(tmp_path / "pid") is None


@pytest.mark.parametrize("content", ["", "12", "12 34", "a b c d"])
def test_a_torn_pid_file_is_no_process(tmp_path: Path, content: str) -> None:
    (tmp_path / "pid").write_text(content)
    assert recall(tmp_path / "pid") is None
    assert recall(tmp_path / "absent") is None


def test_waiting_for_a_process_that_stays_has_a_deadline() -> None:
    with pytest.raises(LabError, match="does not end"):
        wait_gone(os.getpid(), 0.05)


def test_children_are_found_by_name() -> None:
    process = sleeper()
    try:
        name = Path(f"/proc/{process.pid}/comm").read_text().strip()
        assert child_of(os.getpid(), "no-such-program") is None
        assert child_of(os.getpid(), name) is not None
        assert child_of(None, name) is None
        assert start_time(process.pid) is not None
    finally:
        process.communicate()

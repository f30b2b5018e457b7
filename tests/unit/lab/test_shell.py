"""Commands fail loudly, and what is built once is there whole or not at all."""

from pathlib import Path

import pytest

from lab.cli import main
from lab.shell import LabError, built_once, digest, sh


def test_a_failing_command_shows_its_output() -> None:
    with pytest.raises(LabError, match="status 3\nout\nerr"):
        sh("sh", "-c", "echo out; echo err >&2; exit 3")
    assert sh("false", check=False).returncode == 1


def test_digest_keeps_parts_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc")


def test_a_build_that_was_cut_off_leaves_nothing_and_is_done_again(tmp_path: Path) -> None:
    target = tmp_path / "image"
    with pytest.raises(ZeroDivisionError), built_once(target) as scratch:
        assert scratch is not None
        scratch.mkdir()
        (scratch / "half").touch()
        (tmp_path / "image.tmp.upper").mkdir()
        raise ZeroDivisionError
    assert not target.exists()
    with built_once(target) as scratch:
        assert scratch is not None
        assert not scratch.exists()
        assert not (tmp_path / "image.tmp.upper").exists()
        scratch.mkdir()
    assert target.is_dir()
    with built_once(target) as scratch:
        assert scratch is None


def test_an_unknown_host_or_lab_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lab", "unit-none", "--state", str(tmp_path), "exec", "sk1", "--", "true"]) == 1
    assert capsys.readouterr().err == "lab: lab unit-none has no host sk1; it has: none\n"
    assert main(["--lab", "Bad", "--state", str(tmp_path), "list"]) == 1
    assert "lab name 'Bad'" in capsys.readouterr().err
    assert main(["--lab", "unit-none", "--state", str(tmp_path), "run"]) == 2


def test_the_lab_connects_to_its_own_hosts_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lab", "unit-none", "--state", str(tmp_path), "connect", "10.203.0.11", "22"]) == 1
    assert "no host of lab unit-none" in capsys.readouterr().err

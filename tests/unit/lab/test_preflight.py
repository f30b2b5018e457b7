"""Everything that is missing is named at once, with its repair, and nothing is changed."""

from pathlib import Path

import pytest

from lab import preflight
from lab.shell import LabError


def fail_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(preflight, "DISK_BYTES_NEEDED", 1 << 62)
    monkeypatch.setattr(preflight, "MEMORY_BYTES_NEEDED", 1 << 62)
    monkeypatch.setitem(preflight.PACKAGES, "no-such-program", "no-such-package")


def test_every_complaint_names_its_repair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail_all(monkeypatch)
    with pytest.raises(LabError) as raised:
        preflight.require(tmp_path / "not" / "yet")
    text = str(raised.value)
    for repair in ("sudo make cluster", "point LAB_STATE", "add memory", "apt-get install no-such-package"):
        assert repair in text
    assert not (tmp_path / "not").exists()


def test_programs_that_are_about_to_be_installed_are_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail_all(monkeypatch)
    with pytest.raises(LabError) as raised:
        preflight.require(tmp_path, need_programs=False)
    assert "no-such-package" not in str(raised.value)


def test_a_path_that_mount_cannot_take(tmp_path: Path) -> None:
    assert "overlayfs mounts cannot take" in (preflight.overlays(tmp_path / "a:b") or "")


def test_space_is_measured_where_the_state_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "DISK_BYTES_NEEDED", 1)
    assert preflight.space(tmp_path / "x" / "y") is None
    monkeypatch.setattr(preflight, "DISK_BYTES_NEEDED", 1 << 62)
    assert str(tmp_path) in (preflight.space(tmp_path / "x") or "")

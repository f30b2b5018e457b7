"""``python -m neon_services.simulation``: many schedules, or one with its trace."""

import sys

import pytest

from neon_services.simulation import __main__ as command
from neon_services.simulation.campaign import REQUIRED, Outcome


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["simulation", *arguments])
    return command.main()


def test_many(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--schedules", "6", "--first", "40", "--processes", "1") == 0
    printed = capsys.readouterr().out
    assert "6 schedules, 0 violations" in printed and "elections" in printed


@pytest.mark.parametrize("too_little", [False, True])
def test_a_violation_and_too_little_are_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], too_little: bool
) -> None:
    outcome = Outcome(schedules=1000)
    outcome.happened.update(dict.fromkeys(REQUIRED, 1000))
    if too_little:
        outcome.happened["torn"] = 3
    else:
        outcome.failures.append((17, "seed 17 at 1.0 ms: s1 lost WAL"))
    monkeypatch.setattr(command, "run_campaign", lambda *_, **__: outcome)
    assert run(monkeypatch, "--schedules", "1000") == 1
    printed = capsys.readouterr().out
    if too_little:
        assert "TOO LITTLE: torn in 3 of 1000 schedules" in printed
    else:
        assert "s1 lost WAL\n  replay: python -m neon_services.simulation 17" in printed


def test_replay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "3") == 0
    trace = capsys.readouterr().out.splitlines()
    assert "Profile(" in trace[0] and trace[-1].startswith("Stats(")
    assert any("is elected in term 1" in line for line in trace) and any("all faults stop" in line for line in trace)
    assert max(len(line) for line in trace[1:-1]) < 300
    assert run(monkeypatch, "3", "--quiet") == 0
    assert capsys.readouterr().out.splitlines() == trace[-1:]


@pytest.mark.parametrize("arguments", [[], ["3", "--schedules", "4"], ["--schedules", "0"]])
def test_bad_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *arguments)
    assert exit_.value.code == 2
    assert "--schedules" in capsys.readouterr().err

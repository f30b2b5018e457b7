"""Failpoints: their syntax, their counts and chances, and that a pause ends when somebody says so."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from neon_services.ground import failpoints
from neon_services.ground.errors import ConfigError
from neon_services.ground.failpoints import Failpoint, FailpointPanic, Returned

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Failpoints may be set, and nothing of it stays behind."""
    monkeypatch.setattr(failpoints, "_enabled", True)
    monkeypatch.setattr(failpoints, "_declared", {})
    yield


def place(actions: str, *, can_wait: bool = False) -> Failpoint:
    found = failpoints.declare(f"test-{next(_numbers)}", can_wait=can_wait)
    failpoints.configure([(found.name, actions)])
    return found


@pytest.mark.parametrize(
    ("actions", "hits"),
    [
        ("off", [None, None]),
        ("return", [Returned(None)] * 3),
        ("return(42)", [Returned("42")] * 2),
        ("return()", [Returned("")]),
        ("return(a->b)", None),
        ("return(50%*)", [Returned("50%*")]),
        ("2*return(x)", [Returned("x"), Returned("x"), None, None]),
        ("1*return->off", [Returned(None), None, None]),
        ("1*off->2*return(b)->return(c)", [None, Returned("b"), Returned("b"), Returned("c"), Returned("c")]),
        ("0%return(a)->return(b)", [Returned("b")] * 3),
        ("100%1*return", [Returned(None), None]),
        ("print(still alive!)", [None, None]),
        ("sleep(0)", [None]),
        ("0", [None]),
        (" 1*return -> return(2) ", [Returned(None), Returned("2")]),
    ],
)
def test_what_happens_at_each_hit(actions: str, hits: list[Returned | None] | None) -> None:
    if hits is None:  # as in the crate: a chain is split before arguments are looked at
        with pytest.raises(ConfigError, match="is not an action"):
            place(actions)
        return
    found = place(actions)
    assert [found.hit() for _ in hits] == hits


@pytest.mark.parametrize(
    "actions",
    ["", "->", "return->", "explode", "101%return", "-1%return", "%return", "x*return", "*return", "1*2*return", "sleep",
     "sleep()", "sleep(x)", "sleep(-1)", "sleep(99999999)", "sleep(٣)", "off(1)", "exit(2)", "pause(1)", "return(", "return)",
     "return(1)2", "RETURN", "delay(10)", f"{'9' * 400}*return", f"{'9' * 400}%return"],
)  # fmt: skip
def test_wrong_actions_are_refused_and_change_nothing(actions: str) -> None:
    found = place("return(before)", can_wait=True)
    with pytest.raises(ConfigError):
        failpoints.configure([(found.name, "off"), (found.name, actions)])
    assert found.hit() == Returned("before")


def test_any_text_is_either_actions_or_refused() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    pieces = ["return", "sleep", "off", "pause", "print", "->", "(", ")", "%", "*", "1", "100", " ", "\n", "\0", "é", "."]
    found = failpoints.declare("any", can_wait=True)
    outcomes: Counter[bool] = Counter()
    for _ in range(5000):
        text = "".join(generator.choices(pieces, k=generator.randrange(6)))
        try:
            failpoints.configure([("any", text)])
        except ConfigError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes[True], outcomes[False]) > 100, "such texts prove nothing"
    assert found.actions is None or found.actions


def test_a_chance_is_a_chance() -> None:
    found = place("25%return")
    hits = sum(found.hit() is not None for _ in range(4000))
    assert 800 < hits < 1200


def test_panic_is_no_error_of_ours() -> None:
    with pytest.raises(FailpointPanic, match=r"failpoint test-\d+ panic"):
        place("panic").hit()
    with pytest.raises(FailpointPanic, match=r"^boom$"):
        place("panic(boom)").hit()


def test_what_is_not_set_does_nothing() -> None:
    found = failpoints.declare("quiet")
    assert found.hit() is None
    failpoints.configure([("quiet", "return")])
    failpoints.configure([("quiet", "off")])
    assert found.actions is None, "an unset failpoint costs nothing"


def test_unknown_names_are_refused_with_those_that_exist() -> None:
    failpoints.declare("one")
    failpoints.declare("two")
    with pytest.raises(ConfigError, match="no failpoint 'tow' in this process: it has one, two"):
        failpoints.configure([("tow", "return")])


def test_where_the_event_loop_would_stop_there_is_no_pause() -> None:
    failpoints.declare("sync")
    with pytest.raises(ConfigError, match="cannot pause"):
        failpoints.configure([("sync", "1*return->pause")])


@pytest.mark.parametrize("action", ["pause", "sleep(3000000)"])
async def test_waiting_ends_when_the_failpoint_is_set_anew(action: str) -> None:
    found = place(action, can_wait=True)
    waiting = [asyncio.create_task(found.reach()) for _ in range(3)]
    done, _ = await asyncio.wait(waiting, timeout=0.05)
    assert not done
    waiting[0].cancel()
    failpoints.configure([(found.name, "off")])
    async with asyncio.timeout(5):
        assert await asyncio.gather(*waiting[1:]) == [None, None]
    assert waiting[0].cancelled()
    assert await found.reach() is None


async def test_sleeping_does_not_hold_up_the_event_loop() -> None:
    found = place("sleep(50)", can_wait=True)
    started = time.monotonic()
    assert await asyncio.gather(*(found.reach() for _ in range(20))) == [None] * 20
    assert 0.04 < time.monotonic() - started < 0.9


def test_without_the_variable_nothing_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    failpoints.declare("one")
    monkeypatch.setattr(failpoints, "_enabled", False)
    monkeypatch.delenv(failpoints.VARIABLE, raising=False)
    failpoints.enable_from_environment()
    assert not failpoints.is_enabled()
    with pytest.raises(ConfigError, match="FAILPOINTS"):
        failpoints.configure([("one", "return")])


@pytest.mark.parametrize("text", ["", "1", "one=return(5);two=1*off->return", "one=return(5) ; "])
def test_the_variable_opens_the_door_and_may_set_some(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    one = failpoints.declare("one")
    failpoints.declare("two")
    monkeypatch.setattr(failpoints, "_enabled", False)
    monkeypatch.setenv(failpoints.VARIABLE, text)
    failpoints.enable_from_environment()
    assert failpoints.is_enabled()
    assert one.hit() == (Returned("5") if "one" in text else None)


def test_a_wrong_variable_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "none=return")
    with pytest.raises(ConfigError, match="no failpoint 'none'"):
        failpoints.enable_from_environment()

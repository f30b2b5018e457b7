"""Which safekeeper WAL is received from: choosing, cooling down, changing over."""

from dataclasses import dataclass

import pytest

from neon_services.pageserver.wal_candidates import Candidates, ConnectionView, Rules

RULES = Rules(connect_timeout_s=10, lagging_wal_timeout_s=10, max_lsn_wal_lag=1000, availability_zone="here")


@dataclass
class Info:
    safekeeper_id: int
    commit_lsn: int
    safekeeper_connstr: str = "host:5454"
    availability_zone: str | None = None
    standby_horizon: int = 0

    def HasField(self, name: str) -> bool:
        return getattr(self, name) is not None


def chosen(candidates: Candidates, now: float) -> int | None:
    best = candidates.choose(now, RULES)
    return None if best is None else best.safekeeper_id


def test_the_most_advanced_is_chosen_and_the_silent_are_forgotten() -> None:
    candidates = Candidates()
    assert chosen(candidates, 0) is None
    for info, at in ((Info(1, 100), 0), (Info(2, 300), 1), (Info(3, 200), 5), (Info(4, 0), 5), (Info(5, 999, ""), 5)):
        candidates.update(info, at)
    assert chosen(candidates, 5) == 2  # not 4, which has no WAL, nor 5, which has no address
    candidates.expire(12, RULES)
    assert chosen(candidates, 12) == 3
    candidates.forget(3)
    assert chosen(candidates, 12) is None


def test_ties_go_to_our_zone_then_to_the_lowest_id() -> None:
    candidates = Candidates()
    for number, zone in ((1, None), (2, "there"), (3, "here")):
        candidates.update(Info(number, 100, availability_zone=zone), 0)
    assert chosen(candidates, 0) == 3
    candidates.forget(3)
    assert chosen(candidates, 0) == 1


def test_failures_cool_down_longer_and_longer_until_progress() -> None:
    candidates = Candidates()
    candidates.update(Info(1, 100), 0)
    delays = [candidates.connection_failed(1, 0) for _ in range(20)]
    assert delays[:3] == pytest.approx([0.1, 0.15, 0.225]) and delays[-1] == 15
    assert chosen(candidates, 14.9) is None and chosen(candidates, 15) == 1
    candidates.made_progress(1)
    assert chosen(candidates, 1) == 1 and candidates.connection_failed(1, 0) == pytest.approx(0.1)


def view(**changes: object) -> ConnectionView:
    values: dict[str, object] = {
        "safekeeper_id": 1,
        "availability_zone": None,
        "heard_at": 100.0,
        "wal_at": 100.0,
        "commit_lsn": 500,
    }
    return ConnectionView(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("info", "current", "last_record", "now", "reason"),
    [
        (Info(2, 500), view(), 500, 105, None),
        (Info(1, 9999), view(), 500, 105, None),  # the one we have
        (Info(2, 500), view(heard_at=90.0), 500, 105, "nothing heard"),
        (Info(2, 1499), view(), 500, 105, None),
        (Info(2, 1500), view(), 500, 105, "is ahead"),
        (Info(2, 500, availability_zone="here"), view(), 500, 105, "in our availability zone"),
        (Info(2, 500, availability_zone="here"), view(availability_zone="here"), 500, 105, None),
        (Info(2, 501), view(wal_at=94.0), 500, 105, "no WAL"),
        (Info(2, 500), view(wal_at=94.0), 500, 105, None),  # there is no more WAL
    ],
)
def test_when_to_change(info: Info, current: ConnectionView, last_record: int, now: float, reason: str | None) -> None:
    candidates = Candidates()
    candidates.update(info, now)
    found = candidates.why_switch(current, last_record, now, RULES)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")

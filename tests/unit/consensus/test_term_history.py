"""The worked examples of where two logs part."""

import pytest

from neon_services.consensus.term_history import check, divergence_lsn, last_log_term, up_to
from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import TermHistory, TermLsn


def th(*entries: tuple[int, int]) -> TermHistory:
    return tuple(TermLsn(term, Lsn(lsn)) for term, lsn in entries)


@pytest.mark.parametrize(
    ("leader", "mine", "flush", "start"),
    [
        (th((1, 100), (2, 200)), th((1, 100), (2, 200)), 260, 260),
        (th((1, 100), (2, 200)), th((1, 100)), 150, 150),
        (th((1, 100), (3, 300)), th((1, 100), (2, 200)), 400, 200),
        (th((1, 100), (2, 200)), th((1, 100)), 300, 200),
        (th((1, 100), (2, 200)), th(), 0, None),
        (th((3, 100)), th((2, 100)), 180, None),
        (th((1, 100), (2, 200)), th((1, 100), (4, 500)), 300, 200),
        (th((0, 100), (1, 100)), th((0, 100)), 100, 100),
    ],
)
def test_divergence(leader: TermHistory, mine: TermHistory, flush: int, start: int | None) -> None:
    assert divergence_lsn(leader, up_to(mine, flush), Lsn(flush)) == start


def test_one_term_with_two_starts_is_corruption() -> None:
    with pytest.raises(CorruptionError):
        divergence_lsn(th((1, 100), (2, 200)), th((1, 100), (2, 180)), Lsn(300))


def test_restriction_to_what_is_on_disk() -> None:
    history = th((1, 100), (2, 200), (4, 500))
    assert up_to(history, 499) == th((1, 100), (2, 200))
    assert up_to(history, 500) == history
    assert up_to(history, 99) == ()
    assert [last_log_term(history, lsn) for lsn in (99, 100, 200, 499, 500)] == [0, 1, 2, 2, 4]


def test_check() -> None:
    check(th((1, 100), (2, 100)))
    for bad in (th((1, 100), (1, 200)), th((1, 100), (2, 99))):
        with pytest.raises(CorruptionError):
            check(bad)

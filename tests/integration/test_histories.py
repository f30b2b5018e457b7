"""The judges of the histories: what is possible passes, and each kind of impossible history is named."""

import pytest

from tests.integration.histories import (
    ACCOUNTS,
    OPENING_BALANCE,
    Append,
    Outcome,
    Transfer,
    judge_bank,
    judge_lists,
)

OK, MAYBE, NO = Outcome.ACKNOWLEDGED, Outcome.UNKNOWN, Outcome.FAILED
TOTAL = ACCOUNTS * OPENING_BALANCE
TRANSFERS = [Transfer(1, 0, 1, 10, OK), Transfer(2, 1, 2, 5, MAYBE), Transfer(3, 2, 0, 7, NO)]
JOURNAL = {1: (0, 1, 10)}
BALANCES = dict.fromkeys(range(ACCOUNTS), OPENING_BALANCE) | {0: 990, 1: 1010}


def test_possible_banks() -> None:
    assert judge_bank(TRANSFERS, [TOTAL], JOURNAL, BALANCES) == []
    assert judge_bank(TRANSFERS, [TOTAL], JOURNAL | {2: (1, 2, 5)}, BALANCES | {1: 1005, 2: 1005}) == []


@pytest.mark.parametrize(
    ("totals", "journal", "balances", "complaint"),
    [
        ([TOTAL - 1], JOURNAL, BALANCES, "a reader saw 11999"),
        ([], {}, dict.fromkeys(range(ACCOUNTS), OPENING_BALANCE), "transfer 1 was acknowledged and is lost"),
        ([], JOURNAL | {3: (2, 0, 7)}, BALANCES | {2: 993, 0: 997}, "transfer 3 failed before its commit and is there"),
        ([], JOURNAL | {9: (2, 3, 1)}, BALANCES | {2: 999, 3: 1001}, "transfer 9 in the journal is not what anybody did"),
        ([], {1: (0, 1, 11)}, BALANCES | {0: 989, 1: 1011}, "transfer 1 in the journal is not what anybody did"),
        ([], JOURNAL, BALANCES | {0: 991}, "balances are"),
    ],
)
def test_impossible_banks(
    totals: list[int], journal: dict[int, tuple[int, int, int]], balances: dict[int, int], complaint: str
) -> None:
    (first, *rest) = judge_bank(TRANSFERS, totals, journal, balances)
    assert complaint in first and not rest


APPENDS = [
    Append(0, 1, 0.0, 1.0, OK, (1,)),
    Append(0, 2, 0.5, 2.0, OK, (1, 2)),
    Append(0, 3, 2.5, 3.0, MAYBE),
    Append(0, 4, 3.5, 4.0, NO),
    Append(0, 5, 4.5, 5.0, OK, (1, 2, 5)),
]


def test_possible_lists() -> None:
    assert judge_lists(APPENDS, {0: (1, 2, 5)}) == []
    assert judge_lists(APPENDS[:3], {0: (1, 2, 3)}) == []
    assert judge_lists([APPENDS[2]], {}) == []


@pytest.mark.parametrize(
    ("appends", "final", "complaint"),
    [
        (APPENDS, (1, 2), "5 was acknowledged and is lost"),
        (APPENDS, (1, 2, 5, 5), "holds a number twice"),
        (APPENDS, (1, 2, 5, 9), "9, which nobody appended"),
        (APPENDS, (1, 2, 5, 4), "4 failed before its commit and is there"),
        (APPENDS, (1, 2, 3, 5), "5 saw (1, 2, 5), no prefix of (1, 2, 3, 5)"),
        ([Append(0, 1, 0.0, 1.0, OK, (1,)), Append(0, 2, 0.0, 1.0, OK, (1,))], (1, 2), "2 did not see itself"),
        ([Append(0, 1, 0.0, 1.0, OK, (2, 1)), Append(0, 2, 1.5, 2.0, OK, (2,))], (2, 1), "2 stands before a number"),
    ],
)
def test_impossible_lists(appends: list[Append], final: tuple[int, ...], complaint: str) -> None:
    assert any(complaint in text for text in judge_lists(appends, {0: final}))

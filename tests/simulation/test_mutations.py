"""Every planted bug is found within its limit, and docs/mutations.md tells of exactly these.

``python -m tests.simulation.table --replay NAME`` shows how one is found; ``make mutations`` writes the document anew.
"""

import pytest

from tests.simulation.planted import BY_NAME, PLANTED, Found, search_all
from tests.simulation.table import PATH, parse


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    return search_all(BY_NAME)


@pytest.mark.parametrize("name", [planted.name for planted in PLANTED])
def test_a_planted_bug_is_found(name: str, found: dict[str, Found]) -> None:
    print(found[name].text)
    assert 0 < found[name].schedules <= BY_NAME[name].within, found[name].text


def test_the_table_lists_exactly_the_planted_bugs() -> None:
    assert len(BY_NAME) == len(PLANTED) >= 20, "names must differ"
    rows = parse(PATH.read_text())
    hint = f"run `make mutations`: {PATH} is not of these planted bugs"
    assert rows.keys() == BY_NAME.keys(), hint
    assert {name: limit for name, (_, limit, _) in rows.items()} == {p.name: p.within for p in PLANTED}, hint
    assert all(0 < schedules <= limit for schedules, limit, _ in rows.values()), hint
    assert all(planted.breaks in PATH.read_text() for planted in PLANTED), hint

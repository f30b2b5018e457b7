"""The table of planted bugs: ``python -m tests.simulation.table`` finds each of them and writes docs/mutations.md.

``--replay NAME [SEED]`` replays the schedule that finds one, with a trace; without a seed it searches for the first.
"""

import argparse
import re
import sys
from pathlib import Path

from neon_services.simulation.checker import InvariantViolation
from tests.simulation.planted import BY_NAME, PLANTED, WEATHERS, Found, run_planted, search, search_all

PATH = Path(__file__).parents[2] / "docs" / "mutations.md"

_HEAD = """# Planted bugs that the simulation finds

Written by `make mutations`; do not edit. Each line is the production code with one rule broken. The figure is the number of
schedules, counted from seed 0, until an invariant of `neon_services/simulation/checker.py` was violated; the tests fail when
one takes more schedules than its limit. The weathers are those of `neon_services/simulation/profile.py`. Replay one with
`python -m tests.simulation.table --replay NAME`.

| planted bug | what is broken | weather | schedules | limit | invariant that caught it |
|---|---|---|---|---|---|
"""
_ROW = re.compile(r"^\| `(\w+)` \| (.+) \| (\w+) \| (\d+) \| (\d+) \| (.+) \|$")


def render(found: dict[str, Found]) -> str:
    """The document."""
    rows = []
    for planted in PLANTED:
        result = found[planted.name]
        figures = f"{result.schedules} | {planted.within} | {result.invariant}"
        rows.append(f"| `{planted.name}` | {planted.breaks} | {planted.weather} | {figures} |")
    return _HEAD + "\n".join(rows) + "\n"


def parse(text: str) -> dict[str, tuple[int, int, str]]:
    """Of each planted bug in the document: schedules, limit, invariant."""
    rows = [match.groups() for line in text.splitlines() if (match := _ROW.match(line))]
    return {name: (int(schedules), int(limit), invariant) for name, _, _, schedules, limit, invariant in rows}


def _replay(name: str, seed: int | None) -> int:
    if seed is None:
        found = search(name)
        if not found.schedules:
            print(found.text)
            return 1
        seed = found.seed
    try:
        run_planted(name, seed, print)
    except InvariantViolation as violation:
        print(f"VIOLATION: {violation}")
        return 0
    print(f"{name} is not found by seed {seed} in the weather {BY_NAME[name].weather}")
    return 1


def main() -> int:
    """Exit code 1: a planted bug was not found."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.table", description=__doc__.split("\n\n")[0])
    parser.add_argument("--replay", metavar="NAME", choices=sorted(BY_NAME), help="replay a planted bug with a trace")
    parser.add_argument("seed", type=int, nargs="?")
    arguments = parser.parse_args()
    if arguments.replay:
        return _replay(arguments.replay, arguments.seed)
    if arguments.seed is not None:
        parser.error("a seed makes sense only with --replay NAME")
    assert {planted.weather for planted in PLANTED} <= WEATHERS.keys()
    found = search_all(BY_NAME)
    missing = [result.text for result in found.values() if not result.schedules]
    for text in missing:
        print(text, file=sys.stderr)
    if missing:
        return 1
    PATH.write_text(render(found))
    print(f"{len(found)} planted bugs, all found: {PATH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The production state machines and the production storage in the simulated world.

A failing seed is replayed with a trace by ``python -m neon_services.simulation SEED``. ``NEON_SIM_FIRST`` and
``NEON_SIM_SEEDS`` choose other schedules than the default 10,000.
"""

import os
import random

import pytest

from neon_services.consensus.proposer import Proposer
from neon_services.simulation.campaign import JUDGED_FROM, Outcome, run_campaign
from neon_services.simulation.checker import InvariantViolation
from neon_services.simulation.profile import Profile
from neon_services.simulation.stats import Stats
from neon_services.simulation.world import Kinds, World

FIRST = int(os.environ.get("NEON_SIM_FIRST", "0"))
SEEDS = int(os.environ.get("NEON_SIM_SEEDS", "10000"))


def test_schedules() -> None:
    """Every invariant holds at every step of every schedule, and enough happens in them."""
    print(f"seeds {FIRST} to {FIRST + SEEDS - 1}")
    outcome = run_campaign(FIRST, SEEDS)
    print(outcome.table())
    replays = [f"{text}\n  replay: python -m neon_services.simulation {seed}" for seed, text in outcome.failures]
    assert not replays, "\n".join(replays)
    assert outcome.schedules == SEEDS
    assert not outcome.too_little(), "\n".join(outcome.too_little())


@pytest.mark.parametrize("offset", range(7, 12))
def test_a_seed_is_the_whole_reproduction(offset: int) -> None:
    def trace(seed: int) -> tuple[Stats, list[str]]:
        lines: list[str] = []
        return World(seed, log=lines.append).run(), lines

    assert trace(FIRST + offset) == trace(FIRST + offset)
    assert trace(FIRST + offset) != trace(FIRST + offset + 1)


def test_schedules_in_which_too_little_happens_are_no_proof() -> None:
    outcome = Outcome(schedules=JUDGED_FROM)
    for _ in range(JUDGED_FROM):
        outcome.count(Stats(elections=1, unruly_commits=1, torn=0))
    texts = outcome.too_little()
    assert "torn in 0 of 200 schedules, 2% were expected" in texts
    assert not [text for text in texts if text.startswith(("elections", "unruly_commits"))]


def test_a_world_without_connections_proves_nothing_and_says_so() -> None:
    def deaf(rng: random.Random) -> Profile:
        profile = Profile.draw(rng)
        profile.connect_failure = 1.0
        return profile

    class NeverCampaigns(Proposer):
        def _request_vote(self, member):  # type: ignore[no-untyped-def]
            return []

    with pytest.raises(InvariantViolation, match=r"no progress|nothing was elected"):
        World(1, kinds=Kinds(proposer=NeverCampaigns), draw=deaf).run()

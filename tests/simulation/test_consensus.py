"""The production acceptor and proposer in the simulated world.

A failing seed is replayed with a trace by ``python -m neon_services.simulation SEED``. ``NEON_SIM_FIRST`` and
``NEON_SIM_SEEDS`` choose other schedules than the default 2,000. Planted bugs must be found within a stated number of
schedules, about five times what it took.
"""

import os
import random

import pytest

from neon_services.consensus.acceptor import Acceptor
from neon_services.consensus.proposer import Proposer
from neon_services.simulation.checker import InvariantViolation
from neon_services.simulation.world import Kinds, Profile, Stats, World
from tests.simulation import mutants

FIRST = int(os.environ.get("NEON_SIM_FIRST", "0"))
SEEDS = int(os.environ.get("NEON_SIM_SEEDS", "2000"))
CHUNKS = 8

#: Planted bug -> schedules within which it must be found.
PLANTED: dict[type[Proposer] | type[Acceptor], int] = {
    mutants.CountsItselfTwice: 20,
    mutants.DonorByLength: 200,
    mutants.ElectedByOne: 20,
    mutants.ForgetsWhoAcknowledged: 20,
    mutants.StreamsFromFlush: 20,
    mutants.VotesBeforeFlush: 200,
    mutants.VotesBeforePersist: 10,
    mutants.VotesTwice: 50,
    mutants.AdoptsBeforeTruncate: 1200,
    mutants.NeverTruncates: 20,
    mutants.FollowsAnyTerm: 20,
    mutants.BelievesEveryPeer: 300,
    mutants.AcknowledgesBeforeFlush: 10,
    mutants.CommitsBeyondFlush: 10,
    mutants.ReportsAdoptedHistory: 20,
    mutants.ForgetsToCutWhatItVoted: 400,
}


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_schedules(chunk: int) -> None:
    """Every invariant holds at every step of every schedule, and every schedule elects and commits."""
    seeds = range(FIRST + chunk, FIRST + SEEDS, CHUNKS)
    print(f"seeds {seeds}")
    unruly = crashes = elections = migrations = 0
    for seed in seeds:
        stats = World(seed).run()
        unruly += stats.unruly_commits > 0
        crashes += stats.crashes
        elections += stats.elections
        migrations += stats.migrations
    # one in fifty commits nothing meanwhile; a few dozen schedules may by chance have three of them
    assert unruly > 0.95 * len(seeds) - 2, f"only {unruly} of {len(seeds)} schedules committed while things broke"
    assert crashes > len(seeds) and elections > 3 * len(seeds), f"{crashes} crashes and {elections} elections are too few"
    assert migrations > len(seeds) / 5, f"{migrations} changes of the membership are too few"


def test_a_seed_is_the_whole_reproduction() -> None:
    def trace(seed: int) -> tuple[Stats, list[str]]:
        lines: list[str] = []
        return World(seed, log=lines.append).run(), lines

    assert trace(FIRST + 7) == trace(FIRST + 7)
    assert trace(FIRST + 7) != trace(FIRST + 8)


def find(kinds: Kinds, schedules: int, draw: object = None) -> str:
    """The first violation that the planted bug causes."""
    for seed in range(schedules):
        try:
            World(seed, kinds=kinds, draw=draw).run()  # type: ignore[arg-type]
        except InvariantViolation as violation:
            return str(violation)
    raise AssertionError(f"the planted bug was not found in {schedules} schedules: {kinds}")


@pytest.mark.parametrize("kind", PLANTED, ids=lambda kind: kind.__name__)
def test_planted_bug_is_found(kind: type[Proposer] | type[Acceptor]) -> None:
    kinds = Kinds(proposer=kind) if issubclass(kind, Proposer) else Kinds(acceptor=kind)
    print(find(kinds, PLANTED[kind]))


def test_planted_commit_of_former_terms_is_found() -> None:
    """The rule that small models do not miss: it takes four leaders and three partial logs, hence the contested weather."""
    print(find(Kinds(proposer=mutants.CommitsOfFormerTerms), 250, Profile.contested))


#: Planted bug in a change of the membership -> schedules within which it must be found.
MOVING: dict[str, tuple[Kinds, int]] = {
    "JointByNewSetOnly": (Kinds(proposer=mutants.JointByNewSetOnly), 200),
    "AnyGeneration": (Kinds(acceptor=mutants.AnyGeneration, proposer=mutants.GenerationBlindProposer), 150),
    "FinishesUnsynchronised": (Kinds(controller=mutants.FinishesUnsynchronised), 800),
    "FinishesWithoutTerms": (Kinds(controller=mutants.FinishesWithoutTerms), 300),
    "SkipsJoint": (Kinds(controller=mutants.SkipsJoint), 50),
}


@pytest.mark.parametrize("name", MOVING)
def test_planted_bug_in_a_membership_change_is_found(name: str) -> None:
    print(find(*MOVING[name], Profile.moving))


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

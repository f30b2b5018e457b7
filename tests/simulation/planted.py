"""The register of planted bugs: what is broken, in which weather, and within how many schedules it must be found."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from neon_services.simulation.campaign import default_processes, worker_pool
from neon_services.simulation.checker import InvariantViolation
from neon_services.simulation.profile import Profile
from neon_services.simulation.world import Kinds, World
from tests.simulation import mutants, storage_mutants
from tests.simulation.storage_mutants import with_disk, with_segments, with_storage, with_store


@dataclass(frozen=True)
class Planted:
    """One planted bug."""

    name: str
    #: One sentence: the mutant's own.
    breaks: str
    kinds: Kinds
    #: Schedules within which it must be found: several times what it took.
    within: int
    weather: str = "any"


WEATHERS: dict[str, Callable[[Random], Profile]] = {
    "any": Profile.draw,
    "moving": Profile.moving,
    "contested": Profile.contested,
    "storage": Profile.storage,
}


def _planted(mutant: Callable[..., object], kinds: Kinds, within: int, weather: str = "any") -> Planted:
    name = mutant.__name__.replace("_", " ").title().replace(" ", "") if inspect.isfunction(mutant) else mutant.__name__
    return Planted(name, (inspect.getdoc(mutant) or "").splitlines()[0], kinds, within, weather)


_PROPOSERS: list[tuple[type, int, str]] = [
    (mutants.CountsItselfTwice, 20, "any"),
    (mutants.DonorByLength, 200, "any"),
    (mutants.ElectedByOne, 30, "any"),
    (mutants.ForgetsWhoAcknowledged, 20, "any"),
    (mutants.StreamsFromFlush, 50, "any"),
    (mutants.CommitsOfFormerTerms, 1200, "contested"),
    (mutants.JointByNewSetOnly, 200, "moving"),
]
_ACCEPTORS: list[tuple[type, int]] = [
    (mutants.VotesBeforeFlush, 200),
    (mutants.VotesBeforePersist, 20),
    (mutants.VotesTwice, 60),
    (mutants.ForgetsItsPromiseAtBoot, 30),
    (mutants.AdoptsBeforeTruncate, 1200),
    (mutants.NeverTruncates, 30),
    (mutants.FollowsAnyTerm, 150),
    (mutants.BelievesEveryPeer, 1000),
    (mutants.AcknowledgesBeforeFlush, 20),
    (mutants.CommitsBeyondFlush, 20),
    (mutants.ReportsAdoptedHistory, 20),
    (mutants.ForgetsToCutWhatItVoted, 800),
]
_CONTROLLERS: list[tuple[type, int]] = [
    (mutants.FinishesUnsynchronised, 600),
    (mutants.FinishesWithoutTerms, 6000),
    (mutants.SkipsJoint, 60),
]
_STORES: list[tuple[type, int]] = [
    (storage_mutants.SkipsSync, 20),
    (storage_mutants.ReportsPartialRecords, 20),
    (storage_mutants.NoTruncationAfterBoot, 100),
    (storage_mutants.GoesOnAfterAFailedSync, 120),
    (storage_mutants.GoesOnAfterAFailedCut, 300),
    (storage_mutants.BelievesShortWrites, 50),
    (storage_mutants.RecoversToTheCommitOnly, 20),
    (storage_mutants.RecoversWithoutChecksums, 100),
    (storage_mutants.RemovesOneSegmentTooMany, 300),
]
_SEGMENTS: list[tuple[type, int]] = [
    (storage_mutants.NeverMakesSure, 800),
    (storage_mutants.ClearsWhatItSees, 1000),
    (storage_mutants.ForgetsToClear, 20),
    (storage_mutants.KeepsHigherSegments, 120),
    (storage_mutants.SkipsDirectorySync, 20),
]
_STORAGES: list[tuple[type, int]] = [
    (storage_mutants.ReplacesInPlace, 100),
    (storage_mutants.ReplacesUnsynced, 20),
    (storage_mutants.BelievesFailedSaves, 50),
]

PLANTED: tuple[Planted, ...] = (
    *(_planted(kind, Kinds(proposer=kind), within, weather) for kind, within, weather in _PROPOSERS),
    *(_planted(kind, Kinds(acceptor=kind), within) for kind, within in _ACCEPTORS),
    _planted(
        mutants.AnyGeneration,
        Kinds(acceptor=mutants.AnyGeneration, proposer=mutants.GenerationBlindProposer),
        200,
        "moving",
    ),
    *(_planted(kind, Kinds(controller=kind), within, "moving") for kind, within in _CONTROLLERS),
    *(_planted(kind, with_store(kind), within, "storage") for kind, within in _STORES),
    _planted(storage_mutants.AppendsWithoutSync, Kinds(lane=storage_mutants.AppendsWithoutSync), 20, "storage"),
    _planted(storage_mutants.AppendsPartialRecords, Kinds(lane=storage_mutants.AppendsPartialRecords), 20, "storage"),
    _planted(storage_mutants.TakesFromTheDeposed, Kinds(lane=storage_mutants.TakesFromTheDeposed), 300, "storage"),
    *(_planted(kind, with_segments(kind), within, "storage") for kind, within in _SEGMENTS),
    *(_planted(kind, with_storage(kind), within, "storage") for kind, within in _STORAGES),
    _planted(storage_mutants.NoDirectorySync, with_disk(storage_mutants.NoDirectorySync), 20, "storage"),
    _planted(storage_mutants.SkipsSyncfsAtBoot, Kinds(storage=storage_mutants.SkipsSyncfsAtBoot), 500, "moving"),
    _planted(storage_mutants.PublishesUnsyncedCopy, Kinds(storage=storage_mutants.PublishesUnsyncedCopy), 100, "moving"),
    _planted(storage_mutants.PullsByPromisedTerm, Kinds(node=storage_mutants.PullsByPromisedTerm), 5000, "moving"),
    _planted(
        storage_mutants.removes_committed_wal,
        Kinds(removal_horizon=storage_mutants.removes_committed_wal),
        200,
        "storage",
    ),
)
BY_NAME = {planted.name: planted for planted in PLANTED}


@dataclass(frozen=True, slots=True)
class Found:
    """How a planted bug was found; ``schedules`` is 0 when it was not."""

    name: str
    schedules: int
    seed: int
    invariant: str
    text: str


def run_planted(name: str, seed: int, log: Callable[[str], None] | None = None) -> None:
    """One schedule with a planted bug. Raises InvariantViolation."""
    planted = BY_NAME[name]
    World(seed, kinds=planted.kinds, draw=WEATHERS[planted.weather], log=log).run()


def search(name: str) -> Found:
    """Run schedules until the planted bug is found, or as many as it may take."""
    for seed in range(BY_NAME[name].within):
        try:
            run_planted(name, seed)
        except InvariantViolation as violation:
            return Found(name, seed + 1, seed, violation.invariant, str(violation))
    return Found(name, 0, -1, "", f"{name} was not found in {BY_NAME[name].within} schedules")


def search_all(names: Iterable[str], processes: int | None = None) -> dict[str, Found]:
    """Search for many at once, the long searches first."""
    ordered = sorted(names, key=lambda name: -BY_NAME[name].within)
    with worker_pool(processes or default_processes()) as pool:
        return {found.name: found for found in pool.map(search, ordered)}

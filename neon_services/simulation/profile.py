"""The weathers of the simulation: what breaks in one schedule, and how often."""

import random
from dataclasses import dataclass, field
from typing import Any

from neon_services.consensus.acceptor import FlushWal, InitializeWal, PersistState, TruncateWal, WriteWal

EFFECTS: tuple[type[Any], ...] = (FlushWal, WriteWal, TruncateWal, InitializeWal, PersistState)
#: Crashes are much likelier around the rare steps that a promise hangs on.
CRASH_WEIGHT: dict[type[Any], float] = {WriteWal: 0.2, FlushWal: 1.0}
#: Share of the schedules that run the production storage code on simulated disks.
REAL_SHARE = 0.4


@dataclass(slots=True)
class Profile:
    """The weather of one schedule."""

    nodes: int
    #: The production storage code on simulated disks, instead of model storage.
    real: bool
    #: Without membership generations; the safekeepers start empty.
    legacy: bool
    #: Safekeepers that are members at first; when fewer than nodes, the membership changes.
    members: int
    duration_us: int
    delay_us: tuple[int, int]
    #: Mean time between two of the events that break things.
    gap_us: int
    write_gap_us: int
    #: Most WAL bytes in one append: small ones make catching up slow, and leave partial logs behind.
    chunk: int
    connect_failure: float
    #: How often the announcement of a leader gets stuck on its way.
    stalled_elected: float
    #: How often replacing the state fails, leaving the old or the new one.
    disk_failure: float
    crash_at_effect: dict[type[Any], float]
    #: With real storage: how often a disk operation loses power, a sync fails, a write is short.
    power_loss: float = 0.0
    sync_failure: float = 0.0
    short_write: float = 0.0
    #: Relative frequency of what breaks.
    weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def draw(cls, rng: random.Random) -> "Profile":
        """Choose a weather."""
        return cls._choose(rng, real=rng.random() < REAL_SHARE)

    @classmethod
    def storage(cls, rng: random.Random) -> "Profile":
        """Any weather over the production storage code."""
        return cls._choose(rng, real=True)

    @classmethod
    def _choose(cls, rng: random.Random, *, real: bool) -> "Profile":
        if rng.random() < 0.3:
            return cls._contested(rng, real=real)
        nodes = rng.choice((3, 3, 3, 5, 5))
        if nodes == 5 and rng.random() < 0.3:
            return cls._moving(rng, real=real)
        return cls._stormy(rng, nodes, reconfigure=nodes == 5 and rng.random() < 0.5, real=real)

    @classmethod
    def moving(cls, rng: random.Random) -> "Profile":
        """The membership changes, again and again, while computes come and go."""
        return cls._moving(rng, real=rng.random() < REAL_SHARE)

    @classmethod
    def _moving(cls, rng: random.Random, *, real: bool) -> "Profile":
        profile = cls._stormy(rng, 5, reconfigure=True, real=real)
        profile.weights |= {"control": 4, "propose": 3, "isolate": rng.choice((1, 4)), "crash": 0.5, "stop": 0.5}
        return profile

    @classmethod
    def contested(cls, rng: random.Random) -> "Profile":
        """Short-lived leaders that each leave a different tail on a minority: where the rules about terms are needed."""
        return cls._contested(rng, real=False)

    @classmethod
    def _stormy(cls, rng: random.Random, nodes: int, *, reconfigure: bool, real: bool) -> "Profile":
        crash = rng.choice((0.0, 0.002, 0.005, 0.01))
        return cls(
            nodes=nodes,
            real=real,
            legacy=not reconfigure and rng.random() < 0.2,
            members=3 if reconfigure else nodes,
            duration_us=rng.randint(700_000, 2_200_000),
            delay_us=rng.choice(((100, 2000), (500, 10_000), (1000, 60_000))),
            gap_us=rng.choice((15_000, 40_000, 100_000)),
            write_gap_us=rng.choice((5_000, 20_000, 80_000)),
            chunk=rng.choice((24, 96, 400)),
            connect_failure=rng.choice((0.0, 0.1, 0.5)),
            stalled_elected=rng.choice((0.0, 0.05, 0.3)),
            disk_failure=rng.choice((0.0, 0.0, 0.02, 0.1)),
            crash_at_effect={effect: crash * CRASH_WEIGHT.get(effect, 4.0) for effect in EFFECTS},
            power_loss=rng.choice((0.0, 0.002, 0.008)),
            sync_failure=rng.choice((0.0, 0.0, 0.01, 0.05)),
            short_write=rng.choice((0.0, 0.1)),
            weights={
                "crash": rng.choice((0.2, 1, 3)),
                "stop": rng.choice((0.2, 1, 2)),
                "break": rng.choice((0.5, 2, 4)),
                "partition": rng.choice((0, 1, 3)),
                "propose": rng.choice((0.5, 1, 3)),
                "kill": rng.choice((0.5, 1, 2)),
                "isolate": rng.choice((0, 1, 6)),
                "stall": rng.choice((0, 1, 3)),
                "fill": rng.choice((0, 0, 1, 3)) if real else 0,
                "clock": 0.3,
                "gossip": 2,
                "manage": 3,
                "offload": 6 if real else 0,
                "control": rng.choice((1, 4)) if reconfigure else 0,
            },
        )

    @classmethod
    def _contested(cls, rng: random.Random, *, real: bool) -> "Profile":
        return cls(
            nodes=3,
            real=real,
            legacy=False,
            members=3,
            duration_us=1_300_000,
            delay_us=(100, 2000),
            gap_us=rng.choice((15_000, 30_000)),
            write_gap_us=rng.choice((3_000, 10_000)),
            chunk=rng.choice((16, 32)),
            connect_failure=rng.choice((0.0, 0.3)),
            stalled_elected=0.0,
            disk_failure=0.0,
            crash_at_effect=dict.fromkeys(EFFECTS, 0.0),
            weights={
                "isolate": 6,
                "propose": 3,
                "kill": 3,
                "partition": 2,
                "break": 1,
                "crash": 0.3,
                "stop": 0.3,
                "stall": 1,
                "gossip": 0.5,
                "manage": 0.5,
            },
        )

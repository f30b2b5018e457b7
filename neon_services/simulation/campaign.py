"""Many schedules: run, counted, and judged on whether enough happened for their silence to mean something."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from multiprocessing import get_context

from neon_services.simulation.checker import InvariantViolation
from neon_services.simulation.stats import Stats
from neon_services.simulation.world import World

CHUNK = 25  # schedules of one task of a worker process

#: What must happen at least once in this share of the schedules, whatever seeds are chosen.
REQUIRED = {
    "elections": 1.0,
    "unruly_commits": 0.95,
    "real": 0.35,
    "truncations": 0.7,
    "short_ways": 0.3,
    "crashes": 0.75,
    "kills": 0.5,
    "deposed": 0.5,
    "broken": 0.6,
    "migrations": 0.1,
    "pulls": 0.1,
    "pulls_given_up": 0.02,
    "removals": 0.015,
    "clock_jumps": 0.2,
    "disk_failures": 0.15,
    "disk_full": 0.05,
    "power_losses": 0.1,
    "torn": 0.02,
}
#: Below this number of schedules chance decides too much.
JUDGED_FROM = 200


@dataclass(slots=True)
class Outcome:
    """What a set of schedules did."""

    schedules: int = 0
    #: Sum over the schedules, and number of schedules in which it happened at all, by the fields of Stats.
    totals: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)
    #: (seed, what was violated)
    failures: list[tuple[int, str]] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def add(self, other: "Outcome") -> None:
        """Count another set in."""
        self.schedules += other.schedules
        self.totals.update(other.totals)
        self.happened.update(other.happened)
        self.failures += other.failures
        self.cpu_seconds += other.cpu_seconds

    def count(self, stats: Stats) -> None:
        """Count one schedule."""
        for each in fields(stats):
            value = getattr(stats, each.name)
            if value:
                self.totals[each.name] += value
                self.happened[each.name] += 1

    def too_little(self) -> list[str]:
        """What did not happen often enough."""
        if self.schedules < JUDGED_FROM:
            return []
        return [
            f"{name} in {self.happened[name]} of {self.schedules} schedules, {share:.0%} were expected"
            for name, share in REQUIRED.items()
            if self.happened[name] < share * self.schedules
        ]

    def table(self) -> str:
        """For people: what happened."""
        lines = [f"{'':16} {'total':>12} {'in schedules':>14} {'share':>7} {'required':>9}"]
        for each in fields(Stats):
            share = self.happened[each.name] / max(self.schedules, 1)
            required = f"{REQUIRED[each.name]:.0%}" if each.name in REQUIRED else ""
            lines.append(
                f"{each.name:16} {self.totals[each.name]:>12,} {self.happened[each.name]:>14,} {share:>7.1%} {required:>9}"
            )
        each_ms = 1000 * self.cpu_seconds / max(self.schedules, 1)
        lines.append(f"{self.schedules:,} schedules, {len(self.failures)} violations, {each_ms:.0f} ms of processor time each")
        return "\n".join(lines)


def run_schedules(seeds: Iterable[int]) -> Outcome:
    """Run these schedules in this process."""
    outcome = Outcome()
    started = time.process_time()
    for seed in seeds:
        outcome.schedules += 1
        try:
            outcome.count(World(seed).run())
        except InvariantViolation as violation:
            outcome.failures.append((seed, str(violation)))
    outcome.cpu_seconds = time.process_time() - started
    return outcome


def worker_pool(processes: int) -> ProcessPoolExecutor:
    """Worker processes that share nothing with this one."""
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_quiet)


def _quiet() -> None:
    """What the storage logs of failing disks is of no interest a thousand times."""
    logging.getLogger("neon_services").setLevel(logging.CRITICAL)


def default_processes() -> int:
    """As many as there are processors."""
    return os.cpu_count() or 1


def run_campaign(
    first: int,
    count: int,
    *,
    processes: int | None = None,
    progress: Callable[[Outcome], None] = lambda _: None,
    max_failures: int = 10,
) -> Outcome:
    """Run ``count`` schedules from seed ``first`` on, over several processes; stops early after many failures."""
    outcome = Outcome()
    starts = range(first, first + count, CHUNK)
    with worker_pool(processes or default_processes()) as pool:
        waiting: list[Future[Outcome]] = [
            pool.submit(run_schedules, range(start, min(start + CHUNK, first + count))) for start in starts
        ]
        for done in _completed(waiting):
            outcome.add(done)
            progress(outcome)
            if len(outcome.failures) >= max_failures:
                for future in waiting:
                    future.cancel()
                break
    outcome.failures.sort()
    return outcome


def _completed(waiting: list["Future[Outcome]"]) -> Iterator[Outcome]:
    for future in as_completed(waiting):
        yield future.result()

"""Run schedules of the simulation, or replay one.

``python -m neon_services.simulation --schedules 20000`` runs many on all processors and prints what happened in them;
``python -m neon_services.simulation SEED`` replays one with a trace. Exit code 1: an invariant is violated, or too little
happened.
"""

import argparse
import sys
import time

from neon_services.simulation.campaign import Outcome, default_processes, run_campaign
from neon_services.simulation.checker import InvariantViolation
from neon_services.simulation.world import World

PROGRESS_INTERVAL_S = 5.0


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m neon_services.simulation", description=__doc__.split("\n\n")[0])
    parser.add_argument("seed", type=int, nargs="?", help="replay this seed, which a failing run printed")
    parser.add_argument("--quiet", action="store_true", help="of a replay, only the outcome")
    parser.add_argument("--schedules", type=int, metavar="N", help="run N schedules")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="begin with this seed (default 0)")
    parser.add_argument("--processes", type=int, default=default_processes(), metavar="P", help="default: all processors")
    arguments = parser.parse_args()
    if (arguments.seed is None) == (arguments.schedules is None):
        parser.error("give a seed to replay, or --schedules N to run many, and not both")
    if arguments.schedules is not None:
        if arguments.schedules < 1 or arguments.processes < 1:
            parser.error("--schedules and --processes must be at least 1")
        return _run_many(arguments.first, arguments.schedules, arguments.processes)
    return _replay(arguments.seed, quiet=arguments.quiet)


def _replay(seed: int, *, quiet: bool) -> int:
    world = World(seed, log=None if quiet else print)
    try:
        print(world.run())
    except InvariantViolation as violation:
        print(f"VIOLATION: {violation}")
        return 1
    return 0


def _run_many(first: int, count: int, processes: int) -> int:
    started = printed = time.monotonic()

    def progress(outcome: Outcome) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed >= PROGRESS_INTERVAL_S:
            printed = now
            rate = outcome.schedules / (now - started)
            left = (count - outcome.schedules) / rate
            text = f"{outcome.schedules:,} of {count:,} schedules, {rate:.0f} a second, {left:.0f} s to go"
            print(f"{text}, {len(outcome.failures)} violations", flush=True)

    outcome = run_campaign(first, count, processes=processes, progress=progress)
    print(outcome.table())
    for seed, text in outcome.failures:
        print(f"VIOLATION: {text}\n  replay: python -m neon_services.simulation {seed}")
    for text in outcome.too_little():
        print(f"TOO LITTLE: {text}")
    return 1 if outcome.failures or outcome.too_little() else 0


if __name__ == "__main__":
    sys.exit(main())

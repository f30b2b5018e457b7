"""Replay one schedule of the simulation with a trace: ``python -m neon_services.simulation SEED``."""

import argparse
import sys

from neon_services.simulation.checker import InvariantViolation
from neon_services.simulation.world import World


def main() -> int:
    """Print the trace and the outcome; exit code 1 when an invariant is violated."""
    parser = argparse.ArgumentParser(prog="python -m neon_services.simulation", description=__doc__)
    parser.add_argument("seed", type=int, help="the seed that a failing test printed")
    parser.add_argument("--quiet", action="store_true", help="only the outcome")
    arguments = parser.parse_args()
    world = World(arguments.seed, log=None if arguments.quiet else print)
    if not arguments.quiet:
        print(world.profile)
    try:
        print(world.run())
    except InvariantViolation as violation:
        print(f"VIOLATION: {violation}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Run as ``python3 -m lab`` in the clone or as ``python3 /path/to/clone/lab`` from anywhere (ssh's ProxyCommand does)."""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lab.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""What all tests share: the compiled libraries of this clone, unless the environment names others."""

import os
from pathlib import Path

os.environ["NEON_LIB_DIR"] = str(Path(os.environ.get("NEON_LIB_DIR") or Path(__file__).parents[1] / "build" / "lib").resolve())

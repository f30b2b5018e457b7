"""Where the compiled libraries are: ``$NEON_LIB_DIR/pg<major>/<name>``, by default under /usr/lib/neon.

Each library is tied to one Postgres major (and ``neon.so`` and ``neon_redo.so`` to its exact build): never fall back to
the library of another major, except for the record scanner, which is the same code in all of them.
"""

import ctypes
import functools
import os
from pathlib import Path

from neon_services.ground.errors import ConfigError

DEFAULT_LIB_DIR = Path("/usr/lib/neon")
SUPPORTED_MAJORS = (15, 17, 18)
WALDEC = "libneon_waldec.so"
REDO = "neon_redo.so"
COMPUTE = "neon.so"


def lib_dir() -> Path:
    """The directory that holds ``pg<major>`` directories."""
    return Path(os.environ.get("NEON_LIB_DIR") or DEFAULT_LIB_DIR)


def library_path(pg_major: int, name: str) -> Path:
    """The path of one library. Raises ConfigError that names the missing file and how to get it."""
    path = lib_dir() / f"pg{pg_major}" / name
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing: run `make ext` and set NEON_LIB_DIR to its build/lib, or install the libraries for "
            f"Postgres {pg_major}"
        )
    return path


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ConfigError(f"cannot load {path}: {error}; build it again on this platform with `make ext`") from None


def load_waldec(pg_major: int) -> ctypes.CDLL:
    """The WAL decoder library of one major. Raises ConfigError when it is missing or of another platform."""
    return _load(library_path(pg_major, WALDEC))


def load_any_waldec() -> ctypes.CDLL:
    """The WAL decoder library of any major: good for the record scanner. Raises ConfigError when there is none."""
    for path in sorted(lib_dir().glob(f"pg*/{WALDEC}"), reverse=True):
        return _load(path)
    raise ConfigError(f"no {WALDEC} in {lib_dir()}/pg*: run `make ext` and set NEON_LIB_DIR, or install the libraries")

"""Running other programs, and the one error that the lab reports to its user.

Invariant: a command's output is shown only when it fails, and then whole.
"""

import fcntl
import hashlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LabError(Exception):
    """Something the user can mend; the message says what is wrong and how."""


def sh(*argv: object, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. Raises LabError with all of its output when it fails, unless ``check`` is false."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, input=stdin, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if check and done.returncode:
        raise LabError(f"{shlex.join(words)} failed with status {done.returncode}\n{done.stdout}")
    return done


def digest(*parts: str) -> str:
    """Sixteen hex digits that name this content."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def say(text: str) -> None:
    """Tell the user what is being waited for. Progress goes to stderr: stdout is for answers."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file; it ends with the process, however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def built_once(target: Path) -> Iterator[Path | None]:
    """Yield a scratch path that becomes ``target`` at the end of the block, or None when it is there already.

    A target is complete or absent: a build that was cut off leaves only its scratch, which the next one removes.
    """
    with locked(Path(f"{target}.lock")):
        if target.exists():
            yield None
            return
        scratch = Path(f"{target}.tmp")
        for leftover in target.parent.glob(f"{scratch.name}*"):
            shutil.rmtree(leftover)
        yield scratch
        scratch.rename(target)

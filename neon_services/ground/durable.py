"""Durable changes to files. A write is durable only when both the file and its directory are synced."""

import ctypes
import os
from pathlib import Path

from neon_services.ground.errors import NeonError


def sync_directory(directory: Path) -> None:
    """Make renames, creations and deletions in this directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: Path, content: bytes, *, staged_suffix: str = ".new", sync: bool = True) -> None:
    """Replace the file so that after a crash it holds either all the old bytes or all the new ones.

    ``sync=False`` (a test aid, Neon's ``--no-sync``) keeps the order of the steps and skips the system calls.
    """
    staged = path.with_name(path.name + staged_suffix)
    with staged.open("wb") as file:
        file.write(content)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    staged.rename(path)
    if sync:
        sync_directory(path.parent)  # the rename is the directory's data, not the file's


def sync_filesystem(directory: Path) -> None:
    """``syncfs`` of the file system that holds the directory: afterwards everything readable in it is durable."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(descriptor) != 0:
            error = ctypes.get_errno()
            raise NeonError(f"syncfs of {directory} failed: {os.strerror(error)}")
    finally:
        os.close(descriptor)

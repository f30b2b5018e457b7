"""Durable changes to files. A write is durable only when both the file and its directory are synced."""

import ctypes
import os
from pathlib import Path

from neon_services.ground.disk import REAL_DISK, Disk, write_all
from neon_services.ground.errors import NeonError


def sync_directory(directory: Path) -> None:
    """Make renames, creations and deletions in this directory durable."""
    REAL_DISK.sync_directory(directory)


def replace_durably(
    path: Path, content: bytes, *, staged_suffix: str = ".new", sync: bool = True, disk: Disk = REAL_DISK
) -> None:
    """Replace the file so that after a crash it holds either all the old bytes or all the new ones.

    ``sync=False`` (a test aid, Neon's ``--no-sync``) keeps the order of the steps and skips the system calls.
    """
    staged = path.with_name(path.name + staged_suffix)
    descriptor = disk.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(disk, descriptor, [content], 0, 0)
        if sync:
            disk.fsync(descriptor)
    finally:
        disk.close(descriptor)
    disk.rename(staged, path)
    if sync:
        disk.sync_directory(path.parent)  # the rename is the directory's data, not the file's


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

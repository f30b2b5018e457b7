"""Make a compute's data directory from a basebackup, without any relation data.

Invariant: the directory is useless without the ``neon`` library (``pg_wal`` and ``base`` are links that only the library
gives a meaning), and with it, every block that is not in a local file is marked absent in the block map.

The basebackup is Neon's tar plus two members of ours in front of ``global/pg_control``: ``neon.relation_sizes`` (the size of
every relation fork) and ``neon.catalog_pages`` (the pages of the first connection). ``pg_control`` is last, so a
truncated stream is noticed.
"""

import contextlib
import errno
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from neon_services.compute import block_map
from neon_services.compute.first_checkpoint import FirstCheckpoint, make_first_checkpoint, parse_previous_lsn
from neon_services.ground.errors import ConfigError, ProtocolViolation
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn

WAL_DESCRIPTOR = 977  # where the library opens the real directories; the links carry the numbers
BASE_DESCRIPTOR = 978
WAL_DIRECTORY = "pg_wal.neon"
BASE_DIRECTORY = "base.neon"
NO_BASEBACKUP_FILE = "neon.no_basebackup"
CONTROL_FILE = "global/pg_control"
SIZES_MEMBER = "neon.relation_sizes"
PAGES_MEMBER = "neon.catalog_pages"
SIGNAL_MEMBERS = ("neon.signal", "zenith.signal")
DEFAULT_TABLESPACE, GLOBAL_TABLESPACE = 1663, 1664
INIT_FORK = 3
SEGMENT_BLOCKS = 131072

_DIRECTORIES = (
    *("base", "global", "pg_commit_ts", "pg_dynshmem", "pg_logical", "pg_logical/mappings", "pg_logical/snapshots"),
    *("pg_multixact", "pg_multixact/members", "pg_multixact/offsets", "pg_notify", "pg_replslot", "pg_serial"),
    *("pg_snapshots", "pg_stat", "pg_stat_tmp", "pg_subtrans", "pg_tblspc", "pg_twophase", "pg_wal"),
    *("pg_wal/archive_status", "pg_xact"),
)
_FORK_SUFFIX = {0: "", 1: "_fsm", 2: "_vm", 3: "_init"}


@dataclass(frozen=True, slots=True)
class DataDirectory:
    """What was built."""

    path: Path
    base_lsn: Lsn
    checkpoint_lsn: Lsn
    system_id: int
    pg_major: int
    relation_forks: int
    pushed_pages: int


@dataclass(slots=True)
class _Members:
    """A basebackup in memory: what is written as it is, and what the builder works with."""

    directories: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    control: bytes = b""
    signal: str | None = None
    sizes: bytes | None = None
    pages: bytes = b""


def retire_directory(path: Path) -> Path | None:
    """Move an old data directory out of the way; the caller deletes what is returned, later.

    Deleting many files right before making many is what makes starts slow on some file systems.
    """
    if not path.exists():
        return None
    for number in range(1_000_000):
        trash = path.with_name(f"{path.name}.trash.{number}")
        if trash.exists():
            continue
        try:
            path.rename(trash)
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM):
                raise ConfigError(
                    f"--pgdata: {path} cannot be renamed ({error.strerror}): use a directory below it, or make {path.parent} "
                    "writable for this user"
                ) from error
            raise
        return trash
    raise ConfigError(f"--pgdata: too many old directories {path}.trash.*: delete them")


def old_trash(path: Path) -> list[Path]:
    """Retired directories that a killed run has left."""
    return sorted(path.parent.glob(f"{path.name}.trash.*"))


def build_data_directory(path: Path, basebackup: bytes, base_lsn: Lsn, ttid: TenantTimelineId) -> DataDirectory:
    """Make ``path`` (which must not exist) from an uncompressed basebackup tar taken at ``base_lsn``.

    Raises ProtocolViolation when the basebackup is not complete or makes no sense, OSError when the disk refuses.
    """
    members = _read_members(basebackup)
    major = _major_of(members)
    start = make_first_checkpoint(members.control, base_lsn, parse_previous_lsn(members.signal), major)
    sizes, pages = _relations(members, bool(start.control.data_checksum_version))

    path.mkdir(mode=0o700)
    _make_directories(path, members, sizes)
    for name, content in members.files.items():
        _write(path / _placed(name), content)
    _pad_slrus(path, start)
    _write(path / CONTROL_FILE, start.control.to_bytes())
    for name, writes in start.segments.items():
        _write_sparse(path / WAL_DIRECTORY / name, start.control.xlog_seg_size, writes)
    _install_pages(path, sizes, pages)
    identity = block_map.MapIdentity(start.control.system_identifier, base_lsn, ttid)
    block_map.write_map(path / block_map.MAP_FILE, block_map.build_map(identity, sizes, pages))
    _guard(path)
    return DataDirectory(path, base_lsn, start.checkpoint_lsn, start.control.system_identifier, major, len(sizes), len(pages))


def _read_members(basebackup: bytes) -> _Members:
    members = _Members()
    try:
        with tarfile.open(fileobj=io.BytesIO(basebackup), mode="r:") as archive:
            for member in archive:
                name = str(PurePosixPath(member.name))
                if name.startswith("/") or ".." in PurePosixPath(name).parts:
                    raise ProtocolViolation(f"the basebackup has a member outside of the directory: {member.name!r}")
                if member.isdir():
                    members.directories.append(name)
                elif member.isfile():
                    reader = archive.extractfile(member)
                    assert reader is not None
                    _take_file(members, name, reader.read())
                else:
                    raise ProtocolViolation(f"the basebackup has a member that is neither file nor directory: {member.name!r}")
    except tarfile.TarError as error:
        raise ProtocolViolation(f"the basebackup is not a tar file: {error}") from error
    if not members.control:
        raise ProtocolViolation(f"the basebackup is not complete: {CONTROL_FILE} is missing")
    if members.sizes is None:
        raise ProtocolViolation(
            f"the basebackup has no {SIZES_MEMBER}: the pageserver does not know --skeleton, which a stock Postgres needs"
        )
    return members


def _take_file(members: _Members, name: str, content: bytes) -> None:
    if name == CONTROL_FILE:
        members.control = content
    elif name == SIZES_MEMBER:
        members.sizes = content
    elif name == PAGES_MEMBER:
        members.pages = content
    elif name in SIGNAL_MEMBERS:
        members.signal = members.signal or content.decode("utf-8", "replace")
    elif not name.startswith("pg_wal/"):  # its empty segment is replaced by ours
        members.files[name] = content


def _major_of(members: _Members) -> int:
    text = members.files.get("PG_VERSION", b"").decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise ProtocolViolation(f"PG_VERSION in the basebackup is not a number: {text!r}")
    return int(text)


def _relations(members: _Members, data_checksums: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and pushed pages of the forks that live in the block map: all but those of unlogged relations."""
    sizes = block_map.parse_relation_sizes(members.sizes or b"")
    # pages rebuilt from WAL carry no checksum; where the cluster has them, the library computes them page by page
    pages = block_map.parse_catalog_pages(b"" if data_checksums else members.pages)
    shared = sizes["spc"] == GLOBAL_TABLESPACE
    wrong = (sizes["fork"] > INIT_FORK) | (shared != (sizes["db"] == 0)) | (~shared & (sizes["spc"] != DEFAULT_TABLESPACE))
    if wrong.any():
        row = sizes[wrong][0]
        raise ProtocolViolation(
            f"relation {row['spc']}/{row['db']}/{row['rel']} fork {row['fork']} in the basebackup is in a tablespace or fork "
            "that a compute does not know"
        )
    unlogged = _relation_keys(sizes[sizes["fork"] == INIT_FORK])
    if len(unlogged):
        # they start empty: their init forks are files of the basebackup
        sizes = sizes[~np.isin(_relation_keys(sizes), unlogged)]
        pages = pages[~np.isin(_relation_keys(pages), unlogged)]
    return sizes, pages


def _relation_keys(rows: np.ndarray) -> np.ndarray:
    return (rows["db"].astype(np.uint64) << np.uint64(32)) | rows["rel"]


def _placed(name: str) -> str:
    """Where a member goes: the two guarded directories have other names."""
    top, slash, rest = name.partition("/")
    return {"pg_wal": WAL_DIRECTORY, "base": BASE_DIRECTORY}.get(top, top) + slash + rest


def _make_directories(path: Path, members: _Members, sizes: np.ndarray) -> None:
    names = dict.fromkeys(_DIRECTORIES)
    names.update(dict.fromkeys(sorted(members.directories)))
    names.update(dict.fromkeys(f"base/{db}" for db in np.unique(sizes["db"]) if db))
    for name in names:
        if name != ".":
            (path / _placed(name)).mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb", buffering=0) as file:
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]


def _write_sparse(path: Path, size: int, writes: list[tuple[int, bytes]]) -> None:
    """A file of zeros with a few bytes in it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        for offset, content in writes:
            os.pwrite(descriptor, content, offset)
    finally:
        os.close(descriptor)


def _pad_slrus(path: Path, start: FirstCheckpoint) -> None:
    """Startup reads the SLRU pages of the next xid and multixact: each must exist, an unused one is all zeros."""
    for directory, page in start.slru_pages().items():
        name = path / directory / f"{page // 32:04X}"
        size = (page % 32 + 1) * block_map.BLOCK_SIZE
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size < size:
                os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)


def _install_pages(path: Path, sizes: np.ndarray, pages: np.ndarray) -> None:
    for fork, blocks in _by_fork(pages):
        spc, db, rel, number = fork
        matching = sizes[(sizes["rel"] == rel) & (sizes["db"] == db) & (sizes["fork"] == number) & (sizes["spc"] == spc)]
        if not len(matching):
            continue  # the block map refuses it with a message
        directory = "global" if spc == GLOBAL_TABLESPACE else f"{BASE_DIRECTORY}/{db}"
        _write_segments(path / directory / f"{rel}{_FORK_SUFFIX[number]}", int(matching["nblocks"][0]), blocks)


def _by_fork(pages: np.ndarray) -> Iterator[tuple[tuple[int, int, int, int], np.ndarray]]:
    if not len(pages):
        return
    keys = pages[["spc", "db", "rel", "fork"]]
    order = np.argsort(keys, order=("spc", "db", "rel", "fork"), kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        spc, db, rel, fork = (int(value) for value in ordered[start])
        yield (spc, db, rel, fork), pages[order[start:end]]


def _write_segments(path: Path, nblocks: int, blocks: np.ndarray) -> None:
    for segment in range(max(1, -(-nblocks // SEGMENT_BLOCKS))):
        name = path if segment == 0 else path.with_name(f"{path.name}.{segment}")
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, min(nblocks - segment * SEGMENT_BLOCKS, SEGMENT_BLOCKS) * block_map.BLOCK_SIZE)
            here = blocks[blocks["block"] // SEGMENT_BLOCKS == segment]
            for block, page in zip(here["block"].tolist(), here["page"], strict=True):
                os.pwrite(descriptor, page.tobytes(), block % SEGMENT_BLOCKS * block_map.BLOCK_SIZE)
        finally:
            os.close(descriptor)


def _guard(path: Path) -> None:
    (path / "pg_wal").symlink_to(f"/proc/self/fd/{WAL_DESCRIPTOR}")
    (path / "base").symlink_to(f"/proc/self/fd/{BASE_DESCRIPTOR}")
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path / NO_BASEBACKUP_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))

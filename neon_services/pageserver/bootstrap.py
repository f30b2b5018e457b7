"""A new timeline from nothing: run the distribution's initdb and import what it made.

Invariant: the data directory was shut down cleanly, so its files are the state at the LSN of its last checkpoint
(``initdb_lsn``): all of them become images at that LSN, and the checkpoint record that begins there is ingested as WAL. The
directory itself is kept as ``initdb.tar.zst`` in remote storage, from which the timeline could be made again.
"""

import asyncio
import io
import logging
import os
import pwd
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import zstandard

from neon_services.ground.errors import ConfigError, CorruptionError, NeonError
from neon_services.ground.ids import TenantId, TimelineId
from neon_services.ground.lsn import WAL_SEGMENT_SIZE, align_lsn, format_lsn, segment_file_name, segment_number
from neon_services.ground.remote_storage import RemoteStorage
from neon_services.pageserver import keys
from neon_services.pageserver.import_datadir import import_data_directory
from neon_services.pageserver.ingest import WalIngest
from neon_services.pageserver.timeline import Timeline
from neon_services.wal import framing
from neon_services.wal.control_data import ControlFile, DBState
from neon_services.wal.decoder import WalDecoder

log = logging.getLogger(__name__)

SUPERUSER = "cloud_admin"
INITDB_TIMEOUT_S = 300


class InitdbFailed(NeonError):
    """initdb ended with an error. The text is the end of what it wrote."""


async def bootstrap_timeline(
    *,
    tenant_id: TenantId,
    timeline_id: TimelineId,
    pg_version: int,
    pg_bin_dir: Path,
    work_dir: Path,
    remote: RemoteStorage | None,
    make: Callable[[int], Timeline],
) -> Timeline:
    """Run initdb in a temporary directory below ``work_dir`` and import it into ``make(initdb_lsn)``.

    On return the checkpoint record is the timeline's last record; nothing is flushed. Raises InitdbFailed, ConfigError when
    there is no initdb, CorruptionError when what initdb made makes no sense.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"initdb-{timeline_id}-", suffix=".___temp", dir=work_dir))
    try:
        data = scratch / "pgdata"
        await run_initdb(pg_bin_dir, data, pg_version)
        archive = asyncio.create_task(_archive(data, tenant_id, timeline_id, remote))
        try:
            timeline = await import_stopped_cluster(data, pg_version, make)
        except BaseException:
            archive.cancel()
            await asyncio.gather(archive, return_exceptions=True)
            raise
        await archive
        return timeline
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)


def initdb_archive_key(tenant_id: TenantId, timeline_id: TimelineId) -> str:
    """Where the archive of a timeline's initdb is in remote storage; the tenant id is the unsharded one."""
    return f"tenants/{tenant_id}/timelines/{timeline_id}/initdb.tar.zst"


async def run_initdb(pg_bin_dir: Path, data: Path, pg_version: int) -> None:
    """Make a data directory. As root, initdb runs as user ``postgres``: it refuses to run as root."""
    program = pg_bin_dir / "initdb"
    if not program.is_file():
        raise ConfigError(f"{program} does not exist: install Postgres {pg_version} or set pg_distrib_dir")
    arguments = ["--pgdata", str(data), "--username", SUPERUSER, "--encoding", "utf8", "--locale", "C.UTF-8"]
    arguments += ["--no-instructions", "--no-sync", "--auth", "trust"]
    if pg_version >= 15:
        arguments += ["--locale-provider", "libc"]
    if pg_version >= 18:
        arguments.append("--no-data-checksums")  # pages made by WAL redo carry none
    user = _unprivileged_user(data.parent)
    await asyncio.to_thread(_run, [str(program), *arguments], user, pg_version)


def _run(command: list[str], user: pwd.struct_passwd | None, pg_version: int) -> None:
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd="/",
            timeout=INITDB_TIMEOUT_S,
            user=None if user is None else user.pw_uid,
            group=None if user is None else user.pw_gid,
            extra_groups=None if user is None else [],
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InitdbFailed(f"initdb of Postgres {pg_version} did not end within {INITDB_TIMEOUT_S} s") from None
    if result.returncode:
        tail = result.stdout.decode("utf-8", "replace").strip()[-2000:]
        raise InitdbFailed(f"initdb of Postgres {pg_version} ended with status {result.returncode}: {tail}")


def _unprivileged_user(directory: Path) -> pwd.struct_passwd | None:
    """Who runs initdb when we are root; the directory is given to them."""
    if os.geteuid() != 0:
        return None
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        raise ConfigError("running as root without a user postgres for initdb: run the pageserver as its own user") from None
    os.chown(directory, user.pw_uid, user.pw_gid)
    return user


async def import_stopped_cluster(data: Path, pg_version: int, make: Callable[[int], Timeline]) -> Timeline:
    """Import a cleanly stopped data directory whose last record is its checkpoint."""
    content = await asyncio.to_thread((data / "global/pg_control").read_bytes)
    control = ControlFile.parse(content)
    if control.state != DBState.SHUTDOWNED:
        raise CorruptionError(f"the cluster to import was not shut down cleanly (pg_control state {control.state})")
    initdb_lsn = align_lsn(control.checkpoint_lsn)
    if control.checkpoint.redo != initdb_lsn:
        raise CorruptionError(
            f"the last checkpoint of the cluster to import is not a shutdown checkpoint: it is at {format_lsn(initdb_lsn)}, "
            f"its redo point at {format_lsn(control.checkpoint.redo)}"
        )
    record = await asyncio.to_thread(_read_checkpoint_record, data, initdb_lsn)
    timeline = make(initdb_lsn)
    await import_data_directory(timeline, data, initdb_lsn, content, control.checkpoint.to_bytes())
    decoder = WalDecoder(initdb_lsn, pg_version)
    try:
        await WalIngest(timeline).ingest(decoder.feed(record))
    finally:
        decoder.close()
    if timeline.last_record_lsn <= initdb_lsn:
        raise CorruptionError(f"there is no checkpoint record at {format_lsn(initdb_lsn)} in the cluster to import")
    return timeline


def _read_checkpoint_record(data: Path, lsn: int) -> bytes:
    """The bytes of WAL from the start of the record to its end (page headers included)."""
    path = data / "pg_wal" / segment_file_name(segment_number(lsn))
    with path.open("rb") as file:
        file.seek(lsn % WAL_SEGMENT_SIZE)
        (length,) = struct.unpack("<I", file.read(4))
        if not framing.RECORD_HEADER_SIZE < length < keys.PAGE_SIZE:
            raise CorruptionError(f"there is no checkpoint record at {format_lsn(lsn)} in {path.name}")
        file.seek(lsn % WAL_SEGMENT_SIZE)
        return file.read(framing.record_end(lsn, length) - lsn)


async def _archive(data: Path, tenant_id: TenantId, timeline_id: TimelineId, remote: RemoteStorage | None) -> None:
    if remote is not None:
        content = await asyncio.to_thread(_compress, data)
        await remote.put(initdb_archive_key(tenant_id, timeline_id), content)


def _compress(data: Path) -> bytes:
    buffer = io.BytesIO()
    with (
        zstandard.ZstdCompressor(level=1).stream_writer(buffer, closefd=False) as compressed,
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.GNU_FORMAT) as archive,
    ):
        archive.add(data, arcname="pgdata")
    return buffer.getvalue()

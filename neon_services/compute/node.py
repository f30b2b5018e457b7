"""The life of one compute: election, basebackup, data directory, Postgres, and an end with one reason.

Invariants: the walproposer has won the election before the basebackup is taken, so no other compute can commit behind it;
Postgres never runs on a directory of an earlier run; when either process ends, the other one is ended too.
"""

import asyncio
import contextlib
import json
import logging
import os
import pwd
import shutil
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neon_services.compute.activity import watch_activity
from neon_services.compute.apply_spec import apply_spec
from neon_services.compute.children import fence_orphan, place_dynamic_shared_memory
from neon_services.compute.datadir import DataDirectory, build_data_directory, old_trash, retire_directory
from neon_services.compute.pageserver_client import fetch_basebackup, lease_lsn
from neon_services.compute.postgres_conf import (
    SUPERUSER,
    UNCHANGEABLE,
    PostgresSettings,
    make_pg_hba,
    make_pg_ident,
    make_postgres_settings,
)
from neon_services.compute.postgres_process import PostgresProcess, library_path, server_version
from neon_services.compute.proposer_child import ProposerChild, config_of, default_command
from neon_services.compute.spec import ComputeSpec
from neon_services.compute.status import TERMINATING, ComputeStatus, Status, WrongStatus
from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.lsn import Lsn, format_lsn
from neon_services.ground.process import notify_systemd

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
SHORT_STOP_S = 2.0
LEASE_RETRY_S = 10.0
LEASE_MARGIN_S = 60.0


@dataclass(frozen=True, slots=True)
class ComputeOptions:
    """The command line."""

    pgdata: Path
    pgbin: str
    connstr_port: int | None
    compute_id: str
    privileged_role: str
    proposer_command: tuple[str, ...] = ()


@dataclass(slots=True)
class StartTimes:
    """How long the parts of the start took, as ``GET /metrics.json`` shows them."""

    sync_safekeepers_ms: int = 0
    basebackup_ms: int = 0
    basebackup_bytes: int = 0
    build_data_directory_ms: int = 0
    start_postgres_ms: int = 0
    config_ms: int = 0
    total_startup_ms: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def describe(self) -> dict[str, int]:
        """Neon's fields; those of what does not exist here are 0."""
        return {
            "wait_for_spec_ms": 0,
            "sync_sk_check_ms": 0,
            "sync_safekeepers_ms": self.sync_safekeepers_ms,
            "pageserver_connect_micros": 0,
            "basebackup_ms": self.basebackup_ms,
            "basebackup_bytes": self.basebackup_bytes,
            "build_data_directory_ms": self.build_data_directory_ms,
            "start_postgres_ms": self.start_postgres_ms,
            "config_ms": self.config_ms,
            "total_startup_ms": self.total_startup_ms,
            "load_ext_ms": 0,
            "num_ext_downloaded": 0,
            "largest_ext_size": 0,
            "total_ext_download_size": 0,
        }


@dataclass(frozen=True, slots=True)
class StopRequest:
    """Somebody wants the compute to end: by signal, or by ``POST /terminate``."""

    mode: str  # "fast" or "immediate"
    by_http: bool


def _milliseconds_since(started_s: float) -> int:
    return round((time.monotonic() - started_s) * 1000)


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


class ComputeNode:
    """One compute, started once."""

    def __init__(self, options: ComputeOptions, spec: ComputeSpec) -> None:
        if os.geteuid() == 0:
            raise ConfigError("compute_ctl must not run as root: Postgres refuses it; use the user postgres")
        self.options = options
        self.spec = spec
        self.pg_version = server_version(options.pgbin)
        self.library = library_path(self.pg_version // 10000)
        self.status = ComputeStatus()
        self.times = StartTimes()
        self.commit_lsn = Lsn(0)
        self.final_lsn: Lsn | None = None
        self.settings: PostgresSettings | None = None
        self.directory: DataDirectory | None = None
        self._stop: asyncio.Future[StopRequest] = asyncio.get_running_loop().create_future()
        #: Done when Postgres and walproposer have ended.
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._proposer = ProposerChild(self._committed)
        self._postgres = PostgresProcess(options.pgbin, options.pgdata)
        self._attached = False  # commits can be acknowledged from here on
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what others ask for

    def request_stop(self, mode: str, *, by_http: bool = False) -> None:
        """Let the compute end; the first request counts, except that ``immediate`` overrides ``fast``."""
        pending = Status.TERMINATION_PENDING_IMMEDIATE if mode == "immediate" else Status.TERMINATION_PENDING_FAST
        with contextlib.suppress(WrongStatus):
            self.status.change(pending)
        if not self._stop.done():
            self._stop.set_result(StopRequest(mode, by_http))
        elif mode == "immediate" and self._postgres.running:
            self._spawn(self._stop_at_once())

    @property
    def stopped_by_http(self) -> bool:
        """Whether somebody waits for the answer to ``POST /terminate``."""
        return self._stop.done() and self._stop.result().by_http

    async def _stop_at_once(self) -> None:
        await self._postgres.stop("immediate")

    async def reconfigure(self, spec: ComputeSpec) -> None:
        """Apply another specification to the running compute. Raises WrongStatus, ConfigError, NeonError."""
        if self.status.current is not Status.RUNNING or self.settings is None:
            raise WrongStatus(f"invalid compute status for configuration request: {self.status.current.value}")
        if spec.ttid != self.spec.ttid:
            raise ConfigError(f"spec: the compute runs on timeline {self.spec.ttid}; another one needs another compute")
        if (spec.safekeepers, spec.safekeepers_generation) != (self.spec.safekeepers, self.spec.safekeepers_generation):
            raise ConfigError("spec.safekeeper_connstrings: a change needs a restart of the compute")
        settings = self._make_settings(spec)
        self.status.change(Status.CONFIGURATION_PENDING)
        self.status.change(Status.CONFIGURATION)
        try:
            self._write_file("postgresql.conf", settings.text)
            self._postgres.reload()
            if not spec.skip_pg_catalog_updates:
                await apply_spec(spec, self.options.privileged_role, self.settings.socket_directory, self.settings.port)
        except (NeonError, OSError) as error:
            if self.status.current is Status.CONFIGURATION:
                # it still serves with what it has; the caller learns why the rest did not work
                self.status.change(Status.RUNNING, str(error))
            raise
        self.spec = spec
        if self.status.current is Status.CONFIGURATION:
            self.status.change(Status.RUNNING)

    # -- the life

    async def run(self) -> int:
        """Run until the end; the exit code."""
        loop = asyncio.get_running_loop()
        starting = loop.create_task(self._start())
        try:
            await _first_of(starting, self._stop, self._proposer.ended)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return await self._interrupted_start()
            try:
                starting.result()
            except (NeonError, OSError) as error:
                await self._end_early()
                return self._failed(f"{error}")
            return await self._serve()
        finally:
            starting.cancel()
            for task in self._tasks:
                task.cancel()
            if not self.finished.done():
                self.finished.set_result(None)

    def _failed(self, reason: str) -> int:
        log.error("%s", reason)
        with contextlib.suppress(WrongStatus):
            self.status.change(Status.FAILED, reason)
        return 1

    async def _interrupted_start(self) -> int:
        """A request to stop, or the walproposer's end, came first."""
        if self._stop.done():
            log.info("asked to stop while starting")
            if self._attached:  # it serves already: clients may have commits
                return await self._serve()
            await self._end_early()
            return 0
        await self._end_early()
        return self._failed(f"the compute cannot start: {self._proposer.reason}")

    async def _end_early(self) -> None:
        """Give up a start: nothing was acknowledged to anybody that a stop at once could lose."""
        if self._postgres.running:
            await self._postgres.stop("immediate")
        await self._proposer.kill()
        if self.status.current in TERMINATING:
            self.status.change(Status.TERMINATED)

    async def _serve(self) -> int:
        """Postgres runs: wait for whatever ends it."""
        await _first_of(self._postgres.ended, self._proposer.ended, self._stop)
        if self._stop.done():
            code = await self._stop_in_order(self._stop.result())
            self.status.change(Status.TERMINATED)
            return code
        if self._postgres.ended.done():
            code = self._postgres.ended.result()
            self.final_lsn = await self._proposer.stop(STOP_TIMEOUT_S)
            reason = f"Postgres ended with exit code {code}" if code >= 0 else f"Postgres was killed by signal {-code}"
            self._failed(reason)
            return code if code >= 0 else 128 - code
        # no commit can be acknowledged any more: what Postgres has not acknowledged must not be seen
        await self._postgres.stop("immediate")
        return self._failed(f"the compute was stopped: {self._proposer.reason}")

    async def _stop_in_order(self, request: StopRequest) -> int:
        stopping = asyncio.get_running_loop().create_task(self._postgres.stop(request.mode))
        if request.mode == "immediate":
            await stopping
        # in a fast shutdown Postgres ends only when walproposer has got the shutdown checkpoint
        await _first_of(stopping, self._proposer.ended)
        if not stopping.done():
            log.error("walproposer ended before Postgres: %s", self._proposer.reason)
            await self._postgres.stop("immediate")
        code = await stopping
        # a Postgres that had to be stopped at once leaves nothing to wait for
        self.final_lsn = await self._proposer.stop(STOP_TIMEOUT_S if code == 0 else SHORT_STOP_S)
        log.info("stopped at %s", format_lsn(self.final_lsn) if self.final_lsn else "an unknown LSN")
        return 0 if request.mode == "fast" and code == 0 else int(request.mode == "fast" and code != 0)

    # -- the start

    async def _start(self) -> None:
        fenced = await asyncio.to_thread(fence_orphan, self.options.pgdata)
        if fenced is not None:
            log.info("the earlier Postgres (pid %d) has ended", fenced)
        base_lsn = await self._elect()
        await self._make_directory(base_lsn)
        settings = self._configure()
        await self._start_postgres()
        log.info("Postgres serves on port %d, reading at %s", settings.port, format_lsn(base_lsn))
        await self._attach(settings, base_lsn)
        self._spawn(self._keep_lease(base_lsn))
        started = time.monotonic()
        if not self.spec.skip_pg_catalog_updates:
            await apply_spec(self.spec, self.options.privileged_role, settings.socket_directory, settings.port)
        self.times.config_ms = _milliseconds_since(started)
        self.times.total_startup_ms = _milliseconds_since(self.times.started_s)
        self.status.change(Status.RUNNING)
        self._spawn(watch_activity(self.status, settings.socket_directory, settings.port))
        notify_systemd("READY=1")
        log.info("running; start took %s", json.dumps(self.times.describe()))

    async def _elect(self) -> Lsn:
        started = time.monotonic()
        config_path = self.options.pgdata.with_name(f"{self.options.pgdata.name}.walproposer.json")
        config_path.write_text(json.dumps(config_of(self.spec, self.pg_version)))
        command = list(self.options.proposer_command) or default_command()
        await self._proposer.start(command, config_path, self._environment())
        lsn = await self._proposer.ready()
        self.times.sync_safekeepers_ms = _milliseconds_since(started)
        return lsn

    async def _make_directory(self, base_lsn: Lsn) -> None:
        started = time.monotonic()
        spec, pgdata = self.spec, self.options.pgdata
        log.info(
            "taking the basebackup at %s from pageserver %s:%d",
            format_lsn(base_lsn),
            spec.pageserver.host,
            spec.pageserver.port,
        )
        basebackup = await fetch_basebackup(spec.pageserver, spec.ttid, base_lsn, spec.storage_auth_token)
        self.times.basebackup_ms = _milliseconds_since(started)
        self.times.basebackup_bytes = len(basebackup)
        started = time.monotonic()
        retire_directory(pgdata)
        self.directory = await asyncio.to_thread(build_data_directory, pgdata, basebackup, base_lsn, spec.ttid)
        if self.directory.pg_major != self.pg_version // 10000:
            raise NeonError(
                f"timeline {spec.ttid} is of Postgres {self.directory.pg_major}, but --pgbin {self.options.pgbin} is "
                f"{self.pg_version // 10000}"
            )
        self.times.build_data_directory_ms = _milliseconds_since(started)

    def _make_settings(self, spec: ComputeSpec) -> PostgresSettings:
        return make_postgres_settings(
            spec, library=self.library, pgdata=self.options.pgdata, connstr_port=self.options.connstr_port
        )

    def _configure(self) -> PostgresSettings:
        self.settings = self._make_settings(self.spec)
        self._write_file("postgresql.conf", self.settings.text)
        self._write_file("pg_hba.conf", make_pg_hba())
        place_dynamic_shared_memory(self.options.pgdata)
        self._write_file("pg_ident.conf", make_pg_ident(pwd.getpwuid(os.geteuid()).pw_name))
        return self.settings

    def _write_file(self, name: str, text: str) -> None:
        path = self.options.pgdata / name
        staged = path.with_name(f"{name}.new")
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
        staged.rename(path)

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        environment.pop("NOTIFY_SOCKET", None)  # readiness is ours to tell
        if self.spec.storage_auth_token:
            environment["NEON_AUTH_TOKEN"] = self.spec.storage_auth_token
        return environment

    async def _start_postgres(self) -> None:
        started = time.monotonic()
        await self._postgres.start(self._environment(), UNCHANGEABLE)
        await self._postgres.wait_ready()
        self.times.start_postgres_ms = _milliseconds_since(started)

    async def _attach(self, settings: PostgresSettings, base_lsn: Lsn) -> None:
        attaching = asyncio.get_running_loop().create_task(
            self._proposer.attach(settings.socket_directory, settings.port, SUPERUSER, base_lsn)
        )
        await _first_of(attaching, self._postgres.ended)
        if not attaching.done():
            attaching.cancel()
            raise NeonError(f"Postgres ended with exit code {self._postgres.ended.result()} while starting; its log says why")
        attaching.result()
        self._attached = True
        # old directories only now: deleting files makes creating files slow on some file systems
        self._spawn(self._delete_trash())

    # -- in the background

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _delete_trash(self) -> None:
        for path in old_trash(self.options.pgdata):
            try:
                await asyncio.to_thread(shutil.rmtree, path)
            except OSError as error:
                log.warning("could not delete the old directory %s: %s", path, error)

    async def _keep_lease(self, lsn: Lsn) -> None:
        """Keep the history at the base LSN from garbage collection while the compute reads there."""
        complaint = ""
        while True:
            pause_s = LEASE_RETRY_S
            try:
                valid_until_ms = await lease_lsn(self.spec.pageserver, self.spec.ttid, lsn, self.spec.storage_auth_token)
                if valid_until_ms is None:
                    raise NeonError("it was refused: that history is garbage collected")
                left_s = valid_until_ms / 1000 - time.time()
                pause_s = max(min(left_s / 2, left_s - LEASE_MARGIN_S), 1.0)
                complaint = ""
            except (OSError, TimeoutError, NeonError) as error:
                text = str(error) or type(error).__name__
                if text != complaint:
                    log.warning("no lease on %s from the pageserver: %s", format_lsn(lsn), text)
                complaint = text
            await asyncio.sleep(pause_s)

    def _committed(self, lsn: Lsn) -> None:
        self.commit_lsn = max(self.commit_lsn, lsn)

"""The named baseline: stock Postgres from the distribution, alone or with one synchronous standby, on local disk."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import psycopg

from tests.integration.cluster import USER, free_port, make_directory, wait_until


class StockServer:
    """One stock server, fsync on unless told otherwise, run as the service user."""

    def __init__(self, directory: Path, major: int) -> None:
        self.bin = Path(f"/usr/lib/postgresql/{major}/bin")
        self.directory = directory
        self.data = directory / "data"
        self.port = free_port()

    def _run(self, *arguments: str) -> None:
        done = subprocess.run(
            arguments, user=USER, group=USER, extra_groups=[], capture_output=True, text=True, cwd=self.directory
        )
        if done.returncode != 0:
            raise RuntimeError(f"{arguments[0]} failed: {done.stdout}\n{done.stderr}")

    def initialise(self) -> None:
        """initdb with trust authentication."""
        make_directory(self.directory)
        self._run(str(self.bin / "initdb"), "-D", str(self.data), "-U", "cloud_admin", "-A", "trust", "--no-sync")
        self._configure("wal_level = replica", "max_wal_size = 4GB", "listen_addresses = '127.0.0.1'")

    def follow(self, primary: "StockServer") -> None:
        """Become a synchronous standby of the primary, by pg_basebackup."""
        make_directory(self.directory)
        conninfo = f"host=127.0.0.1 port={primary.port} user=cloud_admin application_name=standby"
        self._run(str(self.bin / "pg_basebackup"), "-D", str(self.data), "-d", conninfo, "-R", "-X", "stream", "-c", "fast")
        self._configure()

    def _configure(self, *lines: str) -> None:
        with (self.data / "postgresql.conf").open("a") as file:
            file.write("\n".join([*lines, f"port = {self.port}", f"unix_socket_directories = '{self.directory}'", ""]))

    def start(self) -> None:
        """Start and wait until SQL answers."""
        self._run(str(self.bin / "pg_ctl"), "-D", str(self.data), "-l", str(self.directory / "log"), "-w", "start")

    def stop(self) -> None:
        """Stop fast; no error when it is not running."""
        if (self.data / "postmaster.pid").exists():
            self._run(str(self.bin / "pg_ctl"), "-D", str(self.data), "-m", "fast", "-w", "stop")

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of one statement."""
        with psycopg.connect(
            f"host=127.0.0.1 port={self.port} user=cloud_admin dbname=postgres", autocommit=True
        ) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def require_standby(self) -> None:
        """Commits wait for the standby's flush from here on."""
        self.query("alter system set synchronous_standby_names = 'standby'")
        self.query("select pg_reload_conf()")
        synchronous = lambda: self.query("select count(*) from pg_stat_replication where sync_state = 'sync'") == [(1,)]  # noqa: E731
        wait_until(synchronous, "the standby to be synchronous")

    def destroy(self) -> None:
        """Stop and delete."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

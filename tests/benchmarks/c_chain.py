"""The commit path with every process in C, and none that checks anything: what the same hops cost on this machine.

Stock Postgres without fsync (a compute's files are disposable), the C proposer, and three C servers that write and fdatasync.
"""

import shutil
import subprocess
from pathlib import Path

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, parse_lsn
from tests.benchmarks.stock import StockServer

SEGMENTS = 40  # of each server; they are made before the first commit
SETTINGS = "max_connections = 200\nfsync = off\nfull_page_writes = off\nwal_keep_size = '1GB'\n"


def compile_c(name: str, program: Path) -> Path:
    """Compile one of the C programs beside this file."""
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", program, source], check=True)
    return program


class CChain:
    """Use as: ``initialise()``, load data, ``start()``, measure ``server``, ``destroy()``."""

    def __init__(self, directory: Path, major: int) -> None:
        self.directory = directory
        self.server = StockServer(directory / "postgres", major)
        self._processes: list[subprocess.Popen[str]] = []

    def initialise(self) -> None:
        """Start Postgres."""
        self.server.initialise()
        (self.server.data / "postgresql.auto.conf").write_text(SETTINGS)
        self.server.start()

    def start(self) -> None:
        """Commits go through the chain from here on."""
        append_server = compile_c("append_server", self.directory / "append_server")
        proposer = compile_c("chain_proposer", self.directory / "chain_proposer")
        flushed = parse_lsn(self.server.query("select pg_current_wal_flush_lsn()")[0][0])
        start = flushed - flushed % WAL_SEGMENT_SIZE
        ports = []
        for number in range(3):
            files = self.directory / f"server{number}"
            files.mkdir()
            ports.append(self._run(append_server, files, start, WAL_SEGMENT_SIZE, SEGMENTS))
        socket = self.server.directory / f".s.PGSQL.{self.server.port}"
        ready = self._run(proposer, socket, "cloud_admin", "standby", start, *ports)
        if ready != "ready":
            raise RuntimeError(f"the C proposer did not start: {ready!r}")
        self.server.require_standby()

    def _run(self, *argv: Path | str | int) -> str:
        process = subprocess.Popen([str(argument) for argument in argv], stdout=subprocess.PIPE, text=True)
        self._processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def destroy(self) -> None:
        """Stop and delete everything."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self.server.destroy()
        shutil.rmtree(self.directory, ignore_errors=True)

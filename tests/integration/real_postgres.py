"""A throw-away stock Postgres whose WAL is the input of ingest tests. Runs as user postgres when the tests run as root."""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

PG_BIN = Path("/usr/lib/postgresql/15/bin")
PG_MAJOR = 15
SUPERUSER = "cloud_admin"


def as_postgres() -> dict[str, object]:
    """Arguments for subprocess that leave root behind."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def give_to_postgres(path: Path) -> None:
    """Make a directory tree usable for the server."""
    if os.geteuid() == 0:
        for parent in path.parents:
            if parent == Path("/tmp"):
                break
            parent.chmod(0o755)
        for found in (path, *path.rglob("*")):
            shutil.chown(found, "postgres", "postgres")
    path.chmod(0o700)


class RealPostgres:
    """A server on a data directory; the socket is in its parent directory."""

    def __init__(self, data: Path, port: int, settings: dict[str, str] | None = None) -> None:
        self.data = data
        self.port = port
        self.socket_dir = data.parent
        lines = {
            "port": str(port),
            "listen_addresses": "''",
            "unix_socket_directories": f"'{self.socket_dir}'",
            "fsync": "off",
            "max_prepared_transactions": "10",
            "wal_keep_size": "'4GB'",
            "max_wal_size": "'4GB'",
            "autovacuum_naptime": "'1s'",
            **(settings or {}),
        }
        self._options = [part for name, value in lines.items() for part in ("-c", f"{name}={value.strip(chr(39))}")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it accepts connections."""
        command = [PG_BIN / "pg_ctl", "-D", self.data, "-w", "-t", "60", "-l", self.socket_dir / f"log.{self.port}"]
        options = " ".join(f"'{option}'" if " " in option or not option else option for option in self._options)
        self._run([*command, "-o", options, "start"])

    def stop(self, mode: str = "fast") -> None:
        """Stop; the default shuts down cleanly, with a checkpoint."""
        self._run([PG_BIN / "pg_ctl", "-D", self.data, "-w", "-m", mode, "stop"])

    def psql(self, sql: str, database: str = "postgres") -> str:
        """Run SQL; unaligned rows."""
        return self._client("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql)

    def psql_file(self, path: Path, *arguments: str) -> str:
        """Run a script."""
        command = [str(PG_BIN / "psql"), *self._address(), "-XAtq", *arguments, "-d", "postgres", "-f", "-"]
        return self._run(command, stdin=path.read_bytes())

    def pgbench(self, *arguments: str) -> str:
        """Run pgbench."""
        return self._client("pgbench", *arguments, "postgres")

    def _address(self) -> list[str]:
        return ["-h", str(self.socket_dir), "-p", str(self.port), "-U", SUPERUSER]

    def _client(self, program: str, *arguments: str) -> str:
        return self._run([str(PG_BIN / program), *self._address(), *arguments])

    def _run(self, command: list[object], stdin: bytes = b"") -> str:
        result = subprocess.run(
            [str(word) for word in command],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            timeout=300,
            **as_postgres(),  # type: ignore[call-overload]
        )
        text = result.stdout.decode()
        if result.returncode:
            log = self.socket_dir / f"log.{self.port}"
            raise AssertionError(f"{command[0]} failed: {text[-3000:]}\n{log.read_text()[-3000:] if log.exists() else ''}")
        return text

"""Durable replacement with a failure at every step, the pid file, and objects in a directory."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from neon_services.ground import durable
from neon_services.ground.errors import ConfigError
from neon_services.ground.process import PidFile
from neon_services.ground.remote_storage import (
    LocalFsStorage,
    ObjectNotFound,
    RemoteStorageError,
    open_remote_storage,
    parse_remote_storage_option,
)


class Stopped(Exception):
    """The power goes away here."""


def test_replacement_is_all_or_nothing_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    for steps in range(20):
        path.write_bytes(b"old")
        left = steps

        def wrap(real: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Stopped
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", wrap(os.fsync))
            patch.setattr(Path, "rename", wrap(Path.rename))
            try:
                durable.replace_durably(path, b"new content")
            except Stopped:
                assert path.read_bytes() in (b"old", b"new content")
                continue
        assert path.read_bytes() == b"new content"
        assert steps == 3, "sync of the file, rename, sync of the directory"
        return
    pytest.fail("replacement never finished")


def test_the_order_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: steps.append("dir" if Path(f"/proc/self/fd/{fd}").is_dir() else "file"))
    monkeypatch.setattr(Path, "rename", lambda self, to: (steps.append("rename"), rename(self, to))[1])
    durable.replace_durably(tmp_path / "a", b"x")
    assert steps == ["file", "rename", "dir"]
    steps.clear()
    durable.replace_durably(tmp_path / "a", b"y", sync=False)
    assert steps == ["rename"]
    assert (tmp_path / "a").read_bytes() == b"y"


def test_syncing_a_file_system(tmp_path: Path) -> None:
    durable.sync_filesystem(tmp_path)
    with pytest.raises(FileNotFoundError):
        durable.sync_filesystem(tmp_path / "absent")


def _hold(path: Path, held: Any, done: Any) -> None:
    lock = PidFile(path)
    held.set()
    done.wait(20)
    del lock


def test_the_pid_file_excludes_and_is_free_after_death(tmp_path: Path) -> None:
    path = tmp_path / "service.pid"
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(path, held, done))
    holder.start()
    try:
        assert held.wait(20)
        with pytest.raises(ConfigError, match=rf"locked by another process \(pid {holder.pid}\): stop it first"):
            PidFile(path)
    finally:
        holder.kill()
        holder.join(20)
    PidFile(path)
    assert path.read_text() == f"{os.getpid()}\n"


def test_run_service_turns_errors_into_one_line_and_a_code() -> None:
    program = """
import sys
from neon_services.ground import errors, process
async def main():
    raise eval(sys.argv[1])
sys.exit(process.run_service(main))
"""
    for error, code, text in (
        ("errors.ConfigError('say --x')", 2, "error: say --x"),
        ("errors.CorruptionError('file y')", 1, "error: file y"),
        ("OSError(28, 'No space left')", 1, "No space left"),
    ):
        done = subprocess.run([sys.executable, "-c", program, error], capture_output=True, text=True, check=False, timeout=20)
        assert done.returncode == code
        assert text in done.stderr
        assert "Traceback" not in done.stderr


# -- objects in a directory


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[LocalFsStorage]:
    storage = LocalFsStorage(tmp_path / "bucket")
    yield storage
    await storage.close()


async def test_objects(storage: LocalFsStorage, tmp_path: Path) -> None:
    await storage.put("a/b/one", b"0123456789")
    await storage.put("a/b/one", b"replaced!!")
    await storage.put("a/two", b"2")
    (tmp_path / "local").write_bytes(b"from a file")
    await storage.put_file("c", tmp_path / "local")
    assert await storage.get("a/b/one") == b"replaced!!"
    assert await storage.get("a/b/one", 2, 5) == b"pla"
    assert await storage.get("a/b/one", 8) == b"!!"
    assert await storage.get("a/b/one", 5, 5) == b""
    assert await storage.list_keys("") == ["a/b/one", "a/two", "c"]
    assert await storage.list_keys("a/t") == ["a/two"]
    assert await storage.list_keys("absent/") == []
    assert await storage.list_directories("") == ["a"]
    assert await storage.list_directories("a/") == ["b"]
    await storage.get_file("c", tmp_path / "downloaded")
    assert (tmp_path / "downloaded").read_bytes() == b"from a file"
    await storage.delete(["a/two", "never was"])
    assert await storage.list_keys("a/") == ["a/b/one"]
    for missing in ("a/two", "a/b/one/below"):
        with pytest.raises((ObjectNotFound, RemoteStorageError)):
            await storage.get(missing)


async def test_keys_cannot_leave_the_directory(storage: LocalFsStorage) -> None:
    for key in ("../x", "/etc/passwd", "a/../../x", "."):
        with pytest.raises(RemoteStorageError, match="leaves the storage directory"):
            await storage.put(key, b"")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{local_path=}", "not a TOML inline table"),
        ("7", "must be a table"),
        ("{local='x'}", "unknown key 'local'"),
        ("{bucket_name='b'}", "'bucket_region' is missing"),
        ("{bucket_region='r', bucket_name=''}", "'bucket_name' is missing"),
    ],
)
def test_wrong_configuration_is_named(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        open_remote_storage(parse_remote_storage_option(text))


async def test_a_storage_that_is_not_there_is_not_empty(storage: LocalFsStorage, tmp_path: Path) -> None:
    await storage.put("a/b/c", b"1")
    assert await storage.list_keys("a/b/") == ["a/b/c"] and await storage.list_keys("") == ["a/b/c"]
    assert await storage.list_keys("a/x/") == []
    (tmp_path / "bucket").rename(tmp_path / "away")
    for replaced in (False, True):
        if replaced:
            (tmp_path / "bucket").write_text("no directory")
        with pytest.raises(RemoteStorageError):
            await storage.list_keys("a/b/")
        with pytest.raises(RemoteStorageError):
            await storage.list_directories("a/")
        with pytest.raises(RemoteStorageError):
            await storage.get("a/b/c")
    (tmp_path / "bucket").unlink()
    (tmp_path / "away").rename(tmp_path / "bucket")
    assert await storage.get("a/b/c") == b"1"

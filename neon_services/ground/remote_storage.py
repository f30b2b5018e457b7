"""Object storage behind one small interface: S3 (boto3) or a directory (``local_path``).

Configuration is Neon's ``remote_storage`` table: ``{local_path="/srv/x"}`` or ``{bucket_name, bucket_region, prefix_in_bucket?,
endpoint?, concurrency_limit?}``. Credentials come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``),
never from the table. Keys are ``/``-separated paths relative to the prefix.

Invariant: an object is visible under its key either whole or not at all.
"""

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import tomli

from neon_services.ground.durable import replace_durably
from neon_services.ground.errors import ConfigError, NeonError

T = TypeVar("T")


class ObjectNotFound(NeonError):
    """There is no object under this key."""


class RemoteStorageError(NeonError):
    """The object store answered with an error or not at all; the operation may be tried again."""


class RemoteStorage(ABC):
    """Asynchronous access to objects. Every call may raise RemoteStorageError."""

    @abstractmethod
    async def put(self, key: str, content: bytes, *, metadata: dict[str, str] | None = None) -> None:
        """Store an object; replaces an existing one atomically. A directory keeps no metadata."""

    @abstractmethod
    async def put_file(self, key: str, path: Path) -> None:
        """Store the content of a local file."""

    @abstractmethod
    async def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of an object, fewer when it ends before. Raises ObjectNotFound."""

    @abstractmethod
    async def get_file(self, key: str, path: Path) -> None:
        """Download an object into a local file, synced to disk. Raises ObjectNotFound."""

    @abstractmethod
    async def list_keys(self, prefix: str) -> list[str]:
        """All keys that start with the prefix, sorted."""

    @abstractmethod
    async def list_directories(self, prefix: str) -> list[str]:
        """The distinct next path components below ``prefix`` (which ends in ``/`` or is empty), sorted."""

    @abstractmethod
    async def delete(self, keys: list[str]) -> None:
        """Delete objects; absent ones are no error."""

    @abstractmethod
    async def close(self) -> None:
        """Release threads and connections."""

    @property
    def busy(self) -> bool:
        """Whether a call runs on although nobody may wait for it any more; it cannot be interrupted."""
        return False


class _Threaded(RemoteStorage):
    def __init__(self, concurrency: int) -> None:
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="remote-storage")

        self._calls: set[Future[Any]] = set()

    async def _run(self, call: Callable[..., T], *arguments: Any) -> T:
        running = self._threads.submit(call, *arguments)
        self._calls.add(running)
        running.add_done_callback(self._calls.discard)
        return await asyncio.wrap_future(running)

    @property
    def busy(self) -> bool:
        return any(call.running() for call in tuple(self._calls))

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class LocalFsStorage(_Threaded):
    """Objects as files below one directory."""

    def __init__(self, root: Path, concurrency: int = 8) -> None:
        super().__init__(concurrency)
        self._root = root.resolve()
        self._root.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        path = (self._root / key).resolve()
        if not path.is_relative_to(self._root) or path == self._root:
            raise RemoteStorageError(f"object key {key!r} leaves the storage directory")
        return path

    def _check_root(self) -> None:
        """A storage that is not there is no empty storage."""
        if not self._root.is_dir():
            raise RemoteStorageError(f"the storage directory {self._root} is not there")

    async def put(self, key: str, content: bytes, *, metadata: dict[str, str] | None = None) -> None:
        def store() -> None:
            path = self._path(key)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_durably(path, content, staged_suffix=f".{os.urandom(4).hex()}.___temp")
            except OSError as error:
                raise RemoteStorageError(f"cannot store {key}: {error}") from error

        await self._run(store)

    async def put_file(self, key: str, path: Path) -> None:
        await self.put(key, await self._run(path.read_bytes))

    async def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        def load() -> bytes:
            try:
                with self._path(key).open("rb") as file:
                    file.seek(start)
                    return file.read() if end is None else file.read(max(0, end - start))
            except FileNotFoundError:
                self._check_root()
                raise ObjectNotFound(f"object {key} does not exist") from None
            except OSError as error:
                raise RemoteStorageError(f"cannot read {key}: {error}") from error

        return await self._run(load)

    async def get_file(self, key: str, path: Path) -> None:
        content = await self.get(key)
        await self._run(lambda: replace_durably(path, content, staged_suffix=".temp_download"))

    async def list_keys(self, prefix: str) -> list[str]:
        def walk() -> list[str]:
            self._check_root()
            base = prefix.rpartition("/")[0]
            start = self._path(base) if base else self._root
            keys = []
            for directory, _, names in os.walk(start, onerror=unreadable):
                relative = Path(directory).relative_to(self._root)
                keys += [str(relative / name) for name in names]
            return sorted(k for k in keys if k.startswith(prefix) and not k.endswith(".___temp"))

        def unreadable(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # nothing below this prefix, or just deleted
                raise RemoteStorageError(f"cannot list {prefix}: {error}") from error

        return await self._run(walk)

    async def list_directories(self, prefix: str) -> list[str]:
        def scan() -> list[str]:
            self._check_root()
            directory = self._path(prefix.rstrip("/")) if prefix.strip("/") else self._root
            return sorted(p.name for p in directory.iterdir() if p.is_dir()) if directory.is_dir() else []

        return await self._run(scan)

    async def delete(self, keys: list[str]) -> None:
        def remove() -> None:
            for key in keys:
                try:
                    self._path(key).unlink(missing_ok=True)
                except OSError as error:
                    raise RemoteStorageError(f"cannot delete {key}: {error}") from error

        await self._run(remove)


class S3Storage(_Threaded):
    """Objects in an S3 bucket, by boto3."""

    def __init__(
        self, *, bucket: str, region: str, prefix: str = "", endpoint: str | None = None, concurrency: int = 16
    ) -> None:
        super().__init__(concurrency)
        import boto3
        from botocore.config import Config

        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._client = boto3.client(
            "s3",
            region_name=region,
            endpoint_url=endpoint,
            config=Config(
                max_pool_connections=concurrency,
                retries={"max_attempts": 3, "mode": "standard"},
                connect_timeout=5,
                read_timeout=30,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": "path"} if endpoint else {},
            ),
        )

    async def _call(self, what: str, call: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError

        def guarded() -> T:
            try:
                return call()
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code", "")
                if code in ("NoSuchKey", "404", "NotFound"):
                    raise ObjectNotFound(f"object {what} does not exist in bucket {self._bucket}") from error
                raise RemoteStorageError(f"S3 {what} in bucket {self._bucket}: {error}") from error
            except (BotoCoreError, OSError) as error:
                raise RemoteStorageError(f"S3 {what} in bucket {self._bucket}: {error}") from error

        return await self._run(guarded)

    async def put(self, key: str, content: bytes, *, metadata: dict[str, str] | None = None) -> None:
        extra = {"Metadata": metadata} if metadata else {}
        await self._call(
            key, lambda: self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=content, **extra)
        )

    async def put_file(self, key: str, path: Path) -> None:
        await self._call(key, lambda: self._client.upload_file(str(path), self._bucket, self._prefix + key))

    async def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        from botocore.exceptions import ClientError

        def load() -> bytes:
            extra = {} if start == 0 and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
            try:
                return self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **extra)["Body"].read()
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                    return b""  # the object ends before the range
                raise

        return b"" if end is not None and end <= start else await self._call(key, load)

    async def get_file(self, key: str, path: Path) -> None:
        content = await self.get(key)
        await self._run(lambda: replace_durably(path, content, staged_suffix=".temp_download"))

    async def list_keys(self, prefix: str) -> list[str]:
        def load() -> list[str]:
            keys: list[str] = []
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            ):
                keys += [item["Key"].removeprefix(self._prefix) for item in page.get("Contents", ())]
            return sorted(keys)

        return await self._call(prefix, load)

    async def list_directories(self, prefix: str) -> list[str]:
        def load() -> list[str]:
            names: list[str] = []
            paginator = self._client.get_paginator("list_objects_v2")
            for page in paginator.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix, Delimiter="/"):
                full = (item["Prefix"] for item in page.get("CommonPrefixes", ()))
                names += [name.removeprefix(self._prefix + prefix).strip("/") for name in full]
            return sorted(names)

        return await self._call(prefix, load)

    async def delete(self, keys: list[str]) -> None:
        for first in range(0, len(keys), 1000):
            objects = [{"Key": self._prefix + key} for key in keys[first : first + 1000]]

            def remove(objects: list[dict[str, str]] = objects) -> None:
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
                if answer.get("Errors"):
                    raise RemoteStorageError(f"S3 delete in bucket {self._bucket}: {answer['Errors'][0]}")

            await self._call("delete", remove)


def parse_remote_storage_option(text: str) -> dict[str, Any]:
    """Read the TOML inline table of a command-line option such as ``{local_path='/srv/x'}``. Raises ConfigError."""
    try:
        return tomli.loads(f"remote_storage = {text}")["remote_storage"]
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"--remote-storage: not a TOML inline table ({error}): {text!r}") from error


def open_remote_storage(table: dict[str, Any]) -> RemoteStorage:
    """Open the storage that a ``remote_storage`` table describes. Raises ConfigError naming a wrong or missing key."""
    if not isinstance(table, dict):
        raise ConfigError("remote_storage must be a table such as { local_path = '/srv/neon' }")
    known = {"local_path", "bucket_name", "bucket_region", "prefix_in_bucket", "endpoint", "concurrency_limit",
             "max_keys_per_list_response", "upload_storage_class", "timeout", "small_timeout"}  # fmt: skip
    unknown = sorted(set(table) - known)
    if unknown:
        raise ConfigError(f"remote_storage: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
    if "local_path" in table:
        return LocalFsStorage(Path(table["local_path"]))
    for key in ("bucket_name", "bucket_region"):
        if not isinstance(table.get(key), str) or not table[key]:
            raise ConfigError(f"remote_storage: {key!r} is missing (or give local_path for a directory)")
    return S3Storage(
        bucket=table["bucket_name"],
        region=table["bucket_region"],
        prefix=table.get("prefix_in_bucket", ""),
        endpoint=table.get("endpoint"),
        concurrency=min(int(table.get("concurrency_limit", 16)), 100),
    )

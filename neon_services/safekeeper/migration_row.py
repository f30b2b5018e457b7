"""The row of one timeline's membership as a JSON file, for operators without a storage controller.

```json
{"tenant_id": "...", "timeline_id": "...", "generation": 1, "sk_set": [1, 2, 3], "new_sk_set": null, "pending_exclude": [],
 "safekeepers": [{"id": 1, "host": "10.0.0.1", "pg_port": 5454, "http_url": "http://10.0.0.1:7676"}, ...]}
```

Invariant: the file is replaced whole and durably, by one process at a time (a lock file beside it), and only if it still says
what that process read before.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neon_services.consensus.migration import Members, Row
from neon_services.ground.durable import replace_durably
from neon_services.ground.errors import ConfigError
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.net import parse_endpoint
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId

MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Address:
    """Where a safekeeper is reached by proposers, and by HTTP."""

    member: SafekeeperId
    http_url: str


class RowFile:
    """The file. All methods raise ConfigError that names the file and the field."""

    def __init__(self, path: Path) -> None:
        self._path = path
        document = self._read()
        self.ttid = self._ttid(document)
        self.addresses = self._addresses(document)
        self.row = self._row(document)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing the row."""
        descriptor = os.open(self._path.with_name(self._path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.row = self._row(self._read())
            yield
        except BlockingIOError:
            raise ConfigError(f"{self._path} is in use by another process that changes the membership: wait for it") from None
        finally:
            os.close(descriptor)

    def compare_and_set(self, expected: Row, row: Row) -> bool:
        """Store the row if the file still says ``expected``. Raises OSError as well."""
        document = self._read()
        if self._row(document) != expected:
            return False
        new = row.mconf.new_members
        document["generation"] = row.mconf.generation
        document["sk_set"] = _ids(row.mconf.members)
        document["new_sk_set"] = None if new is None else _ids(new)
        document["pending_exclude"] = _ids(row.pending_exclude)
        replace_durably(self._path, json.dumps(document, indent=2).encode() + b"\n")
        self.row = row
        return True

    def members(self, ids: list[int], what: str) -> Members:
        """The safekeepers with these ids."""
        if len(set(ids)) != len(ids):
            raise self._error(what, f"names a safekeeper twice: {ids}")
        for node_id in ids:
            if node_id not in self.addresses:
                known = ", ".join(map(str, sorted(self.addresses)))
                raise self._error(what, f"safekeeper {node_id} is not listed under 'safekeepers' (those are {known})")
        return tuple(self.addresses[node_id].member for node_id in ids)

    # -- reading

    def _error(self, field: str, text: str) -> ConfigError:
        return ConfigError(f"{self._path}: {field}: {text}")

    def _read(self) -> dict[str, Any]:
        try:
            with self._path.open("rb") as file:
                document = json.loads(file.read(MAX_FILE_BYTES))
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self._path}: not JSON: {error}") from error
        if not isinstance(document, dict):
            raise ConfigError(f"{self._path}: not a JSON object")
        return document

    def _ttid(self, document: dict[str, Any]) -> TenantTimelineId:
        try:
            return TenantTimelineId(
                TenantId.parse(str(document.get("tenant_id"))), TimelineId.parse(str(document.get("timeline_id")))
            )
        except ValueError as error:
            raise self._error("tenant_id, timeline_id", str(error)) from error

    def _addresses(self, document: dict[str, Any]) -> dict[int, Address]:
        listed = document.get("safekeepers")
        if not isinstance(listed, list) or not listed:
            raise self._error("safekeepers", "must be a list of objects with id, host, pg_port and http_url")
        found: dict[int, Address] = {}
        for entry in listed:
            kinds = {"id": int, "host": str, "pg_port": int, "http_url": str}
            if not isinstance(entry, dict) or any(type(entry.get(name)) is not kind for name, kind in kinds.items()):
                raise self._error("safekeepers", f"{entry!r} must be an object with id, host, pg_port and http_url")
            if entry["id"] in found:
                raise self._error("safekeepers", f"safekeeper {entry['id']} is listed twice")
            parse_endpoint(entry["http_url"], what=f"{self._path}: http_url of safekeeper {entry['id']}")
            if not 0 <= entry["id"] < 1 << 64 or not 0 < entry["pg_port"] < 1 << 16 or not entry["host"]:
                raise self._error("safekeepers", f"{entry!r} has an impossible id, host or pg_port")
            member = SafekeeperId(entry["id"], entry["host"], entry["pg_port"])
            found[member.node_id] = Address(member, entry["http_url"])
        urls = [address.http_url for address in found.values()]
        if len(set(urls)) != len(urls):
            raise self._error("safekeepers", "two safekeepers have the same http_url")
        return found

    def _row(self, document: dict[str, Any]) -> Row:
        def ids(name: str, value: Any) -> Members:
            if not isinstance(value, list) or any(type(node_id) is not int for node_id in value):
                raise self._error(name, f"must be a list of safekeeper ids, not {value!r}")
            return self.members(value, name)

        generation = document.get("generation")
        if type(generation) is not int or not 0 <= generation < (1 << 32) - 2:
            raise self._error("generation", f"{generation!r} is not a membership generation")
        members, new = ids("sk_set", document.get("sk_set")), document.get("new_sk_set")
        new_members = None if new is None else ids("new_sk_set", new)
        if not members or new_members == ():
            raise self._error("sk_set, new_sk_set", "a set of safekeepers cannot be empty")
        pending = ids("pending_exclude", document.get("pending_exclude", []))
        return Row(MembershipConfiguration(generation, members, new_members), tuple(sorted(pending)))


def _ids(members: Members) -> list[int]:
    return [member.node_id for member in members]

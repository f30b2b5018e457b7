"""Changing single fields of a control file, given in the JSON form that it is shown in: surgery for operators.

Invariant: what is not named keeps its exact value, and a value of another type or out of range changes nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from neon_services.consensus.term_history import check
from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import Lsn, parse_lsn
from neon_services.protocols.safekeeper_messages import MAX_TERM_HISTORY, MembershipConfiguration, TermLsn
from neon_services.safekeeper.control_file import UPLOAD_STATES, ControlFile, PartialSegment

_EPOCH, _LAST_YEAR = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
LSN_FIELDS = (
    "timeline_start_lsn",
    "local_start_lsn",
    "commit_lsn",
    "backup_lsn",
    "peer_horizon_lsn",
    "remote_consistent_lsn",
)


def _number(value: Any, bits: int) -> int:
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise ValueError(f"{value!r} is not a number from 0 to {(1 << bits) - 1}")
    return value


def _lsn(value: Any) -> Lsn:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not an LSN like 0/169AD58")
    return parse_lsn(value)


def _fields(value: Any, *names: str) -> list[Any]:
    if not isinstance(value, dict) or any(name not in value for name in names):
        raise ValueError(f"must be an object with {', '.join(names)}")
    return [value[name] for name in names]


def _objects(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_TERM_HISTORY:
        raise ValueError("must be a list")
    return value


def _acceptor_state(control: ControlFile, value: Any) -> ControlFile:
    term, listed = _fields(value, "term", "term_history")
    entries = [_fields(entry, "term", "lsn") for entry in _objects(listed)]
    history = tuple(TermLsn(_number(entry_term, 64), _lsn(lsn)) for entry_term, lsn in entries)
    check(history)
    if history and history[-1].term > _number(term, 64):
        raise ValueError(f"term {term} is below the last term of the history, {history[-1].term}")
    return _acceptor(control, term=_number(term, 64), term_history=history)


def _server(control: ControlFile, value: Any) -> ControlFile:
    pg_version, system_id, segment_size = _fields(value, "pg_version", "system_id", "wal_seg_size")
    if segment_size != control.acceptor.wal_seg_size:
        raise ValueError(f"wal_seg_size cannot be changed: the segments on disk have {control.acceptor.wal_seg_size} bytes")
    return _acceptor(control, pg_version=_number(pg_version, 32), system_id=_number(system_id, 64))


def _proposer_uuid(control: ControlFile, value: Any) -> ControlFile:
    if not isinstance(value, str) or len(value) != 32:
        raise ValueError("must be 32 hexadecimal digits")
    return _acceptor(control, proposer_uuid=bytes.fromhex(value))


def _partial_backup(control: ControlFile, value: Any) -> ControlFile:
    (listed,) = _fields(value, "segments")
    parts = []
    for entry in _objects(listed):
        status, name, commit_lsn, flush_lsn, term = _fields(entry, "status", "name", "commit_lsn", "flush_lsn", "term")
        if status not in UPLOAD_STATES or not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"{entry!r} is not a partial segment")
        parts.append(PartialSegment(UPLOAD_STATES.index(status), name, _lsn(commit_lsn), _lsn(flush_lsn), _number(term, 64)))
    return replace(control, partial_backup=tuple(parts))


def _eviction_state(control: ControlFile, value: Any) -> ControlFile:
    if value == "Present":
        return replace(control, offloaded_flush_lsn=None)
    (lsn,) = _fields(value, "Offloaded")
    return replace(control, offloaded_flush_lsn=_lsn(lsn))


def _creation_ts(control: ControlFile, value: Any) -> ControlFile:
    created = datetime.fromisoformat(value) if isinstance(value, str) else None
    if created is None or created.tzinfo is None or not _EPOCH <= created < _LAST_YEAR:
        raise ValueError(f"{value!r} is not a time like 2026-01-31T12:00:00Z")
    return replace(control, creation_ts_ns=(created - _EPOCH) // timedelta(microseconds=1) * 1000)


def _acceptor(control: ControlFile, **changes: Any) -> ControlFile:
    return replace(control, acceptor=replace(control.acceptor, **changes))


_SETTERS: dict[str, Callable[[ControlFile, Any], ControlFile]] = {
    "mconf": lambda control, value: _acceptor(control, mconf=MembershipConfiguration.from_json(value)),
    "acceptor_state": _acceptor_state,
    "server": _server,
    "proposer_uuid": _proposer_uuid,
    "partial_backup": _partial_backup,
    "eviction_state": _eviction_state,
    "creation_ts": _creation_ts,
}


def patched(control: ControlFile, updates: dict[str, Any], apply_fields: list[str]) -> ControlFile:
    """The control file with the named fields as in ``updates``. Raises ValueError that names the field."""
    for name in apply_fields:
        if name not in updates:
            raise ValueError(f"apply_fields: {name!r} is not in updates")
        try:
            if name in LSN_FIELDS:
                control = _acceptor(control, **{name: _lsn(updates[name])})
            elif name in _SETTERS:
                control = _SETTERS[name](control, updates[name])
            elif name in ("tenant_id", "timeline_id"):
                raise ValueError("cannot be changed: it names the directory")
            else:
                raise ValueError(f"no field of a control file; those are {', '.join(sorted({*LSN_FIELDS, *_SETTERS}))}")
        except (ValueError, CorruptionError) as error:
            raise ValueError(f"updates.{name}: {error}") from error
    return control

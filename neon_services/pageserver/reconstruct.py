"""From the rows that a read collected to values: base image plus records in LSN order.

Invariant: a key whose history is a single image never touches the redo helper. Postgres records of many keys go to the helper
in one batch; records of ours are applied in process; both may alternate within one key's history (a visibility map page).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import format_lsn
from neon_services.pageserver.values import IMAGE, NATIVE, TOMBSTONE, WAL, WAL_INIT, MissingKey, format_key
from neon_services.wal.redo import RedoRequest, RedoResult

#: ``apply(page, record, lsn, key) -> page``: one functional record of ours; ``page`` is None when the key has no base.
NativeApply = Callable[[bytes | None, bytes, int, int], bytes]


class RedoFailed(NeonError):
    """A record could not be applied to its page. The text names key and LSN."""


class Redo(Protocol):
    """WAL redo as this module needs it: ``wal.redo.RedoPool`` in production."""

    async def apply(self, requests: Sequence[RedoRequest]) -> list[RedoResult]:
        """Result i belongs to request i; errors of a page are in its result."""


@dataclass(slots=True)
class History:
    """What a read found for one key: newest base (or nothing) and the records after it, oldest first."""

    kinds: list[int] = field(default_factory=list)
    lsns: list[int] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)


class Reconstructor:
    """Applies histories. One per process; holds the ways to apply each type of record."""

    def __init__(self, redo: Redo | None = None, native_apply: NativeApply | None = None) -> None:
        self._redo = redo
        self._native_apply = native_apply

    async def reconstruct(self, key_hi: Sequence[int], key_lo: Sequence[int], histories: list[History], lsn: int) -> list[Any]:
        """A value per key: bytes, or MissingKey, or RedoFailed (returned, not raised: one bad page does not spoil a batch)."""
        answers: list[Any] = [None] * len(histories)
        pending: dict[int, tuple[int, bytes | None]] = {}  # key number -> (next row, page so far)
        for number, history in enumerate(histories):
            kinds = history.kinds
            if not kinds or kinds == [TOMBSTONE]:
                answers[number] = MissingKey(key_hi[number], key_lo[number], lsn)
            elif kinds[0] == IMAGE:
                if len(kinds) == 1:
                    answers[number] = history.values[0]
                else:
                    pending[number] = (1, history.values[0])
            else:
                pending[number] = (1 if kinds[0] == TOMBSTONE else 0, None)
        while pending:
            await self._round(key_hi, key_lo, histories, lsn, answers, pending)
        return answers

    async def _round(
        self,
        key_hi: Sequence[int],
        key_lo: Sequence[int],
        histories: list[History],
        lsn: int,
        answers: list[Any],
        pending: dict[int, tuple[int, bytes | None]],
    ) -> None:
        """Advance every pending key over its native records and one run of Postgres records."""
        requests: list[RedoRequest] = []
        askers: list[tuple[int, int]] = []
        for number in list(pending):
            history = histories[number]
            at, page = pending[number]
            key = key_hi[number] << 64 | key_lo[number]
            try:
                at, page = self._apply_native_run(history, at, page, key)
            except NeonError as error:
                answers[number] = RedoFailed(f"key {format_key(key)} at {format_lsn(lsn)}: {error}")
                del pending[number]
                continue
            if at == len(history.kinds):
                answers[number] = page
                del pending[number]
                continue
            end = at
            while end < len(history.kinds) and history.kinds[end] in (WAL, WAL_INIT):
                end += 1
            if page is None and history.kinds[at] == WAL:
                answers[number] = MissingKey(
                    key_hi[number], key_lo[number], lsn, ": its oldest record needs a page image that no layer holds"
                )
                del pending[number]
                continue
            requests.append(_request(key, page, history.values[at:end]))
            askers.append((number, end))
        if not requests:
            return
        if self._redo is None:
            raise NeonError("a page needs WAL redo, but no redo helper is configured")
        for (number, end), result in zip(askers, await self._redo.apply(requests), strict=True):
            if result.page is None:
                key = key_hi[number] << 64 | key_lo[number]
                text = result.error or "the first record does not make the page and there is no base page"
                answers[number] = RedoFailed(f"WAL redo of key {format_key(key)} at {format_lsn(lsn)}: {text}")
                del pending[number]
            elif end == len(histories[number].kinds):
                answers[number] = result.page
                del pending[number]
            else:
                pending[number] = (end, result.page)

    def _apply_native_run(self, history: History, at: int, page: bytes | None, key: int) -> tuple[int, bytes | None]:
        while at < len(history.kinds) and history.kinds[at] == NATIVE:
            if self._native_apply is None:
                raise NeonError("a functional record needs native_records, which is not configured")
            page = self._native_apply(page, history.values[at], history.lsns[at], key)
            at += 1
        return at, page


def _request(key: int, page: bytes | None, records: list[bytes]) -> RedoRequest:
    return RedoRequest(
        spc=key >> 104 & 0xFFFF,
        db=key >> 72 & 0xFFFF_FFFF,
        rel=key >> 40 & 0xFFFF_FFFF,
        fork=key >> 32 & 0xFF,
        blk=key & 0xFFFF_FFFF,
        base=page,
        entries=records[0] if len(records) == 1 else b"".join(records),
        nrecords=len(records),
    )

"""The form of a timeline's snapshot: a GNU tar stream, as bytes without sockets or files.

Layout: the member ``safekeeper.control`` first, then WAL segments in ascending order without gaps, each of the full segment
size, the last one perhaps named ``.partial``; then two blocks of zeros. Invariant of the reader: it gives out nothing of a
member before the member's header is whole and valid, and it says that the archive is complete only at its end mark.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from neon_services.ground.errors import CorruptionError

BLOCK_BYTES = tarfile.BLOCKSIZE
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)


def member_header(name: str, size: int) -> bytes:
    """The block in front of a member's bytes."""
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o600
    return member.tobuf(tarfile.GNU_FORMAT)


def member_padding(size: int) -> bytes:
    """The zeros behind a member's bytes."""
    return bytes(-size % BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Member:
    """A member begins: its ``size`` bytes follow."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class MemberEnd:
    """All bytes of the member have been given out."""


class TarReader:
    """Cuts a stream that arrives in any pieces into members. ``complete`` is True once the end mark has been seen."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._left = 0  # bytes of the member that are still to come
        self._padding = 0
        self._in_member = False
        self.complete = False

    def feed(self, data: bytes) -> Iterator[Member | bytes | MemberEnd]:
        """What this piece brings. Raises CorruptionError when it is no plain tar stream."""
        position = 0
        while position < len(data):
            if self.complete:
                return  # what follows the end mark is padding of the writer's record size
            if self._in_member:
                piece = data[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                if piece:
                    yield piece
                if not self._left:
                    self._in_member = False
                    yield MemberEnd()
            elif self._padding:
                skipped = min(self._padding, len(data) - position)
                position += skipped
                self._padding -= skipped
            else:
                taken = data[position : position + BLOCK_BYTES - len(self._header)]
                position += len(taken)
                self._header += taken
                if len(self._header) == BLOCK_BYTES:
                    yield from self._begin(bytes(self._header))
                    self._header.clear()

    def _begin(self, block: bytes) -> Iterator[Member | MemberEnd]:
        if not any(block):
            self.complete = True
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise CorruptionError(f"the snapshot is not a tar stream: {error}") from error
        if not member.isreg() or member.size < 0:
            raise CorruptionError(f"the snapshot has a member {member.name!r} that is not a plain file")
        yield Member(member.name, member.size)
        self._left, self._padding = member.size, -member.size % BLOCK_BYTES
        self._in_member = bool(member.size)
        if not member.size:
            yield MemberEnd()

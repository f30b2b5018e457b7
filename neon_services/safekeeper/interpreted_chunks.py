"""Where senders of interpreted WAL get it from: pieces of a timeline's WAL, read, decoded and interpreted.

A chunk begins where a record ends and has at least one record; it ends with the last record that is complete at the next
multiple of 128 KiB, or at the end of what may be read. So readers that follow the same WAL from different positions meet, at
the latest behind the next such multiple, and from there on can share chunks.

Invariant: which chunks a reader gets depends on nothing but its position and what it may read; sharing changes who makes them.
Nobody ever waits for a reader that is behind: only who is first makes shared chunks, the others take them as long as they are
kept, and make their own when they are not.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import INVALID_LSN, Lsn, format_lsn
from neon_services.protocols.replication_stream import MAX_XLOG_DATA_BYTES
from neon_services.safekeeper.wal_reader import WalReader
from neon_services.wal.decoder import WalDecodeError, WalDecoder
from neon_services.wal.interpret import InterpretedBatch, interpret

log = logging.getLogger(__name__)

CHUNK_BYTES = MAX_XLOG_DATA_BYTES
CHUNKS_KEPT = 32  # 4 MiB of WAL
Result = TypeVar("Result")

# Interpreting takes the interpreter for some milliseconds: on threads of its own it can be interrupted by the event loop, which
# appends WAL, and it does not keep the threads busy that read and sync files.
_pool = ThreadPoolExecutor(2, "interpret")


async def in_pool(work: Callable[..., Result], *arguments: object) -> Result:
    """Run CPU-heavy work beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_pool, work, *arguments)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Interpreted WAL; ``streaming_lsn`` is up to where WAL was read, which may be in the middle of a record."""

    batch: InterpretedBatch
    streaming_lsn: Lsn


class ChunkSource:
    """Makes chunks one after another."""

    def __init__(self, reader: WalReader, pg_major: int, segment_size: int) -> None:
        self._reader = reader
        self._pg_major = pg_major
        self._segment_size = segment_size
        # Never closed, only let go: a thread may be using it when the connection that waits for it is cancelled.
        self._decoder: WalDecoder | None = None
        self._left_out: set[int] = set()

    async def next(self, position: Lsn, end: Lsn) -> Chunk | None:
        """The chunk at ``position``, a record's end, of WAL below ``end``; None when no record is complete there.

        Raises NeonError, WalDecodeError, CorruptionError, OSError.
        """
        decoder, self._decoder = self._decoder, None  # after an error the next chunk begins with a new one
        if decoder is None or decoder.next_lsn != position:
            decoder = WalDecoder(position, self._pg_major, segment_size=self._segment_size)
        while decoder.position < end:
            limit = min(end, decoder.position - decoder.position % CHUNK_BYTES + CHUNK_BYTES)
            data = await self._reader.read(decoder.position, limit - decoder.position)
            batch = await in_pool(self._decode, decoder, data, position)
            if batch is not None:
                self._decoder = decoder
                self._report(batch.left_out_tablespaces)
                return Chunk(batch, decoder.position)
        self._decoder = decoder
        return None

    def _decode(self, decoder: WalDecoder, data: bytes, position: Lsn) -> InterpretedBatch | None:
        try:
            decoded = decoder.feed(data)
        except WalDecodeError as error:
            raise NeonError(f"WAL from {format_lsn(position)} on cannot be interpreted: {error}") from error
        return interpret(decoded, position, self._pg_major) if len(decoded.records) else None

    def _report(self, tablespaces: frozenset[int]) -> None:
        for oid in tablespaces - self._left_out:
            self._left_out.add(oid)
            log.error("WAL of tablespace %d is left out of interpreted WAL: its oid has no place in a key", oid)

    def close(self) -> None:
        """Let go of the file."""
        self._reader.close()


def _forget_failure(task: asyncio.Task[Any]) -> None:
    """Whoever waits for the task gets its failure; when all of them have gone, nobody wants it."""
    if not task.cancelled():
        task.exception()


class SharedChunks:
    """The chunks that the readers of one timeline have in common: whoever is first has them made, once.

    For readers of committed WAL only: what was read once stays true.
    """

    def __init__(self, source: ChunkSource) -> None:
        self._source = source
        self._made: OrderedDict[Lsn, Chunk] = OrderedDict()
        self._making: asyncio.Task[Chunk | None] | None = None
        self._making_at = INVALID_LSN
        self.head = INVALID_LSN  #: where the newest chunk ends
        self.users = 0

    async def next(self, position: Lsn, end: Lsn, max_delta: int | None) -> Chunk | Literal[False] | None:
        """The chunk at ``position``, None when no record is complete there; False when the reader must make its own."""
        if max_delta is not None and self.head and abs(self.head - position) > max_delta:
            return False
        made = self._made.get(position)
        if made is not None:
            return made
        if self._making is None:
            if position < self.head:
                return False
            self._making_at = position
            self._making = asyncio.create_task(self._make(position, end))
            self._making.add_done_callback(_forget_failure)
        elif self._making_at != position:
            return False
        # not cancelled with this reader: others wait for it, too
        return await asyncio.shield(self._making)

    async def _make(self, position: Lsn, end: Lsn) -> Chunk | None:
        try:
            chunk = await self._source.next(position, end)
            if chunk is not None:
                self._made[position] = chunk
                self.head = chunk.batch.next_lsn
                if len(self._made) > CHUNKS_KEPT:
                    self._made.popitem(last=False)
            return chunk
        finally:
            self._making = None

    async def close(self) -> None:
        """Nobody reads any more."""
        making = self._making
        if making is not None:
            making.cancel()
            await asyncio.wait({making})
        self._source.close()


class InterpretedReaders:
    """All sources of chunks of one timeline."""

    def __init__(self, open_reader: Callable[[], WalReader]) -> None:
        self._open_reader = open_reader
        self._shared: SharedChunks | None = None
        self.count = 0  #: sources that exist

    def open(self, pg_major: int, segment_size: int, *, fanout: bool, max_delta: int | None) -> "ChunkFeed":
        """One reader's chunks. Close it at the end."""

        def make() -> ChunkSource:
            self.count += 1
            return ChunkSource(self._open_reader(), pg_major, segment_size)

        if not fanout:
            return ChunkFeed(self, make, None, None)
        if self._shared is None:
            self._shared = SharedChunks(make())
        self._shared.users += 1
        return ChunkFeed(self, make, self._shared, max_delta)

    def closed_source(self) -> None:
        """A source of a feed was closed."""
        self.count -= 1

    async def leave(self, shared: SharedChunks) -> None:
        """A feed with shared chunks was closed."""
        shared.users -= 1
        if not shared.users:
            self._shared = None
            self.count -= 1
            await shared.close()


class ChunkFeed:
    """The chunks that one reader gets, shared ones where possible."""

    def __init__(
        self, readers: InterpretedReaders, make: Callable[[], ChunkSource], shared: SharedChunks | None, max_delta: int | None
    ) -> None:
        self._readers = readers
        self._make = make
        self._shared = shared
        self._max_delta = max_delta
        self._own: ChunkSource | None = None

    async def next(self, position: Lsn, end: Lsn) -> Chunk | None:
        """See ChunkSource.next."""
        if self._shared is not None:
            chunk = await self._shared.next(position, end, self._max_delta)
            if chunk is not False:
                self._close_own()
                return chunk
        if self._own is None:
            self._own = self._make()
        return await self._own.next(position, end)

    def _close_own(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.close()
            self._readers.closed_source()

    async def close(self) -> None:
        """Let go of the files. Idempotent."""
        self._close_own()
        shared, self._shared = self._shared, None
        if shared is not None:
            await self._readers.leave(shared)

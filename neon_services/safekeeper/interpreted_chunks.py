"""Where senders of interpreted WAL get it from: pieces of a timeline's WAL, read, decoded and interpreted.

A chunk begins where a record ends and has at least one record; it ends with the last record that is complete at the next
multiple of 128 KiB, or at the end of what may be read. So readers that follow the same WAL from different positions meet, at
the latest behind the next such multiple, and from there on can share chunks.

Invariant: a chunk is right for everybody at its position, whoever made it; sharing only changes who does the work. A reader
waits for another one only when both need the same chunk at the same time, so nobody is held up by who is behind or ahead.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import INVALID_LSN, Lsn, format_lsn
from neon_services.protocols.replication_stream import MAX_XLOG_DATA_BYTES
from neon_services.safekeeper.wal_reader import WalReader
from neon_services.wal.decoder import WalDecodeError, WalDecoder
from neon_services.wal.interpret import InterpretedBatch, interpret

log = logging.getLogger(__name__)

CHUNK_BYTES = MAX_XLOG_DATA_BYTES
KEPT_BYTES_MAX = 16 << 20  # of kept chunks: records with what was extracted from them
CHUNK_OVERHEAD_BYTES = 4096  # about what the columns of a chunk take that has next to no data
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


def _size(chunk: Chunk) -> int:
    return len(chunk.batch.data) + CHUNK_OVERHEAD_BYTES


class SharedChunks:
    """The chunks that the readers of one timeline have in common: made once, by whoever needs one first, and kept a while.

    For readers of committed WAL only: what was read once stays true.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[Lsn, Chunk] = OrderedDict()
        self._making: dict[Lsn, tuple[asyncio.Task[Chunk | None], Lsn]] = {}  # and the end of what it may read
        self._kept_bytes = 0
        self._newest_end = INVALID_LSN
        self.users = 0

    def is_far(self, position: Lsn, max_delta: int | None) -> bool:
        """Whether a reader there goes its own way."""
        return max_delta is not None and bool(self._newest_end) and abs(self._newest_end - position) > max_delta

    def kept(self, position: Lsn) -> Chunk | None:
        """The chunk there, when it was made not long ago."""
        return self._made.get(position)

    def in_work(self, position: Lsn) -> "tuple[asyncio.Task[Chunk | None], Lsn] | None":
        """The making of the chunk there, and the end of what it may read."""
        return self._making.get(position)

    def make(self, source: ChunkSource, position: Lsn, end: Lsn) -> "asyncio.Task[Chunk | None]":
        """Have the chunk made; the work goes on when the reader that began it is gone, as others may wait for it."""
        task = asyncio.create_task(self._make(source, position, end))
        task.add_done_callback(_forget_failure)
        self._making[position] = task, end
        return task

    async def _make(self, source: ChunkSource, position: Lsn, end: Lsn) -> Chunk | None:
        try:
            chunk = await source.next(position, end)
            if chunk is not None:
                self._newest_end = max(self._newest_end, chunk.batch.next_lsn)
                self._keep(position, chunk)
            return chunk
        finally:
            del self._making[position]

    def _keep(self, position: Lsn, chunk: Chunk) -> None:
        self._made[position] = chunk
        self._kept_bytes += _size(chunk)
        while self._kept_bytes > KEPT_BYTES_MAX:
            _, oldest = self._made.popitem(last=False)
            self._kept_bytes -= _size(oldest)


class InterpretedReaders:
    """All readers of interpreted WAL of one timeline."""

    def __init__(self, open_reader: Callable[[], WalReader]) -> None:
        self._open_reader = open_reader
        self._shared: SharedChunks | None = None
        self.count = 0  #: sources that exist: how many do work of their own

    def open(self, pg_major: int, segment_size: int, *, fanout: bool, max_delta: int | None) -> "ChunkFeed":
        """One reader's chunks. Close it at the end."""
        if fanout:
            self._shared = self._shared or SharedChunks()
            self._shared.users += 1
        return ChunkFeed(self, pg_major, segment_size, self._shared if fanout else None, max_delta)

    def open_source(self, pg_major: int, segment_size: int) -> ChunkSource:
        """A source, to be given back by close_source()."""
        source = ChunkSource(self._open_reader(), pg_major, segment_size)
        self.count += 1
        return source

    def close_source(self, source: ChunkSource) -> None:
        """It is not needed any more."""
        self.count -= 1
        source.close()

    def leave(self, shared: SharedChunks) -> None:
        """A reader with shared chunks is gone; they are forgotten with the last one."""
        shared.users -= 1
        if not shared.users:
            self._shared = None


class ChunkFeed:
    """The chunks that one reader gets, one after another."""

    def __init__(
        self, readers: InterpretedReaders, pg_major: int, segment_size: int, shared: SharedChunks | None, max_delta: int | None
    ) -> None:
        self._readers = readers
        self._pg_major = pg_major
        self._segment_size = segment_size
        self._shared = shared
        self._max_delta = max_delta
        self._source: ChunkSource | None = None
        self._work: asyncio.Task[Chunk | None] | None = None  # what our source does for all

    async def next(self, position: Lsn, end: Lsn) -> Chunk | None:
        """See ChunkSource.next."""
        shared = self._shared
        if shared is None or shared.is_far(position, self._max_delta):
            return await self._own_source().next(position, end)
        chunk = shared.kept(position)
        while chunk is None:
            work = shared.in_work(position)
            if work is None:
                self._work = shared.make(self._own_source(), position, end)
                return await asyncio.shield(self._work)
            task, its_end = work
            chunk = await asyncio.shield(task)
            if chunk is None and its_end >= end:
                return None  # else there may be a record by now, that the other reader could not see
        self._close_source()
        return chunk

    def _own_source(self) -> ChunkSource:
        if self._source is None:
            self._source = self._readers.open_source(self._pg_major, self._segment_size)
        return self._source

    def _close_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            self._readers.close_source(source)

    def close(self) -> None:
        """Let go of the files, as soon as nobody waits for what is read from them. Idempotent."""
        if self._work is not None and not self._work.done():
            self._work.add_done_callback(lambda _: self._close_source())
        else:
            self._close_source()
        shared, self._shared = self._shared, None
        if shared is not None:
            self._readers.leave(shared)

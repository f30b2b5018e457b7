"""START_REPLICATION of interpreted WAL: one shard's connection.

Invariant: the messages of a connection follow each other without a gap: each is made from the WAL between the end of the one
before (its ``next_record_lsn``) and its own, also when nothing in it was for this shard. What may be sent, and when the stream
ends, is as for plain WAL: see walsender.py.
"""

import asyncio
import time
from dataclasses import dataclass

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn
from neon_services.protocols import pgwire
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.interpreted_options import InterpretedProtocol
from neon_services.protocols.pgserver import ServerConnection
from neon_services.protocols.replication_stream import INTERPRETED_HEADER_BYTES, pack_interpreted_header
from neon_services.safekeeper.connections import SOON_S
from neon_services.safekeeper.interpreted_chunks import CHUNK_BYTES, ChunkFeed, in_pool
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.walsender import WalSender
from neon_services.wal.interpreted_encoding import encode_batch
from neon_services.wal.libraries import load_waldec

REST_MAX_S = 0.005


@dataclass(frozen=True, slots=True)
class Fanout:
    """Whether the shards of a timeline share the work, and from how many bytes apart they do not (None: always)."""

    enabled: bool = False
    max_delta: int | None = None


NO_FANOUT = Fanout()


class InterpretedSender(WalSender):
    """Streams interpreted WAL to one connection until either side ends it."""

    def __init__(
        self,
        timeline: Timeline,
        connection: ServerConnection,
        appname: str | None,
        term: int | None,
        protocol: InterpretedProtocol,
        fanout: Fanout,
    ) -> None:
        super().__init__(timeline, connection, appname, term)
        self._protocol = protocol
        self._fanout = fanout
        self._state.shard = protocol.shard
        self._state.pageserver = PageserverFeedback()  # nobody else reads interpreted WAL
        self._state.news_s = SOON_S

    def _feed(self) -> None:
        """Nothing is kept back here: small batches rest in between."""

    async def _stream_from(self, start: Lsn) -> None:
        state = self._timeline.acceptor.state
        fanout = self._fanout.enabled and self._protocol.shard.count > 0 and self._term is None
        feed = self._timeline.interpreted.open(
            _known_major(state.pg_version), state.wal_seg_size, fanout=fanout, max_delta=self._fanout.max_delta
        )
        try:
            await self._stream_chunks(feed, start)
        finally:
            feed.close()

    def _check_start(self, start: Lsn) -> None:
        super()._check_start(start)
        load_waldec(_known_major(self._timeline.acceptor.state.pg_version))  # refused before the stream begins

    async def _stream_chunks(self, feed: ChunkFeed, position: Lsn) -> None:
        while True:
            self._news.clear()
            self._check_end()
            end = self._end_position()
            while position < end:
                began = time.monotonic()
                chunk = await feed.next(position, end)
                self._check_end()
                end = self._end_position()  # the term may have changed
                if chunk is None:
                    break
                protocol = self._protocol
                payload = await in_pool(encode_batch, chunk.batch, protocol.shard, protocol.format, protocol.zstd_level)
                self._check_end()
                header = pack_interpreted_header(chunk.streaming_lsn, max(end, chunk.streaming_lsn))
                prefix = pgwire.copy_data_header(INTERPRETED_HEADER_BYTES + len(payload))
                self._connection.write(prefix + header + payload)
                read = chunk.streaming_lsn - position
                position = chunk.batch.next_lsn
                await self._drain()
                if read < CHUNK_BYTES // 2:
                    # whoever follows closely costs at most half a processor: small batches are expensive, so let WAL gather
                    await asyncio.sleep(min(time.monotonic() - began, REST_MAX_S))
            await self._wait_for_news(position)


def _known_major(pg_version: int) -> int:
    if not pg_version:
        raise NeonError(
            "WAL cannot be interpreted: the timeline does not know its Postgres version before a compute has connected"
        )
    return pg_version // 10000

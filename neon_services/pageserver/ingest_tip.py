"""The state at a timeline's tip that ingest reads and changes: sizes, directories, checkpoint, prepared transactions.

Invariant: the state is the metadata at the LSN up to which rows have been put. Every change puts the rows that make a reader at
that LSN see it. What readers cache (relation sizes) is only published by ``publish``, after the rows are in the timeline. After
an error the state is worthless and must be loaded again.
"""

import logging
import struct
from collections.abc import Iterable

from neon_services.ground.errors import CorruptionError
from neon_services.pageserver import keys
from neon_services.pageserver.checkpoint_state import CheckpointState
from neon_services.pageserver.ingest_clog import ClogTip
from neon_services.pageserver.ingest_rows import RowBuilder
from neon_services.pageserver.keys import RelTag
from neon_services.pageserver.relations import Databases, Relations, decode_databases, encode_databases
from neon_services.pageserver.slru import encode_segments, list_segments
from neon_services.pageserver.timeline import Timeline

log = logging.getLogger(__name__)

_SLRU_KINDS = (keys.CLOG, keys.MULTIXACT_MEMBERS, keys.MULTIXACT_OFFSETS)
_U32 = struct.Struct("<I")


def encode_prepared(xids: Iterable[int], pg_major: int) -> bytes:
    """TwoPhaseDirectory, bincode-BE: count u64, then u32 xids (u64 full xids from Postgres 17 on)."""
    numbers = sorted(xids)
    return struct.pack(f">Q{len(numbers)}{'Q' if pg_major >= 17 else 'I'}", len(numbers), *numbers)


def decode_prepared(value: bytes, pg_major: int) -> set[int]:
    """The inverse of ``encode_prepared``. Raises CorruptionError."""
    width = 8 if pg_major >= 17 else 4
    if len(value) < 8 or len(value) != 8 + width * int.from_bytes(value[:8], "big"):
        raise CorruptionError(
            f"the two-phase directory is malformed ({len(value)} bytes): restore the layer from remote storage"
        )
    return set(struct.unpack(f">{(len(value) - 8) // width}{'Q' if width == 8 else 'I'}", value[8:]))


class TipState:
    """Metadata at the tip of one timeline."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._relations = Relations.of(timeline)
        self.rows = RowBuilder(b"")
        self.checkpoint = CheckpointState(bytes(88))
        self.clog = ClogTip(timeline)
        self.databases: Databases = {}
        self.prepared: set[int] = set()
        self._segments: dict[int, dict[int, int]] = {}  # SLRU kind -> segment -> pages
        self._sizes: dict[RelTag, int | None] = {}
        self._changed: dict[RelTag, int] = {}  # fork -> LSN of its last change of size that is not published
        self._foreign_tablespaces: set[int] = set()

    @property
    def pg_major(self) -> int:
        return self._timeline.pg_version

    async def load(self) -> None:
        """Read everything but sizes (which are read when needed) at the timeline's last record."""
        lsn = self._timeline.last_record_lsn
        self.checkpoint = CheckpointState(await self._timeline.get(*keys.CHECKPOINT, lsn))
        self.databases = decode_databases(await self._timeline.get(*keys.DB_DIRECTORY, lsn))
        self.prepared = decode_prepared(await self._timeline.get(*keys.TWOPHASE_DIRECTORY, lsn), self.pg_major)
        self._segments = {kind: dict(await list_segments(self._timeline, kind, lsn)) for kind in _SLRU_KINDS}

    def publish(self) -> None:
        """The rows are in the timeline: readers may see the new sizes."""
        for tag, lsn in self._changed.items():
            self._relations.set_tip_size(tag, lsn, self._sizes[tag])
        self._changed.clear()

    # -- relations

    async def prefetch(self, tags: Iterable[RelTag]) -> None:
        """Make ``size_of`` work for these forks."""
        missing = [tag for tag in tags if tag not in self._sizes]
        if missing:
            sizes = await self._relations.sizes(missing, self._timeline.last_record_lsn)
            self._sizes.update(zip(missing, sizes, strict=True))

    def is_ours(self, spc: int) -> bool:
        """Whether relations of this tablespace are kept; says once that user-defined tablespaces are not."""
        if spc in (keys.DEFAULT_TABLESPACE, keys.GLOBAL_TABLESPACE):
            return True
        if spc not in self._foreign_tablespaces:
            self._foreign_tablespaces.add(spc)
            log.error(
                "timeline %s: WAL of user-defined tablespace %d is left out: only pg_default is stored", self._timeline, spc
            )
        return False

    def size_of(self, tag: RelTag) -> int | None:
        """Blocks of a fork that was prefetched; None when it does not exist."""
        return self._sizes[tag]

    def create_relation(self, tag: RelTag, lsn: int) -> None:
        """The fork exists from here on, empty; nothing happens when it did before."""
        if self._sizes[tag] is not None:
            return
        if (tag.spc, tag.db) not in self.databases:
            self.databases[tag.spc, tag.db] = False
            self._put_databases(lsn)
        self.rows.put_image(keys.relation_exists(tag), lsn, keys.RELATION_EXISTS)
        self.set_size(tag, 0, lsn)

    def set_size(self, tag: RelTag, blocks: int, lsn: int) -> None:
        """The fork has this many blocks from here on."""
        self.rows.put_image(keys.relation_size(tag), lsn, _U32.pack(blocks))
        self.size_was_put(tag, blocks, lsn)

    def size_was_put(self, tag: RelTag, blocks: int, lsn: int) -> None:
        """As ``set_size`` when the caller has put the row."""
        self._sizes[tag] = blocks
        self._changed[tag] = lsn

    def drop_relation(self, tag: RelTag, lsn: int) -> None:
        """The fork is gone. Its pages stay in history and cannot be reached; a new one of that name starts with new pages."""
        if self._sizes[tag] is None:
            return
        self.rows.put_tombstone(keys.relation_exists(tag), lsn)
        self.rows.put_tombstone(keys.relation_size(tag), lsn)
        self._sizes[tag] = None
        self._changed[tag] = lsn

    def truncate_relation(self, tag: RelTag, blocks: int, lsn: int) -> None:
        """The fork keeps at most this many blocks."""
        size = self._sizes[tag]
        if size is not None and size > blocks:
            self.set_size(tag, blocks, lsn)

    # -- databases

    def _put_databases(self, lsn: int) -> None:
        self.rows.put_image(keys.DB_DIRECTORY, lsn, encode_databases(self.databases))

    def put_relation_map(self, spc: int, db: int, content: bytes, lsn: int) -> None:
        """pg_filenode.map of a database."""
        if self.databases.get((spc, db)) is not True:
            self.databases[spc, db] = True
            self._put_databases(lsn)
        self.rows.put_image(keys.relation_map(spc, db), lsn, content)

    def register_database(self, spc: int, db: int, lsn: int) -> None:
        """The database exists, if only as an empty directory."""
        if (spc, db) not in self.databases:
            self.databases[spc, db] = False
            self._put_databases(lsn)

    def drop_database(self, spc: int, db: int, tags: Iterable[RelTag], lsn: int) -> None:
        """The database is gone with its relations (``tags``, prefetched)."""
        for tag in tags:
            self.drop_relation(tag, lsn)
        if self.databases.pop((spc, db), None) is not None:
            self._put_databases(lsn)

    def known_relations(self, spc: int, db: int) -> list[RelTag]:
        """Forks of a database whose sizes have been looked at; with what the timeline lists, all of them."""
        return [tag for tag in self._sizes if tag.spc == spc and tag.db == db]

    # -- SLRUs

    def slru_segments(self, kind: int) -> set[int]:
        """The segments that exist."""
        return set(self._segments[kind])

    def zero_slru_page(self, kind: int, page: int, lsn: int) -> None:
        """A new page of zeros; the segment grows to hold it."""
        self.ensure_slru_page(kind, page, lsn, zeros=False)
        if kind == keys.CLOG:
            self.clog.zeroed(page)
        self.rows.put_zero_page(keys.slru_page(kind, page), lsn)

    def ensure_slru_page(self, kind: int, page: int, lsn: int, *, zeros: bool = True) -> None:
        """Make the page exist; new pages before it, and with ``zeros`` itself, are zeros."""
        segment, block = divmod(page, keys.SLRU_PAGES_PER_SEGMENT)
        pages = self._segments[kind]
        size = pages.get(segment)
        if size is None:
            pages[segment] = size = 0
            self.rows.put_image(keys.slru_directory(kind), lsn, encode_segments(set(pages)))
        if block < size:
            return
        pages[segment] = block + 1
        self.rows.put_image(keys.slru_segment_size(kind, segment), lsn, _U32.pack(block + 1))
        if zeros and kind == keys.CLOG:
            self.clog.zeroed(page)
        for gap in range(size, block + 1 if zeros else block):
            self.rows.put_zero_page(keys.slru_block(kind, segment, gap), lsn)

    def drop_slru_segments(self, kind: int, segments: set[int], lsn: int) -> None:
        """Segments are gone."""
        present = segments & set(self._segments[kind])
        if not present:
            return
        if kind == keys.CLOG:
            self.clog.forget(present)
        for segment in present:
            del self._segments[kind][segment]
            self.rows.put_tombstone(keys.slru_segment_size(kind, segment), lsn)
        self.rows.put_image(keys.slru_directory(kind), lsn, encode_segments(set(self._segments[kind])))

    # -- prepared transactions and the checkpoint

    def put_prepared(self, xid: int, content: bytes, lsn: int) -> None:
        """A transaction was prepared; ``xid`` is a full one from Postgres 17 on."""
        self.prepared.add(xid)
        self.rows.put_image(keys.TWOPHASE_DIRECTORY, lsn, encode_prepared(self.prepared, self.pg_major))
        self.rows.put_image(keys.twophase_file(xid), lsn, content)

    def drop_prepared(self, xid: int, lsn: int) -> None:
        """A prepared transaction was committed or rolled back."""
        if xid in self.prepared:
            self.prepared.discard(xid)
            self.rows.put_image(keys.TWOPHASE_DIRECTORY, lsn, encode_prepared(self.prepared, self.pg_major))
            self.rows.put_tombstone(keys.twophase_file(xid), lsn)

    def oldest_prepared_xid(self) -> int | None:
        """The oldest prepared transaction, 32 bits."""
        full = [xid if self.pg_major >= 17 else self.checkpoint.full_xid(xid) for xid in self.prepared]
        return min(full) & 0xFFFF_FFFF if full else None

    def put_checkpoint_if_changed(self, lsn: int) -> None:
        """Write the checkpoint value when a record changed it."""
        if self.checkpoint.dirty:
            self.rows.put_image(keys.CHECKPOINT, lsn, self.checkpoint.take())

"""What a timeline contains: databases, relations and their sizes, at any LSN.

Invariant: a cached size ``(since_lsn, blocks)`` is right for every LSN from ``since_lsn`` to the timeline's tip. Ingest changes
the entry in the same step in which it moves the tip, so no reader sees one without the other; reads below ``since_lsn`` go to
the layers (and to a small cache of old answers, which never change).
"""

import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final
from weakref import WeakKeyDictionary, ref

from neon_services.ground.errors import CorruptionError
from neon_services.pageserver import keys
from neon_services.pageserver.keys import PAGE_SIZE, RelTag
from neon_services.pageserver.timeline import Timeline
from neon_services.pageserver.values import MissingKey

OLD_SIZES_MAX = 10_000
_ENTRY = struct.Struct(">IIB")
UNKNOWN: Final = -1

Databases = dict[tuple[int, int], bool]


def encode_databases(databases: Databases) -> bytes:
    """DbDirectory, bincode-BE: count u64, then ``(spcnode u32, dbnode u32), bool`` per entry; True: has a relation map."""
    entries = (_ENTRY.pack(spc, db, has_map) for (spc, db), has_map in sorted(databases.items()))
    return struct.pack(">Q", len(databases)) + b"".join(entries)


def decode_databases(value: bytes) -> Databases:
    """The inverse of ``encode_databases``. Raises CorruptionError."""
    if len(value) < 8 or len(value) != 8 + _ENTRY.size * int.from_bytes(value[:8], "big"):
        raise CorruptionError(
            f"the database directory is malformed ({len(value)} bytes): restore the layer from remote storage"
        )
    return {(spc, db): bool(has_map) for spc, db, has_map in _ENTRY.iter_unpack(value[8:])}


class Relations:
    """Reads of databases, relations and sizes of one timeline. Get it with ``Relations.of(timeline)``."""

    _instances: ClassVar["WeakKeyDictionary[Timeline, Relations]"] = WeakKeyDictionary()

    def __init__(self, timeline: Timeline) -> None:
        self._timeline_ref = ref(timeline)  # the registry of instances must not keep timelines alive
        self._tip: dict[RelTag, tuple[int, int | None]] = {}
        self._old: OrderedDict[tuple[RelTag, int], int | None] = OrderedDict()
        #: Bytes of all relations at the tip; None until ``compute_logical_size`` ran. Ingest keeps it up to date.
        self.logical_size: int | None = None
        self._growth_while_counting = 0
        self._newest_lsn = 0  # of the entries of _tip
        self._complete = False  # _tip has every fork that exists

    @classmethod
    def of(cls, timeline: Timeline) -> "Relations":
        """The one instance of a timeline: readers and ingest must share it."""
        found = cls._instances.get(timeline)
        if found is None:
            found = cls._instances[timeline] = cls(timeline)
        return found

    @property
    def _timeline(self) -> Timeline:
        timeline = self._timeline_ref()
        assert timeline is not None, "the timeline is gone"
        return timeline

    # -- sizes

    def cached_size(self, tag: RelTag, lsn: int) -> int | None:
        """The size in blocks, None when the fork does not exist, UNKNOWN when it must be read."""
        entry = self._tip.get(tag)
        if entry is not None and lsn >= entry[0]:
            return entry[1]
        return self._old.get((tag, lsn), UNKNOWN)

    async def sizes(self, tags: Sequence[RelTag], lsn: int) -> list[int | None]:
        """Sizes in blocks at an LSN; None for a fork that does not exist."""
        answers = [self.cached_size(tag, lsn) for tag in tags]
        missing = [number for number, answer in enumerate(answers) if answer == UNKNOWN]
        if missing:
            tip = self._timeline.last_record_lsn
            halves = [keys.relation_size(tags[number]) for number in missing]
            values = await self._timeline.get_many([hi for hi, _ in halves], [lo for _, lo in halves], lsn)
            for number, value in zip(missing, values, strict=True):
                answers[number] = self._remember(tags[number], lsn, _decode_size(value), at_tip=lsn >= tip)
        return answers

    async def size(self, tag: RelTag, lsn: int) -> int | None:
        """The size of one fork in blocks; None when it does not exist."""
        return (await self.sizes([tag], lsn))[0]

    def _remember(self, tag: RelTag, lsn: int, size: int | None, *, at_tip: bool) -> int | None:
        if at_tip:
            # ingest may have put a newer entry while we were reading
            self._tip.setdefault(tag, (lsn, size))
            self._newest_lsn = max(self._newest_lsn, lsn)
        else:
            self._old[tag, lsn] = size
            if len(self._old) > OLD_SIZES_MAX:
                self._old.popitem(last=False)
        return size

    def set_all(self, sizes: dict[RelTag, int], lsn: int) -> None:
        """Import: these are all forks that exist, from ``lsn`` on."""
        self._tip = {tag: (lsn, size) for tag, size in sizes.items()}
        self._newest_lsn = lsn
        self._complete = True
        self.logical_size = PAGE_SIZE * sum(sizes.values())

    def set_tip_size(self, tag: RelTag, lsn: int, size: int | None) -> None:
        """Ingest: the fork has this size from ``lsn`` on (None: it is gone)."""
        before = self._tip.get(tag)
        change = ((size or 0) - (before[1] or 0 if before else 0)) * PAGE_SIZE
        if self.logical_size is not None:
            self.logical_size += change
        else:
            self._growth_while_counting += change
        self._tip[tag] = (lsn, size)
        self._newest_lsn = max(self._newest_lsn, lsn)

    # -- directories

    async def databases(self, lsn: int) -> Databases:
        """All (tablespace, database) pairs; the value says whether there is a relation map."""
        return decode_databases(await self._timeline.get(*keys.DB_DIRECTORY, lsn))

    async def list_relations(self, lsn: int, spc: int | None = None, db: int | None = None) -> list[RelTag]:
        """The forks that exist in a database (or everywhere), in key order."""
        start, end = keys.relation_directory_range(spc, db)
        return [keys.relation_of(hi, lo) for hi, lo, _ in await self._timeline.scan(*start, *end, lsn)]

    async def relation_sizes(self, lsn: int, spc: int | None = None, db: int | None = None) -> dict[RelTag, int]:
        """The forks that exist in a database (or everywhere) with their sizes in blocks."""
        if self._complete and lsn >= self._newest_lsn:
            return {
                tag: entry[1]
                for tag, entry in self._tip.items()
                if entry[1] is not None and (spc is None or tag.spc == spc) and (db is None or tag.db == db)
            }
        tags = await self.list_relations(lsn, spc, db)
        return {tag: size for tag, size in zip(tags, await self.sizes(tags, lsn), strict=True) if size is not None}

    async def database_size_bytes(self, spc: int, db: int, lsn: int) -> int:
        """8192 times the blocks of all forks of a database's relations."""
        return PAGE_SIZE * sum((await self.relation_sizes(lsn, spc, db)).values())

    async def compute_logical_size(self) -> int:
        """The bytes of all relations at the tip; from the first call on kept up to date by ingest.

        From then on, too, all sizes at the tip are in memory, and listing them (a basebackup at the tip) reads nothing.
        """
        if self.logical_size is None or not self._complete:
            before, lsn = self._growth_while_counting, self._timeline.last_record_lsn
            sizes = await self.relation_sizes(lsn)
            for tag, size in sizes.items():
                self._tip.setdefault(tag, (lsn, size))  # what ingest has not touched is still so
            self._newest_lsn = max(self._newest_lsn, lsn)
            self._complete = True
            if self.logical_size is None:  # unless somebody else has counted meanwhile
                self.logical_size = PAGE_SIZE * sum(sizes.values()) + self._growth_while_counting - before
        return self.logical_size


def _decode_size(value: object) -> int | None:
    if isinstance(value, MissingKey):
        return None
    if isinstance(value, Exception):
        raise value
    assert isinstance(value, bytes)
    if len(value) != 4:
        raise CorruptionError(f"a relation size of {len(value)} bytes: restore the layer from remote storage")
    return int.from_bytes(value, "little")


def forks_of(spc: int, db: int, rel: int) -> Iterable[RelTag]:
    """All four forks of a relation."""
    return (RelTag(spc, db, rel, fork) for fork in range(4))

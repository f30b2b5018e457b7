"""What a file system of the simulation keeps of the system calls when the power goes: files, directories, and their weather.

The model, harsher than any one file system:

* A file has a page cache and durable sectors of 512 bytes. ``fsync`` and ``fdatasync`` make all dirty sectors and the length
  durable, a write with ``RWF_DSYNC`` the sectors that it touches. When the power goes, any subset of the dirty sectors
  survives, and the length is the durable one or the latest.
* A directory has entries in memory and durable ones. Creations, renames and deletions become durable by ``sync_directory``.
  When the power goes, any subset of the others survives that leaves out what builds on a lost one; a rename is kept or lost as
  a whole.
* A sync may fail with EIO. Then the kernel forgets that the sectors were dirty: each is durable by chance, a later sync
  succeeds without writing them, and the cache still shows them.
* A full disk refuses to make files longer, after a part or at once; what is there can be overwritten. Writes may be short.
* The power may go, or the process be killed, before any operation that changes something, and in the middle of a write.
"""

import functools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTOR = 512
_ZERO_SECTOR = bytes(SECTOR)


@functools.lru_cache(maxsize=32)
def _zeros(count: int) -> bytes:
    return bytes(count)


@dataclass(slots=True)
class DiskWeather:
    """How often what goes wrong. One per node; changed while the schedule runs."""

    rng: random.Random
    power_loss: float = 0.0
    #: Factor on power_loss, by operation; 1 when absent.
    weight: dict[str, float] = field(default_factory=dict)
    sync_failure: float = 0.0
    short_write: float = 0.0
    full: bool = False
    operations: int = 0
    failures: int = 0
    refusals: int = 0
    power_losses: int = 0
    #: Losses of power after which a part, but not all, of some file's dirty sectors survived.
    torn: int = 0

    def calm(self) -> None:
        """Nothing goes wrong any more."""
        self.power_loss = self.sync_failure = self.short_write = 0.0
        self.full = False


class SimulatedFile:
    """An inode. Sectors that are absent are zeros."""

    __slots__ = ("cache", "dirty", "durable", "durable_size", "forgotten", "size")

    def __init__(self) -> None:
        self.cache: dict[int, bytes] = {}
        self.durable: dict[int, bytes] = {}
        self.dirty: set[int] = set()
        self.forgotten: set[int] = set()  # clean for the kernel, and yet not on the disk
        self.size = self.durable_size = 0

    def read(self, offset: int, count: int) -> bytes:
        """From the cache."""
        count = min(count, self.size - offset)
        return _read(self.cache, offset, count) if count > 0 else b""

    def read_durable(self, offset: int, count: int) -> bytes:
        """What is surely there after a loss of power, up to the first byte that may be another then."""
        if count <= 0:
            return b""
        durable = _read(self.durable, offset, count)
        sectors = range(offset // SECTOR, (offset + count - 1) // SECTOR + 1)
        if not self.dirty.isdisjoint(sectors) or not self.forgotten.isdisjoint(sectors):
            cached = _read(self.cache, offset, count)
            if durable != cached:
                durable = durable[: next(i for i in range(count) if durable[i] != cached[i])]
        return durable[: max(0, min(self.durable_size, self.size) - offset)]

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Into the cache."""
        end = offset + len(data)
        first, last = offset // SECTOR, (end - 1) // SECTOR
        if len(data) > 4096 and not data[0] and not data[-1] and data == _zeros(len(data)):
            self._clear(first, last, offset, end)
        else:
            cache, position = self.cache, 0
            for sector in range(first, last + 1):
                start = sector * SECTOR
                low, high = max(offset, start), min(end, start + SECTOR)
                part = bytes(data[position : position + high - low])
                position += high - low
                if high - low < SECTOR:
                    old = cache.get(sector, _ZERO_SECTOR)
                    part = old[: low - start] + part + old[high - start :]
                cache[sector] = part
                self.dirty.add(sector)
        self.size = max(self.size, end)

    def _clear(self, first: int, last: int, offset: int, end: int) -> None:
        """Zeros over many sectors: only those that are something matter."""
        for sector in [s for s in {*self.cache, *self.durable} if first <= s <= last]:
            start = sector * SECTOR
            old = self.cache.get(sector, _ZERO_SECTOR)
            head, tail = max(offset - start, 0), max(start + SECTOR - end, 0)
            kept = old[:head] + bytes(SECTOR - head - tail) + old[SECTOR - tail :] if head or tail else _ZERO_SECTOR
            self.cache[sector] = kept
            self.dirty.add(sector)

    def truncate(self, size: int) -> None:
        """Set the length; a cut is durable with the next sync."""
        if size < self.size:
            self._clear(size // SECTOR, self.size // SECTOR, size, self.size)
        self.size = size

    def sync(self, first: int | None = None, last: int | None = None) -> None:
        """Make dirty sectors durable: all, or those of a range."""
        chosen = self.dirty if first is None or last is None else {s for s in self.dirty if first <= s <= last}
        for sector in chosen:
            self.durable[sector] = self.cache.get(sector, _ZERO_SECTOR)
        self.forgotten -= chosen
        self.dirty = set() if chosen is self.dirty else self.dirty - chosen
        self.durable_size = self.size

    def fail_sync(self, rng: random.Random) -> None:
        """The device failed: the kernel forgets what was dirty."""
        for sector in sorted(self.dirty):
            if rng.random() < 0.5:
                self.durable[sector] = self.cache.get(sector, _ZERO_SECTOR)
                self.forgotten.discard(sector)
            else:
                self.forgotten.add(sector)
        self.dirty.clear()
        if rng.random() < 0.5:
            self.durable_size = self.size

    def lose_power(self, rng: random.Random) -> bool:
        """Keep a subset of what was dirty. True when it was neither all nor nothing."""
        kept = 0
        mode = rng.random()
        for sector in sorted(self.dirty):
            if mode < 0.2 or (mode < 0.8 and rng.random() < 0.5):
                self.durable[sector] = self.cache.get(sector, _ZERO_SECTOR)
                kept += 1
        torn = 0 < kept < len(self.dirty)
        self.dirty.clear()
        self.forgotten.clear()
        if self.durable_size != self.size and rng.random() < 0.5:
            self.durable_size = self.size
        self.size = self.durable_size
        self.durable = {s: content for s, content in self.durable.items() if s * SECTOR < self.size}
        self.cache = dict(self.durable)
        return torn


def _read(sectors: dict[int, bytes], offset: int, count: int) -> bytes:
    end = offset + count
    first, last = offset // SECTOR, (end - 1) // SECTOR
    if last - first > len(sectors):
        found = sorted(s for s in sectors if first <= s <= last)
        if not found:
            return _zeros(count)
        buffer = bytearray(count)
        for sector in found:
            start = sector * SECTOR
            low, high = max(start, offset), min(start + SECTOR, end)
            buffer[low - offset : high - offset] = sectors[sector][low - start : high - start]
        return bytes(buffer)
    whole = b"".join([sectors.get(sector, _ZERO_SECTOR) for sector in range(first, last + 1)])
    return whole[offset - first * SECTOR : end - first * SECTOR]


#: One change of a directory: the entries that it sets (None: removes) together.
_Change = dict[str, Any]


class SimulatedDirectory:
    """Names; the entries are files and directories."""

    __slots__ = ("durable", "entries", "pending")

    def __init__(self) -> None:
        self.entries: dict[str, SimulatedFile | SimulatedDirectory] = {}
        self.durable: dict[str, SimulatedFile | SimulatedDirectory] = {}
        self.pending: list[_Change] = []

    def change(self, change: _Change) -> None:
        """Change entries, not durably."""
        self.pending.append(change)
        _apply(self.entries, change)

    def sync(self) -> None:
        """Make all changes durable."""
        self.durable = dict(self.entries)
        self.pending.clear()

    def lose_power(self, rng: random.Random) -> bool:
        """Keep some changes; one that builds on a lost one is lost too."""
        lost_names: set[str] = set()
        mode = rng.random()
        for change in self.pending:
            kept = mode < 0.2 or (mode < 0.8 and rng.random() < 0.5)
            if kept and lost_names.isdisjoint(change):
                _apply(self.durable, change)
            else:
                lost_names.update(change)
        self.pending.clear()
        self.entries = dict(self.durable)
        torn = [entry.lose_power(rng) for _, entry in sorted(self.entries.items())]
        return any(torn)


def _apply(entries: dict[str, Any], change: _Change) -> None:
    for name, inode in change.items():
        if inode is None:
            entries.pop(name, None)
        else:
            entries[name] = inode


class Platters:
    """What outlives a process: the tree of directories and files."""

    def __init__(self) -> None:
        self.root = SimulatedDirectory()

    def lose_power(self, weather: DiskWeather) -> None:
        """Of what was not synced, keep some."""
        weather.torn += self.root.lose_power(weather.rng)

    def sync_filesystem(self) -> None:
        """``syncfs``: everything readable is durable, except what an earlier failure made the kernel forget."""
        pending = [self.root]
        while pending:
            directory = pending.pop()
            directory.sync()
            for entry in directory.entries.values():
                if isinstance(entry, SimulatedDirectory):
                    pending.append(entry)
                else:
                    entry.sync()

    def find(self, path: Path, *, durable: bool = False) -> SimulatedFile | SimulatedDirectory | None:
        """What is at a path, now or with none of the changes that are not durable."""
        found: SimulatedFile | SimulatedDirectory | None = self.root
        for part in path.parts:
            if not isinstance(found, SimulatedDirectory):
                return None
            found = (found.durable if durable else found.entries).get(part)
        return found

"""The fast storage of the simulation: a log whose unsynced end may be lost, and a state that is replaced atomically.

It has the interface of ``RealStorage``, which runs the production code on a simulated disk; here nothing but the order of the
effects is under test.

Records of the simulated log begin with a byte that tells their length in units of 8 bytes, so that flush_lsn can stay on record
ends as it does on a real disk.
"""

import random
from collections.abc import Iterator
from typing import Any

from neon_services.consensus.acceptor import (
    AcceptorState,
    Effect,
    FlushWal,
    InitializeWal,
    PersistState,
    TruncateWal,
    WriteWal,
)
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import INVALID_LSN, Lsn
from neon_services.safekeeper.wal_store import WalStoreError


class ModelWal:
    """The log. Bytes up to ``synced_lsn`` survive a crash; of the rest a random prefix does."""

    def __init__(self) -> None:
        self.base: Lsn = INVALID_LSN
        self.data = bytearray()
        self.synced_lsn: Lsn = INVALID_LSN
        self.write_record_lsn: Lsn = INVALID_LSN
        self.flush_lsn: Lsn = INVALID_LSN

    @property
    def write_lsn(self) -> Lsn:
        """End of the written bytes."""
        return Lsn(self.base + len(self.data))

    def read(self, begin: Lsn, end: Lsn) -> bytes:
        """Bytes [begin, end), which must be there."""
        assert self.base <= begin <= end <= self.write_lsn, (self.base, begin, end, self.write_lsn)
        return bytes(self.data[begin - self.base : end - self.base])

    def initialize(self, lsn: Lsn) -> None:
        """Begin at lsn."""
        assert not self.data
        self.base = self.synced_lsn = self.write_record_lsn = self.flush_lsn = lsn

    def write(self, begin: Lsn, data: memoryview | bytes) -> Lsn:
        """Append."""
        assert begin == self.write_lsn, "the acceptor must write without gaps"
        self.data += data
        self._scan()
        return self.write_lsn

    def _scan(self) -> None:
        """Move write_record_lsn over the records that are complete now."""
        data, position = self.data, self.write_record_lsn - self.base
        while position < len(data) and position + data[position] * 8 <= len(data):
            position += data[position] * 8
        self.write_record_lsn = Lsn(self.base + position)

    def flush(self) -> Lsn:
        """Make everything written durable."""
        self.synced_lsn = self.write_lsn
        self.flush_lsn = self.write_record_lsn
        return self.flush_lsn

    def truncate(self, lsn: Lsn) -> None:
        """Cut at a record end, durably. A log that lies wholly beyond begins anew."""
        assert lsn <= self.write_record_lsn, "a log cannot be cut behind its end"
        if lsn < self.base:
            self.data.clear()
            self.base = lsn
        del self.data[lsn - self.base :]
        self.synced_lsn = self.write_record_lsn = self.flush_lsn = lsn

    def crash(self, rng: random.Random) -> None:
        """Lose some of what was not synced, and find the record ends again as recovery does."""
        if not self.base:
            return
        survives = rng.randint(self.synced_lsn, self.write_lsn)
        del self.data[survives - self.base :]
        self.synced_lsn = self.write_lsn
        self.write_record_lsn = self.flush_lsn = self.base
        self._scan()
        # a broken record at the end is garbage: recovery cuts it off
        del self.data[self.write_record_lsn - self.base :]
        self.synced_lsn = self.flush_lsn = self.write_record_lsn


class ModelStorage:
    """Log and state of one timeline on one safekeeper."""

    def __init__(self, state: AcceptorState | None, rng: random.Random) -> None:
        self.present = state is not None
        self.state = state or AcceptorState()
        self.wal = ModelWal()
        self.first_lsn = INVALID_LSN
        #: How often replacing the state fails, leaving the old or the new one.
        self.failure = 0.0
        self.failures = 0
        self._random = rng
        if self.state.timeline_start_lsn:
            self.wal.initialize(self.state.timeline_start_lsn)

    def boot(self) -> None:
        """What is found after a crash is what crash() left."""

    def crash(self, *, power: bool) -> None:
        """Lose a random end of what was not synced."""
        self.wal.crash(self._random)

    def perform(self, effect: Effect) -> Any:
        """Carry out one effect. Raises WalStoreError when the disk fails."""
        kind = type(effect)
        if kind is WriteWal:
            return self.wal.write(effect.begin_lsn, effect.data)  # type: ignore[union-attr]
        if kind is FlushWal:
            return self.wal.flush()
        if kind is PersistState:
            if self.failure and self._random.random() < self.failure:
                self.failures += 1
                if self._random.random() < 0.5:
                    self.state = effect.state  # type: ignore[union-attr]
                raise WalStoreError("no space left on the simulated device; which state is on it, nobody knows")
            self.state = effect.state  # type: ignore[union-attr]
        elif kind is TruncateWal:
            self.wal.truncate(effect.lsn)  # type: ignore[union-attr]
        else:
            assert kind is InitializeWal
            self.wal.initialize(effect.lsn)  # type: ignore[union-attr]
        return None

    def read(self, begin: Lsn, end: Lsn) -> bytes:
        """Bytes of the log. Raises NeonError when they are not there."""
        if not self.wal.base <= begin <= end <= self.wal.write_lsn:
            raise NeonError(f"WAL [{begin}, {end}) is not there: it ends at {self.wal.write_lsn}")
        return self.wal.read(begin, end)

    def stale_bytes_behind(self, lsn: Lsn) -> int | None:
        """A model log has nothing behind its end."""
        return None

    def sure_states(self) -> list[AcceptorState]:
        """The states of which one is found after a loss of power now."""
        return [self.state]

    def sure_bytes(self, begin: Lsn, end: Lsn) -> bytes:
        """Of these bytes those that no loss of power takes away, up to the first gap."""
        end = min(end, self.wal.synced_lsn)
        return self.wal.read(begin, end) if self.wal.base <= begin <= end else b""

    def install(self, begin: Lsn, chunks: Iterator[bytes], state: AcceptorState) -> Iterator[None]:
        """Become a copy of another node's timeline; may be abandoned at every step."""
        copied = bytearray()
        for chunk in chunks:
            copied += chunk
            yield
        self.wal = ModelWal()
        self.wal.initialize(begin)
        self.wal.write(begin, bytes(copied))
        self.wal.flush()
        self.state, self.present = state, True

    def remove(self) -> None:
        """Delete the timeline."""
        self.present = False
        self.state, self.wal = AcceptorState(), ModelWal()

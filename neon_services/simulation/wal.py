"""A safekeeper's disk in the simulation: a log whose unsynced end may be lost, and a state that is replaced atomically.

Records of the simulated log begin with a byte that tells their length in units of 8 bytes, so that flush_lsn can stay on record
ends as it does on a real disk.
"""

import random

from neon_services.consensus.acceptor import (
    AcceptorState,
    Effect,
    FlushWal,
    InitializeWal,
    PersistState,
    TruncateWal,
    WriteWal,
)
from neon_services.ground.lsn import INVALID_LSN, Lsn


class SimulatedWal:
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


class SimulatedDisk:
    """Log and state of one timeline on one safekeeper; ``perform`` carries out the acceptor's effects."""

    def __init__(self, state: AcceptorState) -> None:
        self.state = state
        self.wal = SimulatedWal()
        if state.timeline_start_lsn:
            self.wal.initialize(state.timeline_start_lsn)

    def perform(self, effect: Effect) -> Lsn | None:
        """Carry out one effect."""
        kind = type(effect)
        if kind is WriteWal:
            return self.wal.write(effect.begin_lsn, effect.data)  # type: ignore[union-attr]
        if kind is FlushWal:
            return self.wal.flush()
        if kind is PersistState:
            self.state = effect.state  # type: ignore[union-attr]
        elif kind is TruncateWal:
            self.wal.truncate(effect.lsn)  # type: ignore[union-attr]
        else:
            assert kind is InitializeWal
            self.wal.initialize(effect.lsn)  # type: ignore[union-attr]
        return None

"""Control file and log of one timeline, and the order in which they change.

Invariant: every effect of the acceptor is durable when ``perform`` returns (written WAL only when it is flushed), and the
control file in memory is one that was saved: a save that failed leaves the former one in force. The simulator runs this code.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from neon_services.consensus.acceptor import (
    AcceptorState,
    Effect,
    FlushWal,
    InitializeWal,
    PersistState,
    TruncateWal,
    WriteWal,
)
from neon_services.ground.disk import REAL_DISK, Disk
from neon_services.ground.lsn import WAL_SEGMENT_SIZE
from neon_services.safekeeper import metrics
from neon_services.safekeeper.control_file import FILE_NAME, ControlFile
from neon_services.safekeeper.wal_store import WalStore, WalStoreError


class TimelineStorage:
    """See the module's text. Make it with ``load``."""

    def __init__(self, directory: Path, control: ControlFile, *, sync: bool, disk: Disk = REAL_DISK) -> None:
        self.directory = directory
        self.control = control
        self.store = WalStore(directory, self.segment_size, sync=sync, disk=disk)
        self.control_saved_at = time.monotonic()
        self._sync = sync
        self._disk = disk

    @classmethod
    def load(cls, directory: Path, *, sync: bool = True, disk: Disk = REAL_DISK) -> Self:
        """Read the control file and find the end of the log. Raises OSError, CorruptionError."""
        storage = cls(directory, ControlFile.load(directory / FILE_NAME, disk=disk), sync=sync, disk=disk)
        storage.recover()
        return storage

    def recover(self) -> None:
        """Find the end of the log; once, before anything else. Raises OSError."""
        self.store.recover(self.control.acceptor.commit_lsn, offloaded_flush_lsn=self.control.offloaded_flush_lsn)

    @property
    def segment_size(self) -> int:
        """Bytes of a WAL segment."""
        return self.control.acceptor.wal_seg_size or WAL_SEGMENT_SIZE

    def perform(self, effect: Effect) -> Any:
        """Carry out one effect. Raises WalStoreError or ProtocolViolation."""
        if isinstance(effect, FlushWal):
            return self.store.flush()
        if isinstance(effect, WriteWal):
            return self.store.write(effect.begin_lsn, effect.data)
        state = self.control.acceptor
        if isinstance(effect, PersistState):
            return self._persist(effect.state)
        if isinstance(effect, TruncateWal):
            return self.store.truncate(effect.lsn, pg_version=state.pg_version, system_id=state.system_id)
        assert isinstance(effect, InitializeWal)
        return self.store.initialize(effect.lsn, pg_version=state.pg_version, system_id=state.system_id)

    def _persist(self, state: AcceptorState) -> None:
        self.save_control(replace(self.control, acceptor=state))

    def save_control(self, control: ControlFile) -> None:
        """Replace the control file; only then it is in force. Raises WalStoreError."""
        started = time.perf_counter()
        try:
            control.save(self.directory, sync=self._sync, disk=self._disk)
        except OSError as error:
            raise WalStoreError(f"saving {self.directory}/{FILE_NAME} failed: {error.strerror or error}") from error
        metrics.PERSIST_CONTROL_FILE_SECONDS.observe(time.perf_counter() - started)
        self.control = control
        self.control_saved_at = time.monotonic()

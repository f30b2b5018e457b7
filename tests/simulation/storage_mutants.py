"""Planted bugs in the storage: the production code with one rule broken, for the simulated disk to expose."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from neon_services.consensus.acceptor import AcceptorState
from neon_services.ground.disk import REAL_DISK, Disk, Views, write_all
from neon_services.ground.lsn import Lsn
from neon_services.safekeeper.append_lane import AppendLane
from neon_services.safekeeper.control_file import FILE_NAME, ControlFile
from neon_services.safekeeper.segments import SegmentDirectory
from neon_services.safekeeper.timeline_storage import TimelineStorage
from neon_services.safekeeper.wal_store import WalStore, WalStoreError
from neon_services.simulation.disk import SimulatedDisk
from neon_services.simulation.real_storage import RealStorage
from neon_services.simulation.safekeeper import SimulatedSafekeeper
from neon_services.simulation.world import Kinds
from neon_services.wal.scanner import WalScanner

# --- the log


class SkipsSync(WalStore):
    """Reports WAL as flushed that was only written."""

    def flush(self) -> Lsn:
        self.write_out()
        self._flush_lsn = self._write_record_lsn
        return self._flush_lsn


class ReportsPartialRecords(WalStore):
    """Reports the end of the bytes on the disk instead of the end of the last complete record."""

    def flush(self) -> Lsn:
        super().flush()
        self._flush_lsn = self._write_record_lsn = max(self._write_lsn, self._flush_lsn)
        return self._flush_lsn


class AppendsWithoutSync(AppendLane):
    """The lane of a proposer's connection writes without waiting for the disk."""

    def lend(self) -> bool:
        lent = super().lend()
        self.c.flags = 0
        return lent


class AppendsPartialRecords(AppendLane):
    """The lane reports the end of its bytes instead of the end of the last complete record."""

    def settle(self) -> bool:
        self.c.flush_lsn = self.c.write_lsn
        self.c.answer[18:26] = list(self.c.write_lsn.to_bytes(8, "big"))
        return super().settle()


class TakesFromTheDeposed(AppendLane):
    """The lane takes WAL of the leader that it belongs to though a higher term was promised meanwhile."""

    def lend(self) -> bool:
        state = self._acceptor.state
        self._acceptor.state = replace(state, term=self._proposer.elected_term)
        try:
            return super().lend()
        finally:
            self._acceptor.state = state


class NoTruncationAfterBoot(WalStore):
    """Goes on where recovery found the end, without zeros behind it."""

    def recover(self, commit_lsn: Lsn, *, offloaded_flush_lsn: Lsn | None = None) -> None:
        super().recover(commit_lsn, offloaded_flush_lsn=offloaded_flush_lsn)
        segment = self._flush_lsn // self._segment_size
        descriptor = self.segments.open_partial(segment) if commit_lsn else None
        if descriptor is not None:
            self._descriptor, self._segment, self._dirty = descriptor, segment, True
            self._must_truncate = False
            self._scanner = WalScanner(self._flush_lsn, segment_size=self._segment_size)


class GoesOnAfterAFailedSync(WalStore):
    """After a write or sync that failed, tries the next one as if the failed bytes were there."""

    def flush(self) -> Lsn:
        lsns = self._write_lsn, self._write_record_lsn
        scanner = self._scanner
        try:
            return super().flush()
        except WalStoreError:
            self._write_lsn, self._write_record_lsn = lsns
            self._must_truncate, self._scanner = False, scanner
            raise

    def truncate(self, lsn: Lsn, *, pg_version: int, system_id: int) -> None:
        if lsn != self._write_lsn or self._scanner is None:
            super().truncate(lsn, pg_version=pg_version, system_id=system_id)


class GoesOnAfterAFailedCut(WalStore):
    """Accepts WAL though cutting the log failed in the middle."""

    def truncate(self, lsn: Lsn, *, pg_version: int, system_id: int) -> None:
        try:
            super().truncate(lsn, pg_version=pg_version, system_id=system_id)
        except WalStoreError:
            if self._write_lsn != lsn:
                raise
            self._must_truncate = False
            self._scanner = WalScanner(lsn, segment_size=self._segment_size)
            descriptor = self.segments.open_partial(lsn // self._segment_size)
            if descriptor is not None:
                self._descriptor, self._segment, self._dirty = descriptor, lsn // self._segment_size, True


class BelievesShortWrites(WalStore):
    """Takes a write for whole that was short."""

    def _write_part(self, views: Views, offset: int, length: int, flags: int) -> None:
        assert self._descriptor is not None
        self.disk.pwritev(self._descriptor, views, offset, flags)


class RecoversToTheCommitOnly(WalStore):
    """Forgets at boot the WAL that was flushed after commit_lsn was last saved."""

    def recover(self, commit_lsn: Lsn, *, offloaded_flush_lsn: Lsn | None = None) -> None:
        super().recover(commit_lsn, offloaded_flush_lsn=offloaded_flush_lsn)
        self._move_to(commit_lsn)


class RecoversWithoutChecksums(WalStore):
    """Takes the last byte that is not zero for the end of the log."""

    def recover(self, commit_lsn: Lsn, *, offloaded_flush_lsn: Lsn | None = None) -> None:
        super().recover(commit_lsn, offloaded_flush_lsn=offloaded_flush_lsn)
        end = lsn = int(commit_lsn)
        for chunk in self._stored_bytes(commit_lsn) if commit_lsn else ():
            if kept := len(chunk.rstrip(b"\0")):
                end = lsn + kept
            lsn += len(chunk)
        self._move_to(Lsn(max(self._flush_lsn, -(-end // 8) * 8)))


class NeverMakesSure(SegmentDirectory):
    """Trusts what the page cache shows at boot, though an earlier sync may have failed."""

    def write_anew(self, begin: int, end: int) -> None:
        pass


class ClearsWhatItSees(SegmentDirectory):
    """Writes zeros behind the end only where the page cache shows something."""

    def clear_from(self, descriptor: int, offset: int, *, anew: bool = False) -> None:
        super().clear_from(descriptor, offset)


class ForgetsToClear(SegmentDirectory):
    """Leaves old bytes behind the end of a log that was cut."""

    def clear_from(self, descriptor: int, offset: int, *, anew: bool = False) -> None:
        self._fill_with_zeros(descriptor, max(self.disk.size(descriptor), offset))
        self.disk.fsync(descriptor)


class KeepsHigherSegments(SegmentDirectory):
    """Cuts the log within a segment and leaves the segments above."""

    def remove_above(self, segment: int) -> None:
        pass


class SkipsDirectorySync(SegmentDirectory):
    """Makes segments whose names may be lost with the power."""

    def sync_directory(self) -> None:
        pass


class RemovesOneSegmentTooMany(WalStore):
    """Removes the segment that the horizon lies in, too."""

    def remove_below(self, segment: int) -> int:
        return super().remove_below(segment + 1)


# --- the control file


class ReplacesInPlace(TimelineStorage):
    """Writes the control file over the old one."""

    def _persist(self, state: AcceptorState) -> None:
        self.control = replace(self.control, acceptor=state)
        disk = self._disk
        descriptor = disk.open(self.directory / FILE_NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            write_all(disk, descriptor, [self.control.encode()], 0, 0)
            disk.fsync(descriptor)
        except OSError as error:
            raise WalStoreError(f"saving the control file failed: {error}") from error
        finally:
            disk.close(descriptor)


class ReplacesUnsynced(TimelineStorage):
    """Renames a control file whose bytes are not on the disk."""

    def __init__(self, directory: Path, control: ControlFile, *, sync: bool, disk: Disk = REAL_DISK) -> None:
        super().__init__(directory, control, sync=sync, disk=disk)
        self._sync = False


class BelievesFailedSaves(TimelineStorage):
    """Goes on with a state that could not be saved."""

    def _persist(self, state: AcceptorState) -> None:
        try:
            super()._persist(state)
        except WalStoreError:
            self.control = replace(self.control, acceptor=state)


# --- the disk, the node


class NoDirectorySync(SimulatedDisk):
    """No name is ever made durable by the code under test."""

    def sync_directory(self, directory: Path) -> None:
        pass


class SkipsSyncfsAtBoot(RealStorage):
    """Trusts at boot what a killed process left unsynced in the page cache."""

    def sync_filesystem(self) -> None:
        pass


class PublishesUnsyncedCopy(RealStorage):
    """pull_timeline publishes segments that are not on the disk."""

    def _sync_copies(self, descriptors: list[int]) -> Iterator[None]:
        for descriptor in descriptors:
            self.disk.close(descriptor)
            yield


class PullsByPromisedTerm(SimulatedSafekeeper):
    """pull_timeline takes the donor's promised term for a sign that its log was not cut meanwhile."""

    def snapshot_term(self) -> int:
        return self.acceptor.term


def removes_committed_wal(node: Any, *, walsenders_keep_horizon: bool) -> Lsn:
    """Removes WAL as soon as it is committed, whether or not it is in the bucket."""
    return min(node.acceptor.commit_lsn, node.acceptor.flush_lsn)


# --- putting them in place


def with_store(store: type[WalStore]) -> Kinds:
    """A world whose safekeepers have this store."""

    class Storage(TimelineStorage):
        def __init__(self, directory: Path, control: ControlFile, *, sync: bool, disk: Disk = REAL_DISK) -> None:
            super().__init__(directory, control, sync=sync, disk=disk)
            self.store = store(directory, self.segment_size, sync=sync, disk=disk)

    return with_storage(Storage)


def with_segments(segments: type[SegmentDirectory]) -> Kinds:
    """A world whose safekeepers have this directory of segments."""

    class Storage(TimelineStorage):
        def __init__(self, directory: Path, control: ControlFile, *, sync: bool, disk: Disk = REAL_DISK) -> None:
            super().__init__(directory, control, sync=sync, disk=disk)
            self.store.segments = segments(directory, self.segment_size, sync=sync, disk=disk)

    return with_storage(Storage)


def with_storage(storage: type[TimelineStorage]) -> Kinds:
    """A world whose safekeepers have this storage."""
    return Kinds(storage=type("Storage", (RealStorage,), {"storage_kind": storage}))


def with_disk(disk: type[SimulatedDisk]) -> Kinds:
    """A world with this disk."""
    return Kinds(storage=type("Storage", (RealStorage,), {"disk_kind": disk}))

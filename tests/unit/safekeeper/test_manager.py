"""What the manager decides, and that WAL is removed only below both positions that are saved."""

import asyncio
from pathlib import Path

import pytest

from neon_services.consensus.acceptor import Acceptor, AcceptorState
from neon_services.ground.lsn import Lsn
from neon_services.ground.remote_storage import LocalFsStorage
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP, ProposerElected, TermLsn, VoteRequest
from neon_services.safekeeper.config import OffloadConfig
from neon_services.safekeeper.connections import WalSenderState
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.manager import Manager, is_broker_active, must_save, removal_horizon
from neon_services.safekeeper.offload import Offload
from neon_services.safekeeper.remote_wal import RemoteWal
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines
from neon_services.safekeeper.wal_backup import upload_segment
from tests.unit.safekeeper.test_timelines import TTID, Leader
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)


class Store:
    """A log of which only the end matters."""

    write_lsn = write_record_lsn = flush_lsn = Lsn(0x900000)


def acceptor(**positions: int) -> Acceptor:
    made = Acceptor(1, TTID, AcceptorState(commit_lsn=Lsn(0x100), remote_consistent_lsn=Lsn(0x100)), Store())
    for name, lsn in positions.items():
        setattr(made, name, Lsn(lsn))
    return made


@pytest.mark.parametrize(
    ("computes", "commit", "remote", "active"),
    [(0, 0x100, 0x100, False), (1, 0x100, 0x100, True), (0, 0x200, 0x100, True), (0, 0x100, 0x200, False)],
)
def test_broker_active(computes: int, commit: int, remote: int, active: bool) -> None:
    found = acceptor(commit_lsn=commit, remote_consistent_lsn=remote)
    assert is_broker_active(found, computes) is active
    assert is_broker_active(found, computes, backup_required=True)


@pytest.mark.parametrize(
    ("positions", "since_saved_s", "save"),
    [
        ({}, 1e9, False),
        ({"commit_lsn": 0x101}, 299, False),
        ({"commit_lsn": 0x101}, 300, True),
        ({"commit_lsn": 0x100 + SEGMENT - 1}, 0, False),
        ({"commit_lsn": 0x100 + SEGMENT}, 0, True),
        ({"backup_lsn": SEGMENT}, 0, False),
        ({"backup_lsn": SEGMENT + 1}, 0, True),
        ({"peer_horizon_lsn": 1}, 300, True),
        ({"remote_consistent_lsn": 0x100 + SEGMENT + 1}, 0, True),
    ],
)
def test_when_the_control_file_is_saved(positions: dict[str, int], since_saved_s: float, save: bool) -> None:
    assert must_save(acceptor(**positions), SEGMENT, since_saved_s, 300.0) is save


@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    """Four segments of committed WAL."""
    timelines = Timelines(tmp_path, 1, sync=False)
    state = AcceptorState.create(
        NO_MEMBERSHIP, pg_version=PG_VERSION, system_id=SYSTEM_ID, wal_seg_size=SEGMENT, start_lsn=START
    )
    made = timelines.create(TTID, state)
    wal = WalMaker(START, SEGMENT).until(START + 4 * SEGMENT, 60_000)
    leader = Leader(made)
    leader.connection.greeted = True
    leader.say(VoteRequest(0, 1))
    leader.say(ProposerElected(0, 1, START, (TermLsn(0, START), TermLsn(1, START))))
    while made.store.write_lsn < wal.end:
        end = min(wal.end, made.store.write_lsn + 100_000)
        leader.append(wal, end, end)
    return made


def segments(timeline: Timeline) -> list[int]:
    return sorted(timeline.store.segments.existing())


async def settled(manager: Manager, timeline: Timeline) -> None:
    """Let the manager look, and the work that it begins end."""
    finished = asyncio.Event()
    timeline.on_change = lambda _: finished.set()
    before = set(asyncio.all_tasks())
    manager.tend(timeline)
    if asyncio.all_tasks() - before:
        async with asyncio.timeout(10):
            await finished.wait()


async def test_wal_is_removed_only_below_both_saved_positions(timeline: Timeline, tmp_path: Path) -> None:
    offload = Offload(OffloadConfig(), 1)
    manager = Manager(Timelines(tmp_path, 1), save_interval_s=300, walsenders_keep_horizon=False, offload=offload)
    timeline.remote = RemoteWal(LocalFsStorage(tmp_path / "bucket"), TTID)
    everything = segments(timeline)
    assert len(everything) == 5
    timeline.acceptor.remote_consistent_lsn = Lsn(4 * SEGMENT + 5)
    await settled(manager, timeline)
    assert segments(timeline) == everything, "nothing is in the bucket as WAL"
    for segment in (1, 2):
        await upload_segment(timeline, segment)
    timeline.acceptor.backup_lsn = Lsn(3 * SEGMENT + 5)
    await settled(manager, timeline)
    saved = ControlFile.load(timeline.directory / "safekeeper.control").acceptor
    assert saved.backup_lsn == 3 * SEGMENT + 5, "saved at once, because removal waits for it"
    assert segments(timeline) == [number for number in everything if number >= 3]
    assert timeline.removed_segment == 2
    assert timeline.first_available_lsn == SEGMENT, "the rest is read from the bucket"
    await settled(manager, timeline)
    assert segments(timeline) == [number for number in everything if number >= 3]
    await offload.stop()


async def test_without_a_bucket_wal_stays(timeline: Timeline, tmp_path: Path) -> None:
    manager = Manager(Timelines(tmp_path, 1), save_interval_s=0, walsenders_keep_horizon=False)
    everything = segments(timeline)
    for name in ("backup_lsn", "remote_consistent_lsn"):
        setattr(timeline.acceptor, name, Lsn(4 * SEGMENT))
    await settled(manager, timeline)
    await settled(manager, timeline)
    assert timeline.acceptor.state.backup_lsn == 4 * SEGMENT
    assert segments(timeline) == everything


async def test_a_timeline_that_uses_too_much_disk_is_refused(timeline: Timeline, tmp_path: Path) -> None:
    manager = Manager(
        Timelines(tmp_path, 1), save_interval_s=300, walsenders_keep_horizon=False, max_timeline_disk_usage_bytes=4 * SEGMENT
    )
    manager.tend(timeline)
    assert timeline.wal_refusal is not None and f"current disk usage: {5 * SEGMENT} bytes" in timeline.wal_refusal
    timeline.removed_segment = 1
    manager.tend(timeline)
    assert timeline.wal_refusal is None


def test_a_connected_pageserver_may_hold_the_horizon(timeline: Timeline) -> None:
    timeline.run(timeline.acceptor.persist_volatile())
    for name in ("backup_lsn", "remote_consistent_lsn"):
        setattr(timeline.acceptor, name, Lsn(4 * SEGMENT))
    timeline.run(timeline.acceptor.persist_volatile())
    assert removal_horizon(timeline, walsenders_keep_horizon=True) == 4 * SEGMENT
    sender = WalSenderState(TTID, "a", "pageserver-1", wake=lambda: None, close=lambda _: None)
    timeline.senders[sender.conn_id] = sender
    assert removal_horizon(timeline, walsenders_keep_horizon=True) == 4 * SEGMENT, "a reader without feedback holds nothing"
    sender.pageserver = PageserverFeedback(last_received_lsn=Lsn(2 * SEGMENT))
    assert removal_horizon(timeline, walsenders_keep_horizon=True) == 2 * SEGMENT
    assert removal_horizon(timeline, walsenders_keep_horizon=False) == 4 * SEGMENT

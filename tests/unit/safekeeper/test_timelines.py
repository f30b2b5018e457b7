"""All timelines of a data directory: loading, creating, deleting, tombstones, and the effects of the acceptor on one."""

import errno
from pathlib import Path

import pytest

from neon_services.consensus.acceptor import AcceptorState, PeerInfo, ProposerConnection
from neon_services.ground.errors import Cancelled, StaleGeneration
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    AppendRequest,
    AppendResponse,
    MembershipConfiguration,
    ProposerElected,
    ProposerGreeting,
    ProposerMessage,
    SafekeeperId,
    TermLsn,
    VoteRequest,
    VoteResponse,
)
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import TimelineBroken, TimelineDeleted, TimelineNotFound, Timelines
from neon_services.safekeeper.wal_store import WalStoreError
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

START = Lsn(0x1002028)
TTID = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"l" * 16))
OTHER = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"o" * 16))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def loaded(directory: Path, clock: Clock | None = None) -> Timelines:
    timelines = Timelines(directory, 1, sync=False, clock=clock or Clock())
    timelines.load()
    return timelines


def state(generation: int = 0) -> AcceptorState:
    mconf = MembershipConfiguration(generation, (SafekeeperId(1, "h", 1),)) if generation else NO_MEMBERSHIP
    return AcceptorState.create(
        mconf, pg_version=PG_VERSION, system_id=SYSTEM_ID, wal_seg_size=WAL_SEGMENT_SIZE, start_lsn=START
    )


class Leader:
    """Talks to one timeline as its proposer."""

    def __init__(self, timeline: Timeline, term: int = 1) -> None:
        self.timeline = timeline
        self.term = term
        self.connection = ProposerConnection()

    def say(self, message: ProposerMessage) -> list[object]:
        return list(self.timeline.run(self.timeline.acceptor.handle(self.connection, message)))

    def elect(self) -> "Leader":
        ttid = self.timeline.ttid
        self.say(ProposerGreeting(ttid, NO_MEMBERSHIP, PG_VERSION, SYSTEM_ID, WAL_SEGMENT_SIZE))
        (vote,) = self.say(VoteRequest(0, self.term))
        assert isinstance(vote, VoteResponse) and vote.vote_given
        start = vote.flush_lsn or START
        self.say(ProposerElected(0, self.term, start, (*vote.term_history, TermLsn(self.term, start))))
        return self

    def append(self, wal: WalMaker, end: int, commit: int = 0) -> AppendResponse:
        begin = self.timeline.store.write_lsn
        data = wal.slice(begin, end)
        self.say(AppendRequest(0, self.term, begin, Lsn(end), Lsn(commit), Lsn(0), data))
        (response,) = self.timeline.run(self.timeline.acceptor.flush_batch(self.connection))
        assert isinstance(response, AppendResponse)
        return response


def test_a_created_timeline_is_there_after_a_restart(tmp_path: Path) -> None:
    timelines = loaded(tmp_path)
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(20)
    leader = Leader(timelines.create(TTID, state())).elect()
    assert leader.append(wal, wal.end, wal.record_ends[3]).flush_lsn == wal.end
    timelines.close()
    again = loaded(tmp_path).get(TTID)
    assert again.acceptor.flush_lsn == wal.end
    assert (again.acceptor.term, again.acceptor.last_log_term) == (1, 1)
    assert again.control.creation_ts_ns == 0, "version 9 does not keep it"


def test_creating_twice_gives_the_same(tmp_path: Path) -> None:
    timelines = loaded(tmp_path)
    assert timelines.create(TTID, state()) is timelines.create(TTID, state(3))


def test_half_made_directories_are_wiped_and_strangers_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tmp" / "x_temptli").mkdir(parents=True)
    (tmp_path / "tmp" / "x_temptli" / "safekeeper.control").write_bytes(b"half")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / str(TTID.tenant_id) / "notes").mkdir(parents=True)
    timelines = loaded(tmp_path)
    assert timelines.all() == [] and not timelines.broken
    assert not (tmp_path / "tmp").exists()
    assert (tmp_path / "lost+found").exists()


def test_a_crash_at_any_step_of_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeline is there or it is not; never broken."""
    for steps in range(20):
        directory = tmp_path / str(steps)
        directory.mkdir()
        timelines = loaded(directory)
        left = steps

        def tick() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt("power cut")

        def wrap(real):  # type: ignore[no-untyped-def]
            def call(*arguments, **options):  # type: ignore[no-untyped-def]
                tick()
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "mkdir", "open"):
                patch.setattr(Path, name, wrap(getattr(Path, name)))
            try:
                timelines.create(TTID, state())
                finished = True
            except KeyboardInterrupt:
                finished = False
        again = loaded(directory)
        assert not again.broken
        assert finished <= (again.find(TTID) is not None)
        assert again.create(TTID, state()).acceptor.commit_lsn == START
        if finished:
            assert steps > 3
            return
    pytest.fail("creation takes more steps than expected")


@pytest.mark.parametrize("failing", [1, 2])
def test_a_creation_that_cannot_be_made_durable_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    timelines = Timelines(tmp_path, 1, sync=True, clock=Clock())
    timelines.load()
    calls = 0

    def sync_directory(_: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EIO, "planted")

    monkeypatch.setattr("neon_services.safekeeper.timelines.sync_directory", sync_directory)
    with pytest.raises(OSError, match="planted"):
        timelines.create(TTID, state())
    assert timelines.find(TTID) is None and not timelines.directory_of(TTID).exists()
    timelines.create(TTID, state())
    assert [timeline.ttid for timeline in loaded(tmp_path).all()] == [TTID]


def test_a_control_file_of_another_timeline_is_broken(tmp_path: Path) -> None:
    directory = tmp_path / str(TTID.tenant_id) / str(TTID.timeline_id)
    directory.mkdir(parents=True)
    ControlFile(OTHER, state()).save(directory, sync=False)
    timelines = loaded(tmp_path)
    with pytest.raises(TimelineBroken, match="the control file is of timeline"):
        timelines.get(TTID)
    with pytest.raises(TimelineBroken):
        timelines.create(TTID, state())
    assert timelines.delete(TTID)
    with pytest.raises(TimelineNotFound):
        timelines.get(TTID)


def test_a_deleted_timeline_stays_away_for_a_day(tmp_path: Path) -> None:
    clock = Clock()
    timelines = loaded(tmp_path, clock)
    timeline = timelines.create(TTID, state())
    assert timelines.delete(TTID)
    assert not timelines.directory_of(TTID).exists()
    assert not timelines.delete(TTID)
    with pytest.raises(Cancelled):
        timeline.run(timeline.acceptor.persist_volatile())
    for generation in (0, 9):
        with pytest.raises(TimelineDeleted):
            timelines.create(TTID, state(generation))
    clock.now += 24 * 3600 - 1
    with pytest.raises(TimelineDeleted):
        timelines.create(TTID, state())
    clock.now += 2
    timelines.create(TTID, state())


def test_deleting_a_tenant_blocks_all_its_timelines(tmp_path: Path) -> None:
    timelines = loaded(tmp_path)
    timelines.create(TTID, state())
    timelines.create(OTHER, state())
    assert timelines.delete_tenant(TTID.tenant_id) == {TTID.timeline_id: True, OTHER.timeline_id: True}
    assert not (tmp_path / str(TTID.tenant_id)).exists()
    with pytest.raises(TimelineDeleted):
        timelines.create(TenantTimelineId(TTID.tenant_id, TimelineId(b"n" * 16)), state())
    assert loaded(tmp_path).all() == []


def test_a_failed_control_file_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vote that could not be made durable was not given, here or on the disk."""
    timeline = loaded(tmp_path).create(TTID, state())
    leader = Leader(timeline, 5)
    leader.say(ProposerGreeting(TTID, NO_MEMBERSHIP, PG_VERSION, SYSTEM_ID, WAL_SEGMENT_SIZE))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(WalStoreError, match="No space left"):
            leader.say(VoteRequest(0, 5))
    assert timeline.acceptor.term == 0
    assert ControlFile.load(timeline.directory / "safekeeper.control").acceptor.term == 0
    (vote,) = leader.say(VoteRequest(0, 5))
    assert isinstance(vote, VoteResponse) and vote.vote_given
    assert ControlFile.load(timeline.directory / "safekeeper.control").acceptor.term == 5


def test_closing_keeps_what_was_written(tmp_path: Path) -> None:
    timelines = loaded(tmp_path)
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(5)
    leader = Leader(timelines.create(TTID, state())).elect()
    leader.say(AppendRequest(0, 1, START, wal.end, Lsn(0), Lsn(0), bytes(wal.data)))
    timelines.close()
    assert loaded(tmp_path).get(TTID).acceptor.flush_lsn == wal.end


def test_a_peer_in_the_same_term_tells_what_is_committed(tmp_path: Path) -> None:
    timeline = loaded(tmp_path).create(TTID, state())
    wal = WalMaker(START, WAL_SEGMENT_SIZE).records(5)
    Leader(timeline).elect().append(wal, wal.end)
    changes: list[Timeline] = []
    timeline.on_change = changes.append
    zero = Lsn(0)
    timeline.learn(PeerInfo(2, wal.end, zero, zero, zero))
    assert timeline.acceptor.commit_lsn == START, "a peer whose log ends in another term says nothing about ours"
    timeline.learn(PeerInfo(1, Lsn(wal.end + 1000), zero, wal.record_ends[0], zero))
    assert timeline.acceptor.commit_lsn == wal.end, "never beyond what is flushed here"
    assert timeline.acceptor.remote_consistent_lsn == wal.record_ends[0]
    assert changes


def configuration(generation: int, *ids: int) -> MembershipConfiguration:
    return MembershipConfiguration(generation, tuple(SafekeeperId(i, "h", 1) for i in ids))


def test_an_exclusion_blocks_its_generation_and_older_ones_only(tmp_path: Path) -> None:
    clock = Clock()
    timelines = loaded(tmp_path, clock)
    timelines.create(TTID, state(3))
    assert timelines.exclude(TTID, configuration(4, 2, 3)) is True
    assert not timelines.directory_of(TTID).exists() and list((tmp_path / "tmp").iterdir()) == []
    assert timelines.exclude(TTID, configuration(4, 2, 3)) is False
    for generation in (0, 3, 4):
        with pytest.raises(TimelineDeleted):
            timelines.create(TTID, state(generation))
    timelines.exclude(TTID, configuration(2, 2))  # an older, late one weakens nothing
    with pytest.raises(TimelineDeleted):
        timelines.create(TTID, state(4))
    assert timelines.create(OTHER, state(1)) is not None
    assert timelines.create(TTID, state(5)).acceptor.state.mconf.generation == 5
    timelines.close()


def test_a_deletion_blocks_every_generation_until_it_expires(tmp_path: Path) -> None:
    clock = Clock()
    timelines = loaded(tmp_path, clock)
    timelines.create(TTID, state(1))
    timelines.delete(TTID)
    timelines.exclude(TTID, configuration(9, 2))  # does not weaken the deletion
    clock.now += 24 * 3600 - 1
    with pytest.raises(TimelineDeleted):
        timelines.create(TTID, state(100))
    clock.now += 2
    timelines.create(TTID, state(1))
    timelines.close()


def test_a_stale_or_contradicting_exclusion_removes_nothing(tmp_path: Path) -> None:
    timelines = loaded(tmp_path)
    timelines.create(TTID, state(5))
    for stale in (configuration(4, 2, 3), configuration(5, 2, 3)):
        with pytest.raises(StaleGeneration):
            timelines.exclude(TTID, stale)
    assert timelines.get(TTID).acceptor.state.mconf.generation == 5
    timelines.close()


def test_a_broken_copy_is_not_excluded(tmp_path: Path) -> None:
    timelines = loaded(tmp_path)
    timelines.create(TTID, state(1))
    timelines.close()
    (timelines.directory_of(TTID) / "safekeeper.control").write_bytes(b"rubbish")
    again = loaded(tmp_path)
    with pytest.raises(TimelineBroken):
        again.exclude(TTID, configuration(9, 2))
    assert again.delete(TTID)


def test_a_staged_timeline_does_not_come_back_after_a_deletion_or_over_another(tmp_path: Path) -> None:
    timelines = loaded(tmp_path)
    staged = timelines.stage(TTID)
    ControlFile(TTID, state(2)).save(staged, sync=False)
    timelines.exclude(TTID, configuration(2, 7))
    with pytest.raises(TimelineDeleted):
        timelines.publish(TTID, staged, 2)
    first = timelines.create(TTID, state(3))
    assert timelines.publish(TTID, staged, 3) is first and staged.exists()
    timelines.close()

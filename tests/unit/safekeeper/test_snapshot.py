"""Snapshots: the archive on every prefix, what the destination refuses, and that copying aborts when the log changes."""

import asyncio
import contextlib
import errno
import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from neon_services.consensus.acceptor import AcceptorState
from neon_services.ground.errors import Cancelled, CorruptionError, NeonError
from neon_services.ground.http import serve
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import (
    NO_MEMBERSHIP,
    MembershipConfiguration,
    ProposerElected,
    ProposerGreeting,
    SafekeeperId,
    TermLsn,
    VoteRequest,
)
from neon_services.safekeeper import membership_api
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.http_api import HttpApi
from neon_services.safekeeper.peer_client import PeerClient, PeerStatus
from neon_services.safekeeper.pull_timeline import PullFailed, PullRequest, TimelinePuller
from neon_services.safekeeper.snapshot import Snapshot, SnapshotAborted, SnapshotRefused
from neon_services.safekeeper.snapshot_tar import END_OF_ARCHIVE, Member, MemberEnd, TarReader, member_header, member_padding
from neon_services.safekeeper.snapshot_unpack import SnapshotUnpacker, Unpacked, continuation_end
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines
from tests.integration.cluster import wait_until
from tests.unit.safekeeper.test_timelines import TTID, Leader
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)


@pytest.fixture
def timelines(tmp_path: Path) -> Iterator[Timelines]:
    made = Timelines(tmp_path / "donor", 1, sync=False)
    (tmp_path / "donor").mkdir()
    made.load()
    yield made
    made.close()


def create(timelines: Timelines) -> Timeline:
    return timelines.create(
        TTID,
        AcceptorState.create(NO_MEMBERSHIP, pg_version=PG_VERSION, system_id=SYSTEM_ID, wal_seg_size=SEGMENT, start_lsn=START),
    )


class SmallLeader(Leader):
    """A leader of a timeline with small segments."""

    def elect(self) -> "SmallLeader":
        self.say(ProposerGreeting(TTID, NO_MEMBERSHIP, PG_VERSION, SYSTEM_ID, SEGMENT))
        (vote,) = self.say(VoteRequest(0, self.term))
        start = vote.flush_lsn  # type: ignore[attr-defined]
        self.say(ProposerElected(0, self.term, start, (*vote.term_history, TermLsn(self.term, start))))  # type: ignore[attr-defined]
        return self


def append_all(leader: Leader, wal: WalMaker, end: int, commit: int = 0) -> None:
    """In messages of legal size."""
    while (begin := leader.timeline.store.write_lsn) < end:
        leader.append(wal, min(begin + 100_000, end), commit)


async def archive(timeline: Timeline) -> bytes:
    with timeline.hold_removal():
        return b"".join([piece async for piece in Snapshot.of(timeline).stream()])


def unpack(directory: Path, data: bytes, mconf: MembershipConfiguration | None = None, step: int = 1 << 20) -> Unpacked:
    directory.mkdir()
    unpacker = SnapshotUnpacker(directory, TTID, sync=False)
    try:
        for position in range(0, len(data), step):
            unpacker.feed(data[position : position + step])
        return unpacker.finish(mconf)
    finally:
        unpacker.close()


# --- the archive


def small_archive() -> tuple[bytes, list[tuple[str, bytes]]]:
    members = [("a", b"x" * 700), ("empty", b""), ("b", b"y" * 512)]
    data = b"".join(member_header(n, len(c)) + c + member_padding(len(c)) for n, c in members) + END_OF_ARCHIVE
    return data, members


def read_members(reader: TarReader, pieces: list[bytes]) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for piece in pieces:
        for event in reader.feed(piece):
            if isinstance(event, Member):
                name, content = event.name, b""
            elif isinstance(event, MemberEnd):
                found.append((name, content))
            else:
                content += event
    return found


def test_python_and_the_reader_agree_about_the_archive() -> None:
    data, members = small_archive()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar] == members  # type: ignore[union-attr]
    for step in (1, 7, 512, 1000, len(data)):
        reader = TarReader()
        pieces = [data[i : i + step] for i in range(0, len(data), step)]
        assert read_members(reader, pieces) == members and reader.complete


def test_no_prefix_of_an_archive_is_complete() -> None:
    data, members = small_archive()
    end = len(data) - len(END_OF_ARCHIVE) + 512
    for length in range(end):
        reader = TarReader()
        assert read_members(reader, [data[:length]]) == members[: len(read_members(TarReader(), [data[:length]]))]
        assert not reader.complete, length
    assert read_members(reader := TarReader(), [data + b"tail"]) == members and reader.complete


def test_what_is_no_plain_archive_is_refused() -> None:
    link = tarfile.TarInfo("../evil")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for block in (b"x" * 512, link.tobuf(tarfile.GNU_FORMAT)):
        with pytest.raises(CorruptionError, match="snapshot"):
            list(TarReader().feed(block))


# --- donor and destination


async def test_a_copy_is_the_timeline_and_accepts_the_leader_where_it_ends(timelines: Timelines, tmp_path: Path) -> None:
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).until(START + 3 * SEGMENT)
    leader = SmallLeader(donor).elect()
    end = wal.last_record_end(START + 2 * SEGMENT + 5000)
    append_all(leader, wal, end, wal.last_record_end(end - 3000))
    unpacked = unpack(tmp_path / "copy", await archive(donor))
    assert (unpacked.flush_lsn, unpacked.segments) == (end, 3)
    assert unpacked.position == (1, end)
    copy = Timeline.open(2, tmp_path / "copy", sync=False)
    try:
        assert copy.store.flush_lsn == end
        assert copy.acceptor.state.term_history == donor.acceptor.state.term_history
        assert copy.acceptor.commit_lsn == donor.acceptor.commit_lsn
        follower = SmallLeader(copy, term=2).elect()
        append_all(follower, wal, wal.end)
        reader = copy.reader()
        position, data = START, b""
        while position < wal.end:
            piece = await reader.read(position, wal.end - position)
            data, position = data + piece, Lsn(position + len(piece))
        reader.close()
        assert data == bytes(wal.data)
    finally:
        copy.close("done")


@pytest.mark.parametrize("wal_size", [0, 1])
async def test_a_timeline_without_wal_is_copied(timelines: Timelines, tmp_path: Path, wal_size: int) -> None:
    donor = create(timelines)
    if wal_size:
        SmallLeader(donor).elect()  # a first segment with nothing but headers
    unpacked = unpack(tmp_path / "copy", await archive(donor))
    assert (unpacked.flush_lsn, unpacked.segments) == (START, 0)


async def test_wal_in_object_storage_is_left_out_and_the_copy_says_so(timelines: Timelines, tmp_path: Path) -> None:
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).until(START + 3 * SEGMENT)
    leader = SmallLeader(donor).elect()
    append_all(leader, wal, wal.end, wal.end)
    boundary = Lsn(3 * SEGMENT)
    donor.acceptor.backup_lsn, donor.acceptor.remote_consistent_lsn = boundary, Lsn(boundary + 5000)
    unpacked = unpack(tmp_path / "copy", await archive(donor))
    assert unpacked.control.acceptor.local_start_lsn == boundary
    assert unpacked.segments == (wal.end - 1) // SEGMENT - 2
    assert donor.acceptor.state.local_start_lsn == START


async def test_a_copy_that_is_only_the_end_of_a_long_record_is_accepted(timelines: Timelines, tmp_path: Path) -> None:
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).until(2 * SEGMENT - 20_000).record(30_000)
    assert wal.end > 2 * SEGMENT
    append_all(SmallLeader(donor).elect(), wal, wal.end, wal.end)
    donor.acceptor.backup_lsn = donor.acceptor.remote_consistent_lsn = Lsn(2 * SEGMENT)
    unpacked = unpack(tmp_path / "copy", await archive(donor))
    assert (unpacked.flush_lsn, unpacked.segments) == (wal.end, 1)
    damaged = bytearray(await archive(donor))
    damaged[-len(END_OF_ARCHIVE) - SEGMENT + (wal.end - 2 * SEGMENT) + 100] ^= 1
    with pytest.raises(CorruptionError, match="goes on"):
        unpack(tmp_path / "damaged", bytes(damaged))


def test_where_a_continued_record_ends() -> None:
    page = 8192
    assert continuation_end(SEGMENT, 0, SEGMENT) == SEGMENT
    assert continuation_end(SEGMENT, 5, SEGMENT) == SEGMENT + 48
    assert continuation_end(SEGMENT, page - 40, SEGMENT) == SEGMENT + page
    assert continuation_end(SEGMENT, page - 39, SEGMENT) == SEGMENT + page + 32
    assert continuation_end(SEGMENT + page, page - 23, SEGMENT) == SEGMENT + 2 * page + 32


async def test_every_cut_and_every_kind_of_damage_is_refused(timelines: Timelines, tmp_path: Path) -> None:
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).until(START + SEGMENT + 5000)
    append_all(SmallLeader(donor).elect(), wal, wal.end, wal.end)
    data = await archive(donor)
    header = 512
    control = header + len(donor.control.encode()) + 512
    cuts = [0, 100, header, control - 600, control, control + header + 77, control + header + SEGMENT, len(data) - 1024]
    for number, cut in enumerate(cuts):
        with pytest.raises(CorruptionError):
            unpack(tmp_path / f"cut{number}", data[:cut])
        assert not (tmp_path / f"cut{number}" / "safekeeper.control").exists()

    def damaged(position: int) -> bytes:
        return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]

    first_wal = data.index(wal.slice(START, START + 64))
    for number, position in enumerate([0, header + 20, first_wal + 30, first_wal + 5000, len(data) - 1024 - 100]):
        with pytest.raises(CorruptionError):
            unpack(tmp_path / f"damaged{number}", damaged(position))
    with pytest.raises(CorruptionError, match="not of"):
        SnapshotUnpacker(tmp_path, replace(TTID, tenant_id=type(TTID.tenant_id)(b"z" * 16))).feed(data)


async def test_wal_that_ends_before_its_commit_lsn_is_refused(timelines: Timelines, tmp_path: Path) -> None:
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).records(20)
    append_all(SmallLeader(donor).elect(), wal, wal.end, wal.end)
    state = donor.acceptor.state
    beyond = replace(donor.control, acceptor=replace(state, commit_lsn=Lsn(wal.end + 0x100)))
    with donor.hold_removal():
        pieces = [piece async for piece in Snapshot(donor, beyond, START, wal.end).stream()]
    with pytest.raises(CorruptionError, match="before commit_lsn"):
        unpack(tmp_path / "copy", b"".join(pieces))


def member(name: str, content: bytes) -> bytes:
    return member_header(name, len(content)) + content + member_padding(len(content))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["000000010000000000000001", "000000010000000000000003"], "does not follow"),
        (["000000010000000000000001", "000000010000000000000001"], "does not follow"),
        (["000000010000000000000001.partial", "000000010000000000000002"], "does not follow"),
        (["../../escape"], "no WAL segment"),
        (["000000020000000000000001"], "no WAL segment"),
        (["safekeeper.control"], "no WAL segment"),
        (["000000010000000000000002"], "begins at"),
    ],
)
async def test_impossible_members_are_refused(timelines: Timelines, tmp_path: Path, names: list[str], message: str) -> None:
    control = create(timelines).control.encode()
    body = member("safekeeper.control", control) + b"".join(member(name, bytes(SEGMENT)) for name in names) + END_OF_ARCHIVE
    with pytest.raises(CorruptionError, match=message):
        unpack(tmp_path / "copy", body)


async def test_the_copy_follows_the_newer_configuration_and_forgets_partial_backups(
    timelines: Timelines, tmp_path: Path
) -> None:
    donor = create(timelines)
    mconf = MembershipConfiguration(5, (SafekeeperId(2, "h", 1),))
    unpacked = unpack(tmp_path / "copy", await archive(donor), mconf, step=333)
    assert ControlFile.load(tmp_path / "copy" / "safekeeper.control") == unpacked.control
    assert unpacked.control.acceptor.mconf == mconf and unpacked.control.partial_backup == ()


async def test_another_leader_or_deletion_aborts_the_copy(timelines: Timelines) -> None:
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).until(START + 3 * SEGMENT)
    append_all(SmallLeader(donor).elect(), wal, wal.end)
    pieces = Snapshot.of(donor).stream()
    for _ in range(3):
        await anext(pieces)
    SmallLeader(donor, term=2).say(ProposerGreeting(TTID, NO_MEMBERSHIP, PG_VERSION, SYSTEM_ID, SEGMENT))
    leader = SmallLeader(donor, term=2).elect()
    with pytest.raises(SnapshotAborted, match="from term 1 to 2"):
        [piece async for piece in pieces]
    pieces = Snapshot.of(donor).stream()
    await anext(pieces)
    leader.say(VoteRequest(0, 3))  # a vote alone changes no log
    await anext(pieces)
    timelines.delete(TTID)
    with pytest.raises(Cancelled):
        [piece async for piece in pieces]


async def test_what_was_removed_cannot_be_copied(timelines: Timelines) -> None:
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).until(START + 4 * SEGMENT)
    append_all(SmallLeader(donor).elect(), wal, wal.end, wal.end)
    with donor.hold_removal(), donor.hold_removal():
        pieces = Snapshot.of(donor).stream()
        await anext(pieces)
        donor.acceptor.backup_lsn = donor.acceptor.remote_consistent_lsn = Lsn(4 * SEGMENT)
        donor.run(donor.acceptor.persist_volatile())
        assert donor.removal_held
        assert len([piece async for piece in pieces]) > 4
    assert not donor.removal_held
    donor.store.remove_below(4)
    donor.removed_segment = 3
    pieces = Snapshot.of(donor).stream()
    assert [p async for p in pieces]
    donor.acceptor.state = replace(donor.acceptor.state, backup_lsn=Lsn(SEGMENT))
    donor.acceptor.backup_lsn = Lsn(SEGMENT)
    with pytest.raises(SnapshotRefused, match="lacks WAL"):
        Snapshot.of(donor)


async def test_the_event_loop_goes_on_while_a_copy_is_read(timelines: Timelines) -> None:
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).until(START + 3 * SEGMENT)
    append_all(SmallLeader(donor).elect(), wal, wal.end)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    try:
        pieces = len([piece async for piece in Snapshot.of(donor).stream()])
    finally:
        task.cancel()
    assert turns >= pieces // 2


async def test_wal_is_not_kept_for_ever_for_who_does_not_read(
    timelines: Timelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership_api, "STALL_TIMEOUT_S", 0.2)
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).until(START + 16 * SEGMENT, 60_000)
    append_all(SmallLeader(donor).elect(), wal, wal.end)
    config = SafekeeperConfig(tmp_path, 1, ("127.0.0.1", 0), ("127.0.0.1", 0), "", "")
    runner = await serve(HttpApi(config, timelines).application(), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*runner.addresses[0][:2], limit=4096)
    try:
        path = f"/v1/tenant/{TTID.tenant_id}/timeline/{TTID.timeline_id}/snapshot/2"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert donor.removal_held
        await asyncio.to_thread(wait_until, lambda: not donor.removal_held, "the end of the hold", 20)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := await asyncio.wait_for(reader.read(1 << 20), 20):
                received += piece
        assert len(received) < 16 * SEGMENT and not received.endswith(b"0\r\n\r\n"), "the copy looks whole"
    finally:
        writer.close()
        await runner.cleanup()


async def test_a_full_disk_leaves_nothing(timelines: Timelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).until(START + 2 * SEGMENT, 60_000)
    append_all(SmallLeader(donor).elect(), wal, wal.end)
    config = SafekeeperConfig(tmp_path, 1, ("127.0.0.1", 0), ("127.0.0.1", 0), "", "")
    runner = await serve(HttpApi(config, timelines).application(), "127.0.0.1", 0)
    host, port = runner.addresses[0][:2]
    (tmp_path / "joiner").mkdir()
    joiner = Timelines(tmp_path / "joiner", 2, sync=False)
    puller, calls = TimelinePuller(joiner, 2, sync=False), 0

    def full(self: ControlFile, directory: Path, *, sync: bool = True) -> None:
        nonlocal calls
        calls += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(ControlFile, "save", full)
            with pytest.raises(NeonError, match="No space left"):
                await puller.pull(PullRequest(TTID, (f"http://{host}:{port}",)))
        assert calls == 1 and joiner.find(TTID) is None and list((tmp_path / "joiner" / "tmp").iterdir()) == []
        assert await puller.pull(PullRequest(TTID, (f"http://{host}:{port}",))) == f"http://{host}:{port}"
        assert joiner.get(TTID).store.flush_lsn == wal.end
    finally:
        joiner.close()
        await runner.cleanup()


async def test_a_copy_that_is_older_than_the_donors_status_is_refused(
    timelines: Timelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = create(timelines)
    wal = WalMaker(START, SEGMENT).records(20)
    append_all(SmallLeader(donor).elect(), wal, wal.end)
    config = SafekeeperConfig(tmp_path, 1, ("127.0.0.1", 0), ("127.0.0.1", 0), "", "")
    runner = await serve(HttpApi(config, timelines).application(), "127.0.0.1", 0)
    request = PullRequest(TTID, ("http://{}:{}".format(*runner.addresses[0][:2]),))
    (tmp_path / "joiner").mkdir()
    joiner = Timelines(tmp_path / "joiner", 2, sync=False)
    real = PeerClient.status

    async def before_it_went_back(self: PeerClient, ttid: TenantTimelineId) -> PeerStatus:
        return replace(await real(self, ttid), flush_lsn=Lsn(wal.end + 8))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(PeerClient, "status", before_it_went_back)
            with pytest.raises(PullFailed, match="went back"):
                await TimelinePuller(joiner, 2, sync=False).pull(request)
        assert joiner.find(TTID) is None and list((tmp_path / "joiner" / "tmp").iterdir()) == []
    finally:
        joiner.close()
        await runner.cleanup()

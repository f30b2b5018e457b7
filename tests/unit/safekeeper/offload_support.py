"""A timeline with a few small segments of committed WAL, and a bucket that can be told to fail."""

from collections.abc import Callable
from pathlib import Path

from neon_services.consensus.acceptor import AcceptorState
from neon_services.ground.lsn import Lsn
from neon_services.ground.remote_storage import LocalFsStorage, RemoteStorageError
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP, ProposerElected, TermLsn, VoteRequest
from neon_services.safekeeper.timeline import Timeline
from neon_services.safekeeper.timelines import Timelines
from tests.unit.safekeeper.test_timelines import TTID, Leader
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

SEGMENT = 1 << 20
START = Lsn(SEGMENT + 0x2028)


class Bucket(LocalFsStorage):
    """Objects in a directory. ``before`` is called with every operation and may raise; ``puts`` are the keys stored."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.puts: list[str] = []
        self.largest_read = 1 << 30
        self.before: Callable[[str, str], None] = lambda operation, key: None
        self.after: Callable[[str, str], None] = lambda operation, key: None

    async def put(self, key: str, content: bytes, *, metadata: dict[str, str] | None = None) -> None:
        self.before("put", key)
        await super().put(key, content, metadata=metadata)
        self.puts.append(key)
        self.after("put", key)

    async def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.before("get", key)
        content = await super().get(key, start, end)
        return content[: self.largest_read]

    async def delete(self, keys: list[str]) -> None:
        self.before("delete", " ".join(keys))
        await super().delete(keys)
        self.after("delete", " ".join(keys))

    def objects(self) -> dict[str, bytes]:
        """Everything in the bucket, by the last part of its key."""
        return {path.name: path.read_bytes() for path in self.root.rglob("*") if path.is_file()}


def failing(times: int, *operations: str) -> Callable[[str, str], None]:
    """For ``before``: the first so many of these operations fail."""
    left = [times]

    def before(operation: str, key: str) -> None:
        if operation in operations and left[0]:
            left[0] -= 1
            raise RemoteStorageError(f"{operation} {key}: the store is broken")

    return before


class World:
    """One safekeeper's timeline, its leader and its WAL."""

    def __init__(self, base: Path, segments: int = 4) -> None:
        self.base = base
        self.bucket = Bucket(base / "bucket")
        self.wal = WalMaker(START, SEGMENT).until(START + segments * SEGMENT, 60_000)
        self.datadir = base / "data"
        self.datadir.mkdir()
        self.timelines = self._timelines()
        state = AcceptorState.create(
            NO_MEMBERSHIP, pg_version=PG_VERSION, system_id=SYSTEM_ID, wal_seg_size=SEGMENT, start_lsn=START
        )
        self.timeline = self.timelines.create(TTID, state)
        self.lead(1)
        self.append(self.wal.end)

    def _timelines(self) -> Timelines:
        timelines = Timelines(self.datadir, 1, sync=False)
        timelines.storage = self.bucket
        return timelines

    def reboot(self) -> Timeline:
        """As after a crash of the process: only what is on the disk is left."""
        self.timelines = self._timelines()
        self.timelines.load()
        self.timeline = self.timelines.get(TTID)
        return self.timeline

    def lead(self, term: int) -> None:
        """A proposer is elected and streams from the end of the log."""
        self.leader = Leader(self.timeline, term)
        self.leader.connection.greeted = True
        self.leader.say(VoteRequest(0, term))
        acceptor = self.timeline.acceptor
        start = acceptor.flush_lsn
        self.leader.say(ProposerElected(0, term, start, (*acceptor.state.term_history, TermLsn(term, start))))

    def append(self, upto: int) -> None:
        """The WAL up to here, committed."""
        while self.timeline.store.write_lsn < upto:
            end = min(upto, self.timeline.store.write_lsn + 100_000)
            self.leader.append(self.wal, end, end)

    def segments(self) -> list[int]:
        """Numbers of the segments on the disk."""
        return sorted(self.timeline.store.segments.existing())

    def save(self) -> None:
        self.timeline.run(self.timeline.acceptor.persist_volatile())

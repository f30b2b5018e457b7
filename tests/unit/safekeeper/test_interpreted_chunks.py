"""Chunks of interpreted WAL: the same whoever makes them; shared ones are made once and nobody waits for who is behind."""

import asyncio
import random
from collections.abc import Callable, Iterator

import pytest

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn
from neon_services.safekeeper import interpreted_chunks
from neon_services.safekeeper.interpreted_chunks import CHUNK_BYTES, Chunk, ChunkFeed, InterpretedReaders
from neon_services.wal.framing import build_record, place_record, record_end, record_start

SEGMENT = 1 << 24
START = Lsn(3 * SEGMENT)
PG_MAJOR = 15
RM_TABLESPACE = 5  # its records say nothing to anybody, whatever is in them


class Wal:
    """Records of random sizes from START on; readers of it, which can be held up or made to fail."""

    def __init__(self, seed: int) -> None:
        self.data = bytearray()
        self.ends: list[int] = []
        self.reads = 0
        self.open_files = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self._random = random.Random(seed)
        self._previous = 0

    def grow(self, count: int, largest: int = 3000) -> "Wal":
        for _ in range(count):
            self.record(self._random.randrange(20, largest))
        return self

    def record(self, size: int) -> "Wal":
        end = Lsn(START + len(self.data))
        record = build_record(RM_TABLESPACE, 0, self._random.randbytes(size), prev_lsn=self._previous, xid=7)
        start = record_start(end, SEGMENT)
        for _, written in place_record(start, record, pg_major=PG_MAJOR, system_identifier=1, segment_size=SEGMENT):
            self.data += written
        self._previous = start
        self.ends.append(record_end(start, len(record), SEGMENT))
        return self

    @property
    def end(self) -> Lsn:
        return Lsn(self.ends[-1])

    def reader(self) -> "Wal.Reader":
        return Wal.Reader(self)

    class Reader:
        def __init__(self, wal: "Wal") -> None:
            self._wal = wal
            wal.open_files += 1

        async def read(self, lsn: int, count: int) -> bytes:
            await self._wal.gate.wait()
            self._wal.reads += 1
            if self._wal.failure is not None:
                raise self._wal.failure
            return bytes(self._wal.data[lsn - START : lsn - START + count])

        def close(self) -> None:
            self._wal.open_files -= 1


@pytest.fixture
def seed() -> Iterator[int]:
    number = random.randrange(1 << 32)
    print(f"seed {number}")
    yield number


def readers(wal: Wal) -> InterpretedReaders:
    return InterpretedReaders(wal.reader)  # type: ignore[arg-type]


def feed(of: InterpretedReaders, *, fanout: bool = True, max_delta: int | None = None) -> ChunkFeed:
    return of.open(PG_MAJOR, SEGMENT, fanout=fanout, max_delta=max_delta)


def readers_with(of: InterpretedReaders, open_reader: Callable[[], Wal.Reader]) -> ChunkFeed:
    """A feed among the others whose WAL comes another way."""
    usual, of._open_reader = of._open_reader, open_reader  # type: ignore[assignment]
    made = feed(of)
    made._own_source()
    of._open_reader = usual
    return made


async def follow(chunks: ChunkFeed, position: int, end: int) -> list[Chunk]:
    found = []
    while position < end:
        chunk = await chunks.next(Lsn(position), Lsn(end))
        assert chunk is not None
        assert chunk.batch.start_lsn == position
        found.append(chunk)
        position = chunk.batch.next_lsn
    return found


def ends_of(chunks: list[Chunk]) -> list[int]:
    return [end for chunk in chunks for end in chunk.batch.end_lsn.tolist()]


async def test_chunks_follow_each_other_and_end_at_multiples(seed: int) -> None:
    wal = Wal(seed).grow(800)
    of = readers(wal)
    for fanout in (False, True):
        chunks = feed(of, fanout=fanout)
        found = await follow(chunks, START, wal.end)
        assert ends_of(found) == wal.ends
        for chunk in found[:-1]:
            assert chunk.streaming_lsn % CHUNK_BYTES == 0
            assert chunk.batch.next_lsn == max(end for end in wal.ends if end <= chunk.streaming_lsn)
        chunks.close()
    assert wal.open_files == of.count == 0


async def test_whatever_is_readable_is_given(seed: int) -> None:
    """The end of what may be read moves in steps of any size, also into the middle of records."""
    wal, rng = Wal(seed).grow(300), random.Random(seed)
    chunks = feed(readers(wal))
    position, end, found = START, START, []
    while position < wal.end:
        end = Lsn(min(end + rng.choice((1, 8, 30, 1000, 5000, 300_000)), wal.end))
        while position < end:
            chunk = await chunks.next(position, end)
            if chunk is None:
                assert not any(position < known <= end for known in wal.ends)
                break
            assert chunk.streaming_lsn <= end
            found.append(chunk)
            position = chunk.batch.next_lsn
    assert ends_of(found) == wal.ends
    chunks.close()


async def test_a_record_larger_than_chunks_is_read_once(seed: int) -> None:
    wal = Wal(seed).grow(3).record(10 * CHUNK_BYTES).grow(3)
    chunks = feed(readers(wal), fanout=False)
    position = START
    for end in range(START + 1000, wal.end, 40_000):  # it comes in bit by bit
        while (chunk := await chunks.next(position, Lsn(end))) is not None:
            position = chunk.batch.next_lsn
    assert wal.reads < 3 * (wal.end - START) // 40_000
    found = await follow(chunks, position, wal.end)
    assert ends_of(found)[-1] == wal.end
    chunks.close()


async def test_a_source_goes_where_it_is_asked_to(seed: int) -> None:
    wal, rng = Wal(seed).grow(400), random.Random(seed)
    of = readers(wal)
    source = of.open_source(PG_MAJOR, SEGMENT)
    for start in (START, wal.ends[-2], START, *rng.sample(wal.ends[:-1], 20)):
        chunk = await source.next(Lsn(start), wal.end)
        assert chunk is not None and chunk.batch.start_lsn == start
        assert ends_of([chunk]) == [end for end in wal.ends if start < end <= chunk.batch.next_lsn]
    of.close_source(source)


async def test_many_readers_share_the_work(seed: int) -> None:
    wal = Wal(seed).grow(1500)
    of = readers(wal)
    everyone = [feed(of) for _ in range(5)]
    found = await asyncio.gather(*(follow(chunks, START, wal.end) for chunks in everyone))
    assert all(ends_of(chunks) == wal.ends for chunks in found)
    alone = -(-(wal.end - START) // CHUNK_BYTES)
    assert wal.reads == alone, "each byte is read once for all"
    assert of.count == wal.open_files == 1
    for chunks in everyone:
        chunks.close()
    assert of.count == wal.open_files == 0


async def test_readers_from_different_places_meet(seed: int) -> None:
    wal, rng = Wal(seed).grow(1500), random.Random(seed)
    of = readers(wal)
    starts = [START, *rng.sample(wal.ends[:300], 4)]
    everyone = [feed(of) for _ in starts]
    found = await asyncio.gather(*(follow(chunks, start, wal.end) for chunks, start in zip(everyone, starts, strict=True)))
    for chunks, start in zip(found, starts, strict=True):
        assert ends_of(chunks) == [end for end in wal.ends if end > start]
    assert of.count == 1, "at the end all are served by one"
    assert wal.reads < 2 * -(-(wal.end - START) // CHUNK_BYTES) + 2 * len(starts)
    for chunks in everyone:
        chunks.close()
    assert of.count == wal.open_files == 0


async def test_who_is_behind_makes_its_own_chunks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted_chunks, "KEPT_BYTES_MAX", 2 * CHUNK_BYTES)
    wal = Wal(seed).grow(1500)
    of = readers(wal)
    ahead, behind = feed(of), feed(of)
    first = await behind.next(START, wal.end)
    assert first is not None and of.count == 1
    assert ends_of(await follow(ahead, START, wal.end)) == wal.ends
    rest = await follow(behind, first.batch.next_lsn, wal.end)
    assert ends_of([first, *rest]) == wal.ends
    wal.grow(20)
    before = wal.reads
    news = await asyncio.gather(*(follow(chunks, rest[-1].batch.next_lsn, wal.end) for chunks in (ahead, behind)))
    assert ends_of(news[0]) == ends_of(news[1]) == wal.ends[1500:]
    assert wal.reads - before == len(news[0]) and of.count == 1, "where they are together they share again"
    ahead.close()
    behind.close()
    assert of.count == wal.open_files == 0


async def test_what_is_kept_is_bounded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted_chunks, "KEPT_BYTES_MAX", 3 * CHUNK_BYTES)
    wal = Wal(seed).grow(400).record(5 * CHUNK_BYTES).grow(300)
    of = readers(wal)
    chunks = feed(of)
    assert ends_of(await follow(chunks, START, wal.end)) == wal.ends
    shared = chunks._shared
    assert shared is not None and len(shared._made) <= 3
    kept = sum(len(chunk.batch.data) + interpreted_chunks.CHUNK_OVERHEAD_BYTES for chunk in shared._made.values())
    assert shared._kept_bytes == kept <= 3 * CHUNK_BYTES
    chunks.close()


async def test_a_reader_that_waits_for_its_wal_holds_up_nobody(seed: int) -> None:
    """One behind, whose WAL comes slowly (from object storage): who needs other chunks goes on."""
    wal = Wal(seed).grow(1500)
    of = readers(wal)
    ahead = feed(of)
    await follow(ahead, START, wal.ends[1000])
    slow = asyncio.Event()

    class SlowReader(Wal.Reader):
        async def read(self, lsn: int, count: int) -> bytes:
            await slow.wait()
            return await super().read(lsn, count)

    behind = readers_with(of, lambda: SlowReader(wal))
    waiting = asyncio.create_task(behind.next(Lsn(wal.ends[3]), wal.end))
    await asyncio.sleep(0)
    assert ends_of(await follow(ahead, wal.ends[1000], wal.end)) == wal.ends[1001:]
    assert not waiting.done()
    slow.set()
    chunk = await waiting
    assert chunk is not None and chunk.batch.start_lsn == wal.ends[3]
    ahead.close()
    behind.close()


async def test_max_delta_keeps_readers_apart(seed: int) -> None:
    wal = Wal(seed).grow(1500)
    of = readers(wal)
    near, far = feed(of, max_delta=2 * CHUNK_BYTES), feed(of, max_delta=2 * CHUNK_BYTES)
    await follow(near, START, wal.end)
    before = wal.reads
    chunk = await far.next(START, wal.end)  # still kept, but too far away
    assert chunk is not None and wal.reads == before + 1 and of.count == 2
    assert ends_of([chunk, *await follow(far, chunk.batch.next_lsn, wal.end)]) == wal.ends
    assert of.count == 1
    near.close()
    far.close()


async def test_a_failure_reaches_all_who_wait_and_nobody_after(seed: int) -> None:
    wal = Wal(seed).grow(100)
    of = readers(wal)
    everyone = [feed(of) for _ in range(3)]
    wal.failure = OSError("no disk")
    answers = await asyncio.gather(*(chunks.next(START, wal.end) for chunks in everyone), return_exceptions=True)
    assert all(isinstance(answer, OSError) for answer in answers)
    wal.failure = None
    for chunks in everyone:
        assert ends_of(await follow(chunks, START, wal.end)) == wal.ends
        chunks.close()


async def test_who_may_read_more_is_not_told_that_there_is_nothing(seed: int) -> None:
    """The first reader's end is in the middle of a record, the second one's behind it."""
    wal = Wal(seed).grow(10)
    of = readers(wal)
    first, second, third = feed(of), feed(of), feed(of)
    wal.gate.clear()
    short = asyncio.create_task(first.next(START, Lsn(START + 50)))
    await asyncio.sleep(0)
    others = [asyncio.create_task(second.next(START, wal.end)), asyncio.create_task(third.next(START, Lsn(START + 49)))]
    await asyncio.sleep(0)
    wal.gate.set()
    assert await short is None
    whole, nothing = await asyncio.gather(*others)
    assert whole is not None and ends_of([whole]) == wal.ends
    assert nothing is None
    for chunks in (first, second, third):
        chunks.close()
    assert of.count == wal.open_files == 0


async def test_the_first_may_leave_while_others_wait(seed: int) -> None:
    wal = Wal(seed).grow(40)
    of = readers(wal)
    leader, other = feed(of), feed(of)
    wal.gate.clear()
    leading = asyncio.create_task(leader.next(START, wal.end))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(other.next(START, wal.end))
    await asyncio.sleep(0)
    leading.cancel()
    await asyncio.wait({leading})
    leader.close()
    wal.gate.set()
    chunk = await waiting
    assert chunk is not None and ends_of([chunk]) == wal.ends
    wal.gate.clear()
    wal.grow(10)
    last = asyncio.create_task(other.next(chunk.batch.next_lsn, wal.end))
    await asyncio.sleep(0)
    last.cancel()
    await asyncio.wait({last})
    other.close()  # with the work still going on: what is being read stays open
    assert of.count == wal.open_files == 1
    wal.gate.set()
    assert other._work is not None
    await other._work
    assert of.count == wal.open_files == 0


async def test_wal_that_makes_no_sense(seed: int) -> None:
    wal = Wal(seed).grow(100)
    at = wal.ends[49] - START + 40
    wal.data[at : at + 8] = bytes(byte ^ 0xFF for byte in wal.data[at : at + 8])
    chunks = feed(readers(wal), fanout=False)
    with pytest.raises(NeonError, match=r"WAL from 0/3000000 on cannot be interpreted: "):
        await chunks.next(START, wal.end)
    chunks.close()

"""A safekeeper's append against two floors of the same run: C programs that write and fdatasync the same bytes.

The *floor* has the bytes in memory and the batches given; so has the safekeeper's storage, when it is measured alone: it checks
every record besides. With *new files* the floor opens an empty file for each segment when it comes to it, within the measured
time, in which the safekeeper's storage makes its segments, too; with *ready files* somebody has filled them with zeros before
the time begins: no log that goes on can have that, and it is what the disk is able to do. The *C server* has ready files, gets
the bytes through a socket and acknowledges them, as a safekeeper must, but checks nothing.

Run: ``python -m tests.benchmarks.bench_safekeeper [--megabytes 64] [--pairs 5]``. *One at a time*: a proposer sends a batch and
waits for its acknowledgement, so the time includes both ways through the socket. *Stream*: the proposer never waits, and the
batches are those that the safekeeper itself formed while its disk worked. In both rows without a proposer that waits the first
segment is there when the time begins: a new timeline's first append makes it, once. Then what 1,000 idle timelines cost.
"""

import argparse
import asyncio
import bisect
import contextlib
import os
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn, format_lsn
from neon_services.protocols.safekeeper_messages import (
    MAX_APPEND_BYTES,
    AppendResponse,
    MembershipConfiguration,
    SafekeeperId,
    pack_append_header,
    parse_acceptor_message,
)
from neon_services.safekeeper.wal_store import WalStore
from tests.benchmarks.c_chain import compile_c
from tests.benchmarks.table import row
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Node, ScriptedProposer, new_ttid, running_fleet
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

START = Lsn(WAL_SEGMENT_SIZE * 2)
ONE_AT_A_TIME = (1 << 10, 8 << 10, 64 << 10, 128 << 10, 1 << 20)
MOST_BATCHES = 2000
IDLE_TIMELINES = 1000
IDLE_SECONDS = 10.0


class Floor:
    """The C program without a socket."""

    def __init__(self, base: Path, wal: Path) -> None:
        self.base, self._wal = base, wal
        self._program = base / "append_floor"
        compile_c("append_floor", self._program)

    def seconds(self, batches: list[int], files: str) -> float:
        """The time that these batches take, with ``ready`` or ``new`` files."""
        with tempfile.TemporaryDirectory(dir=self.base) as directory:
            argv = [self._program, files, directory, self._wal, str(WAL_SEGMENT_SIZE)]
            text = "\n".join(map(str, batches))
            return float(subprocess.run(argv, input=text, capture_output=True, text=True, check=True).stdout)


class CServer:
    """The C program behind a socket; one connection each."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._program = base / "append_server"
        compile_c("append_server", self._program)

    @contextlib.contextmanager
    def leader(self, wal: WalMaker) -> Iterator["Leader"]:
        """A connection that takes a proposer's appends."""
        segments = len(wal.data) // WAL_SEGMENT_SIZE + 1
        with tempfile.TemporaryDirectory(dir=self._base) as directory:
            argv = [str(self._program), directory, str(int(START)), str(WAL_SEGMENT_SIZE), str(segments)]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                with socket.create_connection(("127.0.0.1", int(server.stdout.readline()))) as link:
                    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    yield Leader(wal, 1, 1, link, bytearray())


@dataclass
class Leader:
    """An elected proposer on one blocking socket: nothing of an event loop in the measured time."""

    wal: WalMaker
    term: int
    generation: int
    link: socket.socket
    buffer: bytearray

    @classmethod
    async def elect(cls, node: Node, wal: WalMaker) -> "Leader":
        """Make a timeline on the node and lead it."""
        ttid = new_ttid()
        mconf = MembershipConfiguration(1, (SafekeeperId(node.id, "127.0.0.1", node.pg_port),))
        create_timeline(node, ttid, mconf)
        proposer = ScriptedProposer(ttid, START, b"", PG_VERSION, SYSTEM_ID, generation=1, mconf=mconf)
        await proposer.elect([node])
        transport = proposer.members[0].client.transport
        assert transport is not None
        transport.pause_reading()
        link = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        link.setblocking(True)
        return cls(wal, proposer.term, 1, link, bytearray())

    def message(self, begin: int, end: int) -> bytes:
        """The appends of one batch."""
        parts = []
        while begin < end:
            until = min(end, begin + MAX_APPEND_BYTES)
            header = pack_append_header(self.generation, self.term, Lsn(begin), Lsn(until), START, START)
            data = self.wal.slice(begin, until)
            parts += [b"d", (4 + len(header) + len(data)).to_bytes(4, "big"), header, data]
            begin = until
        return b"".join(parts)

    def acknowledged(self) -> Lsn:
        """Wait for the next acknowledgement."""
        while True:
            if len(self.buffer) >= 5:
                length = 1 + int.from_bytes(self.buffer[1:5], "big")
                if len(self.buffer) >= length:
                    kind, body = self.buffer[:1], bytes(self.buffer[5:length])
                    del self.buffer[:length]
                    answer = parse_acceptor_message(memoryview(body)) if kind == b"d" else None
                    if not isinstance(answer, AppendResponse):
                        raise RuntimeError(f"unexpected {kind!r} from the safekeeper: {body[:200]!r}")
                    return answer.flush_lsn
            data = self.link.recv(65536)
            if not data:
                raise ConnectionResetError("the safekeeper closed the connection")
            self.buffer += data


def create_timeline(node: Node, ttid, mconf: MembershipConfiguration) -> None:  # type: ignore[no-untyped-def]
    """A timeline that begins at START."""
    body = {
        "tenant_id": str(ttid.tenant_id),
        "timeline_id": str(ttid.timeline_id),
        "mconf": mconf.to_json(),
        "pg_version": PG_VERSION,
        "system_id": SYSTEM_ID,
        "start_lsn": format_lsn(START),
    }
    http("POST", node.url("/v1/tenant/timeline"), body)


def batches_of(wal: WalMaker, size: int) -> list[int]:
    """Ends of batches of about this size; each ends with a record, so that each can be acknowledged whole."""
    ends: list[int] = []
    position: int = START
    while len(ends) < MOST_BATCHES:
        index = bisect.bisect_left(wal.record_ends, position + size)
        if index == len(wal.record_ends):
            break
        position = wal.record_ends[index]
        ends.append(position)
    return ends


def in_storage(base: Path, wal: WalMaker, ends: list[int]) -> float:
    """Seconds that the safekeeper's storage takes for the batches, in this process, without socket and consensus."""
    views = [memoryview(wal.slice(begin, end)) for begin, end in zip([START, *ends], ends, strict=False)]
    with tempfile.TemporaryDirectory(dir=base) as directory:
        store = WalStore(Path(directory), WAL_SEGMENT_SIZE)
        store.initialize(START, pg_version=PG_VERSION, system_id=SYSTEM_ID)
        store.truncate(START, pg_version=PG_VERSION, system_id=SYSTEM_ID)
        append(store, views[0])  # makes the first segment; the floor has it, too, when the time begins
        begun = time.perf_counter()
        for view in views[1:]:
            append(store, view)
        seconds = time.perf_counter() - begun
        store.close()
    return seconds * len(views) / (len(views) - 1)


def append(store: WalStore, batch: memoryview) -> None:
    """One batch, in pieces as a proposer sends them, durable at the end."""
    for at in range(0, len(batch), MAX_APPEND_BYTES):
        store.write(store.write_lsn, batch[at : at + MAX_APPEND_BYTES])
    if store.flush() != store.write_lsn:
        raise RuntimeError("the batch does not end with a record")


def one_at_a_time(leader: Leader, ends: list[int]) -> float:
    """Seconds to have every batch acknowledged before the next is sent."""
    messages = [leader.message(begin, end) for begin, end in zip([START, *ends], ends, strict=False)]
    begun = time.perf_counter()
    for message, end in zip(messages, ends, strict=True):
        leader.link.sendall(message)
        while leader.acknowledged() < end:
            pass
    return time.perf_counter() - begun


def stream(leader: Leader) -> tuple[float, list[int]]:
    """(seconds to have everything acknowledged, sizes of the batches that the safekeeper made).

    One append comes before: it makes the first segment.
    """
    ends = leader.wal.record_ends
    position, end = ends[bisect.bisect(ends, START + MAX_APPEND_BYTES) - 1], ends[-1]
    leader.link.sendall(leader.message(START, position))
    while leader.acknowledged() < position:
        pass
    message = leader.message(position, end)
    sender = threading.Thread(target=leader.link.sendall, args=(message,))
    sizes: list[int] = []
    begun = time.perf_counter()
    sender.start()
    while position < end:
        flushed = leader.acknowledged()
        if flushed > position:
            sizes.append(flushed - position)
            position = flushed
    seconds = time.perf_counter() - begun
    sender.join()
    return seconds, sizes


def idle_timelines(node: Node) -> None:
    """Memory and CPU of a safekeeper with many timelines that nobody uses."""
    assert node.popen is not None
    mconf = MembershipConfiguration(1, (SafekeeperId(node.id, "127.0.0.1", node.pg_port),))
    before = resident_mib(node.popen.pid)
    start = format_lsn(START)
    known = dict.fromkeys(("commit_lsn", "backup_lsn", "remote_consistent_lsn", "peer_horizon_lsn"), start)
    for _ in range(IDLE_TIMELINES):
        ttid = new_ttid()
        create_timeline(node, ttid, mconf)
        # a pageserver has everything: the timeline is silent
        http("POST", node.url(f"/v1/record_safekeeper_info/{ttid.tenant_id}/{ttid.timeline_id}"), known)
    memory = resident_mib(node.popen.pid)
    cpu = cpu_seconds(node.popen.pid)
    threading.Event().wait(IDLE_SECONDS)
    share = (cpu_seconds(node.popen.pid) - cpu) / IDLE_SECONDS * 100
    figure = f"{(memory - before) * 1024 / IDLE_TIMELINES:.0f} KiB each ({memory:.0f} MiB in all), {share:.1f} % CPU"
    row(f"{IDLE_TIMELINES} idle timelines on one safekeeper", figure, "(stated)")


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(node: Node, wal: WalMaker, floor: Floor, server: CServer, pairs: int) -> None:
    """The rows about appends."""
    for size in ONE_AT_A_TIME:
        ends = batches_of(wal, size)
        sizes = [end - begin for begin, end in zip([START, *ends], ends, strict=False)]
        stored, ours, served, base, ready = [], [], [], [], []
        for _ in range(pairs):
            stored.append(in_storage(floor.base, wal, ends))
            base.append(floor.seconds(sizes, "new"))
            ready.append(floor.seconds(sizes, "ready"))
            ours.append(one_at_a_time(await Leader.elect(node, wal), ends))
            with server.leader(wal) as leader:
                served.append(one_at_a_time(leader, ends))
        each = {
            name: statistics.median(values) / len(ends) * 1e6
            for name, values in (("stored", stored), ("base", base), ("ready", ready), ("ours", ours), ("served", served))
        }
        what = f"append {size >> 10} KiB in the safekeeper's storage / C write + fdatasync, new files"
        figure = f"{median_ratio(stored, base):.2f}  ({each['stored']:.0f} / {each['base']:.0f} us)"
        row(what, f"{figure}, / ready files {median_ratio(stored, ready):.2f} ({each['ready']:.0f} us)", "<= 1.3")
        what = f"append and acknowledge {size >> 10} KiB through the socket / C server"
        figure = f"{median_ratio(ours, served):.2f}  ({each['ours']:.0f} / {each['served']:.0f} us)"
        row(what, f"{figure}, / C without socket {median_ratio(ours, base):.2f}", "(stated)")
    ours, served, base, ready, counts = [], [], [], [], []
    for _ in range(pairs):
        seconds, sizes = stream(await Leader.elect(node, wal))
        ours.append(seconds)
        with server.leader(wal) as leader:
            served.append(stream(leader)[0])
        base.append(floor.seconds(sizes, "new"))
        ready.append(floor.seconds(sizes, "ready"))
        counts.append(len(sizes))
    speed = [len(wal.data) / (1 << 20) / statistics.median(values) for values in (ours, base)]
    what = f"append, a stream ({statistics.median(counts):.0f} batches) / C write + fdatasync, new files"
    figure = (
        f"{median_ratio(ours, base):.2f}  ({speed[0]:.0f} / {speed[1]:.0f} MB/s), / ready files {median_ratio(ours, ready):.2f}"
    )
    row(what, f"{figure}, / C server {median_ratio(ours, served):.2f}", "<= 1.3")


def median_ratio(ours: list[float], base: list[float]) -> float:
    """Of the paired runs."""
    return statistics.median(a / b for a, b in zip(ours, base, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_safekeeper", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64, help="WAL of the longest runs (default 64)")
    parser.add_argument("--pairs", type=int, default=5, help="paired runs per row (default 5)")
    options = parser.parse_args()
    wal = WalMaker(START, WAL_SEGMENT_SIZE).until(START + (options.megabytes << 20), largest=400)
    with tempfile.TemporaryDirectory(prefix="neon-bench-safekeeper-") as text:
        base = Path(text)
        (base / "wal").write_bytes(wal.data)
        floor = Floor(base, base / "wal")
        with running_fleet(base, 1) as fleet:
            asyncio.run(measure(fleet.nodes[0], wal, floor, CServer(base), options.pairs))
            idle_timelines(fleet.nodes[0])


if __name__ == "__main__":
    main()

"""The event loop that runs lanes is asyncio's in everything else; and its compiled half fits its Python half."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from neon_services.ground.errors import ConfigError
from neon_services.protocols import lanes, pgclient
from neon_services.protocols.lanes import CProposerLane, CProposerMember, Lane, LaneEventLoop, function_address, library
from neon_services.protocols.pgframe import FrameConnection
from tests.credentials import Authority
from tests.waiting import eventually


def run(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LaneEventLoop) as runner:
        runner.run(scenario)


class Acknowledgements(Lane):
    """A member's lane without a proposer to speak of: it takes acknowledgements of a term, and leaves all else."""

    def __init__(self) -> None:
        super().__init__(CProposerMember())
        self.proposer = CProposerLane()
        self.proposer.member[0], self.proposer.members = self.address, 1
        self.c.proposer, self.c.active = ctypes.addressof(self.proposer), 1
        self.base.readable = function_address(library().proposer_lane_member_readable)
        self.settled = self.attended = 0

    def settle(self) -> bool:
        self.settled += 1
        return bool(self.base.leaves)

    def attend(self) -> None:
        self.attended += 1
        self.hand_over()


def acknowledgement(persisted: int) -> bytes:
    return b"d" + (57).to_bytes(4, "big") + b"a" + bytes(12 + 8) + persisted.to_bytes(8, "big") + bytes(24)


class Served:
    """A connection with a lane, and the other end of its socket."""

    async def connect(self) -> "Served":
        self.loop = asyncio.get_running_loop()
        self.theirs, ours = socket.socketpair()
        self.theirs.setblocking(False)
        _, self.client = await self.loop.create_connection(pgclient.PgClient, sock=ours)
        self.left: list[bytes] = []
        self.client.copy_sink = lambda body: self.left.append(bytes(body))
        self.lane = Acknowledgements()
        assert self.lane.attach(self.client)
        self.lane.base.open = 1
        return self

    async def close(self) -> None:
        self.lane.detach()
        self.client.abort()
        await self.client.lost
        self.theirs.close()


def test_a_lane_takes_what_it_knows_and_leaves_the_rest_in_order() -> None:
    async def scenario() -> None:
        served = await Served().connect()
        other = b"d\0\0\0\x08ping"
        await served.loop.sock_sendall(served.theirs, acknowledgement(5) + acknowledgement(6) + other + acknowledgement(7))
        await eventually(lambda: len(served.left) == 2, "what the lane left")
        assert served.lane.c.persisted_commit_lsn == 6
        assert served.left == [b"ping", acknowledgement(7)[5:]], "what follows is left as well"
        assert not served.lane.base.open
        served.lane.base.open = 1
        await served.loop.sock_sendall(served.theirs, acknowledgement(8))
        await eventually(lambda: served.lane.c.persisted_commit_lsn == 8, "the lane to be open again")
        await served.close()

    run(scenario())


def test_parts_of_messages_survive_that_the_lane_is_shut() -> None:
    async def scenario() -> None:
        served = await Served().connect()
        message = acknowledgement(9)
        for cut in range(1, len(message)):
            served.lane.base.open = 1
            await served.loop.sock_sendall(served.theirs, message[:cut])
            await asyncio.sleep(0)
            served.lane.shut()
            await served.loop.sock_sendall(served.theirs, message[cut:])
            await eventually(lambda cut=cut: len(served.left) == cut, "the whole message", interval=0)
        assert set(served.left) == {message[5:]}
        await served.close()

    run(scenario())


def test_nothing_is_taken_while_python_has_bytes_to_send() -> None:
    async def scenario() -> None:
        served = await Served().connect()
        served.client.write(bytes(8 << 20))
        await served.loop.sock_sendall(served.theirs, acknowledgement(5))
        await eventually(lambda: served.left == [acknowledgement(5)[5:]], "Python to take it")
        assert served.lane.c.persisted_commit_lsn == 0
        await served.close()

    run(scenario())


def test_the_peer_goes_while_a_part_of_a_message_is_here() -> None:
    async def scenario() -> None:
        served = await Served().connect()
        await served.loop.sock_sendall(served.theirs, acknowledgement(5) + acknowledgement(6)[:20])
        served.theirs.shutdown(socket.SHUT_WR)
        await asyncio.wait_for(asyncio.shield(served.client.lost), 10)
        assert served.lane.c.persisted_commit_lsn == 5
        await served.close()

    run(scenario())


def test_timers_threads_signals_and_processes_go_on() -> None:
    async def scenario() -> None:
        served = await Served().connect()
        loop, seen = asyncio.get_running_loop(), list[str]()
        started = time.monotonic()
        await asyncio.sleep(0.05)
        assert time.monotonic() - started > 0.045
        loop.add_signal_handler(signal.SIGUSR1, seen.append, "signal")
        threading.Timer(0.02, lambda: loop.call_soon_threadsafe(seen.append, "thread")).start()
        threading.Timer(0.04, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        await eventually(lambda: sorted(seen) == ["signal", "thread"], "both to arrive")
        process = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
        assert (await process.communicate(b"x" * 300_000))[0] == b"x" * 300_000
        await served.close()

    run(scenario())


def test_many_lanes_and_descriptors_that_are_used_again() -> None:
    async def scenario() -> None:
        for _ in range(3):
            all_served = [await Served().connect() for _ in range(80)]
            for number, served in enumerate(all_served):
                await served.loop.sock_sendall(served.theirs, acknowledgement(number + 1))
            for number, served in enumerate(all_served):
                c = served.lane.c
                await eventually(lambda c=c, number=number: c.persisted_commit_lsn == number + 1, "each of them")
            for served in all_served:
                await served.close()
        with pytest.raises(OSError, match="has a lane"):
            served = await Served().connect()
            Acknowledgements().attach(served.client)
        await served.close()

    run(scenario())


def test_where_there_are_no_lanes() -> None:
    async def scenario() -> None:
        theirs, ours = socket.socketpair()
        _, client = await asyncio.get_running_loop().create_connection(pgclient.PgClient, sock=ours)
        assert not Acknowledgements().attach(client)
        client.abort()
        theirs.close()

    asyncio.run(scenario())


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Larger(ctypes.Structure):
        _fields_ = [("lane", lanes.CLane), ("more", ctypes.c_uint64)]

    monkeypatch.setattr(lanes, "CAppendLane", Larger)
    monkeypatch.setattr(lanes, "_bind", lanes._bind.__wrapped__)  # nothing is remembered
    with pytest.raises(ConfigError, match="another version"):
        library()
    loop = lanes.make_event_loop()
    assert not isinstance(loop, LaneEventLoop), "everything goes the long way"
    loop.close()


def test_timers_come_while_lanes_are_busy() -> None:
    """Even when there is always something that a lane takes."""
    calls = 0

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def take_nothing(_: int) -> int:
        nonlocal calls
        calls += 1
        return calls > 200_000  # what was left is Python's, after a long time

    async def scenario() -> None:
        served = await Served().connect()
        served.lane.base.readable = function_address(take_nothing)
        await served.loop.sock_sendall(served.theirs, b"d")
        await asyncio.sleep(0.02)
        assert 100 < calls < 200_000
        served.lane.shut()
        await served.close()

    run(scenario())


@pytest.mark.parametrize("selector", [True, False], ids=["lanes", "uvloop"])
def test_a_tls_connection_that_its_peer_has_ended_can_be_closed_and_aborted(tmp_path: Path, selector: bool) -> None:
    """Also with bytes queued that the peer does not read; afterwards it still knows who the peer was."""
    Authority(tmp_path).install(tmp_path)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        served: list[FrameConnection] = []

        def make() -> FrameConnection:
            served.append(FrameConnection())
            return served[0]

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
        server = await loop.create_server(make, "127.0.0.1", 0, ssl=context)
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        raw = socket.create_connection(server.sockets[0].getsockname())
        client = await loop.run_in_executor(None, lambda: trusting.wrap_socket(raw))
        await eventually(lambda: served and served[0].transport is not None, "the connection")
        connection = served[0]
        connection.write(bytes(32 << 20))
        client.setblocking(False)
        with contextlib.suppress(ssl.SSLError, BlockingIOError):
            client.unwrap()  # sends close_notify
        transport = connection.transport
        await eventually(lambda: not selector or (transport is not None and transport.is_closing()), "the peer's word")
        connection.close()
        assert connection.peer
        connection.abort()
        client.close()
        await asyncio.wait_for(asyncio.shield(connection.lost), 10)
        server.close()

    with asyncio.Runner(loop_factory=LaneEventLoop if selector else uvloop.new_event_loop) as runner:
        runner.run(scenario())

"""A cable between two services on loopback that a test can cut, stall one way or both ways, and heal.

The proxy runs its own event loop in a thread. ``cut`` ends every connection and refuses new ones; ``stall`` keeps connections
open and delivers nothing in the chosen direction, which is what a lost route looks like to both ends until they time out.
"""

import asyncio
import contextlib
import enum
import threading
from collections.abc import Coroutine
from typing import Any

from tests.integration.cluster import free_port

_CHUNK = 65536


class Way(enum.Flag):
    """Directions of the traffic, seen from the client that connects to the proxy."""

    TO_SERVER = enum.auto()
    TO_CLIENT = enum.auto()
    BOTH = TO_SERVER | TO_CLIENT


class LinkProxy:
    """Listens on ``port`` and forwards to ``target_port`` on loopback."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut = False
        self._passing = {Way.TO_SERVER: asyncio.Event(), Way.TO_CLIENT: asyncio.Event()}
        for event in self._passing.values():
            event.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy to {target_port}", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", self.port))

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    # -- weather

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        self._call(self._set_cut())

    async def _set_cut(self) -> None:
        self._cut = True
        for writer in list(self._open):
            writer.transport.abort()

    def stall(self, way: Way) -> None:
        """Deliver nothing in this direction from now on."""
        self._call(self._set_stalled(way))

    async def _set_stalled(self, way: Way) -> None:
        for direction, event in self._passing.items():
            if direction in way:
                event.clear()

    def heal(self) -> None:
        """Everything passes again; what was stalled is delivered."""
        self._call(self._set_healed())

    async def _set_healed(self) -> None:
        self._cut = False
        for event in self._passing.values():
            event.set()

    def close(self) -> None:
        """End the proxy."""
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        await self._set_cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- traffic

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._open.add(to_client)
        to_server: asyncio.StreamWriter | None = None
        try:
            if self._cut:
                return
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._open.add(to_server)
            if self._cut:
                return
            await asyncio.gather(
                self._carry(from_client, to_server, Way.TO_SERVER), self._carry(from_server, to_client, Way.TO_CLIENT)
            )
        except (OSError, asyncio.IncompleteReadError):
            pass  # one side is gone: the other learns it below
        finally:
            for writer in (to_client, to_server):
                if writer is not None:
                    self._open.discard(writer)
                    writer.transport.abort()

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, way: Way) -> None:
        while data := await source.read(_CHUNK):
            await self._passing[way].wait()
            if self._cut:
                return
            target.write(data)
            await target.drain()
        await self._passing[way].wait()
        raise ConnectionResetError("one side closed the connection")


@contextlib.contextmanager
def proxies(ports: list[int]) -> Any:
    """One proxy for each port, closed at the end."""
    made: list[LinkProxy] = []
    try:
        for port in ports:
            made.append(LinkProxy(port))
        yield made
    finally:
        for proxy in made:
            proxy.close()

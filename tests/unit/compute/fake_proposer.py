"""A walproposer without safekeepers, for tests of compute_ctl: it speaks the JSON lines and acknowledges whatever it gets.

The environment steers it: ``FAKE_READY_LSN`` is the LSN it says it is ready at, ``FAKE_FATAL_FILE`` a file whose appearance
makes it say ``fatal`` with the file's text, ``FAKE_SILENT`` keeps it from ever getting ready.
"""

import asyncio
import json
import os
import struct
import sys
from pathlib import Path

from neon_services.ground.lsn import format_lsn, parse_lsn
from neon_services.protocols import pgclient, pgwire


def emit(**event: object) -> None:
    """Write one event."""
    print(json.dumps(event), flush=True)


class Fake:
    """The one session."""

    def __init__(self) -> None:
        self.end_lsn = 0
        self.done = asyncio.Event()

    async def attach(self, command: dict[str, object]) -> None:
        """Stream and acknowledge until Postgres ends."""
        parameters = {"user": str(command["user"]), "replication": "true", "application_name": "walproposer"}
        client = await pgclient.connect(str(command["host"]), int(str(command["port"])), parameters=parameters)
        try:
            await client.query('CREATE_REPLICATION_SLOT "wal_proposer_slot" PHYSICAL RESERVE_WAL')
        except pgwire.ServerError as error:
            assert error.sqlstate == "42710", error
        await client.start_copy_both(f'START_REPLICATION SLOT "wal_proposer_slot" PHYSICAL {command["start_lsn"]}')
        emit(event="attached")
        while (queued := await client.next_message()) is not None and queued[0] == ord(
            "d"
        ):  # Postgres ends with CommandComplete
            message = queued[1]
            if message[:1] == b"w":
                (start,) = struct.unpack_from("!Q", message, 1)
                self.end_lsn = start + len(message) - 25
                emit(event="commit", lsn=format_lsn(self.end_lsn))
            client.send_copy_data(struct.pack("!cQQQqB", b"r", self.end_lsn, self.end_lsn, self.end_lsn, 0, 0))
        self.done.set()


async def watch_fatal() -> None:
    """Say fatal when told to."""
    path = os.environ.get("FAKE_FATAL_FILE")
    while path:
        if Path(path).exists():
            emit(event="fatal", reason=Path(path).read_text().strip(), retry=False)
            os._exit(1)
        await asyncio.sleep(0.02)


async def main() -> None:
    """Obey the parent."""
    fake = Fake()
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = [loop.create_task(watch_fatal())]
    if "FAKE_SILENT" not in os.environ:
        lsn = os.environ["FAKE_READY_LSN"]
        fake.end_lsn = parse_lsn(lsn)
        emit(event="elected", term=1, start_lsn=lsn)
        emit(event="ready", lsn=lsn)
    while line := await reader.readline():
        command = json.loads(line)
        if command["command"] == "attach":
            tasks.append(loop.create_task(fake.attach(command)))
        elif command["command"] == "stop":
            try:
                await asyncio.wait_for(fake.done.wait(), 5)
            except TimeoutError:
                pass
            emit(event="stopped", lsn=format_lsn(fake.end_lsn))
            return


if __name__ == "__main__":
    asyncio.run(main())

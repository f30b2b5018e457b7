"""CopyData that arrives together with the server's consent to COPY BOTH reaches the sink, in order."""

from neon_services.protocols import pgclient, pgwire
from neon_services.protocols.pgserver import PgServer, ServerConnection


class Eager:
    """Sends data in the same write as CopyBothResponse, and more afterwards."""

    async def startup(self, message: pgwire.StartupMessage) -> None:
        pass

    def connection_lost(self) -> None:
        pass

    async def query(self, connection: ServerConnection, sql: str) -> None:
        connection.write(pgwire.COPY_BOTH_RESPONSE + b"".join(pgwire.copy_data(b"%d" % i) for i in range(5)))
        await connection.next_copy_data()
        connection.write(b"".join(pgwire.copy_data(b"%d" % i) for i in range(5, 8)) + pgwire.command_complete("COPY 0"))


async def test_early_data_is_not_lost() -> None:
    server = PgServer(lambda _: Eager())
    await server.start("127.0.0.1", 0)
    try:
        client = await pgclient.connect("127.0.0.1", server.port)
        await client.start_copy_both("stream")
        got: list[bytes] = []
        ends: list[int] = []
        client.copy_sink, client.copy_batch_end = lambda view: got.append(bytes(view)), lambda: ends.append(len(got))
        assert not got or ends[-1] == len(got), "early data is a whole batch"
        client.send_copy_data(b"more")
        assert await client.next_copy_data() is None, "a walsender's end"
        assert got == [b"%d" % i for i in range(8)]
        client.close()
    finally:
        await server.stop()

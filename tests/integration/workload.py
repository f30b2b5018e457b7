"""A client that keeps its own log of acknowledgements, and checks of pgbench's invariants."""

import threading
import time
from typing import Any

import psycopg

from tests.integration.cluster import Compute


class AcknowledgedWriter:
    """Inserts numbered rows, one transaction each, and remembers which commits the server acknowledged.

    The invariant it lets a test check: every acknowledged number is in the table afterwards. A number whose commit was not
    acknowledged may or may not be there. ``errors`` collects what the client saw; a test that promises "no error at the
    client" asserts that it is empty.
    """

    def __init__(self, compute: Compute, table: str = "acknowledged") -> None:
        self._compute = compute
        self._table = table
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.acknowledged: list[int] = []
        self.last_acknowledged_at = time.monotonic()
        self.longest_wait_s = 0.0
        self.errors: list[str] = []

    def prepare(self) -> None:
        """Create the table."""
        self._compute.query(f"create table if not exists {self._table} (n bigint primary key, filler text)")

    def start(self) -> None:
        """Start writing in a thread."""
        self._thread.start()

    def _run(self) -> None:
        number = 0
        try:
            with self._compute.connect() as connection:
                while not self._stop.is_set():
                    number += 1
                    begun = time.monotonic()
                    connection.execute(f"insert into {self._table} values (%s, repeat('x', 100))", (number,))
                    self.last_acknowledged_at = time.monotonic()
                    self.longest_wait_s = max(self.longest_wait_s, self.last_acknowledged_at - begun)
                    self.acknowledged.append(number)
        except psycopg.Error as error:
            self.errors.append(str(error))

    def stop(self, timeout: float = 60.0) -> None:
        """Stop after the commit in progress."""
        self._stop.set()
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the writer is stuck in a commit"

    def join_after_crash(self, timeout: float = 30.0) -> None:
        """The server was killed: the thread ends by its error."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the writer did not notice that the server is gone"

    def lost(self) -> list[int]:
        """Acknowledged numbers that are not in the table: must be empty."""
        there = {row[0] for row in self._compute.query(f"select n from {self._table}")}
        return [number for number in self.acknowledged if number not in there]


def check_pgbench_invariants(compute: Compute) -> dict[str, Any]:
    """TPC-B's invariant: the balances of accounts, tellers and branches each equal the sum of the history's deltas."""
    (row,) = compute.query(
        "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers),"
        " (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history),"
        " (select count(*) from pgbench_history), (select count(*) from pgbench_accounts)"
    )
    accounts, tellers, branches, history, transactions, rows = row
    assert accounts == tellers == branches == history, f"balances differ: {row}"
    return {"transactions": transactions, "accounts": rows}

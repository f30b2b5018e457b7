"""Two workloads with recorded histories, and the judges that say whether a history is possible.

*Bank*: transfers between accounts, each with a row of its own in a journal. Money is never made or lost, every acknowledged
transfer is in the journal, and the balances are what the journal says.

*List-append*: every operation appends a number of its own to the list of a key and gets the whole list back. The final list of
a key holds every acknowledged number once; what any operation saw is a prefix of it; and a number that was acknowledged before
another was begun stands before it.

An operation whose commit was sent and not answered may or may not have happened; one that failed before its commit must not.
"""

import enum
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

ACCOUNTS = 12
OPENING_BALANCE = 1000
KEYS = 4
LIST_LENGTH = 150  # then the key is left alone and another begins


class Outcome(enum.Enum):
    """What the client knows."""

    ACKNOWLEDGED = enum.auto()
    UNKNOWN = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class Transfer:
    """One attempted transfer."""

    number: int
    source: int
    target: int
    amount: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Append:
    """One attempted append: ``seen`` is the list that came back."""

    key: int
    number: int
    begun_s: float
    ended_s: float
    outcome: Outcome
    seen: tuple[int, ...] = ()


@dataclass
class History:
    """What all clients did. Lists only grow, each append is atomic."""

    #: Operations acknowledged so far, without sums.
    acknowledged: int = 0
    transfers: list[Transfer] = field(default_factory=list)
    appends: list[Append] = field(default_factory=list)
    totals: list[int] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def record(self, operation: Transfer | Append) -> None:
        """Add what one client did."""
        with self._lock:
            self.acknowledged += operation.outcome is Outcome.ACKNOWLEDGED
            if isinstance(operation, Transfer):
                self.transfers.append(operation)
            else:
                self.appends.append(operation)


# --- judges


def judge_bank(
    transfers: Sequence[Transfer],
    totals: Sequence[int],
    journal: Mapping[int, tuple[int, int, int]],
    balances: Mapping[int, int],
) -> list[str]:
    """What is impossible about this history; nothing when it is fine. ``journal``: number -> (source, target, amount)."""
    wrong = [f"a reader saw {total} in all accounts" for total in totals if total != ACCOUNTS * OPENING_BALANCE]
    attempted = {transfer.number: transfer for transfer in transfers}
    for transfer in transfers:
        if transfer.outcome is Outcome.ACKNOWLEDGED and transfer.number not in journal:
            wrong.append(f"transfer {transfer.number} was acknowledged and is lost")
        if transfer.outcome is Outcome.FAILED and transfer.number in journal:
            wrong.append(f"transfer {transfer.number} failed before its commit and is there")
    expected = dict.fromkeys(range(ACCOUNTS), OPENING_BALANCE)
    for number, (source, target, amount) in journal.items():
        attempt = attempted.get(number)
        if attempt is None or (attempt.source, attempt.target, attempt.amount) != (source, target, amount):
            wrong.append(f"transfer {number} in the journal is not what anybody did")
        expected[source] -= amount
        expected[target] += amount
    if expected != dict(balances):
        wrong.append(f"balances are {dict(balances)}, the journal says {expected}")
    return wrong


def judge_lists(appends: Sequence[Append], final: Mapping[int, Sequence[int]]) -> list[str]:
    """What is impossible about this history; nothing when it is fine."""
    wrong: list[str] = []
    by_key: dict[int, list[Append]] = {}
    for append in appends:
        by_key.setdefault(append.key, []).append(append)
    for key in sorted({*by_key, *final}):
        wrong += _judge_list(key, by_key.get(key, []), tuple(final.get(key, ())))
    return wrong


def _judge_list(key: int, appends: Sequence[Append], final: tuple[int, ...]) -> list[str]:
    wrong: list[str] = []
    place = {number: position for position, number in enumerate(final)}
    if len(place) != len(final):
        wrong.append(f"list {key} holds a number twice: {final}")
    attempted = {append.number: append for append in appends}
    wrong += [f"list {key} holds {number}, which nobody appended" for number in final if number not in attempted]
    done = [append for append in appends if append.outcome is Outcome.ACKNOWLEDGED]
    for append in done:
        if append.number not in place:
            wrong.append(f"list {key}: {append.number} was acknowledged and is lost")
        elif final[: len(append.seen)] != append.seen:
            wrong.append(f"list {key}: {append.number} saw {append.seen}, no prefix of {final}")
        elif not append.seen or append.seen[-1] != append.number:
            wrong.append(f"list {key}: {append.number} did not see itself at the end of {append.seen}")
    wrong += [
        f"list {key}: {append.number} failed before its commit and is there"
        for append in appends
        if append.outcome is Outcome.FAILED and append.number in place
    ]
    # real time: walking the list, nothing may begin after the end of something that comes later
    earliest_end = float("inf")
    for number in reversed(final):
        found = attempted.get(number)
        if found is None:
            continue
        if found.begun_s > earliest_end:
            wrong.append(f"list {key}: {number} stands before a number that was acknowledged before it was begun")
        if found.outcome is Outcome.ACKNOWLEDGED:
            earliest_end = min(earliest_end, found.ended_s)
    return wrong


# --- clients

_APPEND = """
insert into lists values (%s, array[%s]::bigint[]) on conflict (k) do update set v = lists.v || excluded.v returning v
"""


class Clients:
    """Threads that work until stopped, through lost connections and restarts of the server."""

    def __init__(
        self, connect: Callable[[], psycopg.Connection[Any]], seed: int, *, bankers: int = 3, appenders: int = 3
    ) -> None:
        self.history = History()
        self._connect = connect
        self._stop = threading.Event()
        self._numbers = iter(range(1, 1 << 62))
        self._lock = threading.Lock()
        kinds = [self._banker] * bankers + [self._appender] * appenders
        self._threads = [
            threading.Thread(target=self._run, args=(kind, random.Random(f"{seed} {index}")), daemon=True)
            for index, kind in enumerate(kinds)
        ]
        self.failure: BaseException | None = None

    def prepare(self) -> None:
        """Make the tables."""
        with self._connect() as connection:
            connection.execute("create table accounts (id int primary key, balance bigint not null)")
            connection.execute("create table journal (n bigint primary key, source int, target int, amount int)")
            connection.execute("create table lists (k int primary key, v bigint[] not null)")
            connection.execute(
                "insert into accounts select g, %s from generate_series(0, %s) g", (OPENING_BALANCE, ACCOUNTS - 1)
            )

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = 90.0) -> None:
        """End after the operations in progress. Raises what a client could not explain."""
        self._stop.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a client is stuck in an operation"
        if self.failure is not None:
            raise self.failure

    def _run(self, work: Callable[[psycopg.Connection[Any], random.Random], None], rng: random.Random) -> None:
        try:
            while not self._stop.is_set():
                try:
                    with self._connect() as connection:
                        while not self._stop.is_set():
                            work(connection, rng)
                except psycopg.Error as error:
                    self.history.errors[type(error).__name__] += 1
                    self._stop.wait(0.2)  # the server is away
        except BaseException as error:
            self.failure = error

    def _number(self) -> int:
        with self._lock:
            return next(self._numbers)

    def _banker(self, connection: psycopg.Connection[Any], rng: random.Random) -> None:
        if rng.random() < 0.1:
            row = connection.execute("select sum(balance) from accounts").fetchone()
            assert row is not None
            self.history.totals.append(int(row[0]))
            return
        number, amount = self._number(), rng.randint(1, 50)
        source, target = rng.sample(range(ACCOUNTS), 2)
        outcome = Outcome.FAILED
        try:
            connection.execute("begin")
            for account in sorted((source, target)):  # in one order, or two transfers wait for each other
                change = -amount if account == source else amount
                connection.execute("update accounts set balance = balance + %s where id = %s", (change, account))
            connection.execute("insert into journal values (%s, %s, %s, %s)", (number, source, target, amount))
            outcome = Outcome.UNKNOWN
            connection.execute("commit")
            outcome = Outcome.ACKNOWLEDGED
        finally:
            self.history.record(Transfer(number, source, target, amount, outcome))

    def _appender(self, connection: psycopg.Connection[Any], rng: random.Random) -> None:
        number = self._number()
        key = rng.randrange(KEYS) + KEYS * (number // (LIST_LENGTH * KEYS))
        begun_s, outcome, seen = time.monotonic(), Outcome.UNKNOWN, ()
        try:
            row = connection.execute(_APPEND, (key, number)).fetchone()
            assert row is not None
            outcome, seen = Outcome.ACKNOWLEDGED, tuple(row[0])
        finally:
            self.history.record(Append(key, number, begun_s, time.monotonic(), outcome, seen))

    # -- the end

    def verdict(self) -> list[str]:
        """Judge the history against what the database holds now."""
        with self._connect() as connection:
            journal = {row[0]: row[1:] for row in connection.execute("select n, source, target, amount from journal")}
            balances = dict(connection.execute("select id, balance from accounts").fetchall())
            final = dict(connection.execute("select k, v from lists").fetchall())
        history = self.history
        return judge_bank(history.transfers, history.totals, journal, balances) + judge_lists(history.appends, final)

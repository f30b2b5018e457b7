"""Real safekeepers under a stream of faults, and a judge of what the clients saw.

For NEON_TORTURE_SECONDS (default 40; `make test` says 600) three safekeepers on loopback are killed, stopped with SIGSTOP, and
cut off or stalled one way or both ways by a proxy, one at a time and two at a time; now and then the compute or the broker is
killed, too. Clients make transfers and append to lists throughout. Afterwards nothing that was acknowledged is lost, what was
seen stays true, and all safekeepers hold the same bytes. NEON_TORTURE_SEED repeats the faults of a run (their timing against
the load differs).
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.integration.cluster import Cluster, Compute, temporary_cluster, wait_until
from tests.integration.histories import Clients
from tests.integration.link_proxy import LinkProxy, Way, proxies

pytestmark = [pytest.mark.cluster, pytest.mark.postgres]

SECONDS = float(os.environ.get("NEON_TORTURE_SECONDS", "40"))
SEED = int(os.environ.get("NEON_TORTURE_SEED", random.randrange(1 << 32)))
#: After a fault is over, work must go on within this time: an election, a catch-up and a slow machine.
RECOVERY_S = 90.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with temporary_cluster("neon-torture-") as running:
        yield running


class Nemesis:
    """Breaks one thing after the other and mends it; every fault is over before the next begins."""

    def __init__(self, cluster: Cluster, compute: Compute, links: list[LinkProxy], rng: random.Random) -> None:
        self.cluster, self.compute, self.links, self.rng = cluster, compute, links, rng
        self.done: Counter[str] = Counter()
        self._pause = threading.Event()  # never set: a clock that can be waited for

    def step(self) -> str:
        """One fault from its beginning to its end; its name."""
        kinds: dict[Callable[[], None], float] = {
            self.kill_one: 5,
            self.kill_two: 2,
            self.stop_one: 4,
            self.stop_two: 1,
            self.cut_one: 4,
            self.stall_one: 4,
            self.stall_two: 1,
            self.kill_while_another_is_stalled: 2,
            self.kill_compute: 1.5,
            self.kill_broker: 0.5,
        }
        (kind,) = self.rng.choices(list(kinds), list(kinds.values()))
        kind()
        self.done[kind.__name__] += 1
        return kind.__name__

    def _wait(self, low_s: float, high_s: float) -> None:
        self._pause.wait(self.rng.uniform(low_s, high_s))

    def _some(self, count: int) -> list[int]:
        return self.rng.sample(range(len(self.links)), count)

    def _kill(self, numbers: list[int]) -> None:
        for number in numbers:
            self.cluster.safekeepers[number].process.kill()
            self._wait(0, 0.3)
        self._wait(0.1, 2.0)
        for number in numbers:
            self.cluster.safekeepers[number].process.start()

    def kill_one(self) -> None:
        self._kill(self._some(1))

    def kill_two(self) -> None:
        self._kill(self._some(2))

    def _stop(self, numbers: list[int]) -> None:
        for number in numbers:
            self.cluster.safekeepers[number].process.signal(signal.SIGSTOP)
        self._wait(0.2, 4.0)  # longer and shorter than the silence that a proposer bears
        for number in numbers:
            self.cluster.safekeepers[number].process.signal(signal.SIGCONT)

    def stop_one(self) -> None:
        self._stop(self._some(1))

    def stop_two(self) -> None:
        self._stop(self._some(2))

    def cut_one(self) -> None:
        (number,) = self._some(1)
        self.links[number].cut()
        self._wait(0.1, 2.0)
        self.links[number].heal()

    def _stall(self, numbers: list[int]) -> None:
        for number in numbers:
            self.links[number].stall(self.rng.choice([Way.TO_SERVER, Way.TO_CLIENT, Way.BOTH]))
        self._wait(0.2, 4.0)
        for number in numbers:
            self.links[number].heal()

    def stall_one(self) -> None:
        self._stall(self._some(1))

    def stall_two(self) -> None:
        self._stall(self._some(2))

    def kill_while_another_is_stalled(self) -> None:
        stalled, killed = self._some(2)
        self.links[stalled].stall(Way.BOTH)
        self._kill([killed])
        self.links[stalled].heal()

    def kill_compute(self) -> None:
        self.compute.kill_everything()
        self.compute.wipe()
        if self.rng.random() < 0.5:  # the election finds one of the voters away
            self._kill(self._some(1))
        self.compute.start()

    def kill_broker(self) -> None:
        self.cluster.broker.kill()
        self._wait(0.1, 2.0)
        self.cluster.broker.start()


def test_nothing_acknowledged_is_lost(cluster: Cluster) -> None:
    print(f"NEON_TORTURE_SEED={SEED} NEON_TORTURE_SECONDS={SECONDS:g}")
    rng = random.Random(SEED)
    with proxies([safekeeper.pg_port for safekeeper in cluster.safekeepers]) as links:
        timeouts = {"neon.safekeeper_connect_timeout": "2s", "neon.safekeeper_reconnect_timeout": "200"}
        compute = cluster.make_compute(
            safekeeper_ports=[link.port for link in links], max_connections="30", shared_buffers="32MB", **timeouts
        )
        compute.start()
        clients = Clients(compute.connect, SEED)
        clients.prepare()
        clients.start()
        nemesis = Nemesis(cluster, compute, links, rng)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            fault = nemesis.step()
            before = clients.history.acknowledged
            wait_until(
                lambda before=before: clients.failure or clients.history.acknowledged > before + 10,
                f"work to go on after {fault}",
                RECOVERY_S,
            )
            if clients.failure:
                break
        clients.stop()
        history = clients.history
        print(f"faults: {dict(nemesis.done)}; clients' errors: {dict(history.errors)}")
        outcomes = Counter(op.outcome.name for ops in (history.transfers, history.appends) for op in ops)
        print(
            f"{len(history.transfers)} transfers, {len(history.appends)} appends, {len(history.totals)} sums: {dict(outcomes)}"
        )
        assert clients.verdict() == []

        # and the same from storage alone
        compute.kill_everything()
        compute.wipe()
        compute.start()
        assert clients.verdict() == []
        assert compute.process.stop() == 0
        cluster.wait_same_wal()
    assert sum(nemesis.done.values()) > SECONDS / 15, "too little happened"
    assert history.acknowledged > 20 * sum(nemesis.done.values())

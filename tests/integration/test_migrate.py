"""The migrate command on real safekeepers: cut off by kill -9 after each step, with dead members, and with nonsense."""

import asyncio
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neon_services.consensus.membership import is_quorum, voter_sets
from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration
from neon_services.safekeeper.migration_row import RowFile
from tests.integration.cluster import LIBRARIES, http
from tests.integration.safekeeper_support import Fleet, Node, ScriptedProposer, new_ttid, running_fleet, until
from tests.integration.test_pull_timeline import START, create, members, present, proposer, refusal
from tests.unit.safekeeper.walmaker import WalMaker

pytestmark = pytest.mark.cluster
SEGMENT = 1 << 20


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("migrate"), 5, "--no-sync") as fleet:
        yield fleet


class Timeline:
    """A timeline on the first three safekeepers with some WAL, and its row."""

    def __init__(self, fleet: Fleet, directory: Path) -> None:
        self.fleet = fleet
        self.ttid: TenantTimelineId = new_ttid()
        self.wal = WalMaker(START, SEGMENT).until(START + SEGMENT, 20_000)
        self.mconf = MembershipConfiguration(1, members(*fleet.nodes[:3]))
        self.path = directory / "row.json"
        self.path.write_text(
            json.dumps(
                {
                    "tenant_id": str(self.ttid.tenant_id),
                    "timeline_id": str(self.ttid.timeline_id),
                    "generation": 1,
                    "sk_set": [1, 2, 3],
                    "new_sk_set": None,
                    "pending_exclude": [],
                    "safekeepers": [
                        {"id": node.id, "host": "127.0.0.1", "pg_port": node.pg_port, "http_url": node.url("")}
                        for node in fleet.nodes
                    ],
                }
            )
        )

    async def fill(self) -> None:
        create(self.ttid, self.mconf, self.fleet.nodes[:3])
        leader = proposer(self.ttid, self.wal, self.mconf)
        await leader.elect(self.fleet.nodes[:3])
        await leader.stream(self.wal.end)
        leader.leave()

    def start(self, *options: str) -> "subprocess.Popen[str]":
        argv = [sys.executable, "-m", "neon_services.safekeeper.migrate", "--row", str(self.path), *options]
        environment = {**os.environ, "NEON_LIB_DIR": str(LIBRARIES)}
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def run(self, *options: str) -> tuple[int, str]:
        out, err = (process := self.start(*options)).communicate(timeout=60)
        return process.returncode, out + err

    def kill_after(self, steps: int, *options: str) -> bool:
        """Run and SIGKILL when the given step is announced; whether it came to that."""
        with self.start(*options) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(f"step {steps}:"):
                    process.kill()
                    return True
        return False

    @property
    def row(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    def digest(self, number: int, end: Lsn | None = None) -> str:
        return self.fleet.nodes[number - 1].digest(self.ttid, START, end or self.wal.end)


@pytest.fixture
def timeline(fleet: Fleet, tmp_path: Path) -> Timeline:
    return Timeline(fleet, tmp_path)


async def test_a_change_killed_after_each_step_is_finished_by_the_next_run(fleet: Fleet, timeline: Timeline) -> None:
    await timeline.fill()
    expected = timeline.digest(1)
    kills = 0
    for step in range(1, 40):
        before = timeline.row
        if not timeline.kill_after(step, "--to", "3,4,5"):
            break
        kills += 1
        if before["generation"] == 3:
            break  # what remains is repeated from here whatever the number of the step
    assert kills >= 8
    code, output = timeline.run("--to", "3,4,5")
    assert code == 0, output
    row = timeline.row
    assert (row["generation"], row["sk_set"], row["new_sk_set"], row["pending_exclude"]) == (3, [3, 4, 5], None, [])
    assert not present(fleet.nodes[0], timeline.ttid) and not present(fleet.nodes[1], timeline.ttid)
    assert {timeline.digest(number) for number in (3, 4, 5)} == {expected}
    assert timeline.run()[0] == 0 and timeline.run("--to", "5,4,3")[0] == 0  # nothing to do
    # the new set goes on, and a proposer of the old generation cannot win anybody
    new = MembershipConfiguration(3, members(*fleet.nodes[2:]))
    leader = proposer(timeline.ttid, timeline.wal, new)
    await leader.elect(fleet.nodes[2:])
    timeline.wal.records(20)
    await leader.stream(timeline.wal.end)
    leader.leave()
    stale = proposer(timeline.ttid, timeline.wal, timeline.mconf)
    with pytest.raises((NeonError, ConnectionError), match="generation 1"):
        await stale.elect([fleet.nodes[2]])
    assert refusal(lambda: create(timeline.ttid, timeline.mconf, [fleet.nodes[0]]))[0] == 409
    stale.leave()
    assert len({timeline.digest(number) for number in (3, 4, 5)}) == 1


async def test_a_dead_member_is_replaced_while_a_proposer_follows(fleet: Fleet, timeline: Timeline) -> None:
    await timeline.fill()
    dead = fleet.nodes[0]
    dead.kill()
    code, output = timeline.run("--to", "2,3,4")
    assert code == 3 and "forget the timeline: 1" in output
    assert timeline.row["pending_exclude"] == [1] and timeline.row["generation"] == 3
    dead.start()
    assert present(dead, timeline.ttid)
    stale = proposer(timeline.ttid, timeline.wal, timeline.mconf)
    with pytest.raises((NeonError, ConnectionError), match="generation 1"):
        await stale.elect(fleet.nodes[:2])  # the old member votes, but is no quorum without one that moved on
    stale.leave()
    code, output = timeline.run()
    assert code == 0, output
    assert not present(dead, timeline.ttid) and timeline.row["pending_exclude"] == []
    assert len({timeline.digest(number) for number in (2, 3, 4)}) == 1


async def test_a_change_without_a_quorum_waits_and_can_be_taken_back(fleet: Fleet, timeline: Timeline) -> None:
    await timeline.fill()
    for node in fleet.nodes[3:]:
        node.kill()
    try:
        code, output = timeline.run("--to", "3,4,5", "--timeout", "1s")
        assert code == 1 and "1 of 3 new members" in output and "--abort" in output
        assert timeline.row["generation"] == 2 and timeline.row["new_sk_set"] == [3, 4, 5]
        code, output = timeline.run("--to", "1,2,4")
        assert code == 2 and "already changing" in output
        code, output = timeline.run("--abort")
        assert code == 3, output
    finally:
        for node in fleet.nodes[3:]:
            node.start()
    row = timeline.row
    assert (row["generation"], row["sk_set"], row["new_sk_set"], row["pending_exclude"]) == (3, [1, 2, 3], None, [4, 5])
    assert timeline.run()[0] == 0 and timeline.row["pending_exclude"] == []
    code, output = timeline.run("--abort")
    assert code == 2 and "no change to abort" in output


async def test_nonsense_is_refused_and_changes_nothing(fleet: Fleet, timeline: Timeline) -> None:
    await timeline.fill()
    good = timeline.row
    for options, message in (
        (("--to", "2,3,9"), "safekeeper 9 is not listed"),
        (("--to", "2,2,3"), "twice"),
        (("--to", ""), "--to"),
        (("--abort",), "no change to abort"),
    ):
        code, output = timeline.run(*options)
        assert code == 2 and message in output, (options, output)
    for change, message in (
        ({"generation": "x"}, "generation"),
        ({"sk_set": []}, "sk_set"),
        ({"sk_set": [1, 7]}, "sk_set"),
        ({"new_sk_set": []}, "new_sk_set"),
        ({"pending_exclude": [1, 1]}, "pending_exclude"),
        ({"tenant_id": "zz"}, "tenant_id"),
        ({"safekeepers": [{"id": 1}]}, "safekeepers"),
    ):
        timeline.path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ConfigError, match=message):
            RowFile(timeline.path)
    timeline.path.write_text(json.dumps(good)[:-5])
    with pytest.raises(ConfigError, match="not JSON"):
        RowFile(timeline.path)
    swapped = json.loads(json.dumps(good))
    swapped["safekeepers"][0]["http_url"], swapped["safekeepers"][1]["http_url"] = (
        good["safekeepers"][1]["http_url"],
        good["safekeepers"][0]["http_url"],
    )
    timeline.path.write_text(json.dumps(swapped))
    code, output = timeline.run("--to", "2,3,4")
    assert code == 2 and "should be safekeeper 1" in output
    # a stale copy of the row: the members know better
    timeline.path.write_text(json.dumps(good))
    assert timeline.run("--to", "2,3,4")[0] == 0
    timeline.path.write_text(json.dumps(good))
    code, output = timeline.run("--to", "1,4,5")
    assert code == 2 and "409" in output
    assert http("GET", fleet.nodes[1].timeline_url(timeline.ttid))["mconf"]["generation"] == 3


class Writer:
    """A compute: leads under the newest configuration it can find, writes, and campaigns again when it is deposed."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.committed = timeline.wal.end
        self.generations: set[int] = set()
        self.stop = False

    async def run(self) -> None:
        while not self.stop:
            leader = await asyncio.to_thread(self._candidate)
            if leader is None:
                await asyncio.sleep(0.02)
                continue
            candidate, nodes = leader
            try:
                await candidate.elect(nodes)
                while not self.stop:
                    self._timeline.wal.records(5)
                    await candidate.stream(self._timeline.wal.end)  # flushed by all of them, hence by quorums of both sets
                    self.committed = max(self.committed, candidate.commit)
                    self.generations.add(candidate.generation)
            except (NeonError, OSError, AssertionError, TimeoutError):
                pass  # deposed or refused: a new configuration is in force somewhere
            finally:
                candidate.leave()

    def _candidate(self) -> tuple[ScriptedProposer, list[Node]] | None:
        """A proposer and the members that follow the newest configuration, if those are quorums of it."""
        ttid, found = self._timeline.ttid, {}
        for node in self._timeline.fleet.nodes:
            with contextlib.suppress(urllib.error.HTTPError):  # not here, not yet here or no longer here
                found[node] = node.status(ttid)["mconf"]
        mconf = MembershipConfiguration.from_json(max(found.values(), key=lambda mconf: mconf["generation"]))
        nodes = [node for node in found if mconf.contains(node.id)]
        for node in nodes:  # what greetings do for a real proposer
            with contextlib.suppress(OSError):
                http("PUT", node.timeline_url(ttid, "/membership"), mconf.to_json())
        if not is_quorum(voter_sets(mconf), {node.id for node in nodes}):
            return None
        return proposer(ttid, self._timeline.wal, mconf), nodes


async def test_a_timeline_moves_there_and_back_while_a_compute_writes(fleet: Fleet, timeline: Timeline) -> None:
    await timeline.fill()
    writer = Writer(timeline)
    writing = asyncio.create_task(writer.run())
    try:
        for target, generation in (("3,4,5", 3), ("1,2,4", 5)):
            before = writer.committed
            await until(lambda before=before: writer.committed > before, "writes before the change", 60)  # type: ignore[misc]
            code, output = await asyncio.to_thread(timeline.run, "--to", target)
            assert code == 0, output
            assert timeline.row["generation"] == generation
            await until(lambda generation=generation: generation in writer.generations, "writes under the final one", 60)  # type: ignore[misc]
    finally:
        writer.stop = True
        await asyncio.wait_for(writing, 60)
    committed = writer.committed
    assert committed > START + SEGMENT
    content = hashlib.sha256(timeline.wal.slice(START, committed)).hexdigest()
    last = proposer(timeline.ttid, timeline.wal, MembershipConfiguration(5, members(*(fleet.nodes[i] for i in (0, 1, 3)))))
    await last.elect([fleet.nodes[0], fleet.nodes[3]])  # any quorum has everything that was committed
    assert last.term_start >= committed
    await last.stream(max(committed, last.term_start))
    last.leave()
    assert {timeline.digest(number, committed) for number in (1, 4)} == {content}
    assert [node.id for node in fleet.nodes if present(node, timeline.ttid)] == [1, 2, 4]

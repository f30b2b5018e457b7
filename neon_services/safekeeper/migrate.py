"""``python -m neon_services.safekeeper.migrate``: move a timeline from one set of safekeepers to another.

Use it like this: describe the timeline in a file (see migration_row.py), then ``migrate --row FILE --to 2,3,4``. It may be
killed at any time; the same command, or the one without ``--to``, goes on from the file. ``--abort`` goes back to the old set
as long as the change is not final. It is safe while computes write; they must be able to reach the new safekeepers.

The decisions are those of consensus/migration.py; this module carries out its effects over HTTP.
"""

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import aiohttp

from neon_services.consensus.migration import (
    BumpTerm,
    CompareAndSet,
    Effect,
    Exclude,
    Migration,
    MigrationConflict,
    PullTimeline,
    Row,
    Standing,
    SwitchMembership,
    TellCompute,
)
from neon_services.ground.auth import TokenSource
from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.process import configure_logging, run_service
from neon_services.ground.units import parse_duration_ms
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId
from neon_services.safekeeper.access import TOKEN_VARIABLE
from neon_services.safekeeper.migration_row import RowFile
from neon_services.safekeeper.peer_client import PeerAccess, PeerClient, PeerError, timeline_path

log = logging.getLogger(__name__)

RETRY_INTERVAL_S = 1.0
PULL_TIMEOUT_S = 6 * 3600.0
EXCLUDES_PENDING = 3
_HINT = (
    "the change can be continued by the same command without --to, or taken back with --abort; a log that lags is brought up "
    "by a running compute, or by walproposer --sync-safekeepers when there is none"
)


class Stalled(NeonError):
    """The members did not do in time what the change needs."""


class MigrationDriver:
    """Carries out the effects of one change."""

    def __init__(
        self,
        file: RowFile,
        session: aiohttp.ClientSession,
        *,
        timeout_s: float,
        compute_hook: str | None,
        access: PeerAccess | None = None,
    ) -> None:
        self._file = file
        self._session = session
        self._access = access or PeerAccess()
        self._deadline = time.monotonic() + timeout_s
        self._compute_hook = compute_hook
        self._path = timeline_path(file.ttid)
        self._known: dict[int, PeerClient] = {}
        self._steps = 0

    async def run(self, steps: Generator[Effect, Any, Row]) -> Row:
        """To the end; the final row. Raises MigrationConflict, Stalled, ConfigError or OSError."""
        outcome: Any = None
        while True:
            try:
                effect = steps.send(outcome)
            except StopIteration as done:
                return done.value
            self._steps += 1
            print(f"step {self._steps}: {describe(effect)}", flush=True)
            try:
                outcome = await self._perform(effect)
            except PeerError as error:
                if error.status in (400, 401, 403, 409):
                    raise MigrationConflict(str(error)) from error
                print(f"  not yet: {error}", flush=True)
                outcome = None

    async def _perform(self, effect: Effect) -> Any:
        if isinstance(effect, CompareAndSet):
            return self._file.compare_and_set(effect.expected, effect.row)
        if isinstance(effect, TellCompute):
            return await self._tell(effect.mconf)
        if isinstance(effect, SwitchMembership):
            return await self._switch(effect)
        if isinstance(effect, PullTimeline):
            hosts = [self._file.addresses[source.node_id].http_url for source in effect.sources]
            ids = {"tenant_id": str(self._file.ttid.tenant_id), "timeline_id": str(self._file.ttid.timeline_id)}
            body = {**ids, "http_hosts": hosts, "mconf": effect.mconf.to_json()}
            peer = await self._peer(effect.node)
            await peer.request("POST", "/v1/pull_timeline", body, PULL_TIMEOUT_S)
            return True
        if isinstance(effect, BumpTerm):
            await (await self._peer(effect.node)).request("POST", self._path + "/term_bump", {"term": effect.term})
            return True
        if isinstance(effect, Exclude):
            await (await self._peer(effect.node)).request("PUT", self._path + "/exclude", effect.mconf.to_json())
            return True
        return await self._wait(effect.text)

    async def _switch(self, effect: SwitchMembership) -> Standing:
        peer = await self._peer(effect.node)
        answer = await peer.request("PUT", self._path + "/membership", effect.mconf.to_json())
        try:
            current = MembershipConfiguration.from_json(answer["current_conf"])
        except (ValueError, KeyError, TypeError) as error:
            raise PeerError(f"{peer.url}: not an answer to a membership change: {error!r}") from error
        if _ids(current) != _ids(effect.mconf):
            raise MigrationConflict(
                f"safekeeper {effect.node.node_id} follows another configuration of generation {current.generation}: "
                f"{current.to_json()}; the row was not the only one of this timeline"
            )
        status = await peer.status(self._file.ttid)  # after the switch: the term can only be higher than it was then
        return Standing(status.term, status.last_log_term, status.flush_lsn)

    async def _peer(self, node: SafekeeperId) -> PeerClient:
        """The safekeeper, once it has proved that it is the one. Raises PeerError or MigrationConflict."""
        known = self._known.get(node.node_id)
        if known is None:
            known = self._access.client(self._session, self._file.addresses[node.node_id].http_url)
            answer = await known.request("GET", "/v1/status")
            if not isinstance(answer, dict) or answer.get("id") != node.node_id:
                raise MigrationConflict(
                    f"{known.url} should be safekeeper {node.node_id} but says {answer!r}: mend its http_url"
                )
            self._known[node.node_id] = known
        return known

    async def _tell(self, mconf: MembershipConfiguration) -> bool:
        members = sorted({*mconf.members, *(mconf.new_members or ())})
        if self._compute_hook is None:
            listed = ",".join(f"{member.host}:{member.pg_port}" for member in members)
            print(f"  a compute of this timeline needs neon.safekeepers = 'g#{mconf.generation}:{listed}'", flush=True)
            return True
        body = {
            "tenant_id": str(self._file.ttid.tenant_id),
            "timeline_id": str(self._file.ttid.timeline_id),
            "generation": mconf.generation,
            "safekeepers": [{"id": member.node_id, "hostname": member.host} for member in members],
        }
        try:
            async with self._session.put(self._compute_hook, json=body) as answer:
                if answer.status == 200:
                    return True
                print(f"  not yet: {self._compute_hook} answers {answer.status}", flush=True)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            print(f"  not yet: {self._compute_hook}: {error or type(error).__name__}", flush=True)
        return False

    async def _wait(self, text: str) -> None:
        if time.monotonic() >= self._deadline:
            raise Stalled(f"gave up waiting: {text}; {_HINT}")
        await asyncio.sleep(RETRY_INTERVAL_S)


def describe(effect: Effect) -> str:
    """One line about a step."""
    if isinstance(effect, CompareAndSet):
        mconf = effect.row.mconf
        joint = "" if mconf.new_members is None else f" changing to {[m.node_id for m in mconf.new_members]}"
        left = f", to be excluded: {[m.node_id for m in effect.row.pending_exclude]}" if effect.row.pending_exclude else ""
        return f"store generation {mconf.generation}: {[m.node_id for m in mconf.members]}{joint}{left}"
    if isinstance(effect, TellCompute):
        return f"tell the compute of generation {effect.mconf.generation}"
    if isinstance(effect, SwitchMembership):
        return f"safekeeper {effect.node.node_id} follows generation {effect.mconf.generation}"
    if isinstance(effect, PullTimeline):
        return f"safekeeper {effect.node.node_id} pulls the timeline"
    if isinstance(effect, BumpTerm):
        return f"safekeeper {effect.node.node_id} raises its term to {effect.term}"
    if isinstance(effect, Exclude):
        return f"safekeeper {effect.node.node_id} forgets the timeline"
    return f"wait: {effect.text}"


def _ids(mconf: MembershipConfiguration) -> tuple[int, set[int], set[int]]:
    return mconf.generation, {m.node_id for m in mconf.members}, {m.node_id for m in mconf.new_members or ()}


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser("migrate", description="Move a timeline to other safekeepers", allow_abbrev=False)
    parser.add_argument("--row", required=True, type=Path, metavar="FILE", help="the timeline's row, a JSON file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--to", metavar="ID,ID,...", help="the new set; without it, a change that was begun is finished")
    what.add_argument("--abort", action="store_true", help="go back to the old set")
    parser.add_argument("--compute-hook", metavar="URL", help="PUT the list of safekeepers there whenever it changes")
    parser.add_argument(
        "--auth-token-path",
        type=Path,
        metavar="PATH",
        help=f"the token, safekeeperdata (default: the variable {TOKEN_VARIABLE})",
    )
    parser.add_argument("--ssl-ca-file", type=Path, metavar="PATH", help="trust these authorities instead of the system's")
    parser.add_argument("--timeout", default="10m", metavar="DURATION", help="give up waiting for lagging members after this")
    return parser


def _target(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(f"--to: {text!r} is not a list of safekeeper ids like 2,3,4")
    return [int(part) for part in parts]


async def migrate(arguments: argparse.Namespace) -> int:
    """Do what the options say. Exit code 3: the change is final, but some former members have not been told yet."""
    file = RowFile(arguments.row)
    timeout_s = parse_duration_ms(arguments.timeout, what="--timeout") / 1000
    migration = Migration()
    access = PeerAccess(TokenSource(arguments.auth_token_path, TOKEN_VARIABLE), arguments.ssl_ca_file)
    access.check()
    with file.locked():
        target = None if arguments.to is None else file.members(_target(arguments.to), "--to")
        steps = migration.abort(file.row) if arguments.abort else migration.change(file.row, target)
        async with access.session() as session:
            driver = MigrationDriver(file, session, timeout_s=timeout_s, compute_hook=arguments.compute_hook, access=access)
            try:
                row = await driver.run(steps)
            except MigrationConflict as error:
                raise ConfigError(str(error)) from error
    print(f"generation {row.mconf.generation}: {[member.node_id for member in row.mconf.members]}")
    if row.pending_exclude:
        away = ", ".join(str(member.node_id) for member in row.pending_exclude)
        print(f"still to be told to forget the timeline: {away}; run this command again when they are back", flush=True)
        return EXCLUDES_PENDING
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 3 done except for exclusions, 2 refused, 1 not done yet or failed."""
    arguments = make_parser().parse_args(argv)
    configure_logging()
    return run_service(lambda: migrate(arguments))


if __name__ == "__main__":
    sys.exit(main())

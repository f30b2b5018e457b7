#!/usr/bin/python
"""Have a timeline: on its pageserver, and on every safekeeper of its membership."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.neon_http import Api, ApiError

DOCUMENTATION = r"""
module: neon_timeline
short_description: Have a timeline on its pageserver and on its safekeepers
description:
  - Bootstraps the timeline or branches it from another, then registers it with every safekeeper at the point where it starts.
  - A run that was cut off anywhere is finished by the next. A safekeeper that lacks a timeline which has WAL already gets it
    from the others; it is never made empty.
options:
  pageserver:
    description: URL of the HTTP API of the pageserver that has the tenant.
    type: str
    required: true
  safekeepers:
    description: The members, each with C(id), C(host), C(pg_port) and C(http_port).
    type: list
    elements: dict
    required: true
  generation:
    description: Generation of the membership.
    type: int
    default: 1
  tenant_id:
    description: The tenant, 32 hexadecimal digits.
    type: str
    required: true
  timeline_id:
    description: The timeline, 32 hexadecimal digits.
    type: str
    required: true
  pg_version:
    description: Postgres major of a new timeline. A branch has its ancestor's.
    type: int
  ancestor_timeline_id:
    description: Timeline to branch from.
    type: str
  ancestor_start_lsn:
    description: Where to branch; by default at the ancestor's end.
    type: str
"""

MEMBER = {
    "name": {"type": "str"},
    "id": {"type": "int", "required": True},
    "host": {"type": "str", "required": True},
    "pg_port": {"type": "int", "required": True},
    "http_port": {"type": "int", "required": True},
}
ARGUMENTS = {
    "pageserver": {"type": "str", "required": True},
    "safekeepers": {"type": "list", "elements": "dict", "required": True, "options": MEMBER},
    "generation": {"type": "int", "default": 1},
    "tenant_id": {"type": "str", "required": True},
    "timeline_id": {"type": "str", "required": True},
    "pg_version": {"type": "int"},
    "ancestor_timeline_id": {"type": "str"},
    "ancestor_start_lsn": {"type": "str"},
}
_PATIENCE_S = 120


class TimelineError(Exception):
    """What the inventory asks for cannot be had; the message says why."""


@dataclass(frozen=True)
class CreateOnPageserver:
    """Make the timeline where pages are."""

    body: dict[str, Any]


@dataclass(frozen=True)
class CreateOnSafekeeper:
    """Register an empty timeline; ``start_lsn`` None means where the pageserver's timeline ends once it is made."""

    node_id: int
    start_lsn: str | None


@dataclass(frozen=True)
class PullToSafekeeper:
    """Copy the timeline with its WAL from the members that have it."""

    node_id: int
    donors: tuple[int, ...]


Step = CreateOnPageserver | CreateOnSafekeeper | PullToSafekeeper


def lsn(text: str) -> int:
    """The number of an LSN such as ``0/16B9188``."""
    high, _, low = text.partition("/")
    return int(high, 16) << 32 | int(low, 16)


def plan(
    timeline: Mapping[str, Any] | None, members: Mapping[int, Mapping[str, Any] | None], creation: dict[str, Any]
) -> list[Step]:
    """The steps from what is there to a timeline that every member has.

    ``timeline`` is the pageserver's TimelineInfo, ``members`` each safekeeper's TimelineStatus by node id; None where there is
    none. ``creation`` is the body that makes the timeline. Raises TimelineError for a timeline that only safekeepers have, and
    for one with WAL that a majority of the members lacks.
    """
    have = {node_id: status for node_id, status in members.items() if status is not None}
    missing = [node_id for node_id, status in members.items() if status is None]
    if timeline is None:
        if have:
            raise TimelineError(
                f"safekeepers {', '.join(map(str, have))} have the timeline and its pageserver does not: "
                "check that neon_tenants names the pageserver that has this tenant, with the generation of its attachment"
            )
        return [CreateOnPageserver(creation), *(CreateOnSafekeeper(node_id, None) for node_id in missing)]
    if not have:
        return [CreateOnSafekeeper(node_id, timeline["last_record_lsn"]) for node_id in missing]
    starts = {str(status["timeline_start_lsn"]) for status in have.values() if lsn(status["timeline_start_lsn"])}
    written = any(lsn(s["flush_lsn"]) > lsn(s["timeline_start_lsn"]) or lsn(s["commit_lsn"]) > lsn(s["timeline_start_lsn"])
                  for s in have.values())  # fmt: skip
    if written and len(missing) > (len(members) - 1) // 2:
        raise TimelineError(
            f"safekeepers {', '.join(map(str, missing))} of {len(members)} lack the timeline, and it has WAL already: they may "
            "have been the majority that made commits durable. Bring their disks back; or, when those are lost, decide what "
            f"to keep and copy it to them by hand (POST /v1/pull_timeline) from {', '.join(map(str, have))}"
        )
    if written or len(starts) != 1:
        return [PullToSafekeeper(node_id, tuple(have)) for node_id in missing]
    return [CreateOnSafekeeper(node_id, next(iter(starts))) for node_id in missing]


def creation_body(params: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the pageserver's request that makes the timeline."""
    body: dict[str, Any] = {"new_timeline_id": params["timeline_id"]}
    if params["ancestor_timeline_id"]:
        body["ancestor_timeline_id"] = params["ancestor_timeline_id"]
        if params["ancestor_start_lsn"]:
            body["ancestor_start_lsn"] = params["ancestor_start_lsn"]
    else:
        body["pg_version"] = params["pg_version"]
    return body


def membership(params: Mapping[str, Any]) -> dict[str, Any]:
    """The membership configuration that every member gets."""
    members = [{"id": m["id"], "host": m["host"], "pg_port": m["pg_port"]} for m in params["safekeepers"]]
    return {"generation": params["generation"], "members": members, "new_members": None}


class Runner:
    """Carries out the steps."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self.pageserver = Api(params["pageserver"], timeout_s=_PATIENCE_S)
        self.safekeepers = {m["id"]: Api(f"http://{m['host']}:{m['http_port']}") for m in params["safekeepers"]}
        self.timeline_path = f"/v1/tenant/{params['tenant_id']}/timeline/{params['timeline_id']}"

    def look(self) -> tuple[Any, dict[int, Any]]:
        """What the pageserver and each safekeeper have."""
        return self.pageserver.find(self.timeline_path), {
            node_id: api.find(self.timeline_path) for node_id, api in self.safekeepers.items()
        }

    def carry_out(self, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, CreateOnPageserver):
                path = f"/v1/tenant/{self._params['tenant_id']}/timeline"
                self.pageserver.call_patiently("POST", path, step.body, patience_s=_PATIENCE_S)
            elif isinstance(step, CreateOnSafekeeper):
                self._create(step)
            else:
                self._pull(step)

    def _create(self, step: CreateOnSafekeeper) -> None:
        timeline = self.pageserver.call("GET", self.timeline_path)
        start = step.start_lsn or timeline["last_record_lsn"]
        major = int(timeline["pg_version"])
        body = {
            "tenant_id": self._params["tenant_id"],
            "timeline_id": self._params["timeline_id"],
            "mconf": membership(self._params),
            "pg_version": major * 10000 if major < 10000 else major,
            "start_lsn": start,
            "commit_lsn": start,
        }
        self.safekeepers[step.node_id].call_patiently("POST", "/v1/tenant/timeline", body, patience_s=_PATIENCE_S)

    def _pull(self, step: PullToSafekeeper) -> None:
        body = {
            "tenant_id": self._params["tenant_id"],
            "timeline_id": self._params["timeline_id"],
            "http_hosts": [self.safekeepers[donor].endpoint for donor in step.donors],
            "mconf": membership(self._params),
            # what a lost disk had promised only the others together know
            "require_all_hosts": True,
        }
        self.safekeepers[step.node_id].call_patiently("POST", "/v1/pull_timeline", body, patience_s=_PATIENCE_S)


def describe(step: Step) -> str:
    """A step in words."""
    if isinstance(step, CreateOnPageserver):
        return f"make it on the pageserver: {step.body}"
    if isinstance(step, CreateOnSafekeeper):
        return f"register it with safekeeper {step.node_id} at {step.start_lsn or 'its start'}"
    return f"copy it to safekeeper {step.node_id} from {', '.join(map(str, step.donors))}"


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENTS, required_one_of=[("pg_version", "ancestor_timeline_id")], supports_check_mode=True
    )
    runner = Runner(module.params)
    try:
        timeline, members = runner.look()
        steps = plan(timeline, members, creation_body(module.params))
        if not module.check_mode:
            runner.carry_out(steps)
    except (ApiError, TimelineError) as error:
        module.fail_json(msg=f"timeline {module.params['timeline_id']}: {error}")
    module.exit_json(changed=bool(steps), steps=[describe(step) for step in steps])


if __name__ == "__main__":
    main()

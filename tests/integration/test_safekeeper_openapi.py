"""The HTTP API against its own OpenAPI document: every route is described, and nothing that one can ask is a 5xx."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from neon_services.ground.debug_http import MAX_SECONDS
from neon_services.protocols.safekeeper_messages import MembershipConfiguration
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.http_api import HttpApi
from neon_services.safekeeper.openapi import document
from neon_services.safekeeper.timelines import Timelines
from tests.integration.cluster import http
from tests.integration.safekeeper_support import Fleet, new_ttid, running_fleet
from tests.integration.test_pull_timeline import SEGMENT, START, create, members, proposer
from tests.unit.safekeeper.walmaker import WalMaker

EXAMPLES = 15
VALID_SECONDS = {str(number) for number in range(1, MAX_SECONDS + 1)}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_the_document_names_every_route_and_no_other(tmp_path: Path) -> None:
    config = SafekeeperConfig(tmp_path, 1, ("127.0.0.1", 1), ("127.0.0.1", 2), "x", "y")
    router = HttpApi(config, Timelines(tmp_path, 1, sync=False)).application().router
    routes = {
        (r.method.lower(), r.resource.canonical) for r in router.routes() if r.resource is not None and r.method != "HEAD"
    }
    described = {(method, path) for path, operations in document()["paths"].items() for method in operations}
    assert described == routes


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("openapi"), 1, "--no-sync") as fleet:
        yield fleet


@pytest.fixture(scope="module")
def operations(fleet: Fleet) -> dict[str, Any]:
    found = http("GET", fleet.nodes[0].url("/v1/openapi.json"))
    assert found == document()
    schema = schemathesis.openapi.from_dict(found)
    schema.config.update(base_url=fleet.nodes[0].url(""))
    return {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}


LABELS = {
    f"{method.upper()} {path}": bool(operation["parameters"]) or "requestBody" in operation
    for path, operations in document()["paths"].items()
    for method, operation in operations.items()
}
ALLOWED, FORBIDDEN = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(label, ALLOWED) for label in LABELS] + [(label, FORBIDDEN) for label, has_input in LABELS.items() if has_input]


@pytest.mark.cluster
@pytest.mark.parametrize(("label", "mode"), CASES, ids=str)
async def test_no_request_is_answered_with_a_server_error(
    fleet: Fleet, operations: dict[str, Any], label: str, mode: GenerationMode
) -> None:
    node, ttid = fleet.nodes[0], new_ttid()
    mconf = MembershipConfiguration(1, members(node))
    create(ttid, mconf, fleet.nodes)
    leader = proposer(ttid, WalMaker(START, SEGMENT).records(20), mconf)
    await leader.elect(fleet.nodes)
    await leader.stream(leader.start + len(leader.wal))
    try:
        ask(operations[label], mode, {"tenant_id": str(ttid.tenant_id), "timeline_id": str(ttid.timeline_id)})
    finally:
        leader.leave()
    assert http("GET", node.url("/v1/status")) == {"id": node.id, "wal_refused": None}


def ask(operation: Any, mode: GenerationMode, existing: dict[str, str]) -> None:
    """Generated requests: about any timeline, and about one that exists."""
    named = {name: value for name, value in existing.items() if "{" + name + "}" in operation.path}
    counter = itertools.count()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if mode is ALLOWED and next(counter) % 2:
            case.path_parameters = {**case.path_parameters, **named}
        if operation.path == "/profile/cpu" and str((case.query or {}).get("seconds", "5")) in VALID_SECONDS:
            case.query = {**(case.query or {}), "seconds": 1}  # a longer one is no other case
        response = case.call(timeout=30)
        case.validate_response(response, checks=CHECKS)

    run()

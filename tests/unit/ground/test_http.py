"""The shape of every HTTP API: JSON errors with their status, checked fields, metrics."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.http import (
    ApiError,
    json_response,
    make_application,
    optional_field,
    read_json_object,
    require_field,
)

ERRORS: dict[str, Exception] = {
    "api": ApiError(409, "a conflict"),
    "config": ConfigError("wrong option"),
    "value": ValueError("bad value"),
    "ours": NeonError("something of ours"),
    "bug": KeyError("a bug"),
}


@pytest.fixture
async def client() -> AsyncIterator[TestClient]:
    async def fail(request: web.Request) -> web.Response:
        raise ERRORS[request.match_info["kind"]]

    async def fields(request: web.Request) -> web.Response:
        body = await read_json_object(request)
        return json_response([require_field(body, "name", str), optional_field(body, "count", int, 7)])

    application = make_application()
    application.router.add_get("/fail/{kind}", fail)
    application.router.add_post("/fields", fields)
    async with TestClient(TestServer(application)) as client:
        yield client


@pytest.mark.parametrize(
    ("kind", "status", "text"),
    [
        ("api", 409, "a conflict"),
        ("config", 400, "wrong option"),
        ("value", 400, "bad value"),
        ("ours", 500, "something of ours"),
        ("bug", 500, "internal error: KeyError: 'a bug'"),
    ],
)
async def test_errors_are_json_with_a_status(client: TestClient, kind: str, status: int, text: str) -> None:
    answer = await client.get(f"/fail/{kind}")
    assert (answer.status, await answer.json()) == (status, {"msg": text})


async def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert ((await client.get("/nothing")).status, (await client.delete("/fields")).status) == (404, 405)
    assert "msg" in await (await client.get("/nothing")).json()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "must be a JSON object, not list"),
        (b"{}", "field 'name' is missing"),
        (b'{"name": null}', "field 'name' is missing"),
        (b'{"name": 5}', "field 'name' must be str, not int"),
        (b'{"name": "x", "count": "5"}', "field 'count' must be int, not str"),
        (b'{"name": "x", "count": true}', "field 'count' must be int, not bool"),
    ],
)
async def test_wrong_bodies_name_the_field(client: TestClient, body: bytes, expected: str) -> None:
    answer = await client.post("/fields", data=body)
    assert answer.status == 400
    assert expected in (await answer.json())["msg"]


async def test_right_bodies(client: TestClient) -> None:
    assert await (await client.post("/fields", json={"name": "x"})).json() == ["x", 7]
    assert await (await client.post("/fields", json={"name": "x", "count": 1})).json() == ["x", 1]


async def test_metrics(client: TestClient) -> None:
    answer = await client.get("/metrics")
    assert answer.status == 200
    assert "python_info" in await answer.text()

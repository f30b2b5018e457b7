"""Who may ask a safekeeper for what: every route of the application with every kind of token, in one process."""

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from neon_services.ground.auth import KeyRing, Scope
from neon_services.ground.errors import ConfigError
from neon_services.ground.http import json_response, serve
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.safekeeper.access import AccessConfig, read_access
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.http_access import NEEDS, HttpAccess, Needs, needs
from neon_services.safekeeper.http_api import HttpApi
from neon_services.safekeeper.listeners import Listeners
from neon_services.safekeeper.main import make_parser
from neon_services.safekeeper.openapi import document
from neon_services.safekeeper.peer_client import PeerError
from neon_services.safekeeper.timelines import Timelines
from tests.credentials import TokenKey

TENANT, OTHER = TenantId.generate(), TenantId.generate()
TIMELINE = TimelineId.generate()

# the contract, in its own words: T = the own tenant's token or safekeeperdata, S = safekeeperdata, - = nothing
CONTRACT = """
- GET /v1/status
- GET /metrics
S GET /v1/utilization
S GET /v1/debug/filesystem_usage
T POST /v1/tenant/timeline
S GET /v1/tenant/timeline
T GET /v1/tenant/{tenant_id}/timeline/{timeline_id}
T DELETE /v1/tenant/{tenant_id}/timeline/{timeline_id}
T DELETE /v1/tenant/{tenant_id}
T PUT /v1/tenant/{tenant_id}/timeline/{timeline_id}/membership
T PUT /v1/tenant/{tenant_id}/timeline/{timeline_id}/exclude
T GET /v1/tenant/{tenant_id}/timeline/{timeline_id}/snapshot/{destination_id}
S POST /v1/pull_timeline
S POST /v1/tenant/{tenant_id}/timeline/{source_timeline_id}/copy
S PATCH /v1/tenant/{tenant_id}/timeline/{timeline_id}/control_file
S POST /v1/tenant/{tenant_id}/timeline/{timeline_id}/checkpoint
T GET /v1/tenant/{tenant_id}/timeline/{timeline_id}/digest
T POST /v1/tenant/{tenant_id}/timeline/{timeline_id}/backup_partial_reset
T POST /v1/tenant/{tenant_id}/timeline/{timeline_id}/term_bump
T POST /v1/record_safekeeper_info/{tenant_id}/{timeline_id}
S GET /v1/debug_dump
"""
LETTERS = {"-": Needs.NOTHING, "T": Needs.TENANT, "S": Needs.SAFEKEEPER}


def make_api(tmp_path: Path) -> HttpApi:
    config = SafekeeperConfig(tmp_path, 1, ("127.0.0.1", 1), ("127.0.0.1", 2), "x", "y")
    return HttpApi(config, Timelines(tmp_path, 1, sync=False))


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, key: TokenKey) -> AsyncIterator[str]:
    """The API with tokens, and two routes of which nobody has said who may use them."""
    (tmp_path / "key.pem").write_bytes(key.public_pem)
    access = HttpAccess(KeyRing(tmp_path / "key.pem", "--http-auth-public-key-path"))
    application = make_api(tmp_path).application(access)

    async def forgotten(_: web.Request) -> web.Response:
        return json_response("the secret")

    application.router.add_get("/v1/forgotten", forgotten)
    application.router.add_post("/v1/tenant/{tenant_id}/forgotten", forgotten)
    runner = await serve(application, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def filled(path: str) -> str:
    values = {"tenant_id": TENANT, "timeline_id": TIMELINE, "source_timeline_id": TIMELINE, "destination_id": 2}
    return path.format(**values)


def routes(tmp_path: Path) -> set[tuple[str, str]]:
    """Method and path of everything that the application serves."""
    router = make_api(tmp_path).application().router
    found = {(route.method, route.resource.canonical) for route in router.routes() if route.resource is not None}
    assert len(found) >= 25
    return found


def test_every_route_has_said_who_may_use_it(tmp_path: Path) -> None:
    for method, path in routes(tmp_path):
        assert needs(method, path) is not None, f"{method} {path} would be closed to everybody"


def test_the_table_is_the_contract() -> None:
    for line in CONTRACT.strip().splitlines():
        letter, method, path = line.split()
        assert NEEDS[method, path] is LETTERS[letter], line
    told = {(method, path) for _, method, path in (line.split() for line in CONTRACT.strip().splitlines())}
    extra = {(method, path): needed for (method, path), needed in NEEDS.items() if (method, path) not in told}
    assert extra == {
        ("GET", "/profile/cpu"): Needs.NOTHING,
        ("GET", "/profile/heap"): Needs.NOTHING,
        ("GET", "/v1/openapi.json"): Needs.NOTHING,
        ("PUT", "/v1/failpoints"): Needs.SAFEKEEPER,
    }


async def test_every_route_with_every_token(tmp_path: Path) -> None:
    key = TokenKey()
    tokens = {
        "none": None,
        "garbage": "not-a-token",
        "stranger": TokenKey().token("safekeeperdata"),
        "expired": key.expired("safekeeperdata"),
        "other tenant": key.token("tenant", OTHER),
        "tenant": key.token("tenant", TENANT),
        **{scope: key.token(scope, TENANT) for scope in Scope if scope not in (Scope.TENANT, Scope.SAFEKEEPER_DATA)},
        "safekeeperdata": key.token("safekeeperdata"),
    }
    refused = 0
    body = json.dumps({"tenant_id": str(TENANT), "timeline_id": str(TIMELINE)})
    async with serving(tmp_path, key) as url, aiohttp.ClientSession(trust_env=False) as session:
        for method, path in sorted(routes(tmp_path)):
            needed = needs(method, path)
            for name, token in tokens.items():
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                data = body if path == "/v1/tenant/timeline" and method == "POST" else "{}"
                query = "?seconds=0" if path.startswith("/profile/") else ""  # refused at once, but not for want of a token
                async with session.request(method, url + filled(path) + query, headers=headers, data=data) as answer:
                    text = await answer.text()
                what = f"{method} {path} with {name}: {answer.status} {text[:200]}"
                if needed is Needs.NOTHING:
                    assert answer.status == (400 if path == "/profile/cpu" else 412 if query else 200), what
                elif name in ("none", "garbage", "stranger", "expired"):
                    assert answer.status == 401, what
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                elif name == "safekeeperdata" or (name == "tenant" and needed is Needs.TENANT):
                    assert answer.status not in (401, 403), what
                else:
                    assert answer.status == 403, what
                if answer.status in (401, 403):
                    refused += 1
                    assert method == "HEAD" or set(json.loads(text)) == {"msg"}, what
                    assert token is None or token not in text, what
    assert refused > 200


async def test_what_nobody_declared_is_closed(tmp_path: Path) -> None:
    key = TokenKey()
    headers = {"Authorization": f"Bearer {key.token('safekeeperdata')}"}
    async with serving(tmp_path, key) as url, aiohttp.ClientSession(trust_env=False) as session:
        for method, path in (("GET", "/v1/forgotten"), ("HEAD", "/v1/forgotten"), ("POST", f"/v1/tenant/{TENANT}/forgotten")):
            async with session.request(method, url + path, headers=headers) as answer:
                assert answer.status == 403 and "the secret" not in await answer.text()
            async with session.request(method, url + path) as answer:
                assert answer.status == 401
        for path, status in (
            ("/v1/nothing", 404),
            ("/v1/pull_timeline", 405),
            ("/v1/status/", 404),
            ("//v1/tenant/timeline", 404),
        ):
            async with session.get(url + path) as answer:
                assert answer.status == status


async def test_the_tenant_that_the_body_names(tmp_path: Path) -> None:
    key = TokenKey()
    url_path = "/v1/tenant/timeline"
    async with serving(tmp_path, key) as url, aiohttp.ClientSession(trust_env=False) as session:

        async def post(token: str, body: str) -> int:
            async with session.post(url + url_path, data=body, headers={"Authorization": f"Bearer {token}"}) as answer:
                return answer.status

        token = key.token("tenant", TENANT)
        own = {"tenant_id": str(TENANT), "timeline_id": str(TIMELINE), "pg_version": 160000, "start_lsn": "0/1000000"}
        assert await post(token, json.dumps({**own, "tenant_id": str(OTHER)})) == 403
        # of two names JSON readers take the last, here and in the handler
        assert await post(token, f'{{"tenant_id": "{TENANT}", ' + json.dumps({**own, "tenant_id": str(OTHER)})[1:]) == 403
        for wrong in ("", "[]", "{}", '{"tenant_id": 7}', '{"tenant_id": "x"}', "[" * 100_000):
            assert await post(token, wrong) == 400
        assert await post(token, json.dumps(own)) == 200


def test_the_document_tells_of_tokens(tmp_path: Path) -> None:
    described = document()
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            closed = needs(method.upper(), path) is not Needs.NOTHING
            assert operation["security"] == ([{"token": []}] if closed else [])
            assert ({"401", "403"} <= set(operation["responses"])) is closed


async def test_a_token_that_anybody_could_have_sent_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = SafekeeperConfig(tmp_path, 1, ("127.0.0.1", 1), ("127.0.0.1", 2), "x", "y")
    (tmp_path / "key.pem").write_bytes(TokenKey().public_pem)
    closed = replace(plain, access=AccessConfig(http_auth_public_key_path=tmp_path / "key.pem"))
    monkeypatch.delenv("SAFEKEEPER_AUTH_TOKEN", raising=False)
    Listeners(plain)
    monkeypatch.setenv("SAFEKEEPER_AUTH_TOKEN", "the.secret.token")
    Listeners(closed)
    assert not caplog.records
    Listeners(plain)
    assert "whoever reaches the HTTP API" in caplog.text and "secret" not in caplog.text


async def test_a_token_goes_to_the_safekeeper_and_to_nobody_else(tmp_path: Path) -> None:
    """Not to where a safekeeper redirects, not to others that are asked in the same session; and it is read anew."""
    seen: list[tuple[str, str | None]] = []

    async def other(request: web.Request) -> web.Response:
        seen.append(("other", request.headers.get("Authorization")))
        return json_response("hello")

    async def redirect(request: web.Request) -> web.Response:
        seen.append(("first", request.headers.get("Authorization")))
        raise web.HTTPFound(f"http://127.0.0.1:{ports[1]}/")

    runners, ports = [], []
    for handler in (redirect, other):
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", handler)
        runners.append(await serve(application, "127.0.0.1", 0))
        ports.append(runners[-1].addresses[0][1])
    (tmp_path / "token").write_text("one\n")
    access = AccessConfig(auth_token_path=tmp_path / "token").peers()
    ttid = TenantTimelineId(TENANT, TIMELINE)
    try:
        async with access.session() as session:
            for expected in ("one", "two"):
                (tmp_path / "token").write_text(expected)
                client = access.client(session, f"http://127.0.0.1:{ports[0]}")
                with pytest.raises(PeerError, match="302") as failure:
                    await client.status(ttid)
                assert failure.value.status == 302
                with pytest.raises(PeerError, match="302"):
                    await anext(client.snapshot(ttid, 7))
                assert seen == [("first", f"Bearer {expected}")] * 2
                seen.clear()
            async with session.get(f"http://127.0.0.1:{ports[1]}/") as found:
                assert found.status == 200
            assert seen == [("other", None)]
            (tmp_path / "token").unlink()
            with pytest.raises(PeerError, match=str(tmp_path / "token")):
                access.client(session, "http://127.0.0.1:1")
    finally:
        for runner in runners:
            await runner.cleanup()


# -- options


def access_of(*options: str) -> AccessConfig:
    return read_access(make_parser().parse_args(list(options)))


def test_options() -> None:
    assert access_of() == AccessConfig()
    empty = ("--listen-https", "--listen-pg-tenant-only", "--pg-auth-public-key-path", "--http-auth-public-key-path")
    more = ("--pg-tenant-only-auth-public-key-path", "--auth-token-path", "--ssl-ca-file")
    assert access_of(*(text for option in (*empty, *more) for text in (option, ""))) == AccessConfig()
    config = access_of("--listen-https", "h:1", "--listen-pg-tenant-only", "t:2", "--ssl-cert-reload-period", "500ms")
    assert (config.listen_https, config.https_connstr, config.listen_pg_tenant_only) == (("h", 1), "h:1", ("t", 2))
    assert config.ssl_cert_reload_period_s == 0.5
    # Neon's development tool gives the key of the second port also when there is no such port
    assert access_of("--pg-tenant-only-auth-public-key-path", "k").pg_tenant_only_auth_public_key_path == Path("k")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--listen-https", "7677"], "--listen-https: '7677'"),
        (["--listen-pg-tenant-only", "x"], "--listen-pg-tenant-only: 'x'"),
        (["--ssl-cert-reload-period", "0s"], "longer than 0"),
        (["--ssl-cert-reload-period", "soon"], "--ssl-cert-reload-period: 'soon'"),
        (["--listen-pg-tenant-only", "h:1", "--pg-auth-public-key-path", "k"], "open to everybody"),
    ],
)
def test_wrong_options(options: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        access_of(*options)

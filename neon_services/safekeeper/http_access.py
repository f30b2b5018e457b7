"""Tokens at the HTTP API: which endpoint needs which scope.

Invariant: what is not in the table is refused as soon as tokens are checked at all. A token of a tenant opens the endpoints
of its own tenant, which the path names, or for the one that has no such path the body.
"""

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any

from aiohttp import web

from neon_services.ground.auth import Claims, InvalidToken, KeyRing, PermissionDenied, Scope, bearer_token
from neon_services.ground.http import json_response, read_json_object, require_field
from neon_services.ground.ids import TenantId
from neon_services.safekeeper.http_fields import TIMELINE_PATH, parse_id

Endpoint = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Needs(Enum):
    """What an endpoint asks of its caller."""

    NOTHING = "nothing"
    TENANT = "a token of the tenant, or of scope safekeeperdata"
    SAFEKEEPER = "a token of scope safekeeperdata"


NEEDS: dict[tuple[str, str], Needs] = {
    ("GET", "/metrics"): Needs.NOTHING,
    ("GET", "/profile/cpu"): Needs.NOTHING,
    ("GET", "/profile/heap"): Needs.NOTHING,
    ("GET", "/v1/openapi.json"): Needs.NOTHING,
    ("GET", "/v1/status"): Needs.NOTHING,
    ("PUT", "/v1/failpoints"): Needs.SAFEKEEPER,
    ("GET", "/v1/utilization"): Needs.SAFEKEEPER,
    ("GET", "/v1/debug/filesystem_usage"): Needs.SAFEKEEPER,
    ("GET", "/v1/debug_dump"): Needs.SAFEKEEPER,
    ("POST", "/v1/tenant/timeline"): Needs.TENANT,
    ("GET", "/v1/tenant/timeline"): Needs.SAFEKEEPER,
    ("DELETE", "/v1/tenant/{tenant_id}"): Needs.TENANT,
    ("GET", TIMELINE_PATH): Needs.TENANT,
    ("DELETE", TIMELINE_PATH): Needs.TENANT,
    ("PUT", TIMELINE_PATH + "/membership"): Needs.TENANT,
    ("PUT", TIMELINE_PATH + "/exclude"): Needs.TENANT,
    ("GET", TIMELINE_PATH + "/snapshot/{destination_id}"): Needs.TENANT,
    ("POST", "/v1/pull_timeline"): Needs.SAFEKEEPER,
    ("POST", "/v1/tenant/{tenant_id}/timeline/{source_timeline_id}/copy"): Needs.SAFEKEEPER,
    ("PATCH", TIMELINE_PATH + "/control_file"): Needs.SAFEKEEPER,
    ("POST", TIMELINE_PATH + "/checkpoint"): Needs.SAFEKEEPER,
    ("GET", TIMELINE_PATH + "/digest"): Needs.TENANT,
    ("POST", TIMELINE_PATH + "/backup_partial_reset"): Needs.TENANT,
    ("POST", TIMELINE_PATH + "/term_bump"): Needs.TENANT,
    ("POST", "/v1/record_safekeeper_info/{tenant_id}/{timeline_id}"): Needs.TENANT,
}


def needs(method: str, path: str) -> Needs | None:
    """What a route needs; None: nobody has said, so nobody may. HEAD is GET without a body."""
    return NEEDS.get(("GET" if method == "HEAD" else method, path))


class HttpAccess:
    """Checks the tokens of requests."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def middleware(self) -> Any:
        """The aiohttp middleware; it belongs inside the one that turns errors into answers."""

        @web.middleware
        async def check(request: web.Request, handler: Endpoint) -> web.StreamResponse:
            try:
                await self._check(request)
            except InvalidToken as error:
                refusal = json_response({"msg": str(error)}, 401)
                refusal.headers["WWW-Authenticate"] = "Bearer"
                return refusal
            except PermissionDenied as error:
                return json_response({"msg": str(error)}, 403)
            return await handler(request)

        return check

    async def _check(self, request: web.Request) -> None:
        """Raises InvalidToken, PermissionDenied, or ApiError for a body that names no tenant."""
        if request.match_info.http_exception is not None:
            return  # no such path or method: the answer says just that
        resource = request.match_info.route.resource
        needed = None if resource is None else needs(request.method, resource.canonical)
        if needed is Needs.NOTHING:
            return
        claims = self._keys.check(bearer_token(request.headers.get("Authorization")))
        if needed is None:
            raise PermissionDenied("this endpoint is closed: it says nowhere which tokens may use it")
        if claims.scope is Scope.SAFEKEEPER_DATA:
            return
        if claims.scope is not Scope.TENANT:
            raise PermissionDenied(f"a token of scope {claims.scope} is not for safekeepers")
        if needed is not Needs.TENANT:
            raise PermissionDenied("this endpoint needs a token of scope safekeeperdata")
        await self._check_tenant(request, claims)

    async def _check_tenant(self, request: web.Request, claims: Claims) -> None:
        named = request.match_info.get("tenant_id")
        if named is None:  # the body stays readable for the handler
            named = require_field(await read_json_object(request), "tenant_id", str)
        if claims.tenant_id != parse_id(TenantId, named, "tenant_id"):
            raise PermissionDenied("the token is for another tenant")

"""compute_ctl's two HTTP servers: the external one for whoever runs the fleet, the internal one for Postgres itself.

Errors are ``{"error": ...}``; a request that does not fit the status is 412. Without configured keys, only requests from
this machine may change anything.
"""

import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import prometheus_client
from aiohttp import web

from neon_services.compute.apply_spec import check_writability
from neon_services.compute.node import ComputeNode
from neon_services.compute.spec import parse_config
from neon_services.compute.status import TERMINATING, Status, WrongStatus
from neon_services.compute.tokens import TokenError, TokenVerifier
from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.http import MAX_BODY_BYTES, metrics_handler
from neon_services.ground.lsn import format_lsn

log = logging.getLogger(__name__)

_OPEN_PATHS = frozenset({"/metrics", "/autoscaling_metrics"})
_HARMLESS = frozenset({"/status", "/metrics.json"})

_up = prometheus_client.Gauge("compute_ctl_up", "Whether compute_ctl runs, by status", ["status"])
_commit_lsn = prometheus_client.Gauge("compute_ctl_commit_lsn", "The last LSN that the safekeepers have committed")
_start_ms = prometheus_client.Gauge("compute_ctl_startup_ms", "Duration of the parts of the start", ["part"])


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(value), status=status, content_type="application/json")


@web.middleware
async def errors(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Every error as ``{"error": ...}``."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _json({"error": error.text or error.reason}, error.status)
    except WrongStatus as error:
        return _json({"error": str(error)}, 412)
    except TokenError as error:
        return _json({"error": str(error)}, error.status)
    except ConfigError as error:
        return _json({"error": str(error)}, 400)
    except (NeonError, OSError) as error:
        log.error("%s %s: %s", request.method, request.path, error)
        return _json({"error": str(error)}, 500)
    except Exception as error:
        log.exception("%s %s", request.method, request.path)
        return _json({"error": f"internal error: {type(error).__name__}: {error}"}, 500)


def _is_local(request: web.Request) -> bool:
    try:
        return request.remote is None or ipaddress.ip_address(request.remote.split("%")[0]).is_loopback
    except ValueError:
        return False


class ExternalApi:
    """The API on ``--external-http-port``."""

    def __init__(self, node: ComputeNode, verifier: TokenVerifier | None) -> None:
        self._node = node
        self._verifier = verifier

    def application(self) -> web.Application:
        """The aiohttp application."""
        application = web.Application(middlewares=[errors, self._authorize], client_max_size=MAX_BODY_BYTES)
        router = application.router
        router.add_get("/status", self._status)
        router.add_post("/configure", self._configure)
        router.add_post("/terminate", self._terminate)
        router.add_post("/check_writability", self._check_writability)
        router.add_get("/metrics", self._metrics)
        router.add_get("/metrics.json", self._metrics_json)
        return application

    @web.middleware
    async def _authorize(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path not in _OPEN_PATHS:
            if self._verifier is not None:
                self._verifier.check(request.headers.get("Authorization"))
            elif request.path not in _HARMLESS and not _is_local(request):
                raise TokenError(403, "no keys are configured (compute_ctl_config.jwks): only this machine may ask for that")
        return await handler(request)

    def _describe(self) -> dict[str, str | None]:
        ttid = self._node.spec.ttid
        return self._node.status.describe(str(ttid.tenant_id), str(ttid.timeline_id))

    async def _status(self, _: web.Request) -> web.Response:
        return _json(self._describe())

    async def _configure(self, request: web.Request) -> web.Response:
        try:
            body = json.loads(await request.text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"the body is not JSON: {error}") from None
        if self._node.status.current is not Status.RUNNING:
            raise WrongStatus(f"invalid compute status for configuration request: {self._node.status.current.value}")
        await self._node.reconfigure(parse_config(body).spec)
        return _json(self._describe())

    async def _terminate(self, request: web.Request) -> web.Response:
        mode = request.query.get("mode", "fast")
        if mode not in ("fast", "immediate"):
            raise ConfigError(f"mode: {mode!r} is neither fast nor immediate")
        node = self._node
        if node.status.current is Status.TERMINATED:
            return _json({"lsn": _text(node)}, 201)
        already = node.status.current in TERMINATING
        node.request_stop(mode, by_http=True)
        await node.finished
        return _json({"lsn": _text(node)}, 201 if already else 200)

    async def _check_writability(self, _: web.Request) -> web.Response:
        node = self._node
        if node.status.current is not Status.RUNNING or node.settings is None:
            raise WrongStatus(f"invalid compute status for check_writability request: {node.status.current.value}")
        await check_writability(node.settings.socket_directory, node.settings.port)
        return _json(True)

    async def _metrics(self, request: web.Request) -> web.Response:
        _up.clear()
        _up.labels(self._node.status.current.value).set(1)
        _commit_lsn.set(self._node.commit_lsn)
        for part, value in self._node.times.describe().items():
            if part.endswith("_ms"):
                _start_ms.labels(part.removesuffix("_ms")).set(value)
        return await metrics_handler(request)

    async def _metrics_json(self, _: web.Request) -> web.Response:
        return _json(self._node.times.describe())


def _text(node: ComputeNode) -> str | None:
    return format_lsn(node.final_lsn) if node.final_lsn else None


def internal_application(node: ComputeNode) -> web.Application:
    """The API on ``--internal-http-port``: only for programs on this machine."""

    async def status(_: web.Request) -> web.Response:
        return _json({"status": node.status.current.value})

    @web.middleware
    async def local_only(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not _is_local(request):
            raise TokenError(403, "the internal API is for this machine only")
        return await handler(request)

    application = web.Application(middlewares=[errors, local_only], client_max_size=MAX_BODY_BYTES)
    application.router.add_get("/status", status)
    return application

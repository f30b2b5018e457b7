"""The shape of every HTTP API here: JSON bodies, ``{"msg": ...}`` errors, bounded input, `/metrics`.

Neon's convention: an error is ``{"msg": "..."}`` with a fitting status; an empty success body is JSON ``null``.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import prometheus_client
from aiohttp import web

from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.tls import ServerTls

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 1024 * 1024
KEEPALIVE_TIMEOUT_S = 75.0  # also for who connects and says nothing
SHUTDOWN_TIMEOUT_S = 5.0  # for requests that run when the process ends


class ApiError(NeonError):
    """An error with an HTTP status; its text goes to the client as ``msg``."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def json_response(value: Any, status: int = 200) -> web.Response:
    """Answer with a JSON value; None becomes ``null``."""
    return web.Response(text=json.dumps(value), status=status, content_type="application/json")


@web.middleware
async def error_middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn every error into Neon's JSON error body; unexpected ones are logged with their stack and become 500."""
    try:
        return await handler(request)
    except ApiError as error:
        return json_response({"msg": str(error)}, error.status)
    except web.HTTPException as error:
        return json_response({"msg": error.text or error.reason}, error.status)
    except (ConfigError, ValueError) as error:
        return json_response({"msg": str(error)}, 400)
    except NeonError as error:
        log.error("%s %s: %s", request.method, request.path, error)
        return json_response({"msg": str(error)}, 500)
    except Exception as error:
        log.exception("%s %s", request.method, request.path)
        return json_response({"msg": f"internal error: {type(error).__name__}: {error}"}, 500)


async def read_json_object(request: web.Request) -> dict[str, Any]:
    """The request's body as a JSON object. Raises ApiError 400 that says what is wrong with it."""
    try:
        body = json.loads(await request.read())
    except RecursionError as error:
        raise ApiError(400, "the body is not JSON that is fit to read: it is nested too deeply") from error
    except ValueError as error:  # bad JSON, bad UTF-8, a number with thousands of digits
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(body).__name__}")
    return body


def require_field(body: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of a JSON object. Raises ApiError 400 naming the field when it is missing or of another type."""
    if name not in body or body[name] is None:
        raise ApiError(400, f"field {name!r} is missing")
    return _checked(body, name, kind)


def optional_field(body: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """A field that may be absent or null. Raises ApiError 400 naming the field when it is of another type."""
    if body.get(name) is None:
        return default
    return _checked(body, name, kind)


def _checked(body: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = body[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(k.__name__ for k in kinds)
        raise ApiError(400, f"field {name!r} must be {expected}, not {type(value).__name__}")
    return value


async def metrics_handler(_: web.Request) -> web.Response:
    """Prometheus text of the process's default registry."""
    return web.Response(
        body=prometheus_client.generate_latest(), headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
    )


def make_application(metrics: Callable[[web.Request], Awaitable[web.Response]] = metrics_handler) -> web.Application:
    """An application with the error middleware, a bounded body size and `GET /metrics`."""
    application = web.Application(middlewares=[error_middleware], client_max_size=MAX_BODY_BYTES)
    application.router.add_get("/metrics", metrics)
    return application


async def serve(application: web.Application, host: str, port: int) -> web.AppRunner:
    """Start listening; the caller stops it with ``await runner.cleanup()``. Raises OSError when the port is taken."""
    runner = web.AppRunner(
        application, access_log=None, keepalive_timeout=KEEPALIVE_TIMEOUT_S, shutdown_timeout=SHUTDOWN_TIMEOUT_S
    )
    await runner.setup()
    await web.TCPSite(runner, host, port, reuse_address=True).start()
    return runner


async def serve_tls(runner: web.AppRunner, host: str, port: int, tls: ServerTls) -> None:
    """Let a running server listen with TLS as well. Raises OSError when the port is taken."""
    await web.TCPSite(runner, host, port, reuse_address=True, ssl_context=tls.listening).start()

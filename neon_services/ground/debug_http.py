"""The endpoints that every service has for those who look into it: failpoints and profiles, with Neon's paths and limits.

Invariant: one CPU profile at a time, for at most a minute, so that asking for profiles cannot wear a service down.
"""

import asyncio
import json
from typing import Any

from aiohttp import web

from neon_services.ground import failpoints
from neon_services.ground.http import ApiError, json_response
from neon_services.ground.profiling import CpuProfiler, HeapProfilingOff, heap_profile

DEFAULT_SECONDS, MAX_SECONDS = 5, 60
DEFAULT_FREQUENCY_HZ, MAX_FREQUENCY_HZ = 99, 1000


def _number(request: web.Request, name: str, default: int, most: int, unit: str) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= most):
        raise ApiError(400, f"query parameter {name!r} must be 1 to {most} {unit}, not {text[:80]!r}")
    return int(text)


def _check_format(request: web.Request) -> None:
    wanted = request.query.get("format", "pprof")
    if wanted != "pprof":
        raise ApiError(400, f"query parameter 'format' must be pprof, not {wanted[:80]!r}: pprof itself draws pictures")


def _file(content: bytes, name: str) -> web.Response:
    disposition = f'attachment; filename="{name}"'
    return web.Response(body=content, content_type="application/octet-stream", headers={"Content-Disposition": disposition})


class DebugApi:
    """The endpoints."""

    def __init__(self) -> None:
        self._profiler: CpuProfiler | None = None
        self._free = asyncio.Event()
        self._free.set()

    @property
    def profiling(self) -> bool:
        """Whether a CPU profile is under way."""
        return self._profiler is not None

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Register everything."""
        router.add_put("/v1/failpoints", self.failpoints)
        router.add_get("/profile/cpu", self.profile_cpu, allow_head=False)
        router.add_get("/profile/heap", self.profile_heap, allow_head=False)

    async def failpoints(self, request: web.Request) -> web.Response:
        """PUT /v1/failpoints: ``[{"name": ..., "actions": ...}]``. All of them are set, or with status 400 none."""
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON that is fit to read: {error}") from error
        if not isinstance(body, list):
            raise ApiError(400, f"the body must be a list of failpoints, not {type(body).__name__}")
        failpoints.configure([_setting(number, value) for number, value in enumerate(body)])
        return json_response(None)

    async def profile_cpu(self, request: web.Request) -> web.Response:
        """GET /profile/cpu: pprof of the next ``seconds``; ``force`` ends a profile that is under way."""
        _check_format(request)
        seconds = _number(request, "seconds", DEFAULT_SECONDS, MAX_SECONDS, "seconds")
        frequency = _number(request, "frequency", DEFAULT_FREQUENCY_HZ, MAX_FREQUENCY_HZ, "Hz")
        force = request.query.get("force", "false")
        if force not in ("true", "false"):
            raise ApiError(400, f"query parameter 'force' must be true or false, not {force[:80]!r}")
        while self._profiler is not None:
            if force != "true":
                raise ApiError(409, "profiler already running (use ?force=true to cancel it)")
            self._profiler.stop()
            await self._free.wait()
        self._free.clear()
        self._profiler = profiler = CpuProfiler(seconds, frequency)
        try:
            return _file(await profiler.run(), "profile.pb.gz")
        finally:  # also when the client has gone
            profiler.stop()
            self._profiler = None
            self._free.set()

    async def profile_heap(self, request: web.Request) -> web.Response:
        """GET /profile/heap: pprof of what is allocated now; 412 (Neon: 500) when the process does not trace its memory."""
        _check_format(request)
        try:
            return _file(await asyncio.to_thread(heap_profile), "heap.pb.gz")
        except HeapProfilingOff as error:
            raise ApiError(412, str(error)) from error


def _setting(number: int, value: Any) -> tuple[str, str]:
    if not isinstance(value, dict):
        raise ApiError(400, f"failpoint {number} must be an object with name and actions, not {type(value).__name__}")
    for name in ("name", "actions"):
        if not isinstance(value.get(name), str):
            raise ApiError(400, f"failpoint {number}: field {name!r} must be a string")
    return value["name"], value["actions"]

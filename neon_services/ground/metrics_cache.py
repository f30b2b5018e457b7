"""``GET /metrics`` of a service with so many metrics that collecting them for everybody who asks is too much.

Neon's rule: with ``--force-metric-collection-on-scrape false`` metrics are collected every 30 s, and a scrape gets the last
collection; the query parameter ``use_latest`` asks for a new one (true) or the last one (false), whatever the option says.
"""

import asyncio

import prometheus_client
from aiohttp import web

from neon_services.ground.http import ApiError

INTERVAL_S = 30.0


class MetricsCache:
    """The last collection, and who serves it."""

    def __init__(self, *, collect_on_scrape: bool = True) -> None:
        self._collect_on_scrape = collect_on_scrape
        self._last: bytes | None = None

    async def run(self, interval_s: float = INTERVAL_S) -> None:
        """Collect now and then until cancelled."""
        while True:
            self._last = prometheus_client.generate_latest()
            await asyncio.sleep(interval_s)

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        wanted = request.query.get("use_latest")
        if wanted not in (None, "true", "false"):
            raise ApiError(400, f"query parameter 'use_latest' must be true or false, not {wanted[:80]!r}")
        collect = self._collect_on_scrape if wanted is None else wanted == "true"
        content = None if collect else self._last
        if content is None:
            content = prometheus_client.generate_latest()
        return web.Response(body=content, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

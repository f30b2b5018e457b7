"""JSON over HTTP to the services, with the errors that they and the network give.

Invariant: an answer that is no success is an ApiError that names the request and the service's own message; it is never lost.
"""

import json
import time
import urllib.error
import urllib.request
from typing import Any


class ApiError(Exception):
    """The service refused (``status`` says how) or could not be reached (``status`` is None)."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """One service's HTTP API. Never uses a proxy: services are reached directly."""

    def __init__(self, endpoint: str, timeout_s: float = 60) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request and return the JSON of its answer. Raises ApiError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.endpoint}{path}", data=data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            raise ApiError(f"{method} {self.endpoint}{path}: {error.code} {_message(error.read())}", error.code) from error
        except OSError as error:
            raise ApiError(f"{method} {self.endpoint}{path}: {getattr(error, 'reason', None) or error}") from error
        try:
            return json.loads(content) if content.strip() else None
        except ValueError as error:
            raise ApiError(f"{method} {self.endpoint}{path}: the answer is no JSON: {content[:200]!r}") from error

    def find(self, path: str, *, patience_s: float = 60) -> Any:
        """The object at a path, or None when there is none (404). Raises ApiError for anything else.

        Waits for a service that is starting or busy: what it has is not known yet.
        """
        try:
            return self.call_patiently("GET", path, patience_s=patience_s)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def call_patiently(self, method: str, path: str, body: Any = None, *, patience_s: float) -> Any:
        """Like ``call``, but tries again while the service is busy, starting (429, 503) or not reachable yet."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return self.call(method, path, body)
            except ApiError as error:
                if error.status not in (None, 429, 503) or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["msg"])
    except (ValueError, KeyError, TypeError):
        return content[:500].decode(errors="replace")

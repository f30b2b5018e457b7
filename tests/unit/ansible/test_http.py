"""JSON over HTTP: answers, refusals by name, and patience with a service that is starting."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest


class Service:
    """A server that gives the prepared answers in order, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self.requests: list[tuple[str, str, object]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                service.requests.append((self.command, self.path, json.loads(content) if content else None))
                status, body = service.answers.pop(0) if len(service.answers) > 1 else service.answers[0]
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = _answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    thread = threading.Thread(target=running.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.server.shutdown()
    thread.join()
    running.server.server_close()


@pytest.fixture(scope="module")
def http(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("module_utils/neon_http.py")


def test_a_request_and_its_answer(http: ModuleType, service: Service) -> None:
    service.answers = [(200, b'{"id": 1}'), (200, b"")]
    api = http.Api(service.url + "/")
    assert api.call("PUT", "/v1/x", {"a": [1]}) == {"id": 1}
    assert api.call("GET", "/v1/y") is None
    assert service.requests == [("PUT", "/v1/x", {"a": [1]}), ("GET", "/v1/y", None)]


def test_a_refusal_carries_the_services_own_words(http: ModuleType, service: Service) -> None:
    service.answers = [(409, b'{"msg": "not now"}')]
    with pytest.raises(http.ApiError, match="409 not now") as raised:
        http.Api(service.url).call("POST", "/v1/x", {})
    assert raised.value.status == 409


def test_absent_is_none_and_other_errors_are_not(http: ModuleType, service: Service) -> None:
    service.answers = [(404, b'{"msg": "no such tenant"}'), (500, b"broken")]
    api = http.Api(service.url)
    assert api.find("/v1/x") is None
    with pytest.raises(http.ApiError, match="500 broken"):
        api.find("/v1/x")


def test_a_service_that_is_starting_is_waited_for(http: ModuleType, service: Service) -> None:
    service.answers = [(503, b'{"msg": "attaching"}'), (200, b'{"state": "Active"}')]
    assert http.Api(service.url).find("/v1/x") == {"state": "Active"}
    service.answers = [(503, b'{"msg": "attaching"}')]
    with pytest.raises(http.ApiError, match="attaching"):
        http.Api(service.url).find("/v1/x", patience_s=0)


def test_nobody_there_and_no_json(http: ModuleType, service: Service) -> None:
    service.answers = [(200, b"<html>")]
    with pytest.raises(http.ApiError, match="no JSON"):
        http.Api(service.url).call("GET", "/")
    with pytest.raises(http.ApiError, match=r"127\.0\.0\.1:1") as raised:
        http.Api("http://127.0.0.1:1", timeout_s=2).call("GET", "/")
    assert raised.value.status is None

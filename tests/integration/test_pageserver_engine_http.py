"""The management API over HTTP, on the real engine with a fake bootstrap."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from neon_services.ground import http
from neon_services.ground.ids import TenantId, TimelineId
from neon_services.pageserver import http_api
from neon_services.pageserver.http_api import ManagementApi
from tests.unit.pageserver.engine_fixtures import Engine


class Api:
    """A client of one server."""

    def __init__(self, session: aiohttp.ClientSession, base: str, engine: Engine) -> None:
        self.session = session
        self.base = base
        self.engine = engine

    async def call(self, method: str, path: str, body: Any = None, expect: int = 200) -> Any:
        async with self.session.request(method, self.base + path, json=body) as answer:
            assert answer.status == expect, f"{method} {path}: {answer.status} {await answer.text()}"
            assert answer.headers["PAGESERVER_LAUNCH_TIMESTAMP"]
            if answer.content_type != "application/json":
                return await answer.read()
            return await answer.json()


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    engine = Engine(tmp_path)
    application = ManagementApi(engine.tenants, engine.services, 7, 15).application
    runner = await http.serve(application, "127.0.0.1", 0)
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session:
        yield Api(session, f"http://127.0.0.1:{port}/v1", engine)
    await runner.cleanup()
    await engine.tenants.shutdown()


async def test_tenant_and_timeline_over_http(api: Api, monkeypatch: pytest.MonkeyPatch):
    tenant, main, branch = TenantId.generate(), TimelineId.generate(), TimelineId.generate()
    assert await api.call("GET", "/status") == {"id": 7}
    await api.call("GET", f"/tenant/{tenant}", expect=404)
    conf = {
        "mode": "AttachedSingle",
        "generation": 1,
        "tenant_conf": {"checkpoint_distance": 1 << 20, "pitr_interval": "1 day"},
    }
    answer = await api.call("PUT", f"/tenant/{tenant}/location_config", conf)
    assert answer["shards"] == [{"shard_id": str(tenant), "node_id": 7}]
    await api.call("PUT", f"/tenant/{tenant}/location_config", conf)
    (shown,) = (await api.call("GET", "/location_config"))["tenant_shards"]
    assert shown[0] == str(tenant) and shown[1]["generation"] == 1

    info = await api.call("POST", f"/tenant/{tenant}/timeline", {"new_timeline_id": str(main), "pg_version": 15}, expect=201)
    assert info["state"] == "Active" and info["pg_version"] == 15 and info["last_record_lsn"] == "0/3F0"
    assert info["remote_consistent_lsn"] == info["remote_consistent_lsn_visible"] == info["disk_consistent_lsn"] == "0/3F0"
    body = {"new_timeline_id": str(branch), "ancestor_timeline_id": str(main)}
    info = await api.call("POST", f"/tenant/{tenant}/timeline", body, expect=201)
    assert (info["ancestor_timeline_id"], info["ancestor_lsn"]) == (str(main), "0/3F0")
    assert len(await api.call("GET", f"/tenant/{tenant}/timeline")) == 2
    detail = await api.call("GET", f"/tenant/{tenant}")
    assert detail["state"] == {"slug": "Active"} and detail["timelines"] == sorted([str(main), str(branch)])
    assert [t["id"] for t in await api.call("GET", "/tenant")] == [str(tenant)]

    base = f"/tenant/{tenant}/timeline/{main}"
    await api.call("PUT", base + "/checkpoint?force_image_layer_creation=true&wait_until_uploaded=true")
    layers = (await api.call("GET", base + "/layer"))["historic_layers"]
    assert [(layer["kind"], layer["remote"]) for layer in layers] == [("Delta", False), ("Image", False)]
    name = layers[1]["layer_file_name"]
    for status in (200, 304):
        await api.call("DELETE", f"{base}/layer/{name}", expect=status)
    assert await api.call("GET", base + "/getpage?key=" + "0" * 36) == b"initdb"
    assert api.engine.environment.downloads == 1
    await api.call("GET", f"{base}/layer/{name}", expect=304)
    await api.call("GET", base + "/getpage?key=" + "0" * 35 + "9", expect=404)
    monkeypatch.setattr(http_api, "READ_WAIT_LSN_TIMEOUT_S", 0.01)
    assert await api.call("GET", base + "/getpage?lsn=0/3F0&key=" + "0" * 36) == b"initdb"
    for late in ("/getpage?lsn=0/3F8&key=" + "0" * 36, "/keyspace?at_lsn=0/3F8"):
        assert "did not reach 0/3F8" in (await api.call("GET", base + late, expect=503))["msg"]
    assert (await api.call("GET", base + "/keyspace"))["keys"] == [["0" * 36, "0" * 35 + "2"]]

    await api.call("DELETE", base, expect=412)
    await api.call("DELETE", f"/tenant/{tenant}/timeline/{branch}", expect=202)
    await api.call("PUT", f"/tenant/{tenant}/location_config", {"mode": "Detached", "tenant_conf": {}})
    await api.call("GET", f"/tenant/{tenant}", expect=404)


async def test_tenant_config_is_checked_and_kept(api: Api, tmp_path: Path):
    tenant = TenantId.generate()
    conf = {"mode": "AttachedSingle", "generation": 1, "tenant_conf": {}}
    await api.call("PUT", f"/tenant/{tenant}/location_config", conf)
    await api.call("PUT", "/tenant/config", {"tenant_id": str(tenant), "gc_horizon": 5, "gc_period": "10s"})
    await api.call("PATCH", "/tenant/config", {"tenant_id": str(tenant), "gc_horizon": None, "compaction_threshold": 3})
    shown = await api.call("GET", f"/tenant/{tenant}/config")
    assert shown["tenant_specific_overrides"] == {"gc_period": "10s", "compaction_threshold": 3}
    assert shown["effective_config"]["gc_horizon"] == 64 << 20
    for bad in ({"nonsense": 1}, {"gc_horizon": "x"}, {"gc_period": "soon"}, {"gc_horizon": True}):
        message = await api.call("PUT", "/tenant/config", {"tenant_id": str(tenant), **bad}, expect=400)
        assert next(iter(bad)) in message["msg"]
    await api.engine.crash()
    again = Engine(tmp_path)
    again.tenants.start()
    (restarted,) = again.tenants.tenants.values()
    assert restarted.conf.tenant_conf == {"gc_period": "10s", "compaction_threshold": 3}
    await again.crash()


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"mode": "AttachedSingle", "tenant_conf": {}}, "needs a generation"),
        ({"mode": "Attached", "generation": 1, "tenant_conf": {}}, "mode must be one of"),
        ({"mode": "AttachedSingle", "generation": 1}, "'tenant_conf' is missing"),
        ({"mode": "Secondary", "generation": 1, "tenant_conf": {}}, "no generation"),
        ({"mode": "AttachedSingle", "generation": -1, "tenant_conf": {}}, "generation"),
        ({"mode": "AttachedSingle", "generation": 1, "tenant_conf": {"x": 1}}, "unknown field 'x'"),
        ([], "must be a JSON object"),
    ],
)
async def test_bad_location_config_is_400_and_says_why(api: Api, body: Any, complaint: str):
    answer = await api.call("PUT", f"/tenant/{TenantId.generate()}/location_config", body, expect=400)
    assert complaint in answer["msg"]


async def test_bad_requests_are_400(api: Api):
    tenant = TenantId.generate()
    await api.call("PUT", f"/tenant/{tenant}/location_config", {"mode": "AttachedSingle", "generation": 1, "tenant_conf": {}})
    for body in ({}, {"new_timeline_id": "xyz"}, {"new_timeline_id": 5}, {"new_timeline_id": "0" * 32, "pg_version": "x"}):
        await api.call("POST", f"/tenant/{tenant}/timeline", body, expect=400)
    await api.call("GET", "/tenant/zz", expect=400)
    await api.call("GET", f"/tenant/{tenant}/timeline/12", expect=400)
    await api.call("GET", f"/tenant/{tenant}/timeline/{TimelineId.generate()}", expect=404)

"""A cluster of safekeepers and a broker that speak TLS and want tokens, among themselves and with their clients."""

import asyncio
import json
import os
import ssl
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import Lsn
from neon_services.ground.tls import ClientTls, SslMode
from neon_services.protocols import broker_messages as bm
from neon_services.protocols.safekeeper_messages import MembershipConfiguration
from neon_services.storage_broker.client import RETRY_INTERVAL_S, BrokerClient, BrokerError
from tests.credentials import Authority
from tests.integration.cluster import LIBRARIES, http
from tests.integration.safekeeper_support import Node, new_ttid, read_stream, until
from tests.integration.secure_support import SecureFleet, SecureNode, secure_fleet
from tests.integration.test_pull_timeline import SEGMENT, START, create, members, present, proposer, pull, refusal
from tests.unit.safekeeper.walmaker import WalMaker

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureFleet]:
    with secure_fleet(tmp_path_factory.mktemp("tls"), 4, "--no-sync", "--peer-recovery", "true") as fleet:
        yield fleet


def make_wal(size: int = 3 * SEGMENT) -> WalMaker:
    return WalMaker(START, SEGMENT).until(START + size, 20_000)


# -- HTTPS and its certificate


async def test_https_beside_http(fleet: SecureFleet, tmp_path: Path) -> None:
    member = fleet.members[0]
    ca_file, token = fleet.authority.ca_file, member.node.token
    assert http("GET", member.https_url + "/v1/status", ca_file=ca_file)["id"] == 1
    assert http("GET", member.https_url + "/v1/utilization", ca_file=ca_file, token=token) == {"timeline_count": 0}
    with pytest.raises(urllib.error.HTTPError) as refused:
        http("GET", member.https_url + "/v1/utilization", ca_file=ca_file)
    assert refused.value.code == 401
    for other in (None, Authority(tmp_path, "other").ca_file):
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            http("GET", member.https_url + "/v1/status", ca_file=other)


def serial_of_https(port: int, authority: Authority) -> int:
    pem = ssl.get_server_certificate(("127.0.0.1", port), ca_certs=str(authority.ca_file), timeout=5)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def openssl(port: int, authority: Authority, *options: str) -> str:
    """What openssl says of a server."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", str(authority.ca_file), *options]
    return subprocess.run(command, input="", capture_output=True, text=True, timeout=20, check=False).stdout


def serial_of_pg(port: int, authority: Authority) -> int:
    said = openssl(port, authority, "-starttls", "postgres", "-showcerts", "-verify_return_error", "-verify_ip", "127.0.0.1")
    assert "Verify return code: 0 (ok)" in said, said
    return x509.load_pem_x509_certificate(said[said.index("-----BEGIN") :].encode()).serial_number


async def test_certificates_are_renewed_while_it_runs(fleet: SecureFleet) -> None:
    member, authority = fleet.members[3], fleet.authority
    node, directory = member.node, member.certificates
    ttid, wal = new_ttid(), make_wal(SEGMENT)
    half = wal.end
    wal.until(START + 3 * SEGMENT, 20_000)
    leader = proposer(ttid, wal, MembershipConfiguration(1, members(node)))
    create(ttid, leader.mconf, [node])
    await leader.elect([node])
    await leader.stream(half)

    def shown() -> set[int]:
        ports = (node.pg_port, member.tenant_port)
        return {serial_of_https(member.https_port, authority), *(serial_of_pg(port, authority) for port in ports)}

    first = shown()
    assert len(first) == 1
    key, certificate, second = authority.issue()
    (directory / "server.crt").write_bytes(certificate)  # without its key
    await until(lambda: "does not belong to the certificate" in node.log.read_text(), "the log to tell of half a change")
    assert shown() == first
    (directory / "server.key").write_bytes(key)
    await until(lambda: shown() == {second}, "the new certificate on all ports")
    (directory / "server.crt").write_bytes(b"nonsense")
    await until(lambda: "not usable" in node.log.read_text(), "the log to tell of the bad certificate")
    assert shown() == {second}
    third = authority.install(directory)
    await until(lambda: shown() == {third}, "the third certificate on all ports")
    await leader.stream(wal.end)  # the connection of the first certificate lives on
    leader.leave()
    assert node.lsn(ttid, "commit_lsn") == wal.end


# -- the WAL service


async def test_the_wal_service_speaks_only_tls(fleet: SecureFleet, tmp_path: Path) -> None:
    member = fleet.members[0]
    node, ttid = member.node, new_ttid()
    for port in (node.pg_port, member.tenant_port):
        said = openssl(port, fleet.authority, "-starttls", "postgres", "-brief")
        assert "Verification error" not in said
    for how in (None, ClientTls(SslMode.DISABLE)):
        node.pg_tls, kept = how, node.pg_tls
        try:
            with pytest.raises(NeonError, match="must connect with TLS"):
                await node.connect(ttid)
        finally:
            node.pg_tls = kept
    node.pg_tls, kept = ClientTls(SslMode.PREFER, Authority(tmp_path, "other").ca_file), node.pg_tls
    try:
        with pytest.raises(ConnectionError, match="not trusted"):
            await node.connect(ttid)
    finally:
        node.pg_tls = kept


async def test_wal_goes_in_and_out_through_tls(fleet: SecureFleet) -> None:
    nodes = fleet.fleet.nodes[:3]
    ttid, wal = new_ttid(), make_wal()
    leader = proposer(ttid, wal, MembershipConfiguration(1, members(*nodes)))
    create(ttid, leader.mconf, nodes)
    await leader.elect(nodes)
    await leader.stream(wal.end)
    leader.leave()
    for node in nodes:
        client = await node.connect(ttid, "pageserver-1")
        assert await read_stream(client, START, wal.end) == bytes(wal.data)
        client.abort()


# -- among safekeepers


async def test_peers_find_each_other_through_the_broker(fleet: SecureFleet) -> None:
    nodes = fleet.fleet.nodes[:3]
    ttid, wal = new_ttid(), make_wal(SEGMENT)
    leader = proposer(ttid, wal, MembershipConfiguration(1, members(*nodes)))
    create(ttid, leader.mconf, nodes)
    await leader.elect(nodes)
    await leader.stream(wal.end)

    def peers() -> dict[int, str]:
        return {peer["sk_id"]: peer["https_connstr"] for peer in nodes[0].status(ttid)["peers"]}

    expected = {member.node.id: f"127.0.0.1:{member.https_port}" for member in fleet.members[:3]}
    await until(lambda: peers() == expected, "all peers with their HTTPS addresses")
    leader.leave()


async def test_peer_recovery_with_tokens_and_tls(fleet: SecureFleet) -> None:
    nodes = fleet.fleet.nodes[:3]
    ttid, wal = new_ttid(), make_wal()
    leader = proposer(ttid, wal, MembershipConfiguration(1, members(*nodes)))
    create(ttid, leader.mconf, nodes)
    await leader.elect(nodes[:2])
    await leader.stream(wal.end)
    leader.leave()
    lagging = nodes[2]
    await until(lambda: lagging.lsn(ttid, "commit_lsn") == wal.end, "the lagging member to catch up from its peers", 30)
    assert lagging.digest(ttid, START, wal.end) == nodes[0].digest(ttid, START, wal.end)


async def test_pull_timeline_by_https(fleet: SecureFleet, tmp_path: Path) -> None:
    nodes = fleet.fleet.nodes
    ttid, wal = new_ttid(), make_wal()
    old = MembershipConfiguration(1, members(*nodes[:3]))
    leader = proposer(ttid, wal, old)
    create(ttid, old, nodes[:3])
    await leader.elect(nodes[:3])
    await leader.stream(wal.end)
    leader.leave()
    target, hosts = nodes[3], [member.https_url for member in fleet.members[:3]]
    new = MembershipConfiguration(2, members(*nodes[1:]))
    token_file = fleet.base / "token"
    good = token_file.read_text()

    def attempt() -> str:
        return pull(target, ttid, hosts, new)

    try:
        for bad, expected in (
            (fleet.key.token("pageserverapi"), "412"),
            (fleet.key.expired("safekeeperdata"), "412"),
            ("", "500"),
        ):
            token_file.write_text(bad)  # read anew for each pull
            status, text = await asyncio.to_thread(refusal, attempt)
            assert str(status) == expected, text
            assert good.strip() not in text and (not bad or bad not in text)
            assert not present(target, ttid)
        assert str(token_file) in text
    finally:
        token_file.write_text(good)
    wrong_authority = fleet.authority.ca_file.read_bytes()
    fleet.authority.ca_file.write_bytes(Authority(tmp_path, "other").ca_file.read_bytes())
    try:
        status, text = await asyncio.to_thread(refusal, attempt)
        assert status == 412 and "3 are needed" not in text and "gave its status" in text
    finally:
        fleet.authority.ca_file.write_bytes(wrong_authority)
    assert not present(target, ttid)
    assert await asyncio.to_thread(attempt) in hosts
    assert target.digest(ttid, START, wal.end) == nodes[0].digest(ttid, START, wal.end)


async def test_migrate_takes_its_token_from_the_environment(fleet: SecureFleet, tmp_path: Path) -> None:
    nodes = fleet.fleet.nodes
    ttid, wal = new_ttid(), make_wal()
    leader = proposer(ttid, wal, MembershipConfiguration(1, members(*nodes[:3])))
    create(ttid, leader.mconf, nodes[:3])
    await leader.elect(nodes[:3])
    await leader.stream(wal.end)
    leader.leave()
    row = tmp_path / "row.json"
    row.write_text(json.dumps(make_row(fleet.members, ttid)))
    (tmp_path / "token").write_text(fleet.key.token("safekeeperdata"))

    def migrate(to: str, token: str | None, *options: str) -> tuple[int, str]:
        argv = [sys.executable, "-m", "neon_services.safekeeper.migrate", "--row", str(row), "--to", to]
        argv += ["--ssl-ca-file", str(fleet.authority.ca_file), "--timeout", "20s", *options]
        environment = {**os.environ, "NEON_LIB_DIR": str(LIBRARIES)} | (
            {} if token is None else {"SAFEKEEPER_AUTH_TOKEN": token}
        )
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    for token, expected in (
        (None, "401 missing authorization token"),
        (fleet.key.expired("safekeeperdata"), "401 the token has expired"),
        (fleet.key.token("pageserverapi"), "403 a token of scope pageserverapi"),
    ):
        code, text = await asyncio.to_thread(migrate, "2,3,4", token)
        assert code == 2 and expected in text, text
        assert token is None or token not in text
    code, text = await asyncio.to_thread(migrate, "2,3,4", fleet.key.token("safekeeperdata"))
    assert code == 0, text
    assert not present(nodes[0], ttid)
    assert nodes[3].digest(ttid, START, wal.end) == nodes[1].digest(ttid, START, wal.end)
    code, text = await asyncio.to_thread(migrate, "1,2,3", None, "--auth-token-path", str(tmp_path / "token"))
    assert code == 0, text
    assert present(nodes[0], ttid) and not present(nodes[3], ttid)


def make_row(secure: list[SecureNode], ttid: object) -> dict[str, object]:
    def entry(member: SecureNode) -> dict[str, object]:
        node: Node = member.node
        return {"id": node.id, "host": "127.0.0.1", "pg_port": node.pg_port, "http_url": member.https_url}

    tenant, timeline = str(ttid).split("/")
    return {
        "tenant_id": tenant,
        "timeline_id": timeline,
        "generation": 1,
        "sk_set": [1, 2, 3],
        "new_sk_set": None,
        "pending_exclude": [],
        "safekeepers": [entry(member) for member in secure],
    }


# -- the broker


def info(ttid: object) -> object:
    return bm.SafekeeperTimelineInfo(
        safekeeper_id=77,
        tenant_timeline_id=bm.encode_ttid(ttid),
        commit_lsn=Lsn(7),
        safekeeper_connstr="x:1",  # type: ignore[arg-type]
    )


async def test_grpc_and_http_on_the_brokers_tls_port(fleet: SecureFleet, tmp_path: Path) -> None:
    ca_file, ttid = fleet.authority.ca_file, new_ttid()
    secure = BrokerClient(f"https://127.0.0.1:{fleet.broker_https_port}", ca_file=ca_file)
    plain = BrokerClient(f"http://127.0.0.1:{fleet.fleet.broker_port}")
    news = secure.subscribe(ttid, {bm.SAFEKEEPER_TIMELINE_INFO})
    first = asyncio.ensure_future(anext(news))  # type: ignore[arg-type]
    async with asyncio.timeout(20):
        while not first.done():  # published until the subscription is there
            await plain.publish_one(info(ttid))
            await asyncio.wait({first}, timeout=0.2)
    assert first.result().safekeeper_timeline_info.safekeeper_id == 77
    await news.aclose()  # type: ignore[attr-defined]
    await secure.publish_one(info(ttid))
    url = f"https://127.0.0.1:{fleet.broker_https_port}"
    listed = await asyncio.to_thread(http, "GET", f"{url}/v1/timelines?tenant_id={ttid.tenant_id}", ca_file=ca_file)
    assert listed
    assert await asyncio.to_thread(http, "GET", f"{url}/status", ca_file=ca_file) is None
    said = openssl(fleet.broker_https_port, fleet.authority, "-alpn", "h2,http/1.1")
    assert "ALPN protocol: h2" in said
    stranger = BrokerClient(url, ca_file=Authority(tmp_path, "other").ca_file)
    unaware = BrokerClient(f"http://127.0.0.1:{fleet.broker_https_port}")
    for client in (stranger, unaware):
        with pytest.raises(BrokerError):
            await client.publish_one(info(ttid))
        await client.close()
    await secure.close()
    await plain.close()


async def publish_at_last(client: BrokerClient) -> None:
    """As all users of the client do."""
    while True:
        try:
            return await client.publish_one(info(new_ttid()))
        except BrokerError:
            await asyncio.sleep(RETRY_INTERVAL_S)


async def test_another_authority_while_it_runs(fleet: SecureFleet, tmp_path: Path) -> None:
    """The broker's certificate comes from a new authority: a client follows its CA file, and is never without one."""
    port, old, new = fleet.broker_https_port, fleet.authority, Authority(tmp_path, "new")
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(old.ca_file.read_bytes())
    client = BrokerClient(f"https://127.0.0.1:{port}", ca_file=ca_file)
    await client.publish_one(info(new_ttid()))
    ca_file.write_bytes(b"")  # half-way
    await client.publish_one(info(new_ttid()))
    ca_file.write_bytes(new.ca_file.read_bytes())
    with pytest.raises(BrokerError):
        await client.publish_one(info(new_ttid()))
    serial = new.install(fleet.base)
    try:
        await until(lambda: serial_of_https(port, new) == serial, "the broker's certificate of the new authority")
        async with asyncio.timeout(20):
            await publish_at_last(client)
    finally:
        old.install(fleet.base)
        await until(lambda: serial_of_https(port, old), "the broker's certificate of the old authority")
    await client.close()


async def test_the_brokers_certificate_is_renewed(fleet: SecureFleet) -> None:
    port, authority = fleet.broker_https_port, fleet.authority
    client = BrokerClient(f"https://127.0.0.1:{port}", ca_file=authority.ca_file)
    await client.publish_one(info(new_ttid()))
    serial = authority.install(fleet.base)
    await until(lambda: serial_of_https(port, authority) == serial, "the broker's new certificate")
    await client.publish_one(info(new_ttid()))
    await client.close()
    options = [("grpc.use_local_subchannel_pool", 1)]
    credentials = grpc.ssl_channel_credentials(authority.ca_file.read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
        call = channel.unary_unary(f"/{bm.SERVICE}/PublishOne")
        await call(bm.typed(info(new_ttid())).SerializeToString(), timeout=10)

"""Certificates that follow their files, and clients that trust nobody by accident."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509

from neon_services.ground.errors import ConfigError
from neon_services.ground.http import json_response, make_application, serve, serve_tls
from neon_services.ground.tls import ClientTls, ServerTls, SslMode, ca_bundle, client_context
from tests.credentials import Authority


async def serial_at(port: int, authority: Authority) -> int:
    """The serial number of the certificate that a server shows."""
    context = client_context(authority.ca_file)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    assert reader is not None
    return x509.load_der_x509_certificate(der).serial_number


@contextlib.asynccontextmanager
async def listening(tls: ServerTls) -> AsyncIterator[int]:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=tls.listening)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_a_new_certificate_is_shown_by_the_same_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Authority(tmp_path)
    first = authority.install(tmp_path)
    tls = ServerTls(tmp_path / "server.key", tmp_path / "server.crt", alpn=("h2", "http/1.1"))
    async with listening(tls) as port:
        assert await serial_at(port, authority) == first
        tls.reload()
        assert await serial_at(port, authority) == first
        key, certificate, second = authority.issue()
        (tmp_path / "server.key").write_bytes(key)  # half of the change
        with caplog.at_level(logging.INFO):
            tls.reload()
            tls.reload()
        assert caplog.text.count("the key does not belong to the certificate") == 1
        assert await serial_at(port, authority) == first
        (tmp_path / "server.crt").write_bytes(certificate)
        tls.reload()
        assert await serial_at(port, authority) == second
        for content in (b"", b"nonsense", certificate[:200]):
            (tmp_path / "server.crt").write_bytes(content)
            tls.reload()
            assert await serial_at(port, authority) == second
        (tmp_path / "server.crt").unlink()
        tls.reload()
        assert await serial_at(port, authority) == second
        third = authority.install(tmp_path)
        tls.reload()
        assert await serial_at(port, authority) == third


async def test_protocols_are_negotiated_after_a_change_as_before(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.install(tmp_path)
    tls = ServerTls(tmp_path / "server.key", tmp_path / "server.crt", alpn=("h2", "http/1.1"))
    async with listening(tls) as port:
        for _ in range(2):
            for offered, expected in ((["h2"], "h2"), (["http/1.1"], "http/1.1"), (["http/1.1", "h2"], "h2"), ([], None)):
                context = client_context(authority.ca_file)
                if offered:
                    context.set_alpn_protocols(offered)
                _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
                assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == expected
                writer.close()
            authority.install(tmp_path)
            tls.reload()


async def test_old_protocols_are_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.install(tmp_path)
    tls = ServerTls(tmp_path / "server.key", tmp_path / "server.crt")
    context = client_context(authority.ca_file)
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with listening(tls) as port:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=context)


def test_files_that_are_not_usable(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    key, certificate, _ = authority.issue()
    other, _, _ = authority.issue()
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    encrypted = load_pem_private_key(key, None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    for key_pem, certificate_pem, expected in (
        (other, certificate, "does not belong"),
        (encrypted, certificate, "encrypted"),
        (b"", certificate, "not usable"),
        (key, b"", "not usable"),
        (key, None, "No such file"),
    ):
        (tmp_path / "k").write_bytes(key_pem)
        (tmp_path / "c").unlink(missing_ok=True)
        if certificate_pem is not None:
            (tmp_path / "c").write_bytes(certificate_pem)
        with pytest.raises(ConfigError, match=expected) as failure:
            ServerTls(tmp_path / "k", tmp_path / "c")
        assert "\n" not in str(failure.value)
    for name in ("missing", "k"):
        with pytest.raises(ConfigError, match=name):
            client_context(tmp_path / name)
        with pytest.raises(ConfigError, match=name):
            ca_bundle(tmp_path / name)
    (tmp_path / "k").write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(ConfigError, match="not a file of PEM certificates"):
        client_context(tmp_path / "k")


def test_how_strict_a_client_is(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    assert ClientTls().context().verify_mode is ssl.CERT_NONE
    for mode, required in (("disable", False), ("prefer", False), ("require", True), ("verify-full", True)):
        tls = ClientTls.parse(mode, authority.ca_file, what="x")
        assert tls.required is required
        context = tls.context()
        assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
    assert ClientTls(SslMode.VERIFY_FULL).context().verify_mode is ssl.CERT_REQUIRED
    with pytest.raises(ConfigError, match=r"--x: 'maybe' is not one of disable, prefer, require, verify-full"):
        ClientTls.parse("maybe", None, what="--x")


async def test_http_and_https_at_once(tmp_path: Path) -> None:
    import aiohttp

    authority = Authority(tmp_path)
    authority.install(tmp_path)
    application = make_application()

    async def hello(_: object) -> object:
        return json_response("hello")

    application.router.add_get("/", hello)  # type: ignore[arg-type]
    runner = await serve(application, "127.0.0.1", 0)
    await serve_tls(runner, "127.0.0.1", 0, ServerTls(tmp_path / "server.key", tmp_path / "server.crt"))
    plain, secure = (address[1] for address in runner.addresses)
    try:
        async with aiohttp.ClientSession(trust_env=False) as session:
            async with session.get(f"http://127.0.0.1:{plain}/") as answer:
                assert await answer.json() == "hello"
            async with session.get(f"https://127.0.0.1:{secure}/", ssl=client_context(authority.ca_file)) as answer:
                assert await answer.json() == "hello"
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"https://127.0.0.1:{secure}/")  # the system does not know this authority
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"http://127.0.0.1:{secure}/")
    finally:
        await runner.cleanup()

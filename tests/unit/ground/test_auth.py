"""Tokens and keys: everything that is not exactly right is refused, and nothing of a token is ever repeated."""

import base64
import hashlib
import hmac
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed448, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from neon_services.ground.auth import (
    MAX_TOKEN_BYTES,
    Claims,
    InvalidToken,
    KeyRing,
    Scope,
    TokenSource,
    bearer_token,
    verified_claims,
)
from neon_services.ground.errors import ConfigError
from neon_services.ground.ids import TenantId
from tests.credentials import TokenKey

TENANT = TenantId.parse("0123456789abcdef0123456789abcdef")
KEY = TokenKey()
KEYS = [TokenKey().key.public_key(), KEY.key.public_key()]


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(header: Any, claims: bytes) -> str:
    text = b64(json.dumps(header).encode()) + "." + b64(claims)
    return f"{text}.{b64(KEY.key.sign(text.encode()))}"


def refused(token: str) -> str:
    """The error of a token that is refused; it says nothing of the token."""
    with pytest.raises(InvalidToken) as failure:
        Claims.from_json(verified_claims(token, KEYS))
    text = str(failure.value)
    assert not any(len(part) > 8 and part in text for part in token.split("."))
    assert failure.value.__cause__ is None
    return text


def test_each_scope_by_its_name() -> None:
    for scope in Scope:
        claims = Claims.from_json(verified_claims(KEY.token(scope, TENANT), KEYS))
        assert claims == Claims(scope, TENANT)
    assert {str(scope) for scope in Scope} == {
        *("tenant", "pageserverapi", "safekeeperdata", "tenantendpoint"),
        *("generations_api", "admin", "infra", "scrubber", "controller_peer"),
    }


def test_claims_that_are_not_ours_do_no_harm() -> None:
    now = int(time.time())
    token = KEY.token("safekeeperdata", iss="x", aud=["y"], iat=now + 1000, sub="z", exp=now + 60, nbf=now - 60, jti="1")
    assert Claims.from_json(verified_claims(token, KEYS)) == Claims(Scope.SAFEKEEPER_DATA)


def test_every_prefix_and_every_changed_character_is_refused() -> None:
    token = KEY.token("tenant", TENANT)
    assert verified_claims(token, KEYS)
    for length in range(len(token)):
        refused(token[:length])
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for position, char in enumerate(token):
        for other in (
            alphabet[(alphabet.find(char) + 1) % 64],
            alphabet[(alphabet.find(char) + 32) % 64],
            ".",
            "=",
            " ",
            "\n",
            "ä",
        ):
            if other != char:
                refused(token[:position] + other + token[position + 1 :])
        refused(token[:position] + "\n" + token[position:])
    for tail in ("A", "=", "==", "\n", " ", ".", ".A"):
        refused(token + tail)


@given(st.text(max_size=300))
def test_arbitrary_text(text: str) -> None:
    refused(text)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_arbitrary_parts_with_a_good_signature(header: bytes, claims: bytes) -> None:
    text = b64(header or b"x") + "." + b64(claims or b"x")
    refused(f"{text}.{b64(KEY.key.sign(text.encode()))}")


def test_other_algorithms() -> None:
    claims = json.dumps({"scope": "safekeeperdata"}).encode()
    for algorithm in ("none", "None", "NONE", "HS256", "RS256", "ES256", "eddsa", "", None, 7, ["EdDSA"]):
        refused(signed({"alg": algorithm, "typ": "JWT"}, claims))
    refused(signed({"typ": "JWT"}, claims))
    unsigned = b64(b'{"alg":"none"}') + "." + b64(claims)
    refused(unsigned + ".")
    refused(unsigned)
    # the public key as the secret of a MAC, in every spelling that a confused server might use
    raw = KEY.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    for secret in (KEY.public_pem, KEY.public_pem.strip(), raw, b64(raw).encode()):
        for name, function in (("HS256", hashlib.sha256), ("HS512", hashlib.sha512)):
            text = b64(json.dumps({"alg": name, "typ": "JWT"}).encode()) + "." + b64(claims)
            refused(f"{text}.{b64(hmac.digest(secret, text.encode(), function))}")


def test_wrong_key_time_and_claims() -> None:
    now = int(time.time())
    assert "known key" in refused(TokenKey().token("safekeeperdata"))
    assert "expired" in refused(KEY.token("safekeeperdata", exp=now - 1))
    assert "not valid yet" in refused(KEY.token("safekeeperdata", nbf=now + 60))
    for number in ("x", [], {}, None, 1e400, float("nan"), "1e9"):
        refused(signed({"alg": "EdDSA"}, json.dumps({"scope": "safekeeperdata", "exp": number}).encode()))
    for payload in (b"", b"x", b"7", b"null", b"[]", b'"tenant"', b"{", b"\xff", b"[" * 3000, b'{"scope":' + b"[" * 2500):
        refused(signed({"alg": "EdDSA"}, payload or b" "))
    for claims in ({}, {"scope": None}, {"scope": "root"}, {"scope": "Tenant"}, {"scope": ["tenant"]}, {"scope": True}):
        assert "no known scope" in refused(signed({"alg": "EdDSA"}, json.dumps(claims).encode()))
    assert "names no tenant_id" in refused(KEY.token("tenant"))
    for tenant in ("", "xyz", 7, [], {}, str(TENANT)[:-1], str(TENANT) + "0", True):
        assert "tenant_id" in refused(signed({"alg": "EdDSA"}, json.dumps({"scope": "tenant", "tenant_id": tenant}).encode()))
    deep = "[" * 4000
    refused(f"{b64(deep.encode())}.{b64(b'{}')}.{b64(bytes(64))}")
    long = KEY.token("safekeeperdata", pad="x" * MAX_TOKEN_BYTES)
    refused(long)
    for field in ({"crit": ["exp"], "exp": 1}, {"kid": 7}, {"b64": False, "crit": ["b64"]}):
        refused(signed({"alg": "EdDSA", **field}, b'{"scope":"safekeeperdata"}'))


def test_authorization_headers() -> None:
    assert bearer_token("Bearer a.b.c") == bearer_token("bearer  a.b.c ") == "a.b.c"
    for header in (None, "", "Bearer", "Bearer ", "Basic secret-token", "secret-token"):
        with pytest.raises(InvalidToken) as failure:
            bearer_token(header)
        assert "secret" not in str(failure.value)


# -- keys


def test_key_files(tmp_path: Path) -> None:
    one, two, three = TokenKey(), TokenKey(), TokenKey()
    (tmp_path / "one.pem").write_bytes(one.public_pem)
    assert KeyRing(tmp_path / "one.pem", "--x").check(one.token("admin")) == Claims(Scope.ADMIN)
    (tmp_path / "two").write_bytes(b"a comment\n" + two.public_pem + b"\n" + three.public_pem)
    (tmp_path / ".hidden").write_bytes(b"not a key")
    (tmp_path / "directory").mkdir()
    ring = KeyRing(tmp_path, "--x")
    for key in (one, two, three):
        ring.check(key.token("admin"))
    with pytest.raises(InvalidToken):
        ring.check(TokenKey().token("admin"))


def test_clocks_may_differ_a_little(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY.public_pem)
    ring, now = KeyRing(tmp_path / "key", "--x"), int(time.time())
    for times in ({"exp": now - 30}, {"nbf": now + 30}):
        assert ring.check(KEY.token("admin", **times)) == Claims(Scope.ADMIN)
    for times in ({"exp": now - 90}, {"nbf": now + 90}):
        with pytest.raises(InvalidToken):
            ring.check(KEY.token("admin", **times))


def test_what_is_no_key(tmp_path: Path) -> None:
    def complaint(content: bytes | None, name: str = "key.pem") -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as failure:
            KeyRing(path, "--http-auth-public-key-path")
        text = str(failure.value)
        assert text.startswith("--http-auth-public-key-path: ") and str(path) in text and "\n" not in text
        return text

    assert "No such file" in complaint(None, "missing")
    assert "no PEM PUBLIC KEY" in complaint(b"")
    assert "private keys" in complaint(KEY.private_pem)
    assert "private keys" in complaint(KEY.public_pem + KEY.private_pem)
    assert "damaged" in complaint(KEY.public_pem.replace(b"MCow", b"MCox"))
    for other in (rsa.generate_private_key(65537, 2048).public_key(), ed448.Ed448PrivateKey.generate().public_key()):
        assert "Ed25519" in complaint(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert "longer than" in complaint(b"x" * 100_000)
    (tmp_path / "empty").mkdir()
    assert "no public key in this directory" in complaint(None, "empty")


def test_rotation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = TokenKey(), TokenKey()
    (tmp_path / "old.pem").write_bytes(old.public_pem)
    ring = KeyRing(tmp_path, "--x")
    (tmp_path / "new.pem").write_bytes(new.public_pem[:50])  # still being written
    with caplog.at_level(logging.INFO):
        ring.reload()
        ring.reload()
    assert caplog.text.count("not read again") == 1
    ring.check(old.token("admin"))
    (tmp_path / "new.pem").write_bytes(new.public_pem)
    ring.reload()
    ring.check(old.token("admin"))
    ring.check(new.token("admin"))
    (tmp_path / "old.pem").unlink()
    ring.reload()
    ring.check(new.token("admin"))
    with pytest.raises(InvalidToken):
        ring.check(old.token("admin"))
    (tmp_path / "new.pem").unlink()  # nothing left: a mistake, not a wish
    ring.reload()
    ring.check(new.token("admin"))


def test_token_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_TOKEN", raising=False)
    assert TokenSource().read() is None
    assert TokenSource(None, "SOME_TOKEN").read() is None
    monkeypatch.setenv("SOME_TOKEN", " from.the.environment\n")
    assert TokenSource(None, "SOME_TOKEN").read() == "from.the.environment"
    path = tmp_path / "token"
    source = TokenSource(path, "SOME_TOKEN")
    for content in (None, b"", b"\n", b"two words", b"\xff"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=str(path)):
            source.read()
    path.write_text("from.a.file\n")
    assert source.read() == "from.a.file"

"""Values in other notations come back as they were."""

import base64
import hashlib
import hmac
import tomllib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def values(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("filter_plugins/neon_values.py")


# TOML has no surrogates, and its integers have 64 bits.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALAR = TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1)
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)


@given(document=st.dictionaries(TEXT, VALUE, max_size=4))
def test_toml_comes_back(values: ModuleType, document: dict[str, Any]) -> None:
    assert tomllib.loads(values.toml_document(document)) == document


def test_a_remote_storage_table(values: ModuleType) -> None:
    table = {"bucket_name": "neon", "endpoint": "http://10.0.0.1:8333"}
    assert values.toml_value(table) == '{bucket_name = "neon", endpoint = "http://10.0.0.1:8333"}'


def test_scram_verifier_accepts_its_password_only(values: ModuleType) -> None:
    verifier = values.scram_verifier("secret", "tenant/app")
    assert verifier == values.scram_verifier("secret", "tenant/app")
    assert verifier != values.scram_verifier("secret", "tenant/other")
    scheme, parameters, keys = verifier.split("$")
    iterations, salt = parameters.split(":")
    stored, server = (base64.b64decode(key) for key in keys.split(":"))
    salted = hashlib.pbkdf2_hmac("sha256", b"secret", base64.b64decode(salt), int(iterations))
    assert scheme == "SCRAM-SHA-256"
    assert hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest() == stored
    assert hmac.digest(salted, b"Server Key", "sha256") == server


@pytest.mark.parametrize("password", ["", "pässword"])
def test_passwords_that_cannot_be_hashed_here(values: ModuleType, password: str) -> None:
    with pytest.raises(Exception, match="ASCII"):
        values.scram_verifier(password, "x")


@pytest.mark.parametrize(
    ("word", "quoted"),
    [("-D", "-D"), ("a b", '"a b"'), ("100%", "100%%"), ("$x", "$$x"), ('a"b', '"a\\"b"'), ("", '""'), ("a\\b", '"a\\\\b"')],
)
def test_systemd_words(values: ModuleType, word: str, quoted: str) -> None:
    assert values.systemd_argument(word) == quoted


def test_settings_are_text_and_booleans_are_refused(values: ModuleType) -> None:
    assert values.spec_settings({"b": 1, "a": "x"}) == [
        {"name": "a", "value": "x", "vartype": "string"},
        {"name": "b", "value": "1", "vartype": "string"},
    ]
    with pytest.raises(Exception, match="quote it"):
        values.spec_settings({"fsync": False})


def test_ipv6_connection_strings(values: ModuleType) -> None:
    assert values.host_port({"host": "10.0.0.1", "pg_port": 5454}) == "10.0.0.1:5454"
    assert values.host_port({"host": "fd00::1", "pg_port": 5454}) == "[fd00::1]:5454"

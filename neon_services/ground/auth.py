"""JSON web tokens of the storage services: who may do what, in Neon's shapes.

A token is an Ed25519-signed JWT (``alg`` EdDSA) with the claims ``{"scope": ..., "tenant_id"?: hex, "exp"?: seconds}``.
Keys are PEM public keys in one file or in a directory.

Invariants: nothing of a token is looked at before its signature is known to be good, except the algorithm, which must be EdDSA;
no error text contains a token or a part of one; a set of keys that cannot be read never replaces one that could.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.ids import TenantId
from neon_services.ground.reload import Reloadable

ALGORITHM = "EdDSA"
MAX_TOKEN_BYTES = 8192
#: For storage tokens; Neon's services allow the same.
LEEWAY_S = 60.0
MAX_KEY_FILE_BYTES = 64 * 1024

_PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
# what is said about these claims is for their readers (compute_ctl) to judge
_OPTIONS: Any = {
    "require": [],
    "verify_aud": False,
    "verify_iat": False,
    "verify_iss": False,
    "verify_sub": False,
    "verify_jti": False,
}


class InvalidToken(NeonError):
    """No token, or one that proves nothing: HTTP status 401."""


class PermissionDenied(NeonError):
    """A valid token that does not allow this: HTTP status 403."""


class Scope(StrEnum):
    """What a token is for, with Neon's names."""

    TENANT = "tenant"
    PAGESERVER_API = "pageserverapi"
    SAFEKEEPER_DATA = "safekeeperdata"
    TENANT_ENDPOINT = "tenantendpoint"
    GENERATIONS_API = "generations_api"
    ADMIN = "admin"
    INFRA = "infra"
    SCRUBBER = "scrubber"
    CONTROLLER_PEER = "controller_peer"


@dataclass(frozen=True, slots=True)
class Claims:
    """What a storage token says. A token of scope ``tenant`` always names its tenant."""

    scope: Scope
    tenant_id: TenantId | None = None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Claims":
        """Read verified claims. Raises InvalidToken."""
        try:
            scope = Scope(str(value.get("scope")))
        except ValueError:
            raise InvalidToken("the token has no known scope") from None
        named = value.get("tenant_id")
        if named is None:
            if scope is Scope.TENANT:
                raise InvalidToken("the token has the scope tenant and names no tenant_id")
            return cls(scope)
        try:
            return cls(scope, TenantId.parse(named if isinstance(named, str) else ""))
        except ValueError:
            raise InvalidToken("the token's tenant_id is not an id of 32 hexadecimal digits") from None


def verified_claims(token: str, keys: Sequence[Ed25519PublicKey], *, leeway_s: float = 0.0) -> dict[str, Any]:
    """The claims of a token that one of the keys signed and that is valid now (``exp``, ``nbf``). Raises InvalidToken.

    ``leeway_s`` is how far the clock of whoever signed it may be from ours.
    """
    if len(token) > MAX_TOKEN_BYTES or not _COMPACT.fullmatch(token):
        raise InvalidToken("the token is not a signed JSON web token")
    for key in keys:
        try:
            return jwt.decode(token, key, algorithms=[ALGORITHM], options=_OPTIONS, leeway=leeway_s)
        except jwt.InvalidAlgorithmError:
            raise InvalidToken(f"the token is not signed with {ALGORITHM}") from None
        except jwt.InvalidSignatureError:
            continue
        except jwt.ExpiredSignatureError:
            raise InvalidToken("the token has expired") from None
        except jwt.ImmatureSignatureError:
            raise InvalidToken("the token is not valid yet") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            raise InvalidToken("the token cannot be decoded") from None
    raise InvalidToken("the token's signature is not of a known key")


def bearer_token(authorization: str | None) -> str:
    """The token in an Authorization header. Raises InvalidToken."""
    if authorization is None:
        raise InvalidToken("missing authorization token: send `Authorization: Bearer <JWT>`")
    kind, _, token = authorization.partition(" ")
    if kind.lower() != "bearer" or not token.strip():
        raise InvalidToken("the Authorization header is not `Bearer <JWT>`")
    return token.strip()


def sign_token(key: Ed25519PrivateKey, claims: dict[str, Any]) -> str:
    """A token with these claims. Services only check tokens; this is for who owns the private key."""
    return jwt.encode(claims, key, algorithm=ALGORITHM)


# -- keys


def parse_public_keys(pem: bytes, where: str) -> list[Ed25519PublicKey]:
    """All public keys of a PEM file. Raises ConfigError naming ``where``."""
    found: list[Ed25519PublicKey] = []
    for block in _PEM_BLOCK.finditer(pem):
        if block[1] != b"PUBLIC KEY":
            hint = ": keep private keys away from services" if b"PRIVATE" in block[1] else ""
            raise ConfigError(f"{where}: contains a {block[1].decode()} where only public keys belong{hint}")
        try:
            key = load_pem_public_key(block[0])
        except (ValueError, UnsupportedAlgorithm):
            raise ConfigError(f"{where}: a PUBLIC KEY in it is damaged") from None
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"{where}: a key in it is not an Ed25519 key (openssl genpkey -algorithm ed25519 makes one)")
        found.append(key)
    if not found:
        raise ConfigError(f"{where}: contains no PEM PUBLIC KEY")
    return found


def read_key_files(path: Path) -> dict[str, bytes]:
    """The content of a key file, or of all files of a directory (not of hidden ones, nor of its directories), by name.

    Raises ConfigError.
    """
    try:
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")) if path.is_dir() else [path]
        found: dict[str, bytes] = {}
        for file in files:
            with file.open("rb") as opened:
                found[str(file)] = opened.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror or error}") from error
    for name, content in found.items():
        if len(content) > MAX_KEY_FILE_BYTES:
            raise ConfigError(f"{name}: longer than {MAX_KEY_FILE_BYTES} bytes: not a file of public keys")
    if not found:
        raise ConfigError(f"{path}: no public key in this directory; every token would be refused")
    return found


class KeyRing(Reloadable):
    """The keys at a path, and the check of tokens against them.

    To rotate: put the new key beside the old one, hand out new tokens, remove the old key. Connections that exist stay.
    """

    def __init__(self, path: Path, what: str) -> None:
        """``what`` names the option in errors. Raises ConfigError."""
        self._path = path
        self._keys: tuple[Ed25519PublicKey, ...] = ()
        super().__init__(what)

    def _read(self) -> dict[str, bytes]:
        return read_key_files(self._path)

    def _take(self, content: dict[str, bytes]) -> None:
        self._keys = tuple(key for name, pem in content.items() for key in parse_public_keys(pem, name))

    def check(self, token: str) -> Claims:
        """The claims of a valid token. Raises InvalidToken."""
        return Claims.from_json(verified_claims(token, self._keys, leeway_s=LEEWAY_S))


# -- tokens to present


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Where this process finds the token that it presents to others: a file, else a variable of the environment.

    It is read at each use, so that a new token needs no restart, and it is not part of any configuration that is shown.
    """

    path: Path | None = None
    variable: str | None = None

    def read(self) -> str | None:
        """The token; None when there is none. Raises ConfigError."""
        if self.path is None:
            return (os.environ.get(self.variable, "").strip() or None) if self.variable is not None else None
        try:
            token = self.path.read_text(encoding="ascii").strip()
        except OSError as error:
            raise ConfigError(f"the token in {self.path} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError:
            raise ConfigError(f"{self.path} does not contain a token") from None
        if not token or len(token.split()) != 1:
            raise ConfigError(f"{self.path} does not contain one token")
        return token

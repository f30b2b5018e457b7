"""Check the JSON web tokens of those who give orders to a compute (Ed25519 keys from ``compute_ctl_config.jwks``)."""

import base64
import binascii
import json
import time
from typing import Any

from neon_services.ground.errors import ConfigError, NeonError


class TokenError(NeonError):
    """The request may not be carried out; ``status`` is 400, 401 or 403."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class TokenVerifier:
    """Accepts tokens for one compute, or for all computes, signed by one of the keys."""

    def __init__(self, jwks: tuple[dict[str, Any], ...], compute_id: str) -> None:
        try:
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        except ImportError:
            raise ConfigError("compute_ctl_config.jwks: checking tokens needs the Python package cryptography") from None
        self._invalid_signature = InvalidSignature
        self._compute_id = compute_id
        self._keys = []
        for index, key in enumerate(jwks):
            where = f"compute_ctl_config.jwks.keys[{index}]"
            if key.get("kty") != "OKP" or key.get("crv") != "Ed25519":
                raise ConfigError(f"{where}: only Ed25519 keys (kty OKP) are supported")
            try:
                self._keys.append(Ed25519PublicKey.from_public_bytes(_decode(str(key.get("x", "")))))
            except (ValueError, binascii.Error) as error:
                raise ConfigError(f"{where}.x: not an Ed25519 key: {error}") from None

    def check(self, authorization: str | None) -> None:
        """Check an Authorization header. Raises TokenError."""
        if authorization is None:
            raise TokenError(400, "missing authorization token")
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or token.count(".") != 2:
            raise TokenError(400, "the Authorization header is not a bearer token")
        claims = self._verified_claims(token)
        expires = claims.get("exp")
        if expires is not None and (not isinstance(expires, int | float) or expires < time.time()):
            raise TokenError(401, "the token has expired")
        audience = claims.get("aud")
        is_admin = claims.get("scope") == "compute_ctl:admin" and "compute" in (
            audience if isinstance(audience, list) else [audience]
        )
        if not is_admin and claims.get("compute_id") != self._compute_id:
            raise TokenError(403, "the token is not for this compute")

    def _verified_claims(self, token: str) -> dict[str, Any]:
        signed, _, signature_text = token.rpartition(".")
        try:
            header = json.loads(_decode(signed.split(".")[0]))
            claims = json.loads(_decode(signed.split(".")[1]))
            signature = _decode(signature_text)
        except (ValueError, binascii.Error):
            raise TokenError(401, "the token cannot be decoded") from None
        if not isinstance(header, dict) or not isinstance(claims, dict) or header.get("alg") != "EdDSA":
            raise TokenError(401, "the token is not signed with EdDSA")
        for key in self._keys:
            try:
                key.verify(signature, signed.encode())
                return claims
            except self._invalid_signature:
                continue
        raise TokenError(401, "the token's signature is not of a known key")

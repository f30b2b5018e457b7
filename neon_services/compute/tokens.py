"""Check the JSON web tokens of those who give orders to a compute (Ed25519 keys from ``compute_ctl_config.jwks``)."""

import base64
import binascii
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from neon_services.ground.auth import InvalidToken, verified_claims
from neon_services.ground.errors import ConfigError, NeonError


class TokenError(NeonError):
    """The request may not be carried out; ``status`` is 400, 401 or 403."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TokenVerifier:
    """Accepts tokens for one compute, or for all computes, signed by one of the keys."""

    def __init__(self, jwks: tuple[dict[str, Any], ...], compute_id: str) -> None:
        self._compute_id = compute_id
        self._keys = [_public_key(key, f"compute_ctl_config.jwks.keys[{index}]") for index, key in enumerate(jwks)]

    def check(self, authorization: str | None) -> None:
        """Check an Authorization header. Raises TokenError."""
        if authorization is None:
            raise TokenError(400, "missing authorization token")
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or token.count(".") != 2:
            raise TokenError(400, "the Authorization header is not a bearer token")
        try:
            claims = verified_claims(token, self._keys)
        except InvalidToken as error:
            raise TokenError(401, str(error)) from None
        audience = claims.get("aud")
        is_admin = claims.get("scope") == "compute_ctl:admin" and "compute" in (
            audience if isinstance(audience, list) else [audience]
        )
        if not is_admin and claims.get("compute_id") != self._compute_id:
            raise TokenError(403, "the token is not for this compute")


def _public_key(jwk: dict[str, Any], where: str) -> Ed25519PublicKey:
    if jwk.get("kty") != "OKP" or jwk.get("crv") != "Ed25519":
        raise ConfigError(f"{where}: only Ed25519 keys (kty OKP) are supported")
    text = str(jwk.get("x", ""))
    try:
        return Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error) as error:
        raise ConfigError(f"{where}.x: not an Ed25519 key: {error}") from None

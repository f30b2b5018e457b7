"""Tokens at the WAL service: the token is the password, in clear text, as in Neon.

Invariant: with keys, a connection without accepted claims carries out no command, and claims of a tenant reach that tenant
only: ``check`` is asked with the tenant of every command, not with what the startup packet seemed to be about.
"""

import logging

from neon_services.ground.auth import Claims, InvalidToken, KeyRing, Scope
from neon_services.ground.ids import TenantId
from neon_services.protocols.pgserver import ServerConnection
from neon_services.protocols.pgwire import ServerError

log = logging.getLogger(__name__)

SQLSTATE = "XX000"  # Neon's; 28000 would be more to the point


class PgAccess:
    """Who may use one WAL port. Without keys everybody may."""

    def __init__(self, keys: KeyRing | None = None, *, tenant_only: bool = False) -> None:
        self._keys = keys
        self._tenant_only = tenant_only

    async def admit(self, connection: ServerConnection) -> Claims | None:
        """Ask a new connection for its token; what it may do, None for everything. Raises ServerError."""
        if self._keys is None:
            return None
        password = await connection.ask_password()
        try:
            claims = self._keys.check(password)
        except InvalidToken as error:
            log.warning("connection from %s refused: %s", connection.peer, error)
            raise ServerError(SQLSTATE, f"JWT authentication error: {error}", "FATAL") from None
        allowed = (Scope.TENANT,) if self._tenant_only else (Scope.TENANT, Scope.SAFEKEEPER_DATA)
        if claims.scope not in allowed:
            log.warning("connection from %s refused: a token of scope %s", connection.peer, claims.scope)
            raise ServerError(
                SQLSTATE, f"JWT authentication error: a token of scope {claims.scope} is not for this port", "FATAL"
            )
        return claims


def check(claims: Claims | None, tenant_id: TenantId) -> None:
    """Whether commands about this tenant are allowed. Raises ServerError."""
    if claims is None or claims.scope is Scope.SAFEKEEPER_DATA:
        return
    if claims.scope is not Scope.TENANT or claims.tenant_id != tenant_id:
        raise ServerError(SQLSTATE, "permission denied: the token is for another tenant")

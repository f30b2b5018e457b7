"""The ports of a safekeeper: the WAL service, a second one for tenants, HTTP and HTTPS, with their keys and certificates."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from neon_services.ground.auth import KeyRing
from neon_services.ground.errors import ConfigError
from neon_services.ground.http import serve, serve_tls
from neon_services.ground.reload import Reloadable, watch
from neon_services.ground.tls import ServerTls
from neon_services.protocols.pgserver import Handler, PgServer, ServerConnection
from neon_services.safekeeper.config import SafekeeperConfig
from neon_services.safekeeper.http_access import HttpAccess
from neon_services.safekeeper.pg_access import PgAccess

log = logging.getLogger(__name__)

HandlerFactory = Callable[[ServerConnection, PgAccess], Handler]
Opener = Callable[[str, int], Awaitable[None]]
ApplicationFactory = Callable[[HttpAccess | None], web.Application]


class Listeners:
    """Opens and closes them."""

    def __init__(self, config: SafekeeperConfig) -> None:
        """Read keys and certificates. Raises ConfigError."""
        self._config = config
        self._reloadable: list[Reloadable] = []
        access = config.access
        self._pg_keys = self._keys("--pg-auth-public-key-path", access.pg_auth_public_key_path)
        self._tenant_keys = self._keys("--pg-tenant-only-auth-public-key-path", access.pg_tenant_only_auth_public_key_path)
        self._http_keys = self._keys("--http-auth-public-key-path", access.http_auth_public_key_path)
        self._tls: ServerTls | None = None
        if access.listen_https is not None or access.enable_tls_wal_service_api:
            self._tls = ServerTls(access.ssl_key_file, access.ssl_cert_file)
            self._reloadable.append(self._tls)
        if self._http_keys is None and access.peers().password() is not None:
            log.warning(
                "there is a token for other safekeepers and no --http-auth-public-key-path: whoever reaches the HTTP API can "
                "have the token sent to any host, by pull_timeline"
            )
        self._pg: list[PgServer] = []
        self._http: web.AppRunner | None = None

    def _keys(self, option: str, path: Path | None) -> KeyRing | None:
        if path is None:
            return None
        ring = KeyRing(path, option)
        self._reloadable.append(ring)
        return ring

    async def start(self, handler: HandlerFactory, application: ApplicationFactory) -> None:
        """Listen. Raises ConfigError when an address is taken; ``stop`` closes what is open by then."""
        config, access = self._config, self._config.access
        await self._open("--listen-pg", config.listen_pg, self._pg_opener(handler, PgAccess(self._pg_keys)))
        if access.listen_pg_tenant_only is not None:
            opener = self._pg_opener(handler, PgAccess(self._tenant_keys, tenant_only=True))
            await self._open("--listen-pg-tenant-only", access.listen_pg_tenant_only, opener)
        http_access = None if self._http_keys is None else HttpAccess(self._http_keys)

        async def open_http(host: str, port: int) -> None:
            self._http = await serve(application(http_access), host, port)

        async def open_https(host: str, port: int) -> None:
            assert self._http is not None and self._tls is not None
            await serve_tls(self._http, host, port, self._tls)

        await self._open("--listen-http", config.listen_http, open_http)
        if access.listen_https is not None:
            await self._open("--listen-https", access.listen_https, open_https)

    def _pg_opener(self, handler: HandlerFactory, access: PgAccess) -> Opener:
        tls = self._tls if self._config.access.enable_tls_wal_service_api else None
        server = PgServer(lambda connection: handler(connection, access), tls)
        self._pg.append(server)
        return server.start

    @staticmethod
    async def _open(option: str, address: tuple[str, int], opener: Opener) -> None:
        host, port = address
        try:
            await opener(host, port)
        except OSError as error:
            raise ConfigError(f"{option}: cannot listen on {host}:{port}: {error.strerror or error}") from error

    async def run(self) -> None:
        """Follow the files of keys and certificates, until cancelled."""
        await watch(self._reloadable, self._config.access.ssl_cert_reload_period_s)

    async def stop_pg(self) -> None:
        """Stop the WAL services and end their connections."""
        await asyncio.gather(*(server.stop() for server in self._pg))

    async def stop_http(self) -> None:
        """Stop HTTP and HTTPS."""
        if self._http is not None:
            await self._http.cleanup()

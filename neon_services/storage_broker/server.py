"""A running broker: the gRPC server and the HTTP endpoints behind one port."""

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

import grpc
from aiohttp import web

from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.http import make_application
from neon_services.ground.reload import watch
from neon_services.ground.tls import ServerTls
from neon_services.storage_broker.front import Front
from neon_services.storage_broker.hub import Hub
from neon_services.storage_broker.rest import RestApi
from neon_services.storage_broker.service import BrokerService

KEEPALIVE_TIMEOUT_MS = 20_000
STOP_GRACE_S = 0.2
ALPN = ("h2", "http/1.1")


@dataclass(frozen=True)
class BrokerConfig:
    """What the command line says. ``host`` None: no port in the clear; ``https``: the address with TLS."""

    host: str | None
    port: int
    timeline_chan_size: int = 32
    all_keys_chan_size: int = 16384
    http2_keepalive_interval_ms: int = 5000
    https: tuple[str, int] | None = None
    ssl_key_file: Path = Path("server.key")
    ssl_cert_file: Path = Path("server.crt")
    ssl_cert_reload_period_s: float = 60.0


async def _status(_: web.Request) -> web.Response:
    return web.Response()


class BrokerServer:
    """Starts and stops everything; keeps no state beyond the open connections and a minute of news."""

    def __init__(self, config: BrokerConfig) -> None:
        """Raises ConfigError when TLS is wanted and the certificate is not usable."""
        self._config = config
        self._tls = None if config.https is None else ServerTls(config.ssl_key_file, config.ssl_cert_file, alpn=ALPN)
        self._reloading: asyncio.Task[None] | None = None
        self._service = BrokerService(Hub(config.timeline_chan_size, config.all_keys_chan_size))

    async def start(self) -> None:
        """Listen. Raises ConfigError when an address cannot be bound."""
        self._directory = tempfile.TemporaryDirectory(prefix="storage_broker-")  # mode 0700
        directory = Path(self._directory.name)
        keepalive = self._config.http2_keepalive_interval_ms
        self._grpc = grpc.aio.server(
            options=[
                ("grpc.keepalive_time_ms", keepalive),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                # clients ping idle connections every few seconds: that is no attack
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
                ("grpc.http2.max_ping_strikes", 0),
            ]
        )
        self._grpc.add_generic_rpc_handlers((self._service.handler(),))
        if not self._grpc.add_insecure_port(f"unix:{directory / 'grpc'}"):
            raise NeonError(f"cannot listen on the private socket {directory / 'grpc'}")
        await self._grpc.start()
        application = make_application()
        application.router.add_get("/status", _status)
        RestApi(self._service).add_routes(application.router)
        self._http = web.AppRunner(application, access_log=None, shutdown_timeout=STOP_GRACE_S)
        await self._http.setup()
        await web.UnixSite(self._http, str(directory / "http")).start()
        self._front = Front(directory / "grpc", directory / "http")
        try:
            if self._config.host is not None:
                await self._listen("--listen-addr", self._config.host, self._config.port, None)
            if self._config.https is not None and self._tls is not None:
                await self._listen("--listen-https-addr", *self._config.https, self._tls)
                self._reloading = asyncio.create_task(watch([self._tls], self._config.ssl_cert_reload_period_s))
        except ConfigError:
            await self.stop()
            raise

    async def _listen(self, option: str, host: str, port: int, tls: ServerTls | None) -> None:
        try:
            await self._front.start(host, port, tls)
        except OSError as error:
            raise ConfigError(f"{option}: cannot listen on {host}:{port}: {error.strerror or error}") from error

    @property
    def port(self) -> int:
        """The port that clients use: of --listen-addr if there is one."""
        return self._front.ports[0]

    @property
    def https_port(self) -> int:
        """The port with TLS."""
        return self._front.ports[-1]

    async def stop(self) -> None:
        """End subscriptions, close all connections, remove the private sockets."""
        if self._reloading is not None:
            self._reloading.cancel()
            await asyncio.gather(self._reloading, return_exceptions=True)
        self._service.stop()
        await self._grpc.stop(STOP_GRACE_S)
        await self._front.stop()
        await self._http.cleanup()
        self._directory.cleanup()

"""The options about who may connect to a safekeeper, and how connections are protected: tokens and TLS.

An empty value of a path or an address means "not set", as in Neon.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neon_services.ground.auth import TokenSource
from neon_services.ground.errors import ConfigError
from neon_services.ground.net import parse_host_port
from neon_services.ground.tls import ClientTls, SslMode
from neon_services.ground.units import parse_duration_ms
from neon_services.safekeeper.peer_client import PeerAccess

TOKEN_VARIABLE = "SAFEKEEPER_AUTH_TOKEN"


@dataclass(frozen=True)
class AccessConfig:
    """What the options say. A key path that is None: whoever reaches that port is trusted."""

    listen_pg_tenant_only: tuple[str, int] | None = None
    listen_https: tuple[str, int] | None = None
    #: What peers and the broker are told; None without HTTPS.
    https_connstr: str | None = None
    pg_auth_public_key_path: Path | None = None
    pg_tenant_only_auth_public_key_path: Path | None = None
    http_auth_public_key_path: Path | None = None
    auth_token_path: Path | None = None
    ssl_key_file: Path = Path("server.key")
    ssl_cert_file: Path = Path("server.crt")
    #: Keys are read again that often, too.
    ssl_cert_reload_period_s: float = 60.0
    ssl_ca_file: Path | None = None
    use_https_safekeeper_api: bool = False
    enable_tls_wal_service_api: bool = False

    def peers(self) -> PeerAccess:
        """How this safekeeper presents itself to others."""
        # all members of a cluster have the same options, so a peer's WAL port is like ours
        mode = SslMode.PREFER
        if self.enable_tls_wal_service_api:
            mode = SslMode.REQUIRE if self.ssl_ca_file is None else SslMode.VERIFY_FULL
        return PeerAccess(
            token=TokenSource(self.auth_token_path, TOKEN_VARIABLE),
            ca_file=self.ssl_ca_file,
            use_https=self.use_https_safekeeper_api,
            pg_tls=ClientTls(mode, self.ssl_ca_file),
        )


def add_access_options(add: Any) -> None:
    """Declare them; ``add`` is the parser's ``add_argument``."""
    path, address = {"metavar": "PATH"}, {"metavar": "HOST:PORT"}
    add("--listen-pg-tenant-only", **address, help="a second WAL service, which takes only tokens of single tenants")
    add("--listen-https", **address, help="the HTTP API with TLS, beside --listen-http")
    keys = "check tokens with the Ed25519 public keys in this PEM file or directory"
    add("--pg-auth-public-key-path", **path, help=f"on --listen-pg: {keys}; without it everybody is trusted")
    add("--pg-tenant-only-auth-public-key-path", **path, help=f"on --listen-pg-tenant-only: {keys}")
    add("--http-auth-public-key-path", **path, help=f"on the HTTP API: {keys}")
    add("--auth-token-path", **path, help=f"the token for other safekeepers (default: the variable {TOKEN_VARIABLE})")
    add("--ssl-key-file", default="server.key", **path, help="the private key for TLS, PEM")
    add("--ssl-cert-file", default="server.crt", **path, help="the certificate for TLS, PEM")
    add("--ssl-cert-reload-period", default="60s", metavar="DURATION", help="how often certificates and keys are read again")
    add("--ssl-ca-file", **path, help="trust these authorities, PEM, instead of the system's (broker, other safekeepers)")
    add("--use-https-safekeeper-api", action="store_true", help="talk to other safekeepers by HTTPS")
    add("--enable-tls-wal-service-api", action="store_true", help="the WAL service speaks only TLS")


def read_access(arguments: argparse.Namespace) -> AccessConfig:
    """Check the options. Raises ConfigError; files are looked at when the server starts."""

    def given(option: str) -> Any:
        return getattr(arguments, option.removeprefix("--").replace("-", "_")) or None

    def path(option: str) -> Path | None:
        return None if given(option) is None else Path(given(option))

    def address(option: str) -> tuple[str, int] | None:
        return None if given(option) is None else parse_host_port(given(option), what=option)

    period_s = parse_duration_ms(arguments.ssl_cert_reload_period, what="--ssl-cert-reload-period") / 1000
    if period_s <= 0:
        raise ConfigError("--ssl-cert-reload-period must be longer than 0")
    config = AccessConfig(
        listen_pg_tenant_only=address("--listen-pg-tenant-only"),
        listen_https=address("--listen-https"),
        https_connstr=given("--listen-https"),
        pg_auth_public_key_path=path("--pg-auth-public-key-path"),
        pg_tenant_only_auth_public_key_path=path("--pg-tenant-only-auth-public-key-path"),
        http_auth_public_key_path=path("--http-auth-public-key-path"),
        auth_token_path=path("--auth-token-path"),
        ssl_key_file=Path(arguments.ssl_key_file or "server.key"),
        ssl_cert_file=Path(arguments.ssl_cert_file or "server.crt"),
        ssl_cert_reload_period_s=period_s,
        ssl_ca_file=path("--ssl-ca-file"),
        use_https_safekeeper_api=arguments.use_https_safekeeper_api,
        enable_tls_wal_service_api=arguments.enable_tls_wal_service_api,
    )
    if (
        config.listen_pg_tenant_only is not None
        and config.pg_auth_public_key_path is not None
        and config.pg_tenant_only_auth_public_key_path is None
    ):
        raise ConfigError(
            "--listen-pg-tenant-only would be open to everybody while --listen-pg is not: "
            "give --pg-tenant-only-auth-public-key-path, too"
        )
    return config

"""TLS for servers, with certificates that follow their files, and for clients, with libpq's words for how strict they are.

Invariants: a server never runs with half a certificate (key and chain are checked together before they are used); a client that
verifies also verifies the host's name; nothing here accepts less than TLS 1.2.
"""

import ssl
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from neon_services.ground.errors import ConfigError
from neon_services.ground.reload import Reloadable

HANDSHAKE_TIMEOUT_S = 15.0
MAX_FILE_BYTES = 1024 * 1024


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_FILE_BYTES} bytes: not a PEM file")
    return content


class ServerTls(Reloadable):
    """A server's certificate. ``current`` is the context for a handshake that begins now; never keep it.

    Whoever needs one context for good (a listening socket) takes ``listening``: it looks up ``current`` in each handshake.
    """

    def __init__(self, key_file: Path, cert_file: Path, *, alpn: tuple[str, ...] = ()) -> None:
        """Raises ConfigError naming the file."""
        self._key_file = key_file
        self._cert_file = cert_file
        self._alpn = alpn
        self.current: ssl.SSLContext
        super().__init__("--ssl-key-file, --ssl-cert-file")
        self.listening = self._make()
        self.listening.sni_callback = self._choose

    def _choose(self, connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        # called in every handshake, also for clients that name no host
        connection.context = self.current

    def _read(self) -> tuple[bytes, bytes]:
        return _content(self._key_file), _content(self._cert_file)

    def _take(self, content: tuple[bytes, bytes]) -> None:
        self.current = self._make()

    def _make(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # a renewed certificate must be seen by clients that were here before
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        if self._alpn:
            context.set_alpn_protocols(list(self._alpn))
        try:
            context.load_cert_chain(self._cert_file, self._key_file, password=self._no_password)
        except ssl.SSLError as error:
            reason = "the key does not belong to the certificate" if "MISMATCH" in str(error) else f"not usable: {error.reason}"
            raise ConfigError(f"{self._cert_file} with {self._key_file}: {reason}") from error
        except OSError as error:
            raise ConfigError(f"{self._cert_file} with {self._key_file}: {error.strerror or error}") from error
        return context

    def _no_password(self) -> bytes:
        raise ConfigError(f"{self._key_file}: the key is encrypted; a service needs one without a password")


def client_context(ca_file: Path | None) -> ssl.SSLContext:
    """A context that trusts only the CA certificates of the file, or without one those of the system. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is None:
        context.load_default_certs()
        return context
    pem = ca_bundle(ca_file)
    try:
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{ca_file}: not a file of PEM certificates: {getattr(error, 'reason', error)}") from error
    return context


def ca_bundle(ca_file: Path) -> bytes:
    """The PEM certificates of a file. Raises ConfigError."""
    pem = _content(ca_file)
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise ConfigError(f"{ca_file}: contains no PEM CERTIFICATE")
    return pem


class SslMode(StrEnum):
    """Whether a Postgres-wire client wants TLS, in libpq's words. A given CA file is always used when there is TLS."""

    DISABLE = "disable"
    PREFER = "prefer"  #: when the server offers it
    REQUIRE = "require"  #: or no connection; verified only when a CA file is given
    VERIFY_FULL = "verify-full"  #: verified, without a CA file against the system's authorities


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a Postgres-wire client protects its connections."""

    mode: SslMode = SslMode.PREFER
    ca_file: Path | None = None

    @classmethod
    def parse(cls, mode: str, ca_file: Path | None, *, what: str) -> "ClientTls":
        """Read a mode's name. Raises ConfigError naming the option (``what``)."""
        try:
            return cls(SslMode(mode), ca_file)
        except ValueError:
            raise ConfigError(f"{what}: {mode!r} is not one of {', '.join(SslMode)}") from None

    @property
    def required(self) -> bool:
        """Whether a server without TLS is refused."""
        return self.mode in (SslMode.REQUIRE, SslMode.VERIFY_FULL)

    def context(self) -> ssl.SSLContext:
        """The context of one connection; the CA file is read anew. Raises ConfigError."""
        if self.ca_file is not None or self.mode is SslMode.VERIFY_FULL:
            return client_context(self.ca_file)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

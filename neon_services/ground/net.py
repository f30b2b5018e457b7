"""Network addresses as Neon's options write them: ``host:port``, ``[v6]:port``, URLs."""

from dataclasses import dataclass

from neon_services.ground.errors import ConfigError

_HOST_EXCLUDES = frozenset("/?#@ \t\r\n")  # they would make it a path, or a part of a URL


def parse_host_port(text: str, *, what: str, default_port: int | None = None) -> tuple[str, int]:
    """Split ``host:port``. Raises ConfigError naming the option (``what``) and the text."""
    host, colon, port = text.rpartition(":")
    if not colon and default_port is not None:
        host, port = text, str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not _HOST_EXCLUDES.isdisjoint(host) or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ConfigError(f"{what}: {text!r} is not HOST:PORT (for example 127.0.0.1:5454)")
    return host, int(port)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an HTTP or gRPC service is reached."""

    host: str
    port: int
    tls: bool = False

    @property
    def netloc(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL without a path."""
        return f"{'https' if self.tls else 'http'}://{self.netloc}"


def parse_endpoint(text: str, *, what: str) -> Endpoint:
    """Read ``http://host:port``, ``https://host:port`` or ``host:port``. Raises ConfigError naming the option and the text."""
    tls = text.startswith("https://")
    try:
        host, port = parse_host_port(text.removeprefix("https://" if tls else "http://").rstrip("/"), what=what)
    except ConfigError:
        raise ConfigError(f"{what}: {text!r} is not http://HOST:PORT or https://HOST:PORT") from None
    return Endpoint(host, port, tls)

"""Network addresses as Neon's options write them: ``host:port``, ``[v6]:port``, URLs."""

from neon_services.ground.errors import ConfigError


def parse_host_port(text: str, *, what: str, default_port: int | None = None) -> tuple[str, int]:
    """Split ``host:port``. Raises ConfigError naming the option (``what``) and the text."""
    host, colon, port = text.rpartition(":")
    if not colon and default_port is not None:
        host, port = text, str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ConfigError(f"{what}: {text!r} is not HOST:PORT (for example 127.0.0.1:5454)")
    return host, int(port)


def parse_http_endpoint(text: str, *, what: str) -> tuple[str, int]:
    """Split ``http://host:port[/]``. Raises ConfigError naming the option and the text; TLS comes in a later version."""
    if text.startswith("https://"):
        raise ConfigError(f"{what}: {text!r}: https is not supported yet; use http://HOST:PORT")
    return parse_host_port(text.removeprefix("http://").rstrip("/"), what=what)

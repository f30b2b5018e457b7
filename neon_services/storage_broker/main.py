"""``storage_broker``: Neon's command line for the broker."""

import argparse
import logging
import sys
from pathlib import Path

import prometheus_client

from neon_services import __version__
from neon_services.ground.errors import ConfigError
from neon_services.ground.net import parse_host_port
from neon_services.ground.process import configure_logging, notify_systemd, run_service, wait_for_stop_signal
from neon_services.ground.units import parse_duration_ms
from neon_services.storage_broker.server import BrokerConfig, BrokerServer

log = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    """The options, with Neon's names and defaults."""
    parser = argparse.ArgumentParser("storage_broker", description="Message broker of the storage nodes", allow_abbrev=False)
    parser.add_argument("-l", "--listen-addr", metavar="HOST:PORT", help="where to listen, conventionally 127.0.0.1:50051")
    parser.add_argument("--listen-https-addr", metavar="HOST:PORT", help="the same with TLS; may be given beside the other")
    parser.add_argument("--timeline-chan-size", type=int, default=32, help="messages kept for a slow subscriber of a timeline")
    parser.add_argument("--all-keys-chan-size", type=int, default=16384, help="the same for a subscriber of all timelines")
    parser.add_argument("--http2-keepalive-interval", default="5000ms", metavar="DURATION")
    parser.add_argument("--log-format", choices=["plain", "json"], default="plain")
    parser.add_argument("--ssl-key-file", default="server.key", metavar="PATH", help="the private key, PEM")
    parser.add_argument("--ssl-cert-file", default="server.crt", metavar="PATH", help="the certificate, PEM")
    parser.add_argument(
        "--ssl-cert-reload-period", default="60s", metavar="DURATION", help="how often the certificate is read again"
    )
    parser.add_argument("--version", action="version", version=f"storage_broker {__version__}")
    return parser


def read_config(arguments: argparse.Namespace) -> BrokerConfig:
    """Check the options. Raises ConfigError."""
    host, port, https = None, 0, None
    if arguments.listen_addr:
        host, port = parse_host_port(arguments.listen_addr, what="--listen-addr")
    if arguments.listen_https_addr:
        https = parse_host_port(arguments.listen_https_addr, what="--listen-https-addr")
    if host is None and https is None:
        raise ConfigError("no address to listen on: give --listen-addr HOST:PORT, for example 127.0.0.1:50051")
    for option, value in (
        ("--timeline-chan-size", arguments.timeline_chan_size),
        ("--all-keys-chan-size", arguments.all_keys_chan_size),
    ):
        if not 1 <= value <= 1 << 24:
            raise ConfigError(f"{option}: {value} is not between 1 and {1 << 24}")
    keepalive = parse_duration_ms(arguments.http2_keepalive_interval, what="--http2-keepalive-interval")
    if keepalive <= 0:
        raise ConfigError("--http2-keepalive-interval must be longer than 0")
    period = parse_duration_ms(arguments.ssl_cert_reload_period, what="--ssl-cert-reload-period")
    if period <= 0:
        raise ConfigError("--ssl-cert-reload-period must be longer than 0")
    return BrokerConfig(
        host,
        port,
        arguments.timeline_chan_size,
        arguments.all_keys_chan_size,
        keepalive,
        https=https,
        ssl_key_file=Path(arguments.ssl_key_file),
        ssl_cert_file=Path(arguments.ssl_cert_file),
        ssl_cert_reload_period_s=period / 1000,
    )


async def _serve(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    server = BrokerServer(config)
    await server.start()
    if config.host is not None:
        log.info("listening on %s:%d", config.host, server.port)
    if config.https is not None:
        log.info("listening with TLS on %s:%d", config.https[0], server.https_port)
    notify_systemd("READY=1")
    received = await wait_for_stop_signal()
    log.info("got %s, stopping", received.name)
    notify_systemd("STOPPING=1")
    await server.stop()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 after a stop signal, 2 for wrong options, 1 for anything else."""
    arguments = make_parser().parse_args(argv)
    configure_logging(arguments.log_format)
    prometheus_client.disable_created_metrics()
    return run_service(lambda: _serve(arguments))


if __name__ == "__main__":
    sys.exit(main())

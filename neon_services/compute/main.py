"""``compute_ctl``: runs one stateless Postgres on the storage, from a configuration file to its exit code."""

import argparse
import asyncio
import contextlib
import logging
import os
import re
import sys
from pathlib import Path

from aiohttp import web
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from neon_services.compute.http_api import ExternalApi, internal_application
from neon_services.compute.node import ComputeNode, ComputeOptions
from neon_services.compute.spec import read_config
from neon_services.compute.status import Status
from neon_services.compute.tokens import TokenVerifier
from neon_services.ground.errors import ConfigError
from neon_services.ground.http import serve
from neon_services.ground.process import PidFile, configure_logging, run_service, wait_for_stop_signal

log = logging.getLogger(__name__)

LINGER_S = 30.0  # how long /status can be read after a failed start or a termination


def build_parser() -> argparse.ArgumentParser:
    """Neon's command line."""
    parser = argparse.ArgumentParser(prog="compute_ctl", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("-D", "--pgdata", type=Path, required=True, help="data directory, made anew at each start")
    parser.add_argument("-C", "--connstr", required=True, help="superuser's connection URL; its port is the default port")
    parser.add_argument("-b", "--pgbin", default=os.environ.get("POSTGRES_PATH", "postgres"), help="the postgres program")
    parser.add_argument("-i", "--compute-id", required=True, help="identity that tokens are checked against")
    parser.add_argument("-c", "--config", type=Path, help="configuration file (JSON)")
    parser.add_argument("-p", "--control-plane-uri", help="not supported yet: use --config")
    parser.add_argument("--external-http-port", type=int, default=3080)
    parser.add_argument("--internal-http-port", type=int, default=3081)
    parser.add_argument("--http-port", type=int, help="sets the external port and, one above, the internal one")
    parser.add_argument("--http-host", default="", help="address of the external API (default: all)")
    parser.add_argument("--privileged-role-name", default="neon_superuser")
    parser.add_argument("--walproposer", default="", help="the walproposer program (default: the one of this installation)")
    parser.add_argument("--dev", action="store_true", help="accepted for compatibility")
    for option in ("--remote-ext-base-url", "--installed-extensions-collection-interval", "--pg-init-timeout"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    parser.add_argument("-r", dest="remote_ext_base_url", help=argparse.SUPPRESS)
    return parser


def _options(arguments: argparse.Namespace) -> ComputeOptions:
    if arguments.control_plane_uri is not None:
        raise ConfigError("--control-plane-uri: fetching the specification is not supported yet; give --config FILE")
    if arguments.config is None:
        raise ConfigError("--config: a configuration file is needed")
    if not re.fullmatch(r"[a-z_]+", arguments.privileged_role_name):
        raise ConfigError(f"--privileged-role-name: {arguments.privileged_role_name!r} may have only a-z and _")
    try:
        port = conninfo_to_dict(arguments.connstr).get("port")
    except ProgrammingError as error:
        raise ConfigError(f"--connstr: {arguments.connstr!r} is not a connection string: {str(error).strip()}") from None
    return ComputeOptions(
        pgdata=arguments.pgdata.absolute(),
        pgbin=arguments.pgbin,
        connstr_port=int(port) if port else None,
        compute_id=arguments.compute_id,
        privileged_role=arguments.privileged_role_name,
        proposer_command=(arguments.walproposer,) if arguments.walproposer else (),
    )


async def _stop_on_signal(node: ComputeNode) -> None:
    """The first signal asks for a fast shutdown, the next for an immediate one."""
    for mode in ("fast", "immediate"):
        number = await wait_for_stop_signal()
        log.info("%s: %s shutdown", number.name, mode)
        node.request_stop(mode)


async def run(arguments: argparse.Namespace) -> int:
    """Run the compute and its HTTP servers."""
    options = _options(arguments)
    config = read_config(arguments.config)
    external = arguments.external_http_port if arguments.http_port is None else arguments.http_port
    internal = arguments.internal_http_port if arguments.http_port is None else arguments.http_port + 1
    verifier = TokenVerifier(config.jwks, options.compute_id) if config.jwks else None
    node = ComputeNode(options, config.spec)
    options.pgdata.parent.mkdir(parents=True, exist_ok=True)
    lock = PidFile(options.pgdata.with_name(f"{options.pgdata.name}.lock"))
    signals = asyncio.get_running_loop().create_task(_stop_on_signal(node))
    servers: list[web.AppRunner] = []
    try:
        servers.append(await serve(ExternalApi(node, verifier).application(), arguments.http_host or None, external))  # type: ignore[arg-type]
        servers.append(await serve(internal_application(node), "127.0.0.1", internal))
        code = await node.run()
        await _linger(node, signals)
        return code
    finally:
        signals.cancel()
        for server in servers:
            await server.cleanup()
        del lock


async def _linger(node: ComputeNode, signals: "asyncio.Task[None]") -> None:
    """After a failed start or a termination by HTTP, let the manager read /status for a while."""
    failed_start = node.status.current is Status.FAILED and node.times.total_startup_ms == 0
    if not failed_start and not node.stopped_by_http:
        return
    log.info("exiting in %.0f s, or at the next signal", LINGER_S)
    waiting = asyncio.get_running_loop().create_task(wait_for_stop_signal())
    signals.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait([waiting], timeout=LINGER_S)
    waiting.cancel()


def main() -> int:
    """The console script."""
    arguments = build_parser().parse_args()
    configure_logging()
    return run_service(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())

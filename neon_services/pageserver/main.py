"""``pageserver -D DIR``: Neon's command line for the pageserver."""

import argparse
import json
import logging
import os
import resource
import sys
from pathlib import Path

from neon_services import __version__
from neon_services.ground.errors import ConfigError
from neon_services.ground.process import PidFile, configure_logging, notify_systemd, run_service, wait_for_stop_signal
from neon_services.pageserver.node import PageserverNode
from neon_services.pageserver.settings import load_settings

log = logging.getLogger(__name__)

FEATURES = ["testing"]  # checkpoint, getpage and the like are always there
_SWITCH_INTERVAL_S = 0.001  # a page request waits at most this long for a thread that writes layers
_OPEN_FILES = 65536  # every resident layer that was read keeps a descriptor


def make_parser() -> argparse.ArgumentParser:
    """The options, with Neon's names and defaults."""
    parser = argparse.ArgumentParser("pageserver", description="Pages of any relation at any LSN", allow_abbrev=False)
    parser.add_argument("-D", "--workdir", default=".neon", metavar="DIR", help="working directory with pageserver.toml")
    parser.add_argument("--enabled-features", action="store_true", help="print the features as JSON and exit")
    version = f"Neon page server {__version__} failpoints: false, features: {json.dumps(FEATURES)}"
    parser.add_argument("--version", action="version", version=version)
    return parser


def _raise_open_files_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(workdir: Path) -> int:
    if not workdir.is_dir():
        raise ConfigError(f"working directory {workdir} does not exist: create it with pageserver.toml and identity.toml in it")
    workdir = workdir.resolve()
    os.chdir(workdir)
    settings = load_settings(workdir)
    configure_logging(settings.log_format)
    pid_file = PidFile(workdir / "pageserver.pid")
    _raise_open_files_limit()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    node = PageserverNode(settings)
    await node.start()
    notify_systemd("READY=1")
    try:
        received = await wait_for_stop_signal()
        log.info("got %s, stopping", received.name)
    finally:
        notify_systemd("STOPPING=1")
        await node.stop()
        del pid_file
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 after a stop signal, 2 for wrong settings, 1 for anything else."""
    arguments = make_parser().parse_args(argv)
    if arguments.enabled_features:
        print(json.dumps({"features": FEATURES}))
        return 0
    configure_logging()
    return run_service(lambda: _serve(Path(arguments.workdir)))


if __name__ == "__main__":
    sys.exit(main())

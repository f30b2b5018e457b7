"""``safekeeper``: Neon's command line for a safekeeper.

All of Neon's options are here, and each does what it says; ``--dev`` and ``--current-thread-runtime`` have nothing to change.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
from pathlib import Path

import prometheus_client

from neon_services import __version__
from neon_services.ground import failpoints
from neon_services.ground.durable import replace_durably
from neon_services.ground.errors import ConfigError
from neon_services.ground.net import parse_endpoint, parse_host_port
from neon_services.ground.process import PidFile, configure_logging, notify_systemd, run_service, wait_for_stop_signal
from neon_services.ground.remote_storage import parse_remote_storage_option
from neon_services.ground.units import parse_duration_ms
from neon_services.protocols.lanes import make_event_loop
from neon_services.safekeeper.access import add_access_options, read_access
from neon_services.safekeeper.config import OffloadConfig, SafekeeperConfig
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.server import SafekeeperServer
from neon_services.safekeeper.startup_recovery import TOKEN_VARIABLE

log = logging.getLogger(__name__)

ID_FILE = "safekeeper.id"
PID_FILE = "safekeeper.pid"


def make_parser() -> argparse.ArgumentParser:
    """The options, with Neon's names and defaults. A repeated option: the last value wins."""
    parser = argparse.ArgumentParser(
        "safekeeper", description="Keeps WAL safe until it is in object storage", allow_abbrev=False
    )
    add = parser.add_argument
    add("-D", "--datadir", default="./", help="the data directory")
    add("--id", type=int, metavar="N", help="this node's id, unique for ever; needed once, then kept in safekeeper.id")
    add("--init", action="store_true", help="write safekeeper.id and exit")
    add("-l", "--listen-pg", default="127.0.0.1:5454", metavar="HOST:PORT", help="the WAL service")
    add("--listen-http", default="127.0.0.1:7676", metavar="HOST:PORT", help="the HTTP API")
    add("--advertise-pg", metavar="HOST:PORT", help="where others reach the WAL service (default: --listen-pg)")
    add("--availability-zone", metavar="NAME")
    add_access_options(add)
    add("-n", "--no-sync", action="store_true", help="never wait for the disk: WAL is not safe (for tests)")
    add("--dump-control-file", metavar="PATH", help="print a control file as JSON and exit")
    add("--broker-endpoint", default="http://127.0.0.1:50051", metavar="URL")
    add("--broker-keepalive-interval", default="5000ms", metavar="DURATION")
    add("--heartbeat-timeout", default="5000ms", metavar="DURATION", help="a peer silent for longer is forgotten")
    add("--control-file-save-interval", default="300s", metavar="DURATION", help="how long progress may stay unsaved")
    add("--peer-recovery", default="false", metavar="true|false", help="catch up from peers while no compute streams")
    add("--disable-periodic-broker-push", action="store_true")
    add("--walsenders-keep-horizon", action="store_true", help="keep WAL that a connected pageserver has not received")
    add("--wal-reader-fanout", action="store_true", help="interpret WAL once for all shards of a tenant that follow it")
    add("--max-delta-for-fanout", type=int, metavar="BYTES", help="a shard that is further away is served apart; default: any")
    add("--remote-storage", metavar="TOML", help="where WAL is sent; without it no WAL is ever removed from the disk")
    add("--disable-wal-backup", action="store_true", help="only read WAL from object storage, send none")
    add("--wal-backup-parallel-jobs", type=int, default=5, metavar="N", help="segments that are sent at once")
    add("--max-offloader-lag", type=int, default=1 << 27, metavar="BYTES", help="who is further behind sends no WAL")
    add("--max-reelect-offloader-lag-bytes", type=int, default=0, metavar="BYTES",
        help="another member takes over when so much is not sent; 0: never")  # fmt: skip
    add("--partial-backup-timeout", default="15m", metavar="DURATION",
        help="the last segment of a timeline is sent when it has been the last for so long")  # fmt: skip
    add("--partial-backup-concurrency", type=int, default=5, metavar="N")
    add("--enable-offload", action="store_true", help="evict idle timelines to object storage")
    add("--delete-offloaded-wal", action="store_true", help="delete the last segment of an evicted timeline")
    add("--eviction-min-resident", default="15m", metavar="DURATION", help="no timeline is evicted sooner")
    add("--max-timeline-disk-usage-bytes", type=int, default=0, metavar="BYTES", help="WAL of one timeline; 0: no limit")
    add("--max-global-disk-usage-ratio", type=float, default=0.0, metavar="RATIO", help="of the file system; 0: no limit")
    add("--global-disk-check-interval", default="60s", metavar="DURATION")
    add("--enable-pull-timeline-on-startup", action="store_true",
        help="ask --hcc-base-url which timelines should be here, and copy those that are not from their members")  # fmt: skip
    add("--hcc-base-url", metavar="URL", help=f"the control plane; environment variable {TOKEN_VARIABLE}: a token for it")
    add("--force-metric-collection-on-scrape", default="true", metavar="true|false",
        help="false: /metrics gives what is collected every 30 s, unless it is asked with use_latest=true")  # fmt: skip
    add("--log-format", choices=["plain", "json"], default="plain")
    add("--current-thread-runtime", action="store_true", help="always so here")
    add("--dev", action="store_true", help="accepted; changes nothing here")
    add("--version", action="version", version=f"safekeeper {__version__}")
    return parser


def read_config(arguments: argparse.Namespace, datadir: Path, node_id: int) -> SafekeeperConfig:
    """Check the options. Raises ConfigError."""

    def seconds(option: str) -> float:
        value = parse_duration_ms(getattr(arguments, option.removeprefix("--").replace("-", "_")), what=option) / 1000
        if value <= 0:
            raise ConfigError(f"{option} must be longer than 0")
        return value

    for option in ("--peer-recovery", "--force-metric-collection-on-scrape"):
        value = getattr(arguments, option.removeprefix("--").replace("-", "_"))
        if value not in ("true", "false"):
            raise ConfigError(f"{option}: {value!r} is neither true nor false")

    def number(option: str, least: int) -> int:
        value = getattr(arguments, option.removeprefix("--").replace("-", "_"))
        if value < least:
            raise ConfigError(f"{option} must be at least {least}, not {value}")
        return int(value)

    parse_endpoint(arguments.broker_endpoint, what="--broker-endpoint")
    recovery_url = arguments.hcc_base_url or None
    if arguments.enable_pull_timeline_on_startup != (recovery_url is not None):
        raise ConfigError("--enable-pull-timeline-on-startup and --hcc-base-url URL need each other: give both or none")
    if recovery_url is not None:
        parse_endpoint(recovery_url, what="--hcc-base-url")
    if not 0.0 <= arguments.max_global_disk_usage_ratio <= 1.0:
        raise ConfigError(f"--max-global-disk-usage-ratio must be from 0 to 1, not {arguments.max_global_disk_usage_ratio}")
    remote_storage = parse_remote_storage_option(arguments.remote_storage) if arguments.remote_storage else None
    if arguments.enable_offload and (remote_storage is None or arguments.disable_wal_backup):
        raise ConfigError("--enable-offload needs --remote-storage, and not --disable-wal-backup")
    if arguments.delete_offloaded_wal and not arguments.enable_offload:
        raise ConfigError("--delete-offloaded-wal needs --enable-offload")
    if arguments.max_delta_for_fanout is not None and not arguments.wal_reader_fanout:
        raise ConfigError("--max-delta-for-fanout needs --wal-reader-fanout")
    listen_pg = parse_host_port(arguments.listen_pg, what="--listen-pg")
    advertise_pg = arguments.advertise_pg or arguments.listen_pg
    parse_host_port(advertise_pg, what="--advertise-pg")
    return SafekeeperConfig(
        datadir=datadir,
        node_id=node_id,
        listen_pg=listen_pg,
        listen_http=parse_host_port(arguments.listen_http, what="--listen-http"),
        advertise_pg=advertise_pg,
        http_connstr=arguments.listen_http,
        availability_zone=arguments.availability_zone or None,
        broker_endpoint=arguments.broker_endpoint,
        broker_keepalive_interval_ms=round(seconds("--broker-keepalive-interval") * 1000),
        heartbeat_timeout_s=seconds("--heartbeat-timeout"),
        control_file_save_interval_s=seconds("--control-file-save-interval"),
        periodic_broker_push=not arguments.disable_periodic_broker_push,
        walsenders_keep_horizon=arguments.walsenders_keep_horizon,
        peer_recovery=arguments.peer_recovery == "true",
        wal_reader_fanout=arguments.wal_reader_fanout,
        max_delta_for_fanout=None if arguments.max_delta_for_fanout is None else number("--max-delta-for-fanout", 0),
        sync=not arguments.no_sync,
        remote_storage=remote_storage,
        access=read_access(arguments),
        offload=OffloadConfig(
            wal_backup=remote_storage is not None and not arguments.disable_wal_backup,
            backup_parallel_jobs=number("--wal-backup-parallel-jobs", 1),
            heartbeat_timeout_s=seconds("--heartbeat-timeout"),
            max_offloader_lag=number("--max-offloader-lag", 0),
            max_reelect_offloader_lag=number("--max-reelect-offloader-lag-bytes", 0),
            partial_backup_timeout_s=seconds("--partial-backup-timeout"),
            partial_backup_concurrency=number("--partial-backup-concurrency", 1),
            eviction=arguments.enable_offload,
            delete_offloaded_wal=arguments.delete_offloaded_wal,
            eviction_min_resident_s=seconds("--eviction-min-resident"),
        ),
        max_timeline_disk_usage_bytes=number("--max-timeline-disk-usage-bytes", 0),
        max_global_disk_usage_ratio=arguments.max_global_disk_usage_ratio,
        global_disk_check_interval_s=seconds("--global-disk-check-interval"),
        force_metric_collection_on_scrape=arguments.force_metric_collection_on_scrape == "true",
        startup_recovery_url=recovery_url,
    )


def read_or_write_id(datadir: Path, wanted: int | None) -> int:
    """The node id of this data directory, written there the first time. Raises ConfigError when it does not fit."""
    path = datadir / ID_FILE
    if wanted is not None and not 0 <= wanted < 1 << 64:
        raise ConfigError(f"--id: {wanted} is not a number from 0 to {(1 << 64) - 1}")
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        if wanted is None:
            raise ConfigError(f"{path} does not exist: this is a new safekeeper, give it an id with --id") from None
        replace_durably(path, str(wanted).encode())
        return wanted
    except UnicodeDecodeError:
        text = ""
    if not text.isdecimal():
        raise ConfigError(f"{path} does not hold a number: write this safekeeper's id into it")
    if wanted is not None and int(text) != wanted:
        raise ConfigError(
            f"--id {wanted} does not fit: {path} says {int(text)}. A node id is never changed: use the right data directory, "
            f"or leave --id out"
        )
    return int(text)


def dump_control_file(path: Path) -> int:
    """Print a control file as JSON. Raises ConfigError or CorruptionError."""
    try:
        print(json.dumps(ControlFile.load(path).to_json(), indent=2))
    except OSError as error:
        raise ConfigError(f"--dump-control-file: {path}: {error.strerror or error}") from error
    return 0


def _enter_datadir(text: str) -> Path:
    datadir = Path(text).absolute()
    try:
        os.chdir(datadir)
    except OSError as error:
        raise ConfigError(f"--datadir: {datadir}: {error.strerror or error}") from error
    return datadir


async def _serve(arguments: argparse.Namespace, servers: list[SafekeeperServer]) -> int:
    if arguments.dump_control_file is not None:
        return dump_control_file(Path(arguments.dump_control_file))
    failpoints.enable_from_environment()
    datadir = _enter_datadir(arguments.datadir)
    lock = PidFile(datadir / PID_FILE)
    node_id = read_or_write_id(datadir, arguments.id)
    if arguments.init:
        print(f"safekeeper {node_id} is initialized in {datadir}")
        return 0
    config = read_config(arguments, datadir, node_id)
    server = SafekeeperServer(config)
    servers.append(server)
    await server.start()
    log.info("safekeeper %d: WAL service on %s, HTTP on %s", node_id, arguments.listen_pg, arguments.listen_http)
    notify_systemd("READY=1")
    stop_signal = asyncio.create_task(wait_for_stop_signal())
    failure = asyncio.create_task(server.wait())
    await asyncio.wait({stop_signal, failure}, return_when=asyncio.FIRST_COMPLETED)
    notify_systemd("STOPPING=1")
    if stop_signal.done():
        log.info("got %s, stopping", stop_signal.result().name)
    await server.stop()
    del lock
    if failure.done() and not stop_signal.done():
        await failure
    failure.cancel()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 after a stop signal, 2 for wrong options, 1 when anything else ends the process."""
    arguments = make_parser().parse_args(argv)
    configure_logging(arguments.log_format)
    prometheus_client.disable_created_metrics()
    servers: list[SafekeeperServer] = []
    code = run_service(lambda: _serve(arguments, servers), make_event_loop)
    if any(server.has_unfinished_requests for server in servers):
        # everything is saved; a request to an object store that hangs must not delay the end (and the restart) for minutes
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())

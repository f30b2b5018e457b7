"""The safekeeper's command line as a process: wrong input is one clear line and a non-zero exit; signals are exit 0."""

import gc
import json
import logging
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neon_services.consensus.acceptor import AcceptorState
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import TermLsn
from neon_services.safekeeper.control_file import ControlFile
from neon_services.safekeeper.main import main as safekeeper_main
from neon_services.storage_broker.main import main as storage_broker_main
from tests.integration.cluster import SCRIPTS, free_port, http
from tests.integration.safekeeper_support import Node, new_ttid

pytestmark = pytest.mark.cluster


Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Call the entry point as the console script does, but in this process: these runs never start serving."""
    handlers, level = logging.root.handlers[:], logging.root.level

    def call(*arguments: str, cwd: Path = tmp_path, entry: Callable[[list[str]], int] = safekeeper_main) -> Done:
        monkeypatch.chdir(cwd)  # the safekeeper changes into its data directory
        capfd.readouterr()
        code = entry(list(arguments))
        gc.collect()  # what would be said at the interpreter's end is said now
        output, errors = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, output, errors)

    yield call
    logging.root.handlers[:], logging.root.level = handlers, level


def run_process(*arguments: str, cwd: Path | None = None) -> Done:
    """The same in a process of its own, which lets go of its lock at the end."""
    argv = [str(SCRIPTS / "safekeeper"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=20, cwd=cwd, check=False)


def refused(done: Done, *expected: str) -> None:
    """Exactly one line on stderr, which says all of this."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stdout
    for text in expected:
        assert text in lines[0], lines[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--listen-pg", "5454"], ["--listen-pg", "'5454'", "HOST:PORT"]),
        (["--listen-http", "host:99999"], ["--listen-http", "host:99999"]),
        (["--broker-endpoint", "https://b"], ["--broker-endpoint", "https://b"]),
        (["--broker-endpoint", "https://b:1", "--ssl-ca-file", "/ca"], ["/ca: No such file"]),
        (["--heartbeat-timeout", "soon"], ["--heartbeat-timeout", "'soon'", "duration"]),
        (["--control-file-save-interval", "0s"], ["--control-file-save-interval", "longer than 0"]),
        (["--enable-offload"], ["--enable-offload needs --remote-storage"]),
        (["--delete-offloaded-wal"], ["--delete-offloaded-wal needs --enable-offload"]),
        (["--wal-backup-parallel-jobs", "0"], ["--wal-backup-parallel-jobs must be at least 1, not 0"]),
        (["--max-offloader-lag", "-1"], ["--max-offloader-lag must be at least 0, not -1"]),
        (["--remote-storage", "{bucket_name='b'}"], ["remote_storage", "'bucket_region' is missing"]),
        (["--remote-storage", "{local_path='/proc/x'}"], ["--remote-storage: /proc/x"]),
        (["--listen-https", "127.0.0.1:1"], ["--ssl-key-file, --ssl-cert-file", "server.key: No such file"]),
        (["--enable-tls-wal-service-api", "--ssl-key-file", "/k"], ["--ssl-key-file", "/k: No such file"]),
        (["--auth-token-path", "/t"], ["the token in /t cannot be read", "No such file"]),
        (["--max-delta-for-fanout", "9"], ["--max-delta-for-fanout needs --wal-reader-fanout"]),
        (["--wal-reader-fanout", "--max-delta-for-fanout", "-1"], ["--max-delta-for-fanout must be at least 0, not -1"]),
        (["--peer-recovery", "perhaps"], ["--peer-recovery", "'perhaps'"]),
        (["--pg-auth-public-key-path", "/k"], ["--pg-auth-public-key-path: /k: No such file"]),
        (["--http-auth-public-key-path", "."], ["--http-auth-public-key-path: ", "no PEM PUBLIC KEY"]),
        (["--max-global-disk-usage-ratio", "1.8"], ["--max-global-disk-usage-ratio must be from 0 to 1, not 1.8"]),
        (["--remote-storage", "{local_path="], ["--remote-storage", "TOML"]),
        (["--force-metric-collection-on-scrape", "no"], ["--force-metric-collection-on-scrape: 'no'"]),
        (["--enable-pull-timeline-on-startup"], ["--hcc-base-url URL need each other"]),
        (["--hcc-base-url", "http://c:1"], ["--hcc-base-url URL need each other"]),
        (
            ["--enable-pull-timeline-on-startup", "--hcc-base-url", "c"],
            ["--hcc-base-url", "'c' is not http://HOST:PORT or https://HOST:PORT"],
        ),
    ],
)
def test_wrong_options(run: Run, tmp_path: Path, options: list[str], expected: list[str]) -> None:
    refused(run("-D", str(tmp_path), "--id", "1", *options), *expected)


def test_options_of_absent_features_may_say_off(run: Run, tmp_path: Path) -> None:
    off = ["--peer-recovery", "false", "--max-timeline-disk-usage-bytes", "0", "--http-auth-public-key-path", ""]
    off += ["--force-metric-collection-on-scrape", "true", "--hcc-base-url", ""]
    off += ["--wal-backup-parallel-jobs", "5", "--partial-backup-timeout", "15m", "--remote-storage", "{local_path='/x'}"]
    done = run("-D", str(tmp_path), "--id", "3", "--init", *off)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "safekeeper.id").read_text() == "3"


def test_the_id_is_needed_once_and_never_changes(tmp_path: Path) -> None:
    refused(run_process("-D", str(tmp_path)), "give it an id with --id")
    assert run_process("-D", str(tmp_path), "--id", "7", "--init").returncode == 0
    assert run_process("--init", cwd=tmp_path).returncode == 0, "the default data directory is the current one"
    refused(run_process("-D", str(tmp_path), "--id", "8"), "--id 8 does not fit", "says 7")
    (tmp_path / "safekeeper.id").write_text("seven")
    refused(run_process("-D", str(tmp_path), "--id", "7"), "safekeeper.id does not hold a number")
    refused(run_process("-D", str(tmp_path), "--id", "-1"), "--id: -1 is not a number")


def test_a_missing_data_directory(run: Run, tmp_path: Path) -> None:
    refused(run("-D", str(tmp_path / "absent"), "--id", "1"), "--datadir", "absent", "No such file")


def test_a_locked_data_directory_and_taken_ports(tmp_path: Path) -> None:
    node = Node(tmp_path, 1, free_port())
    node.start()
    assert node.popen is not None
    try:
        refused(run_process("-D", str(node.directory)), "safekeeper.pid is locked", f"pid {node.popen.pid}")
        (tmp_path / "other").mkdir()
        other = ["-D", str(tmp_path / "other"), "--id", "2"]
        refused(run_process(*other, "--listen-pg", f"127.0.0.1:{node.pg_port}"), "--listen-pg: cannot listen", "in use")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            pg = f"127.0.0.1:{free_port()}"
            taken = f"127.0.0.1:{node.http_port}"
            refused(run_process(*other, "--listen-pg", pg, "--listen-http", taken), "--listen-http: cannot listen")
    finally:
        node.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_signals_end_it_with_0(tmp_path: Path, number: signal.Signals) -> None:
    node = Node(tmp_path, 1, free_port())
    node.start()
    assert node.popen is not None
    node.popen.send_signal(number)
    assert node.popen.wait(10) == 0
    assert f"got {number.name}" in node.log.read_text()


def test_it_tells_systemd_when_it_is_ready(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(20)
        node = Node(tmp_path, 1, free_port())
        node.argv = ["/usr/bin/env", f"NOTIFY_SOCKET={tmp_path / 'notify'}", *node.argv]
        node.start()
        try:
            assert notify.recv(100) == b"READY=1"
            assert node.stop() == 0
            assert notify.recv(100) == b"STOPPING=1"
        finally:
            node.kill()


def control_file(directory: Path) -> Path:
    ttid = new_ttid()
    path = directory / str(ttid.tenant_id) / str(ttid.timeline_id)
    path.mkdir(parents=True)
    state = AcceptorState(term=4, term_history=(TermLsn(4, Lsn(0x1000028)),), commit_lsn=Lsn(0x1000028))
    ControlFile(ttid, state).save(path)
    return path / "safekeeper.control"


def test_dumping_a_control_file(run: Run, tmp_path: Path) -> None:
    path = control_file(tmp_path)
    done = run("--dump-control-file", str(path))
    assert done.returncode == 0
    assert json.loads(done.stdout)["acceptor_state"]["term"] == 4
    path.write_bytes(path.read_bytes()[:-1])
    refused(run("--dump-control-file", str(path)), "safekeeper.control", "checksum mismatch")
    refused(run("--dump-control-file", str(tmp_path / "nothing")), "nothing", "No such file")


def test_a_broken_timeline_is_reported_and_the_others_are_served(tmp_path: Path) -> None:
    node = Node(tmp_path, 1, free_port())
    good, bad = control_file(node.directory), control_file(node.directory)
    bad.write_bytes(bad.read_bytes()[:30])
    node.start()
    try:
        listed = http("GET", node.url("/v1/tenant/timeline"))
        assert [entry["timeline_id"] for entry in listed] == [good.parent.name]
        assert "safekeeper.control: checksum mismatch; remove" in node.log.read_text()
        with pytest.raises(Exception, match=r"is broken: .*pull the timeline"):
            http("GET", node.url(f"/v1/tenant/{bad.parent.parent.name}/timeline/{bad.parent.name}"))
    finally:
        node.kill()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--listen-addr"),
        (["-l", "nowhere"], "--listen-addr: 'nowhere'"),
        (["-l", "127.0.0.1:1", "--listen-https-addr", "127.0.0.1:2"], "server.key: No such file"),
        (["--listen-https-addr", "nowhere"], "--listen-https-addr: 'nowhere'"),
        (["-l", "127.0.0.1:1", "--timeline-chan-size", "0"], "--timeline-chan-size: 0"),
        (["-l", "127.0.0.1:1", "--http2-keepalive-interval", "x"], "--http2-keepalive-interval: 'x'"),
    ],
)
def test_wrong_options_of_the_broker(run: Run, options: list[str], expected: str) -> None:
    done = run(*options, entry=storage_broker_main)
    assert done.returncode == 2
    refused(done, expected)


def test_the_brokers_taken_port(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("-l", address, entry=storage_broker_main)
    refused(done, f"cannot listen on {address}", "in use")

"""``make bench``: the rows of the performance table that exist, each as a ratio to a baseline of the same run.

Usage: python -m tests.benchmarks [--seconds N] [--pairs N] [--scale N] [--only SUBSTRING]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from neon_services.ground.ids import TimelineId
from tests.benchmarks import pgbench
from tests.benchmarks.c_chain import CChain
from tests.benchmarks.stock import StockServer
from tests.benchmarks.table import row
from tests.integration.cluster import Cluster, Compute, make_directory, running_cluster


def read_only(cluster: Cluster, compute: Compute, stock: StockServer, options: argparse.Namespace) -> None:
    """Warm read-only pgbench: every page is local, and what fits is in shared buffers."""
    for port in (compute.port, stock.port):
        pgbench.tps(cluster.major, port, ["-S", "-c", "4", "-j", "2"], options.seconds)
    arguments = ["-S", "-c", "4", "-j", "2"]
    ratio, ours, base = pgbench.paired(cluster.major, compute.port, stock.port, arguments, options.seconds, options.pairs)
    row("warm read-only pgbench -S -c 4, compute / stock", f"{ratio:.2f}  ({ours:.0f} / {base:.0f} tps)", ">= 0.98")


def read_write(cluster: Cluster, compute: Compute, stock: StockServer, chain: StockServer, options: argparse.Namespace) -> None:
    """Commits through three safekeepers against one synchronous standby, and against the same processes in C."""
    for clients in (1, 16, 64):
        arguments = ["-N", "-c", str(clients), "-j", "2"]
        ratio, ours, base = pgbench.paired(cluster.major, compute.port, stock.port, arguments, options.seconds, options.pairs)
        what = f"read-write pgbench -N -c {clients}, 3 safekeepers / stock + sync standby"
        row(what, f"{ratio:.2f}  ({ours:.0f} / {base:.0f} tps)", ">= 1.0")
        ratio, ours, base = pgbench.paired(cluster.major, compute.port, chain.port, arguments, options.seconds, options.pairs)
        what = f"the same -c {clients} / proposer and 3 servers in C that check nothing"
        row(what, f"{ratio:.2f}  ({ours:.0f} / {base:.0f} tps)", "(stated)")


def warm(server: Compute | StockServer) -> None:
    """Read every page of pgbench's tables and indexes once: a compute that has just started has none of them."""
    server.query("create extension if not exists pg_prewarm")
    server.query(
        "select sum(pg_prewarm(oid::regclass, 'read')) from pg_class where relname ~ '^pgbench' and relkind in ('r', 'i')"
    )


def branches(cluster: Cluster, options: argparse.Namespace) -> None:
    """Time to create a branch at the tip, pageserver only."""
    from tests.integration.cluster import http

    times = []
    for _ in range(10):
        body = {"new_timeline_id": str(TimelineId.generate()), "ancestor_timeline_id": str(cluster.timeline)}
        begun = time.perf_counter()
        http("POST", f"{cluster.pageserver_api}/v1/tenant/{cluster.tenant}/timeline", body)
        times.append((time.perf_counter() - begun) * 1000)
    row("branch creation", f"{statistics.median(times):.0f} ms (worst of 10: {max(times):.0f})", "< 50 ms")


def compute_start(cluster: Cluster, compute: Compute) -> None:
    """From X known to SELECT 1, by compute_ctl's own clock, and the whole start as a user sees it."""
    from tests.integration.cluster import http

    whole, inner = [], []
    for _ in range(5):
        compute.kill_everything()
        compute.wipe()
        begun = time.perf_counter()
        compute.start()
        whole.append((time.perf_counter() - begun) * 1000)
        metrics = http("GET", f"http://127.0.0.1:{compute.http_port}/metrics.json")
        inner.append(metrics["basebackup_ms"] + metrics["start_postgres_ms"])
    what = "compute start, X known to SELECT 1 (after kill -9, empty disk)"
    row(what, f"{statistics.median(inner):.0f} ms (with the election: {statistics.median(whole):.0f})", "< 300 ms")


def component_benchmarks() -> None:
    """The benchmarks of single components print their own rows."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        print(f"-- {path.stem}", flush=True)
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.{path.stem}"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--seconds", type=int, default=8, help="length of one pgbench run (default 8)")
    parser.add_argument("--pairs", type=int, default=3, help="paired runs per row (default 3)")
    parser.add_argument("--scale", type=int, default=20, help="pgbench scale (default 20, 300 MB)")
    parser.add_argument("--only", default="", help="run only the rows whose name contains this")
    options = parser.parse_args()

    def wanted(name: str) -> bool:
        return options.only in name

    with tempfile.TemporaryDirectory(prefix="neon-bench-") as text:
        base = Path(text)
        base.chmod(0o755)
        make_directory(base / "stock")
        subprocess.run(["chown", "postgres:postgres", str(base)], check=True)
        with running_cluster(base / "cluster", safekeeper_options=()) as cluster:
            compute = cluster.make_compute(max_connections="200", shared_buffers="128MB", max_wal_size="4GB")
            compute.start()
            pgbench.load(cluster.major, compute.port, options.scale)
            if wanted("branch"):
                branches(cluster, options)
            if wanted("start"):
                compute_start(cluster, compute)
            primary = StockServer(base / "stock" / "primary", cluster.major)
            standby = StockServer(base / "stock" / "standby", cluster.major)
            end: list[Callable[[], None]] = []
            try:
                primary.initialise()
                (primary.data / "postgresql.auto.conf").write_text("max_connections = 200\n")
                primary.start()
                end.append(primary.destroy)
                pgbench.load(cluster.major, primary.port, options.scale)
                warm(compute)
                warm(primary)
                if wanted("read-only"):
                    read_only(cluster, compute, primary, options)
                if wanted("read-write"):
                    make_directory(base / "chain")
                    chain = CChain(base / "chain", cluster.major)
                    end.append(chain.destroy)
                    chain.initialise()
                    pgbench.load(cluster.major, chain.server.port, options.scale)
                    chain.start()
                    standby.follow(primary)
                    standby.start()
                    end.append(standby.destroy)
                    primary.require_standby()
                    read_write(cluster, compute, primary, chain.server, options)
            finally:
                for action in reversed(end):
                    action()
    if wanted("component"):
        component_benchmarks()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""pgbench against two servers in turn: ratios of paired runs, so that a noisy machine disturbs both alike."""

import re
import statistics
import subprocess


def tps(major: int, port: int, arguments: list[str], seconds: int) -> float:
    """Transactions a second of one run."""
    command = [f"/usr/lib/postgresql/{major}/bin/pgbench", "-h", "127.0.0.1", "-p", str(port), "-U", "cloud_admin"]
    command += ["-n", "-M", "prepared", "-T", str(seconds), *arguments, "postgres"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PGPASSWORD": "cloud_admin"}, timeout=seconds + 120)
    found = re.search(r"tps = ([0-9.]+) \(without", done.stdout)
    if done.returncode != 0 or found is None:
        raise RuntimeError(f"pgbench failed: {done.stdout}\n{done.stderr}")
    return float(found[1])


def load(major: int, port: int, scale: int) -> None:
    """Fill a server with pgbench's tables."""
    command = [f"/usr/lib/postgresql/{major}/bin/pgbench", "-h", "127.0.0.1", "-p", str(port), "-U", "cloud_admin"]
    command += ["-i", "-q", "-s", str(scale), "postgres"]
    subprocess.run(command, check=True, capture_output=True, env={"PGPASSWORD": "cloud_admin"}, timeout=900)


def paired(major: int, ours: int, baseline: int, arguments: list[str], seconds: int, pairs: int) -> tuple[float, float, float]:
    """(median ratio ours/baseline, median tps of ours, of the baseline); the order alternates from pair to pair."""
    ratios, our_tps, base_tps = [], [], []
    for number in range(pairs):
        order = [ours, baseline] if number % 2 == 0 else [baseline, ours]
        result = {port: tps(major, port, arguments, seconds) for port in order}
        ratios.append(result[ours] / result[baseline])
        our_tps.append(result[ours])
        base_tps.append(result[baseline])
    return statistics.median(ratios), statistics.median(our_tps), statistics.median(base_tps)

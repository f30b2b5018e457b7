"""The walproposer's ring and configuration, without processes."""

import random
from pathlib import Path
from typing import Any

import pytest

from neon_services.compute.walproposer_config import parse_config, read_config
from neon_services.compute.walproposer_ring import WalRing
from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import NO_MEMBERSHIP

GOOD: dict[str, Any] = {
    "tenant_id": "0" * 31 + "1",
    "timeline_id": "0" * 31 + "2",
    "safekeepers": ["10.0.0.1:5454", "10.0.0.2:5454", "10.0.0.3:5454"],
    "generation": 3,
    "pg_version": 150020,
    "system_id": None,
}


def test_ring_gives_back_what_was_appended() -> None:
    seed = 4711
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(50):
        start = Lsn(rng.randint(1, 1 << 40))
        ring, model = WalRing(rng.randint(16, 200), start), b""
        for _ in range(60):
            data = rng.randbytes(rng.randint(0, ring.size // 2))
            ring.append(memoryview(data))
            model += data
            if rng.random() < 0.05:
                ring.grow()
            assert ring.end == start + len(model)
            assert ring.end - ring.start <= ring.size
            begin = Lsn(rng.randint(ring.start, ring.end))
            end = Lsn(rng.randint(begin, ring.end))
            assert b"".join(ring.views(begin, end)) == model[begin - start : end - start]


def test_ring_refuses_what_it_has_not() -> None:
    ring = WalRing(16, Lsn(100))
    ring.append(memoryview(bytes(20))[:16])
    ring.append(memoryview(bytes(4)))
    assert (ring.start, ring.end) == (104, 120)
    for begin, end in ((103, 110), (110, 121), (112, 111)):
        with pytest.raises(NeonError):
            ring.views(Lsn(begin), Lsn(end))
    with pytest.raises(NeonError):
        ring.append(memoryview(bytes(17)))


def test_config_and_its_defaults() -> None:
    config = parse_config(GOOD)
    assert config.safekeepers[2] == ("10.0.0.3", 5454)
    assert (config.reconnect_timeout_s, config.connect_timeout_s, config.lazy_s) == (1.0, 10.0, 0.0)
    assert config.gather_s == 0.0004 and parse_config({**GOOD, "gather_us": 0}).gather_s == 0
    assert config.membership == NO_MEMBERSHIP and config.proposer().use_generations
    one_host = parse_config({**GOOD, "safekeepers": ["h:1", "h:2", "h:3"], "generation": 0})
    assert one_host.lazy_s == 0.01 and not one_host.proposer().use_generations
    members = [{"id": 1, "host": "a", "pg_port": 1}]
    assert parse_config({**GOOD, "membership": {"generation": 4, "members": members}}).proposer().mconf.generation == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tenant_id": "xyz"}, "xyz"),
        ({"safekeepers": []}, "safekeepers"),
        ({"safekeepers": ["a:1", "a:1"]}, "listed twice"),
        ({"safekeepers": ["a:port"]}, "a:port"),
        ({"safekeepers": [f"a:{i}" for i in range(1, 33)]}, "1 to 31"),
        ({"generation": -1}, "generation"),
        ({"generation": True}, "generation"),
        ({"pg_version": "15"}, "pg_version"),
        ({"pg_version": 15}, "pg_version"),
        ({"gather_us": 100_001}, "gather_us is a number from 0 to 100000"),
        ({"bootstrap_lsn": "zero"}, "zero"),
        ({"membership": {"generation": 2, "members": []}}, "no members"),
        ({"safekeeper": []}, "unknown key 'safekeeper'"),
    ],
)
def test_wrong_config_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config({**GOOD, **change})


def test_unreadable_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_config(tmp_path / "bad.json")

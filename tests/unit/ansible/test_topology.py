"""What an inventory means and what is wrong with it, as pure functions."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

TENANT, MAIN, BRANCH = "a" * 32, "b" * 32, "c" * 32


@pytest.fixture
def topology(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("filter_plugins/neon_topology.py")


class Inventory:
    """A good cluster of eight hosts, to be spoilt by tests."""

    def __init__(self) -> None:
        members = {
            "storage_broker": ["broker1"],
            "safekeepers": ["sk1", "sk2", "sk3"],
            "pageservers": ["ps1"],
            "computes": ["compute1", "compute2"],
            "object_store": ["store1"],
        }
        self.groups: dict[str, list[str]] = {**members, "all": [host for hosts in members.values() for host in hosts]}
        self.tenants: list[dict[str, Any]] = [
            {
                "id": TENANT,
                "pageserver": "ps1",
                "generation": 1,
                "timelines": [{"id": MAIN, "pg_version": 15}, {"id": BRANCH, "ancestor_timeline_id": MAIN}],
            }
        ]
        self.hostvars: dict[str, dict[str, Any]] = {
            host: {"ansible_host": f"10.0.0.{number}", "neon_tenants": self.tenants}
            for number, host in enumerate(self.groups["all"], 1)
        }
        for number, host in enumerate(self.groups["safekeepers"], 1):
            self.hostvars[host]["safekeeper_node_id"] = number
        self.hostvars["ps1"]["pageserver_node_id"] = 1
        for host, timeline in (("compute1", MAIN), ("compute2", BRANCH)):
            self.hostvars[host] |= {"compute_tenant_id": TENANT, "compute_timeline_id": timeline}

    def on_one_machine(self) -> None:
        for number, host in enumerate(self.groups["all"]):
            self.hostvars[host] |= {"neon_machine": "one", "neon_address": "127.0.0.1"}
            self.hostvars[host] |= {"safekeeper_pg_port": 5000 + number, "safekeeper_http_port": 6000 + number}
            self.hostvars[host] |= {"compute_pg_port": 7000 + number, "compute_http_port": 8000 + 2 * number}


@pytest.fixture
def inventory() -> Inventory:
    return Inventory()


def test_a_good_inventory_has_no_problems(topology: ModuleType, inventory: Inventory) -> None:
    assert topology.problems(inventory.groups, inventory.hostvars) == []


def test_services_with_their_addresses(topology: ModuleType, inventory: Inventory) -> None:
    inventory.hostvars["sk2"] |= {"neon_address": "192.0.2.7", "safekeeper_pg_port": 6454}
    found = topology.topology(inventory.groups, inventory.hostvars)
    assert found["broker_endpoint"] == "http://10.0.0.1:50051"
    assert found["object_store_endpoint"] == "http://10.0.0.8:8333"
    assert found["safekeepers"][1] == {"name": "sk2", "id": 2, "host": "192.0.2.7", "pg_port": 6454, "http_port": 7676}
    assert [page["id"] for page in found["pageservers"]] == [1]


def test_without_optional_groups(topology: ModuleType, inventory: Inventory) -> None:
    del inventory.groups["object_store"]
    assert topology.topology(inventory.groups, inventory.hostvars)["object_store_endpoint"] is None


Spoil = Callable[[Inventory], object]
CASES: list[tuple[str, Spoil, str]] = [
    ("no broker", lambda i: i.groups["storage_broker"].clear(), "group storage_broker has no host"),
    ("two brokers", lambda i: i.groups["storage_broker"].append("sk1"), "keep exactly one"),
    ("even members", lambda i: i.groups["safekeepers"].append("store1"), "use an odd number"),
    ("one member", lambda i: i.groups.update(safekeepers=["sk1"]), "use 3"),
    ("id missing", lambda i: i.hostvars["sk2"].pop("safekeeper_node_id"), "safekeeper_node_id of sk2 is not set"),
    ("id twice", lambda i: i.hostvars["sk2"].update(safekeeper_node_id=1), "safekeeper_node_id is 1 for sk1, sk2"),
    ("id text", lambda i: i.hostvars["sk2"].update(safekeeper_node_id="2"), "safekeeper_node_id of sk2 is '2'"),
    ("id zero", lambda i: i.hostvars["ps1"].update(pageserver_node_id=0), "pageserver_node_id of ps1 is 0"),
    ("name for address", lambda i: i.hostvars["sk3"].update(ansible_host="sk3.example"), "set neon_address"),
    ("tenant id", lambda i: i.tenants[0].update(id="XY"), "tenant with id 'XY'"),
    ("tenant id unquoted", lambda i: i.tenants[0].update(id=11112222333344445555666677778888), "in quotes"),
    ("tenant nowhere", lambda i: i.tenants[0].update(pageserver="ps9"), "on pageserver 'ps9'"),
    ("tenant twice", lambda i: i.tenants.append(copy.deepcopy(i.tenants[0])), "twice"),
    ("generation", lambda i: i.tenants[0].update(generation=0), "generation 0"),
    ("timeline id", lambda i: i.tenants[0]["timelines"][0].update(id="xyz"), "timeline with id 'xyz'"),
    ("branch first", lambda i: i.tenants[0]["timelines"].reverse(), "list it first"),
    ("no version", lambda i: i.tenants[0]["timelines"][0].pop("pg_version"), "pg_version None"),
    ("unknown branch", lambda i: i.hostvars["compute2"].update(compute_timeline_id="d" * 32), "does not list"),
    ("two writers", lambda i: i.hostvars["compute2"].update(compute_timeline_id=MAIN), "both write to timeline"),
    ("port twice", lambda i: i.hostvars["sk1"].update(safekeeper_http_port=5454), "are both 5454 on machine sk1"),
]


@pytest.mark.parametrize(("spoil", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_mistake_is_named_with_its_repair(topology: ModuleType, inventory: Inventory, spoil: Spoil, message: str) -> None:
    spoil(inventory)
    found = topology.problems(inventory.groups, inventory.hostvars)
    assert any(message in problem for problem in found), found


def test_one_machine_may_hold_everything_when_ports_differ(topology: ModuleType, inventory: Inventory) -> None:
    inventory.on_one_machine()
    assert topology.problems(inventory.groups, inventory.hostvars) == []
    # the control node, listed first and said to be the machine, too, as variables of all hosts would do
    inventory.groups["all"].insert(0, "localhost")
    inventory.hostvars["localhost"] = {"neon_machine": "one"}
    leaders = [h for h in inventory.groups["all"] if topology.machine_of(inventory.groups, inventory.hostvars, h)["leader"]]
    assert leaders == ["broker1"]
    assert "computes" in topology.machine_of(inventory.groups, inventory.hostvars, "sk1")["runs"]
    assert topology.firewall_rules(inventory.groups, inventory.hostvars, "sk1") == []  # it talks to itself over loopback


def open_to(topology: ModuleType, inventory: Inventory, host: str) -> dict[int, set[str]]:
    rules = topology.firewall_rules(inventory.groups, inventory.hostvars, host)
    return {rule["port"]: set(rule["sources"]) for rule in rules}


def test_each_port_is_open_to_exactly_those_who_use_it(topology: ModuleType, inventory: Inventory) -> None:
    ip = {host: inventory.hostvars[host]["ansible_host"] for host in inventory.groups["all"]}
    others = {ip["sk1"], ip["sk2"], ip["sk3"]} - {ip["sk1"]}
    assert open_to(topology, inventory, "sk1") == {
        5454: others | {ip["ps1"], ip["compute1"], ip["compute2"]},
        7676: others | {ip["ps1"]},
    }
    assert open_to(topology, inventory, "ps1") == {6400: {ip["compute1"], ip["compute2"]}}
    assert open_to(topology, inventory, "store1") == {8333: {ip["sk1"], ip["sk2"], ip["sk3"], ip["ps1"]}}
    assert open_to(topology, inventory, "compute1") == {}


def test_monitoring_reads_http_and_nothing_else(topology: ModuleType, inventory: Inventory) -> None:
    inventory.groups["monitoring"] = ["watch1"]
    inventory.groups["all"].append("watch1")
    inventory.hostvars["watch1"] = {"ansible_host": "10.0.0.99"}
    ports = {
        port
        for host in inventory.groups["all"]
        for port, sources in open_to(topology, inventory, host).items()
        if "10.0.0.99" in sources
    }
    assert ports == {50051, 7676, 9898, 3080}


def test_comments_fit_nftables(topology: ModuleType, inventory: Inventory) -> None:
    for host in inventory.groups["all"]:
        for rule in topology.firewall_rules(inventory.groups, inventory.hostvars, host):
            assert len(rule["comment"]) < 128


def test_the_numbers_are_the_roles_defaults(topology: ModuleType) -> None:
    roles = Path(topology.__file__ or "").parents[1] / "roles"
    defaults: dict[str, Any] = {}
    for role in ("storage_broker", "safekeeper", "pageserver", "compute", "object_store"):
        defaults |= yaml.safe_load((roles / role / "defaults/main.yml").read_text())
    assert {name: defaults[name] for name in topology.DEFAULTS} == topology.DEFAULTS

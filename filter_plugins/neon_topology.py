"""The cluster that an inventory describes: who runs what, where it answers, who may talk to it, and what is wrong with it.

Invariant: pure functions of the groups and host variables; no fact and no host is needed. Roles, the firewall, the validation
and the tests all read this one answer. An inventory host is one instance of a service; several may share a machine
(``neon_machine``), which is how one server runs a whole cluster.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

Groups = Mapping[str, list[str]]
HostVars = Mapping[str, Mapping[str, Any]]

# The same numbers are the defaults of the roles; tests/unit/ansible compares the two.
DEFAULTS = {
    "storage_broker_port": 50051,
    "safekeeper_pg_port": 5454,
    "safekeeper_http_port": 7676,
    "pageserver_pg_port": 6400,
    "pageserver_http_port": 9898,
    "compute_pg_port": 55433,
    "compute_http_port": 3080,
    "object_store_port": 8333,
}
ROLES = ("storage_broker", "safekeepers", "pageservers", "computes", "object_store")
_ID = re.compile(r"[0-9a-f]{32}")


def _is_id(value: Any) -> bool:
    """Whether it is an id, and text: without quotes YAML takes an id of digits only for a number."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _value(hostvars: HostVars, host: str, name: str) -> Any:
    return hostvars[host].get(name, DEFAULTS.get(name))


def address(hostvars: HostVars, host: str) -> str:
    """Where other hosts reach this one: ``neon_address``, else what Ansible connects to."""
    variables = hostvars[host]
    return str(variables.get("neon_address") or variables.get("ansible_host") or host)


def machine(hostvars: HostVars, host: str) -> str:
    """The machine that an instance runs on; by default each inventory host is one."""
    return str(hostvars[host].get("neon_machine") or host)


def topology(groups: Groups, hostvars: HostVars) -> dict[str, Any]:
    """Every service of the cluster with its address and ports, in inventory order."""
    broker = next(iter(groups.get("storage_broker", [])), None)
    store = next(iter(groups.get("object_store", [])), None)
    return {
        "broker_endpoint": broker and f"http://{address(hostvars, broker)}:{_value(hostvars, broker, 'storage_broker_port')}",
        "object_store_endpoint": store and f"http://{address(hostvars, store)}:{_value(hostvars, store, 'object_store_port')}",
        "safekeepers": [
            {
                "name": host,
                "id": hostvars[host].get("safekeeper_node_id"),
                "host": address(hostvars, host),
                "pg_port": _value(hostvars, host, "safekeeper_pg_port"),
                "http_port": _value(hostvars, host, "safekeeper_http_port"),
            }
            for host in groups.get("safekeepers", [])
        ],
        "pageservers": [
            {
                "name": host,
                "id": hostvars[host].get("pageserver_node_id"),
                "host": address(hostvars, host),
                "pg_port": _value(hostvars, host, "pageserver_pg_port"),
                "http_port": _value(hostvars, host, "pageserver_http_port"),
            }
            for host in groups.get("pageservers", [])
        ],
        "computes": [
            {
                "name": host,
                "host": address(hostvars, host),
                "pg_port": _value(hostvars, host, "compute_pg_port"),
                "tenant_id": hostvars[host].get("compute_tenant_id"),
                "timeline_id": hostvars[host].get("compute_timeline_id"),
            }
            for host in groups.get("computes", [])
        ],
    }


def machine_of(groups: Groups, hostvars: HostVars, host: str) -> dict[str, Any]:
    """What runs on the machine of ``host``, and whether this instance is the one that prepares the machine for all.

    A host of the inventory that runs nothing (the control node, say) is no instance and prepares nothing.
    """
    here = machine(hostvars, host)
    serving = {other for role in ROLES for other in groups.get(role, [])}
    instances = [other for other in groups["all"] if other in serving and machine(hostvars, other) == here]
    runs = [role for role in ROLES if any(other in groups.get(role, []) for other in instances)]
    return {"name": here, "instances": instances, "leader": instances[:1] == [host], "runs": runs}


# Who may connect to which port: (group that listens, port variable, groups that use it).
FLOWS = (
    ("storage_broker", "storage_broker_port", ("safekeepers", "pageservers")),
    ("safekeepers", "safekeeper_pg_port", ("computes", "pageservers", "safekeepers")),
    ("safekeepers", "safekeeper_http_port", ("safekeepers", "pageservers")),
    ("pageservers", "pageserver_pg_port", ("computes",)),
    ("pageservers", "pageserver_http_port", ()),
    ("computes", "compute_http_port", ()),
    ("object_store", "object_store_port", ("safekeepers", "pageservers")),
)


def firewall_rules(groups: Groups, hostvars: HostVars, host: str) -> list[dict[str, Any]]:
    """The ports of the machine of ``host`` with the addresses of exactly those machines that use them.

    Hosts of the group ``monitoring`` may read every HTTP port. A machine talks to itself over the loopback interface, which is
    always open. Computes' SQL port is not here: clients come from anywhere the operator says.
    """
    rules = []
    for instance in machine_of(groups, hostvars, host)["instances"]:
        for listener, port, users in FLOWS:
            if instance not in groups.get(listener, []):
                continue
            allowed = list(users) + (["monitoring"] if port.endswith("_http_port") or listener == "storage_broker" else [])
            sources = {
                address(hostvars, user)
                for group in allowed
                for user in groups.get(group, [])
                if machine(hostvars, user) != machine(hostvars, instance)
            }
            if sources:
                rules.append(
                    {
                        "port": int(_value(hostvars, instance, port)),
                        "sources": sorted(sources),
                        "comment": f"{port.removesuffix('_port')} of {instance} from {', '.join(allowed)}",
                    }
                )
    return rules


def problems(groups: Groups, hostvars: HostVars) -> list[str]:
    """What is wrong with the inventory: each message names the variable, its value and the repair."""
    return [
        *_group_problems(groups, hostvars),
        *_identity_problems(groups, hostvars, "safekeepers", "safekeeper_node_id"),
        *_identity_problems(groups, hostvars, "pageservers", "pageserver_node_id"),
        *_address_problems(groups, hostvars),
        *_sharing_problems(groups, hostvars),
        *_tenant_problems(groups, hostvars),
    ]


def _group_problems(groups: Groups, hostvars: HostVars) -> Iterator[str]:
    for group, least in (("storage_broker", 1), ("safekeepers", 1), ("pageservers", 1)):
        if len(groups.get(group, [])) < least:
            yield f"group {group} has no host: add one to it, a cluster needs {group.replace('_', ' ')}"
    for group in ("storage_broker", "object_store"):
        if len(groups.get(group, [])) > 1:
            yield f"group {group} has {len(groups[group])} hosts ({', '.join(groups[group])}): keep exactly one"
    members = groups.get("safekeepers", [])
    any_host = next(iter(groups.get("all", [])), None)
    few_allowed = any_host is not None and hostvars[any_host].get("neon_allow_few_safekeepers", False)
    if members and len(members) < 3 and not few_allowed:
        yield (
            f"group safekeepers has {len(members)} host(s): use 3, so that losing one loses nothing, "
            "or set neon_allow_few_safekeepers: true for a throw-away cluster"
        )
    if members and len(members) % 2 == 0:
        yield f"group safekeepers has {len(members)} hosts: use an odd number, one less survives as many failures"


def _identity_problems(groups: Groups, hostvars: HostVars, group: str, variable: str) -> Iterator[str]:
    values = {host: hostvars[host].get(variable) for host in groups.get(group, [])}
    for host, value in values.items():
        if value is None:
            yield f"{variable} of {host} is not set: give it a number that no other host of {group} has or ever had"
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{variable} of {host} is {value!r}: use a whole number from 1"
    counts = Counter(value for value in values.values() if value is not None)
    for value, count in counts.items():
        if count > 1:
            owners = ", ".join(host for host, other in values.items() if other == value)
            yield f"{variable} is {value} for {owners}: an identity belongs to one host, give the others new numbers"


def _address_problems(groups: Groups, hostvars: HostVars) -> Iterator[str]:
    for host in (host for host in groups.get("all", []) if any(host in groups.get(role, []) for role in ROLES)):
        if not hostvars[host].get("firewall_enabled", True):
            continue
        try:
            ipaddress.ip_address(address(hostvars, host))
        except ValueError:
            yield (
                f"the address of {host} is {address(hostvars, host)!r}: set neon_address to the IP address at which other "
                "hosts reach it (firewall rules are made of addresses, not of names)"
            )


def _sharing_problems(groups: Groups, hostvars: HostVars) -> Iterator[str]:
    taken: dict[tuple[str, int], str] = {}
    for group, variables in (
        ("storage_broker", ("storage_broker_port",)),
        ("safekeepers", ("safekeeper_pg_port", "safekeeper_http_port")),
        ("pageservers", ("pageserver_pg_port", "pageserver_http_port")),
        ("computes", ("compute_pg_port", "compute_http_port")),
        ("object_store", ("object_store_port",)),
    ):
        for host in groups.get(group, []):
            for variable in variables:
                port = _value(hostvars, host, variable)
                where = (machine(hostvars, host), int(port))
                mine = f"{variable} of {host}"
                if where in taken:
                    yield f"{mine} and {taken[where]} are both {port} on machine {where[0]}: give each its own port"
                taken[where] = mine


def _tenant_problems(groups: Groups, hostvars: HostVars) -> Iterator[str]:
    any_host = next(iter(groups.get("all", [])), None)
    tenants = (hostvars[any_host].get("neon_tenants") or []) if any_host is not None else []
    known: set[tuple[str, str]] = set()
    for tenant in tenants:
        name = tenant.get("id", "")
        if not _is_id(name):
            yield f"neon_tenants has a tenant with id {name!r}: an id is 32 hexadecimal digits in lower case, in quotes"
        if tenant.get("pageserver") not in groups.get("pageservers", []):
            yield (
                f"neon_tenants puts tenant {name} on pageserver {tenant.get('pageserver')!r}: name a host of group pageservers "
                f"({', '.join(groups.get('pageservers', [])) or 'empty'})"
            )
        if not isinstance(tenant.get("generation", 1), int) or tenant.get("generation", 1) < 1:
            yield f"neon_tenants gives tenant {name} generation {tenant.get('generation')!r}: use a whole number from 1"
        for timeline in tenant.get("timelines", []):
            yield from _timeline_problems(str(name), timeline, known)
            known.add((str(name), str(timeline.get("id"))))
    for first, second in pairwise(sorted(str(tenant.get("id")) for tenant in tenants)):
        if first == second:
            yield f"neon_tenants has tenant {first} twice: merge the two"
    yield from _compute_problems(groups, hostvars, known)


def _timeline_problems(tenant: str, timeline: Mapping[str, Any], known: set[tuple[str, str]]) -> Iterator[str]:
    name = timeline.get("id", "")
    if not _is_id(name):
        yield f"neon_tenants gives tenant {tenant} a timeline with id {name!r}: an id is 32 lower-case hex digits, in quotes"
    if (tenant, str(name)) in known:
        yield f"neon_tenants gives tenant {tenant} timeline {name} twice: keep one"
    ancestor = timeline.get("ancestor_timeline_id")
    if ancestor is not None and (tenant, str(ancestor)) not in known:
        yield f"timeline {name} of tenant {tenant} branches from {ancestor}, which is not listed before it: list it first"
    if ancestor is None and not isinstance(timeline.get("pg_version"), int):
        yield f"timeline {name} of tenant {tenant} has pg_version {timeline.get('pg_version')!r}: use a major such as 15"


def _compute_problems(groups: Groups, hostvars: HostVars, known: set[tuple[str, str]]) -> Iterator[str]:
    writers: dict[tuple[str, str], str] = {}
    for host in groups.get("computes", []):
        branch = (str(hostvars[host].get("compute_tenant_id")), str(hostvars[host].get("compute_timeline_id")))
        if branch not in known:
            yield (
                f"compute {host} serves timeline {branch[1]} of tenant {branch[0]}, which neon_tenants does not list: "
                "set compute_tenant_id and compute_timeline_id to one that it lists"
            )
        elif hostvars[host].get("compute_mode", "Primary") == "Primary":
            if branch in writers:
                yield f"computes {writers[branch]} and {host} both write to timeline {branch[1]}: give one its own branch"
            writers[branch] = host


class FilterModule:
    """Gives Ansible ``groups | neon_topology(hostvars)`` and its siblings."""

    def filters(self) -> dict[str, Any]:
        return {
            "neon_topology": topology,
            "neon_machine": machine_of,
            "neon_firewall_rules": firewall_rules,
            "neon_problems": problems,
        }

"""Which artifacts a set of hosts needs, and which of them is a given host's.

Invariant: hosts of one platform share one artifact; a host without Postgres needs no libraries of an exact server build, so it
takes those of the newest build among its platform's hosts, if any (the WAL scanner in them depends on the major only).
"""

from collections.abc import Iterable, Mapping
from typing import Any

HostVars = Mapping[str, Mapping[str, Any]]
Artifact = dict[str, Any]


def _platform(facts: Mapping[str, Any]) -> Artifact:
    return {
        "suite": str(facts["distribution_release"]),
        "machine": str(facts["architecture"]),
        "python_version": ".".join(str(facts["python_version"]).split(".")[:2]),
    }


def wanted(hosts: Iterable[str], hostvars: HostVars) -> list[Artifact]:
    """Every artifact that these hosts need, once each, as the ``wanted`` list of the neon_artifact module.

    Reads ``ansible_facts`` and, for hosts with Postgres, ``postgres_installed`` (``{major, version}``).
    """
    found: list[Artifact] = []
    for host in hosts:
        variables = hostvars[host]
        platform = _platform(variables["ansible_facts"])
        needs: list[Artifact] = [{"kind": "dependencies", **platform}, {"kind": "release", **platform}]
        installed = variables.get("postgres_installed")
        if installed:
            needs.append(
                {
                    "kind": "libraries",
                    **platform,
                    "postgres_major": int(installed["major"]),
                    "postgres_version": str(installed["version"]),
                }
            )
        found += [need for need in needs if need not in found]
    return found


def mine(artifacts: Iterable[Artifact], variables: Mapping[str, Any]) -> list[Artifact]:
    """Those artifacts that belong on the host with these variables."""
    platform = _platform(variables["ansible_facts"])
    here = [artifact for artifact in artifacts if all(artifact[key] == value for key, value in platform.items())]
    installed = variables.get("postgres_installed")
    libraries = [artifact for artifact in here if artifact["kind"] == "libraries"]
    if installed:
        libraries = [artifact for artifact in libraries if artifact["postgres_version"] == str(installed["version"])]
    return [artifact for artifact in here if artifact["kind"] != "libraries"] + libraries[-1:]


def install_list(artifacts: Iterable[Artifact], variables: Mapping[str, Any]) -> list[Artifact]:
    """The ``artifacts`` of the neon_install module for the host: programs in /opt/neon, libraries in /usr/lib/neon/pgNN."""
    found: list[Artifact] = []
    for artifact in mine(artifacts, variables):
        libraries = artifact["kind"] == "libraries"
        entry = {"dest": f"/{'usr/lib' if libraries else 'opt'}/neon/{artifact['name']}", "archive": artifact["archive"]}
        found.append({**entry, "link": f"/usr/lib/neon/pg{artifact['postgres_major']}"} if libraries else entry)
    return found


class FilterModule:
    """Gives Ansible the filters by name."""

    def filters(self) -> dict[str, Any]:
        return {"neon_artifacts_wanted": wanted, "neon_artifacts_of": mine, "neon_install_list": install_list}

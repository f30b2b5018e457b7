#!/usr/bin/python
"""Build artifacts on the control node, once per platform, and say where they are."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.neon_artifacts import (
    RECIPE,
    ArtifactError,
    Target,
    build_dependencies,
    build_libraries,
    build_release,
    build_tool,
    digest,
    once,
    tree_digest,
)
from ansible.module_utils.neon_lockfile import LockfileError, closure, for_python, parse

DOCUMENTATION = r"""
module: neon_artifact
short_description: Build artifacts on the control node, once per platform
description:
  - Builds what hosts need (Python dependencies, this project, compiled libraries, tools) and keeps it by content.
  - Run it on the control node (C(delegate_to=localhost)) with the Python that runs Ansible.
  - An artifact that is built is no change of any host, so the module never reports one; C(built) names what was made now.
options:
  project:
    description: The clone of this repository.
    type: path
    required: true
  cache:
    description: Directory in which artifacts are kept.
    type: path
    required: true
  wanted:
    description: The artifacts. Each has the platform of its hosts; libraries also the exact server build, a tool its wheel.
    type: list
    elements: dict
    required: true
"""

ITEM = {
    "kind": {"type": "str", "required": True, "choices": ["dependencies", "release", "libraries", "tool"]},
    "suite": {"type": "str", "required": True},
    "machine": {"type": "str", "required": True},
    "python_version": {"type": "str", "required": True},
    "postgres_major": {"type": "int"},
    "postgres_version": {"type": "str"},
    "requirements": {"type": "str"},
}
ARGUMENTS = {
    "project": {"type": "path", "required": True},
    "cache": {"type": "path", "required": True},
    "wanted": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": ITEM,
        "required_if": [("kind", "libraries", ["postgres_major", "postgres_version"]), ("kind", "tool", ["requirements"])],
    },
}


def locked_requirements(project: Path, target: Target) -> str:
    """What this project needs at run time, for the target's Python."""
    import tomllib

    roots = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
    return for_python(closure(parse((project / "requirements.lock").read_text()), roots), target.python_version, target.machine)


def plan(project: Path, item: dict) -> tuple[str, object]:
    """The artifact's name, which holds the hash of its content's sources, and the function that builds its tree."""
    target = Target(item["suite"], item["machine"], item["python_version"])
    platform = f"{target.machine}-py{target.python_version}"
    if item["kind"] == "libraries":
        major, version = item["postgres_major"], item["postgres_version"]
        name = f"pg{major}-{target.machine}-{digest(RECIPE, tree_digest(project / 'postgres_ext'), version, target.machine)}"
        return name, lambda tree: build_libraries(tree, project, target, major, version)
    if item["kind"] == "tool":
        requirements = item["requirements"]
        name = f"tool-{target.machine}-{digest(RECIPE, requirements, target.machine)}"
        return name, lambda tree: build_tool(tree, requirements, target)
    requirements = locked_requirements(project, target)
    dependencies = f"dependencies-{platform}-{digest(RECIPE, requirements, platform)}"
    if item["kind"] == "dependencies":
        return dependencies, lambda tree: build_dependencies(tree, requirements, target, dependencies)
    pyproject = (project / "pyproject.toml").read_text()
    name = f"release-{digest(RECIPE, dependencies, pyproject, tree_digest(project / 'neon_services'))}"
    return name, lambda tree: build_release(tree, project, target, name, dependencies)


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    project, cache = Path(module.params["project"]), Path(module.params["cache"])
    artifacts, built = [], []
    for item in module.params["wanted"]:
        try:
            name, build = plan(project, item)
            archive = cache / f"{name}.tar.gz"
            if not module.check_mode:
                cache.mkdir(parents=True, exist_ok=True)
                if once(archive, build):
                    built.append(name)
        except (ArtifactError, LockfileError, OSError) as error:
            module.fail_json(msg=f"cannot build {item['kind']} for {item['suite']} {item['machine']}: {error}")
        artifacts.append({**item, "name": name, "archive": str(archive)})
    module.exit_json(changed=False, built=built, artifacts=artifacts)


if __name__ == "__main__":
    main()

#!/usr/bin/python
"""Unpack artifacts on a host, each whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: neon_install
short_description: Unpack artifacts of the control node on a host
description:
  - An artifact is a gzipped tar whose last member is C(.complete); a directory without it is unpacked anew.
  - The action plugin of the same name first asks which are missing and sends only those.
options:
  artifacts:
    description:
      - What to have, each with C(dest), the directory it becomes; C(archive), its file on the control node; and C(link), a
        symbolic link to point at it when it is there.
    type: list
    elements: dict
    required: true
  sent:
    description: Where archives were put on the host, by C(dest). Set by the action plugin.
    type: dict
    default: {}
"""

ARGUMENTS = {
    "artifacts": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "dest": {"type": "path", "required": True},
            "archive": {"type": "str", "required": True},
            "link": {"type": "path"},
        },
    },
    "sent": {"type": "dict", "default": {}},
}


def is_whole(dest: Path) -> bool:
    """Whether the artifact was unpacked to its end."""
    return (dest / ".complete").exists()


def unpack(archive: str, dest: Path) -> None:
    """Make ``dest`` from the archive, in place: a virtual environment works at one path only."""
    if dest.exists():
        shutil.rmtree(dest)
    dest.mkdir(parents=True)
    with tarfile.open(archive) as packed:
        packed.extractall(dest)
    missing_bytecode = next(dest.rglob("*.py"), None) and not next(dest.rglob("*.pyc"), None)
    if missing_bytecode:  # the control node has another Python than this host
        import compileall

        compileall.compile_dir(str(dest), quiet=2, workers=1)
    Path(dest, ".complete").touch()
    os.sync()


def points_at(link: Path, dest: Path) -> bool:
    return link.is_symlink() and link.readlink() == dest


def point(link: Path, dest: Path) -> None:
    """Make the link point at ``dest``, with no moment in which it is absent."""
    staged = link.with_name(f"{link.name}.new")
    staged.unlink(missing_ok=True)
    staged.symlink_to(dest)
    staged.rename(link)


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    done, missing = [], []
    for artifact in module.params["artifacts"]:
        dest, link = Path(artifact["dest"]), artifact["link"] and Path(artifact["link"])
        whole = is_whole(dest)
        if not whole and artifact["dest"] not in module.params["sent"]:
            missing.append(artifact["dest"])
            continue
        if whole and not (link and not points_at(link, dest)):
            continue
        done.append(artifact["dest"])
        if module.check_mode:
            continue
        try:
            if not whole:
                unpack(module.params["sent"][artifact["dest"]], dest)
            if link:
                point(link, dest)
        except (OSError, tarfile.TarError) as error:
            module.fail_json(msg=f"cannot unpack {artifact['archive']} to {dest}: {error}", python=sys.executable)
    module.exit_json(changed=bool(done), installed=done, missing=missing)


if __name__ == "__main__":
    main()

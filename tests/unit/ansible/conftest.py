"""Imports modules and plugins the way Ansible does: by file, with module_utils below ``ansible.module_utils``."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """Load a file of the repository such as ``library/neon_timeline.py``."""
    for path in sorted((ROOT / "module_utils").glob("*.py")):
        _load(path, f"ansible.module_utils.{path.stem}")

    def by_path(path: str) -> ModuleType:
        if path.startswith("module_utils/"):
            return sys.modules[f"ansible.module_utils.{Path(path).stem}"]
        return _load(ROOT / path, f"under_test.{Path(path).parent.name}.{Path(path).stem}")

    return by_path

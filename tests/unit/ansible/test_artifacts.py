"""Artifacts: the right requirements for a target, one artifact per platform, unpacked whole or not at all."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

LOCK = """\
# made by a tool
alpha==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:ab
    # via our-project (pyproject.toml)
beta==2.0 ; python_full_version < '3.12' \\
    --hash=sha256:b1
    # via
    #   alpha
    #   gamma
beta==2.5 ; python_full_version >= '3.12' \\
    --hash=sha256:b2
    # via alpha
gamma==3.0 \\
    --hash=sha256:cc
    # via our-project (pyproject.toml)
Delta_X==4.0 ; sys_platform == 'win32' \\
    --hash=sha256:dd
    # via beta
"""


@pytest.fixture
def lockfile(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("module_utils/neon_lockfile.py")


def test_only_what_a_root_needs_for_this_python(lockfile: ModuleType) -> None:
    needed = lockfile.closure(lockfile.parse(LOCK), ["alpha>=1"])
    assert [requirement.name for requirement in needed] == ["alpha", "beta", "beta", "delta-x"]
    text = lockfile.for_python(needed, "3.11", "x86_64")
    assert text.split() == [
        "alpha==1.0",
        "\\",
        "--hash=sha256:aa",
        "\\",
        "--hash=sha256:ab",
        "beta==2.0",
        "\\",
        "--hash=sha256:b1",
    ]
    assert "beta==2.5" in lockfile.for_python(needed, "3.13", "x86_64")


def test_a_root_that_is_not_locked(lockfile: ModuleType) -> None:
    with pytest.raises(lockfile.LockfileError, match="lacks omega"):
        lockfile.closure(lockfile.parse(LOCK), ["omega"])
    with pytest.raises(lockfile.LockfileError, match="line 1"):
        lockfile.parse("alpha>=1.0\n")


def test_the_projects_own_lock_file_gives_every_dependency(lockfile: ModuleType) -> None:
    import tomllib

    root = Path(__file__).resolve().parents[3]
    roots = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    for python in ("3.11", "3.13"):
        needed = lockfile.for_python(
            lockfile.closure(lockfile.parse((root / "requirements.lock").read_text()), roots), python, "x86_64"
        )
        names = [line.partition("==")[0] for line in needed.splitlines() if not line.startswith(" ")]
        assert {"aiohttp", "boto3", "botocore", "grpcio", "numpy", "uvloop", "psycopg-binary"} <= set(names)
        assert not {"ansible-core", "molecule", "pytest", "mypy"} & set(names), "hosts need no tools of development"
        assert len(names) == len(set(names))


def facts(suite: str, python: str) -> dict[str, object]:
    return {"distribution_release": suite, "architecture": "x86_64", "python_version": python}


def test_hosts_of_one_platform_share_and_get_their_own(load: Callable[[str], ModuleType]) -> None:
    artifacts = load("filter_plugins/neon_artifacts.py")
    hostvars = {
        "a": {"ansible_facts": facts("bookworm", "3.11.2")},
        "b": {"ansible_facts": facts("bookworm", "3.11.2"), "postgres_installed": {"major": 15, "version": "15.20-0"}},
        "c": {"ansible_facts": facts("trixie", "3.13.5"), "postgres_installed": {"major": 17, "version": "17.6-0"}},
    }
    wanted = artifacts.wanted(["a", "b", "c"], hostvars)
    assert [(item["kind"], item["suite"]) for item in wanted] == [
        ("dependencies", "bookworm"),
        ("release", "bookworm"),
        ("libraries", "bookworm"),
        ("dependencies", "trixie"),
        ("release", "trixie"),
        ("libraries", "trixie"),
    ]
    built = [{**item, "name": f"{item['kind']}-{item['suite']}", "archive": "x"} for item in wanted]
    assert [entry["dest"] for entry in artifacts.install_list(built, hostvars["c"])] == [
        "/opt/neon/dependencies-trixie",
        "/opt/neon/release-trixie",
        "/usr/lib/neon/libraries-trixie",
    ]
    assert artifacts.install_list(built, hostvars["b"])[2]["link"] == "/usr/lib/neon/pg15"
    assert artifacts.mine(built, hostvars["a"])[-1]["name"] == "libraries-bookworm"


def test_pack_and_unpack(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    packing, install = load("module_utils/neon_artifacts.py"), load("library/neon_install.py")

    def build(tree: Path) -> None:
        (tree / "sub").mkdir()
        (tree / "sub/file").write_text("content")

    archive = tmp_path / "artifact.tar.gz"
    assert packing.once(archive, build)
    assert not packing.once(archive, build), "an artifact is built once"
    with tarfile.open(archive) as packed:
        assert packed.getnames()[-1] == ".complete"
        assert {member.uid for member in packed} == {0}

    dest, link = tmp_path / "dest", tmp_path / "link"
    dest.mkdir()
    (dest / "of-an-unpacking-that-was-cut-off").touch()
    assert not install.is_whole(dest)
    install.unpack(str(archive), dest)
    assert install.is_whole(dest)
    assert sorted(path.name for path in dest.iterdir()) == [".complete", "sub"]
    install.point(link, tmp_path / "old")
    assert not install.points_at(link, dest)
    install.point(link, dest)
    assert install.points_at(link, dest)
    assert (link / "sub/file").read_text() == "content"


def test_a_build_that_fails_leaves_no_artifact(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    packing = load("module_utils/neon_artifacts.py")

    def fail(tree: Path) -> None:
        (tree / "half").touch()
        raise packing.ArtifactError("no")

    with pytest.raises(packing.ArtifactError):
        packing.once(tmp_path / "artifact.tar.gz", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact.tar.gz.lock"]


def test_a_platform_that_cannot_be_built_here_says_what_to_do(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = load("module_utils/neon_artifacts.py")
    (tmp_path / "postgres_ext").mkdir()
    with pytest.raises(packing.ArtifactError, match=r"postgresql-server-dev-15=15\.0-none"):
        packing.build_libraries(tmp_path, tmp_path, packing.Target("bookworm", "s390x", "3.11"), 15, "15.0-none")

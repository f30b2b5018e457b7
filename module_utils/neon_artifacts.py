"""What the control node builds once per platform and keeps by content: dependencies, releases, libraries, tools.

Invariant: an artifact is a gzipped tar whose name holds the hash of everything that went into it and whose last member is
``.complete``. A host has an artifact whole when, and only when, it has that member: unpacking that was cut off is done again.

- *dependencies*: a ``site-packages`` directory made by pip for the target's Python, from the lock file, by hash;
- *release*: a virtual environment with this project and its commands, which finds the dependencies through a ``.pth`` file;
- *libraries*: the compiled Postgres libraries, for one exact build of one Postgres major;
- *tool*: one program that comes as a wheel (the object store).
"""

import contextlib
import fcntl
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Part of every artifact's name: count it up when the way of building changes.
RECIPE = "2"
PREFIX = "/opt/neon"
_GLIBC_MINORS = range(36, 16, -1)  # Debian 12 has glibc 2.36


class ArtifactError(Exception):
    """An artifact cannot be built here; the message says why and what to do."""


@dataclass(frozen=True)
class Target:
    """The platform of a host."""

    suite: str  # Debian's code name
    machine: str  # uname -m
    python_version: str  # such as 3.11


def digest(*parts: object) -> str:
    """Twelve hex digits that name this content."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:12]


def tree_digest(root: Path, pattern: str = "**/*") -> str:
    """Names the content of the files below a directory; caches and build output do not count."""
    names = sorted(p for p in root.glob(pattern) if p.is_file() and "__pycache__" not in p.parts and not p.name.endswith(".o"))
    return digest(*(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in names))


def run(*argv: object, cwd: Path | None = None) -> str:
    """Run a program; its output becomes the error when it fails."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise ArtifactError(f"{' '.join(words[:4])} ... failed with status {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(target: Path, build: Callable[[Path], None]) -> bool:
    """Pack what ``build`` puts into a directory as the artifact ``target``, unless it is there; whether it was built now."""
    if target.exists():
        return False
    with _locked(Path(f"{target}.lock")):
        if target.exists():
            return False
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
            tree = Path(scratch, "tree")
            tree.mkdir()
            build(tree)
            packed = Path(scratch, "packed")
            pack(tree, packed)
            packed.rename(target)
        return True


def pack(tree: Path, target: Path) -> None:
    """Write the tree as a gzipped tar owned by root, with ``.complete`` as its last member."""

    def owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    with gzip.open(target, "wb", compresslevel=3) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted(tree.iterdir()):
            archive.add(path, arcname=path.name, filter=owned_by_root)
        (tree / ".complete").touch()
        archive.add(tree / ".complete", arcname=".complete", filter=owned_by_root)


def pip_platform(target: Target) -> list[str]:
    """The options that make pip choose wheels for the target instead of for this machine."""
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={target.python_version}"]
    tags = [f"manylinux_2_{minor}_{target.machine}" for minor in _GLIBC_MINORS]
    return [*options, *(f"--platform={tag}" for tag in (*tags, f"manylinux2014_{target.machine}"))]


def pip_install(requirements: str, into: Path, target: Target) -> None:
    """Install hashed requirements for the target below ``into``.

    The lock file was resolved for every supported Python, and its markers were evaluated for the target's. pip 23.0, which is
    Debian 12's, would compare each wheel's Requires-Python with the Python that runs pip, whatever --python-version says.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        run(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile",
            "--require-hashes", "--ignore-requires-python", *pip_platform(target),
            f"--target={into}", "-r", file.name)  # fmt: skip


def compile_bytecode(tree: Path, final: str, target: Target) -> bool:
    """Compile the tree as it will be found on the host; False when this Python is not the target's, so the host must do it."""
    if f"{sys.version_info[0]}.{sys.version_info[1]}" != target.python_version:
        return False
    run(sys.executable, "-m", "compileall", "-q", "-s", tree, "-p", final, tree)
    return True


def build_dependencies(tree: Path, requirements: str, target: Target, name: str) -> None:
    """A site-packages directory."""
    site = tree / "site-packages"
    pip_install(requirements, site, target)
    shutil.rmtree(site / "bin", ignore_errors=True)
    compile_bytecode(tree, f"{PREFIX}/{name}", target)


def build_release(tree: Path, project: Path, target: Target, name: str, dependencies: str) -> None:
    """A virtual environment that holds the project; it works at ``PREFIX/name`` only."""
    import tomllib

    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    site = tree / "lib" / f"python{target.python_version}" / "site-packages"
    (tree / "bin").mkdir(parents=True)
    site.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        # Build from a copy: setuptools leaves its traces in the source tree.
        source = Path(scratch, "source")
        source.mkdir()
        shutil.copy2(project / "pyproject.toml", source)
        shutil.copytree(project / "neon_services", source / "neon_services", ignore=shutil.ignore_patterns("__pycache__"))
        run(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index",
            "--no-build-isolation", "--no-compile", f"--target={site}", source)  # fmt: skip
    shutil.rmtree(site / "bin", ignore_errors=True)
    (site / "neon_dependencies.pth").write_text(f"{PREFIX}/{dependencies}/site-packages\n")
    (tree / "bin/python3").symlink_to("/usr/bin/python3")
    (tree / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {target.python_version}\n"
    )
    for command, entry in metadata.get("scripts", {}).items():
        module, _, function = entry.partition(":")
        script = tree / "bin" / command
        script.write_text(
            f"#!{PREFIX}/{name}/bin/python3\nimport sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n"
        )
        script.chmod(0o755)
    compile_bytecode(tree, f"{PREFIX}/{name}", target)


def build_tool(tree: Path, requirements: str, target: Target) -> None:
    """The programs that a wheel ships."""
    with tempfile.TemporaryDirectory() as scratch:
        pip_install(requirements, Path(scratch, "wheel"), target)
        for program in (Path(scratch, "wheel") / "bin").iterdir():
            shutil.copy2(program, tree / program.name)


def installed_version(package: str) -> str | None:
    """The version of a Debian package on this machine, or None."""
    if not shutil.which("dpkg-query"):
        return None
    shown = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package], capture_output=True, text=True, check=False
    ).stdout.split()
    return shown[1] if len(shown) == 2 and shown[0] == "installed" else None


def build_libraries(tree: Path, project: Path, target: Target, major: int, version: str) -> None:
    """The Postgres libraries of one major, compiled against exactly the server build ``version`` of the target.

    Directly when this machine is that platform and has the headers of that very build; otherwise in a chroot of the target's
    Debian release, made with mmdebstrap, which needs root here. Hosts need no compiler either way.
    """
    headers = f"postgresql-server-dev-{major}"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "postgres_ext")
        shutil.copytree(project / "postgres_ext", source, ignore=shutil.ignore_patterns("*.o", "*.bc", "*.so"))
        made = Path(scratch, "out")
        made.mkdir()
        make = f"PG_CONFIG=/usr/lib/postgresql/{major}/bin/pg_config"
        if installed_version(headers) == version and os.uname().machine == target.machine and shutil.which("make"):
            run("make", "-C", source, make, f"OUT={made}")
            _take_libraries(made, tree)
            return
        if os.uname().machine != target.machine or os.geteuid() != 0 or not shutil.which("mmdebstrap"):
            raise ArtifactError(
                f"the Postgres libraries for {headers} {version} ({target.suite}, {target.machine}) cannot be built here: "
                f"install {headers}={version} and make on a control node of that platform, or run as root on a machine of the "
                "same architecture with mmdebstrap installed"
            )
        sys.path.insert(0, str(project))
        from lab.images import Images, in_chroot
        from lab.labs import default_state

        image = Images(default_state() / "images").image(
            target.suite,
            # The headers' package asks for a whole LLVM, which is for just-in-time compilation only.
            install=[
                "gcc",
                "libc6-dev",
                "libkrb5-dev",
                "libpq-dev",
                "libssl-dev",
                "make",
                f"postgresql-client-{major}={version}",
            ],
            unpack=[f"{headers}={version}"],
            mirror=[],
        )
        script = f"make -C /mnt/source {make} OUT=/mnt/out with_llvm=no"
        in_chroot(list(image.lowers), Path(scratch, "upper"), script, {source: "/mnt/source", made: "/mnt/out"})
        _take_libraries(made, tree)


def _take_libraries(made: Path, tree: Path) -> None:
    """Only what hosts load: the build leaves its objects beside it."""
    for library in sorted(made.glob("*.so")):
        shutil.copy2(library, tree / library.name)

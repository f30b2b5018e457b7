"""Images that hosts start from, and the archive of packages that apt finds inside them.

Invariant: an image is named by what went into it, made once, and never written again. A base is a directory made by
mmdebstrap; a layer is the overlayfs difference that installing packages makes; a mirror is a flat archive of packages with all
they need, keyed by the distribution's package lists of the day, so that an update in the distribution makes a new one.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.shell import LabError, built_once, digest, locked, say, sh

SUITES = ("bookworm", "trixie")
# What every host has before any role runs: what a cloud image would have.
BASE_PACKAGES = [
    "systemd",
    "systemd-sysv",
    "dbus",
    "openssh-server",
    "python3",
    "python3-apt",
    "nftables",
    "iproute2",
    "iputils-ping",
    "ca-certificates",
    "sudo",
    "netbase",
    "procps",
]
# Part of every image's name: count it up when the way images are made changes.
RECIPE = "4"
# Package lists younger than this are not fetched again.
LISTS_MAX_AGE_S = 24 * 3600


@dataclass(frozen=True)
class Image:
    """What a host boots from: overlay layers, topmost first, and the archive it sees at /srv/apt."""

    suite: str
    lowers: tuple[Path, ...]
    mirror: Path | None


class Images:
    """The store of images below one directory."""

    def __init__(self, store: Path) -> None:
        self._store = store

    def image(self, suite: str, *, install: list[str], mirror: list[str], unpack: Sequence[str] = ()) -> Image:
        """An image with the packages ``install`` installed and ``mirror`` installable; makes what is not there yet.

        Packages ``unpack`` are there as files only, without what they depend on: headers without a compiler suite.
        """
        base = self.base(suite)
        lists = self._lists(base) if install or mirror else None
        lowers = (base,) if not install or lists is None else (self._layer(base, lists, install, unpack), base)
        return Image(suite, lowers, self._mirror(lowers, lists, mirror) if mirror and lists is not None else None)

    def base(self, suite: str) -> Path:
        """A minimal Debian of the suite with BASE_PACKAGES."""
        if suite not in SUITES:
            raise LabError(f"there is no image for suite {suite!r}: choose one of {', '.join(SUITES)}")
        target = self._store / f"{suite}-{digest(RECIPE, suite, *BASE_PACKAGES)}"
        with built_once(target) as scratch:
            if scratch:
                say(f"making the Debian {suite} image (once; a minute on a slow machine)")
                sh("mmdebstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}",
                   '--aptopt=Acquire::Languages "none"', "--dpkgopt=path-exclude=/usr/share/doc/*",
                   "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
                   "--dpkgopt=force-unsafe-io", suite, scratch)  # fmt: skip
                _forget_identity(scratch)
        return target

    def _lists(self, base: Path) -> Path:
        """The distribution's package lists of the day, for the suite of ``base``."""
        target = Path(f"{base}.lists")
        with locked(Path(f"{target}.lock")):
            age = time.time() - target.stat().st_mtime if target.exists() else float("inf")
            if age > LISTS_MAX_AGE_S:
                scratch = Path(f"{target}.new")
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
                try:
                    say("fetching the distribution's package lists")
                    in_chroot([base], Path(f"{scratch}.upper"), "apt-get -q update", {scratch: "/var/lib/apt/lists"})
                except LabError as error:
                    if not target.exists():
                        raise
                    say(f"keeping package lists that are {age / 3600:.0f} hours old: {error}")
                    return target
                finally:
                    shutil.rmtree(f"{scratch}.upper", ignore_errors=True)
                shutil.rmtree(target, ignore_errors=True)
                scratch.rename(target)
                os.utime(target)
        return target

    def _layer(self, base: Path, lists: Path, packages: list[str], unpack: Sequence[str]) -> Path:
        target = self._store / f"layer-{digest(base.name, _lists_digest(lists), *sorted(packages), 'unpack', *unpack)}"
        with built_once(target) as scratch:
            if scratch:
                say(f"installing {' '.join(packages)} into an image")
                script = _INSTALL + " ".join(packages)
                if unpack:
                    script += f"; cd /tmp; apt-get -q download {' '.join(unpack)}; dpkg --force-depends --unpack *.deb"
                in_chroot([base], scratch, script + "; apt-get clean", {lists: "/var/lib/apt/lists"})
        return target

    def _mirror(self, lowers: tuple[Path, ...], lists: Path, packages: list[str]) -> Path:
        target = self._store / f"mirror-{digest(*(path.name for path in lowers), _lists_digest(lists), *sorted(packages))}"
        with built_once(target) as scratch:
            if scratch:
                say(f"fetching {' '.join(packages)} with all they need")
                scratch.mkdir()
                fetch = f"{_INSTALL} --download-only -o Dir::Cache::archives=/mnt {' '.join(packages)}"
                in_chroot(list(lowers), Path(f"{scratch}.upper"), fetch, {lists: "/var/lib/apt/lists", scratch: "/mnt"})
                shutil.rmtree(f"{scratch}.upper")
                shutil.rmtree(scratch / "partial", ignore_errors=True)
                (scratch / "lock").unlink(missing_ok=True)
                (scratch / "Packages").write_text("".join(_index_entry(deb) for deb in sorted(scratch.glob("*.deb"))))
        return target


_INSTALL = "apt-get -qy --no-install-recommends install "


def _index_entry(deb: Path) -> str:
    """One stanza of a flat archive's Packages file."""
    fields = sh("dpkg-deb", "--field", deb).stdout.rstrip("\n")
    checksum = hashlib.sha256(deb.read_bytes()).hexdigest()
    return f"{fields}\nFilename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {checksum}\n\n"


def _lists_digest(lists: Path) -> str:
    """Names the distribution's state: its signed release files list the checksum of every package list."""
    return digest(*(file.read_text(errors="replace") for file in sorted(lists.glob("*Release"))))


def _forget_identity(image: Path) -> None:
    """Every host gets its own name, machine id and ssh keys when it is created."""
    for name in ("etc/hostname", "etc/resolv.conf", "etc/machine-id"):
        (image / name).unlink(missing_ok=True)
    for key in (image / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    (image / "etc/machine-id").touch()
    # Disks of the lab are disposable: dpkg need not wait for them.
    (image / "etc/dpkg/dpkg.cfg.d/lab").write_text("force-unsafe-io\n")
    # Ansible's cache_valid_time goes by this time: no list was ever fetched.
    os.utime(image / "var/lib/apt/lists", (0, 0))


def in_chroot(lowers: list[Path], upper: Path, script: str, binds: dict[Path, str]) -> None:
    """Run a script in a chroot over the image, on the machine's own network; what it writes lands in ``upper``.

    All mounts live in a private mount namespace: nothing to clean up, however this ends.
    """
    work, root = Path(f"{upper}.work"), Path(f"{upper}.root")
    for directory in (upper, work, root):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    mounts = "".join(f"mkdir -p {root}{inside}; mount --bind {outside} {root}{inside}\n" for outside, inside in binds.items())
    setup = f"""
        mount -t overlay overlay -o lowerdir={":".join(map(str, lowers))},upperdir={upper},workdir={work} {root}
        mount -t proc proc {root}/proc
        mount --bind /dev {root}/dev
        mount -t tmpfs tmpfs {root}/run
        mount -t tmpfs tmpfs {root}/tmp
        cp -L /etc/resolv.conf {root}/tmp/resolv.conf
        touch {root}/etc/resolv.conf && mount --bind {root}/tmp/resolv.conf {root}/etc/resolv.conf
        printf '#!/bin/sh\\nexit 101\\n' > {root}/tmp/policy-rc.d; chmod 755 {root}/tmp/policy-rc.d
        touch {root}/usr/sbin/policy-rc.d && mount --bind {root}/tmp/policy-rc.d {root}/usr/sbin/policy-rc.d
        {mounts}
        exec chroot {root} /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \\
            sh -ec "$0"
    """
    try:
        done = sh("unshare", "--mount", "--propagation", "private", "sh", "-ec", setup, script, check=False)
        if done.returncode:
            raise LabError(
                f"in an image, {script!r} failed with status {done.returncode}; its last lines:\n{done.stdout[-3000:]}"
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
        root.rmdir()
    for leftover in ("usr/sbin/policy-rc.d", "etc/resolv.conf"):
        (upper / leftover).unlink(missing_ok=True)

"""The commands of the lab. Each says in one line what was wrong when it could not do its work, and exits with 1."""

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from lab import preflight
from lab.cable import carry
from lab.hosts import Host
from lab.labs import Lab, default_state, each
from lab.naming import split_list
from lab.network import enter
from lab.shell import LabError


def _check(lab: Lab, args: argparse.Namespace) -> None:
    preflight.require(lab.state, need_programs=not args.before_install)


def _image(lab: Lab, args: argparse.Namespace) -> None:
    image = lab.images.image(args.suite, install=split_list(args.install), mirror=split_list(args.mirror))
    print("\n".join(str(path) for path in (*image.lowers, image.mirror) if path))


def _up(lab: Lab, args: argparse.Namespace) -> None:
    preflight.require(lab.state)
    image = lab.images.image(args.suite, install=split_list(args.install), mirror=split_list(args.mirror))
    lab.up(args.names, image, memory=args.memory, suppress_sync=args.suppress_sync)


def _list(lab: Lab, args: argparse.Namespace) -> None:
    rows = [
        {
            "name": host.name,
            "address": host.address.ip,
            "suite": host.spec["suite"],
            "status": host.status(),
            "memory": host.memory(),
        }
        for host in lab.hosts()
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        mib = f"{row['memory'] >> 20} MiB" if row["memory"] else ""
        print(f"{row['name']:16} {row['address']:14} {row['suite']:9} {row['status']:4} {mib}")


def _inventory(lab: Lab, args: argparse.Namespace) -> None:
    print(json.dumps(lab.inventory(), indent=2))


def _connect(lab: Lab, args: argparse.Namespace) -> None:
    """Hand ssh a socket that is already connected, made on the lab's network."""
    known = {host.address.ip: host for host in lab.hosts()}
    if args.address not in known:
        raise LabError(f"{args.address} is no host of lab {lab.name}: the lab connects to its own hosts only")
    connected = lab.network.connect(args.address, args.port)
    with socket.socket(fileno=os.dup(1)) as ssh:
        socket.send_fds(ssh, [b"\0"], [connected.fileno()])


def _run(lab: Lab, args: argparse.Namespace) -> None:
    enter(lab.network.namespace)
    try:
        os.execvp(args.command[0], args.command)
    except OSError as error:
        raise LabError(f"cannot run {args.command[0]}: {error.strerror}") from error


def _exec(lab: Lab, args: argparse.Namespace) -> None:
    (host,) = lab.chosen([args.name])
    argv = host.command(*args.command)
    os.execvp(argv[0], argv)


def _off(lab: Lab, args: argparse.Namespace) -> None:
    each(lab.chosen(args.names), lambda host: host.power_off(soft=args.soft))


def _on(lab: Lab, args: argparse.Namespace) -> None:
    lab.network.ensure()
    each(lab.chosen(args.names), Host.power_on)


def _cut(lab: Lab, args: argparse.Namespace) -> None:
    each(lab.chosen(args.names), lambda host: host.set_link("down"))


def _heal(lab: Lab, args: argparse.Namespace) -> None:
    lab.network.heal_drops()
    each(lab.chosen(args.names), lambda host: host.set_link("up"))


def _drop(lab: Lab, args: argparse.Namespace) -> None:
    if not 1 <= args.percent <= 100:
        raise LabError(f"--percent {args.percent}: give a number from 1 to 100")
    first, second = (host.address for host in lab.chosen([args.first, args.second]))
    lab.network.drop([(first, second)] if args.one_way else [(first, second), (second, first)], args.percent)


def _delay(lab: Lab, args: argparse.Namespace) -> None:
    (host,) = lab.chosen([args.name])
    host.set_delay(0)
    host.set_delay(args.ms)


def _destroy(lab: Lab, args: argparse.Namespace) -> None:
    lab.destroy(args.names)


def _cable(lab: Lab, args: argparse.Namespace) -> None:
    carry(args.left, args.right, args.ms)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab", description="Several Debian hosts on one machine, for a first try and for tests."
    )
    parser.add_argument(
        "--lab", default=os.environ.get("LAB_NAME", "neon"), help="name of the lab (default: $LAB_NAME or neon)"
    )
    parser.add_argument(
        "--state", type=Path, default=default_state(), help="where images and disks are kept (default: %(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function: Callable[[Lab, argparse.Namespace], None], help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(function=function)
        return sub

    def image_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--suite", default="bookworm", help="Debian suite: bookworm or trixie")
        sub.add_argument("--install", metavar="P,..", help="packages that the image already has")
        sub.add_argument("--mirror", metavar="P,..", help="packages that apt finds inside the hosts")

    sub = command("check", _check, "say what this machine lacks for a lab; changes nothing")
    sub.add_argument("--before-install", action="store_true", help="do not ask for programs that are about to be installed")
    image_options(command("image", _image, "make an image without starting a host"))
    sub = command("up", _up, "create hosts that are new, power on hosts that are off")
    sub.add_argument("names", nargs="+")
    image_options(sub)
    sub.add_argument("--memory", help="limit for each host, such as 2G")
    sub.add_argument("--suppress-sync", action="store_true", help="fsync does nothing in the host: fast, and unsafe on purpose")
    command("list", _list, "show the hosts").add_argument("--json", action="store_true")
    command("inventory", _inventory, "print an Ansible inventory as JSON")
    command("run", _run, "run a command of this machine on the lab's network").add_argument("command", nargs=argparse.REMAINDER)
    sub = command("exec", _exec, "run a command in a host, without ssh")
    sub.add_argument("name")
    sub.add_argument("command", nargs=argparse.REMAINDER)
    sub = command("connect", _connect, "for ssh: ProxyCommand with ProxyUseFdpass")
    sub.add_argument("address")
    sub.add_argument("port", type=int)
    sub = command("off", _off, "pull the plug")
    sub.add_argument("names", nargs="+")
    sub.add_argument("--soft", action="store_true", help="shut down properly")
    command("on", _on, "power on").add_argument("names", nargs="+")
    command("cut", _cut, "pull the network cable").add_argument("names", nargs="+")
    command("heal", _heal, "plug the cable back in; ends all partitions of the lab").add_argument("names", nargs="*")
    sub = command("drop", _drop, "lose packets between two hosts")
    sub.add_argument("first")
    sub.add_argument("second")
    sub.add_argument("--one-way", action="store_true", help="only from the first to the second")
    sub.add_argument("--percent", type=int, default=100)
    sub = command("delay", _delay, "delay what crosses a host's cable")
    sub.add_argument("name")
    sub.add_argument("--ms", type=float, required=True, help="each way; 0 removes the delay")
    command("destroy", _destroy, "remove hosts, or the whole lab when none is named").add_argument("names", nargs="*")
    sub = commands.add_parser("cable")  # internal: the process behind ``delay``
    sub.set_defaults(function=_cable)
    sub.add_argument("left")
    sub.add_argument("right")
    sub.add_argument("ms", type=float)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when it was done."""
    args = _parser().parse_args(argv)
    if getattr(args, "command", [""])[:1] == ["--"]:
        args.command = args.command[1:]
    if "command" in args and not args.command:
        print("lab: give a command to run", file=sys.stderr)
        return 2
    try:
        args.function(Lab(args.lab, args.state.absolute()), args)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0

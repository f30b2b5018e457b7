"""The lab: several Debian hosts on one machine, for a first try and for tests.

Invariant: nothing the lab does touches the machine's own interfaces, routes, firewall or units. Every host is a Debian system
booted with systemd as PID 1 in systemd-nspawn, with its own address, sshd, apt, journal and nftables rules; its disk is one
overlayfs layer over a shared image and survives a power cut. The hosts of a lab hang off one bridge inside a network namespace
of the lab's own, so their addresses exist nowhere else: from outside, a packet to one of them would leave by the machine's
default route, which is why every command that talks to a host enters the namespace first.

Modules, each importing only those before it: ``shell`` (commands and errors), ``naming`` (pure: names, numbers, addresses),
``processes``, ``preflight``, ``images``, ``network``, ``cable``, ``hosts``, ``labs``, ``cli``. Standard library only, so that
the lab runs before anything is installed.
"""

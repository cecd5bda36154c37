"""Real firewalls in a network namespace: ufw and firewalld, from packages that are not installed.

scripts/setup.sh unpacks them.  They run on private copies of /etc and /usr, firewalld with a bus of
its own; nothing of them reaches this machine, and all of it ends with the context.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKAGES: Final = Path(sys.prefix) / "firewalls"
_LIMIT: Final = 60.0
"""Seconds that a firewall may take to start on a crowded machine."""

needed: Final = pytest.mark.skipif(
    not (_PACKAGES / "complete").exists(), reason="scripts/test unpacks ufw and firewalld"
)

_PREPARE: Final = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /mnt
mkdir /mnt/etc /mnt/etc.work /mnt/usr /mnt/usr.work
for top in etc usr; do
  mount -t overlay overlay /$top \
    -o lowerdir={packages}/$top:/$top,upperdir=/mnt/$top,workdir=/mnt/$top.work
done
mkdir -p /mnt/bus
mount -t tmpfs tmpfs /var/log
for tool in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
  case $tool in
    *-*) to=/usr/sbin/${{tool%-*}}-{flavour}-${{tool#*-}} ;;
    *) to=/usr/sbin/$tool-{flavour} ;;
  esac
  ln -sf $to /usr/sbin/$tool
done
echo ready
exec sleep infinity
"""

_BUS: Final = """
<busconfig>
  <type>system</type>
  <listen>unix:path=/mnt/bus/socket</listen>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/>
  </policy>
</busconfig>
"""
_ADDRESS: Final = "unix:path=/mnt/bus/socket"


class Machine:
    """The file system in which a firewall runs, and the network namespace it guards.

    /run, where the lock of iptables-legacy is, stays that of the machine whose namespace it is.
    """

    def __init__(self, netns: str, flavour: str) -> None:
        script = _PREPARE.format(packages=_PACKAGES, flavour=flavour)
        files = (f"--mount={netns.removesuffix('net')}mnt",) if netns.startswith("/proc/") else ()
        self._holder = subprocess.Popen(
            ["nsenter", f"--net={netns}", *files, "unshare", "--mount", "sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._netns = netns
        self._started: list[subprocess.Popen[bytes]] = []
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"

    def sh(self, *argv: str, check: bool = True) -> str:
        """What a program printed."""
        done = subprocess.run(
            self._inside(*argv), capture_output=True, text=True, check=False, env=self._env
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stderr or done.stdout}"
        return done.stdout

    def start(self, *argv: str) -> None:
        """Start a program that goes on until `close`."""
        quiet = subprocess.DEVNULL
        argv = self._inside(*argv)
        self._started.append(subprocess.Popen(argv, stdout=quiet, stderr=quiet, env=self._env))

    def write(self, path: str, text: str) -> None:
        """A file of this machine alone."""
        script = f"mkdir -p {Path(path).parent} && cat >{path}"
        subprocess.run(self._inside("sh", "-c", script), input=text, text=True, check=True)

    def close(self) -> None:
        """End everything that was started."""
        for started in reversed(self._started):
            started.terminate()
            started.wait()
        self._holder.terminate()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()

    def _inside(self, *argv: str) -> tuple[str, ...]:
        mount = f"--mount=/proc/{self._holder.pid}/ns/mnt"
        return ("nsenter", mount, f"--net={self._netns}", "--", *argv)

    @property
    def _env(self) -> dict[str, str]:
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "DBUS_SYSTEM_BUS_ADDRESS": _ADDRESS,
            "LC_ALL": "C",
            "HOME": os.environ.get("HOME", "/"),
        }


@contextmanager
def _machine(netns: str, flavour: str) -> Iterator[Machine]:
    made = Machine(netns, flavour)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def ufw(netns: str, flavour: str = "nft") -> Iterator[Machine]:
    """A machine whose ufw is enabled with its defaults: drops what comes in or is forwarded."""
    with _machine(netns, flavour) as machine:
        for name in ("before", "after", "user"):
            for file in (f"{name}.rules", f"{name}6.rules"):
                machine.sh("cp", f"/usr/share/ufw/iptables/{file}", f"/etc/ufw/{file}")
        for file in ("before.init", "after.init", "ufw.conf"):
            machine.sh("cp", f"/usr/share/ufw/{file}", f"/etc/ufw/{file}")
        machine.sh("sh", "-c", "chmod 640 /etc/ufw/*.rules")
        machine.sh("ufw", "--force", "enable")
        yield machine


@contextmanager
def firewalld(netns: str, backend: str = "nftables", flavour: str = "nft") -> Iterator[Machine]:
    """A machine whose firewalld runs with its defaults: zone public, which rejects."""
    with _machine(netns, flavour) as machine:
        machine.write("/mnt/bus/conf", _BUS)
        machine.start("dbus-daemon", "--config-file=/mnt/bus/conf", "--nofork", "--nopidfile")
        _until(machine, "test", "-S", "/mnt/bus/socket")
        chosen = f"s/^FirewallBackend=.*/FirewallBackend={backend}/"
        machine.sh("sed", "-i", chosen, "/etc/firewalld/firewalld.conf")
        machine.start("firewalld", "--nofork", "--nopid")
        _until(machine, "firewall-cmd", "--state")
        yield machine


def _until(machine: Machine, *argv: str) -> None:
    end = time.monotonic() + _LIMIT
    script = '"$@" >/dev/null 2>&1 && echo yes || echo no'
    while machine.sh("timeout", "10", "sh", "-c", script, "sh", *argv) != "yes\n":
        assert time.monotonic() < end, argv
        time.sleep(0.1)

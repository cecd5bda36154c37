"""A machine: namespaces of its own and a first process that holds them.

Makes machines, wires and addresses them, and runs programs in them; the lab's first process is
its only caller.  Never knows what runs on a machine.
"""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.dataplane import netns
from mesh.errors import CommandFailed
from mesh.lab import kernel, process, topology
from mesh.lab.environment import HOME
from mesh.lab.topology import Kind

if TYPE_CHECKING:
    from mesh.lab.process import Program, Started
    from mesh.lab.topology import Machine

OWN: Final = netns.CLONE_NEWNET | netns.CLONE_NEWNS | netns.CLONE_NEWPID | kernel.CLONE_NEWUTS

_EMPTIED: Final = ("/etc/mesh", "/var/lib/mesh", "/var/lib/cni")
"""Where the tools keep what belongs to one machine; whatever the host has there is hidden."""

_QUIET: Final = dict.fromkeys(
    (
        f"ipv6/conf/{scope}/{name}"
        for scope in ("all", "default")
        for name in ("accept_dad", "accept_ra")
    ),
    "0",
)
_FORWARDING: Final = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}


@dataclass(frozen=True, slots=True)
class Host:
    """The outside: `proc` is a descriptor of its /proc, which gives processes their numbers."""

    proc: int

    @property
    def own_pid(self) -> int:
        """This process's number there."""
        return int(os.readlink("self", dir_fd=self.proc))


def furnish_switch() -> None:
    """Give the lab a /run and /proc of its own, which nobody outside sees, and its switch."""
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
    kernel.mount("proc", "/proc", "proc")
    HOME.mkdir()
    _sysctl(_QUIET)
    _ip(topology.switch_batch())


def power_on(machine: Machine, host: Host, output: int) -> Started:
    """Make a machine with its link still missing; its first process holds the namespaces."""
    (HOME / machine.name).mkdir(exist_ok=True)
    holder = process.Program(
        argv=("sleep", "infinity"),
        environment=os.environ,
        output=output,
        reaps_orphans=True,
    )
    return process.start(holder, host.proc, lambda: netns.unshare(OWN), lambda: _furnish(machine))


def connect(machine: Machine, pids: dict[str, int]) -> None:
    """Wire and address a machine; `pids` has the first process of every machine by name."""
    _ip(topology.link_batch(machine, lambda name: netns_path(pids[name])))
    with netns.entered(netns_path(pids[machine.name])):
        _ip(topology.inside_batch(machine))
    if machine.far:
        with netns.entered(netns_path(pids["router"])):
            _ip(topology.far_side_batch())


def disconnect(machine: Machine) -> None:
    """Remove a machine's link; one that went with its namespace just now is not an error."""
    try:
        _ip(topology.unlink_batch(machine))
    except CommandFailed:
        if machine.name in (name for _, name in socket.if_nameindex()):
            raise


def run_on(holder: int, host: Host, program: Program) -> Started:
    """Start a program on the machine whose first process is `holder`."""
    descriptor = os.pidfd_open(holder)
    try:
        return process.start(
            program, host.proc, lambda: netns.setns(descriptor, OWN), process.nothing
        )
    finally:
        os.close(descriptor)


def netns_path(pid: int) -> str:
    """A process's network namespace."""
    return f"/proc/{pid}/ns/net"


def _furnish(machine: Machine) -> None:
    """Runs as the machine's first process."""
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    disk = os.open(HOME / machine.name, os.O_PATH | os.O_CLOEXEC)
    kernel.mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
    for directory in ("lab", "lock", "netns"):
        Path("/run", directory).mkdir()
    kernel.mount(f"/proc/self/fd/{disk}", str(HOME), "", kernel.MS_BIND)
    for place in _EMPTIED:
        if Path(place).is_dir():
            kernel.mount("tmpfs", place, "tmpfs", 0, "mode=755")
    kernel.mount("proc", "/proc", "proc")
    socket.sethostname(machine.name)
    _sysctl(_QUIET | (_FORWARDING if machine.kind is Kind.ROUTER else {}))


def _sysctl(values: dict[str, str]) -> None:
    for name, value in values.items():
        Path("/proc/sys/net", name).write_text(value)


def _ip(batch: str) -> None:
    """Run one `ip -batch` in the network namespace of this thread.  Raises CommandFailed."""
    done = subprocess.run(
        ("ip", "-batch", "-"), input=batch, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CommandFailed(f"ip: {' '.join(done.stderr.split())}")

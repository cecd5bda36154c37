"""What the host must offer before the mesh may touch it: rights, programs, ports, tun devices.

Only looks.  Every refusal says what to do.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path
from typing import Final

from mesh.errors import HostNotReady

_CAP_NET_ADMIN: Final = 12
_STATUS: Final = Path("/proc/self/status")
_TUN: Final = Path("/dev/net/tun")


def check_rights() -> None:
    """Raise HostNotReady unless this process may change links, routes and rules."""
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff" and int(value, 16) >> _CAP_NET_ADMIN & 1:
            return
    raise HostNotReady("this process lacks CAP_NET_ADMIN: run the agent as root")


def check_program(program: str, package: str) -> None:
    """Raise HostNotReady unless `program` is installed; `package` is where Debian has it."""
    if not has_program(program):
        raise HostNotReady(f"{program} is not installed: apt install {package}")


def has_program(program: str) -> bool:
    """Whether `program` is installed."""
    return shutil.which(program) is not None


def check_port(port: int) -> None:
    """Raise HostNotReady if another process has the UDP port, in either family."""
    for family, anywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((anywhere, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                continue  # a host without IPv6
            raise HostNotReady(
                f"UDP port {port} is taken: stop what uses it (ss -ulnp sport = {port}) "
                "or set wireguardPort at `mesh cluster init`"
            ) from None


def check_tun() -> None:
    """Raise HostNotReady unless wireguard-go can make a tun device."""
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise HostNotReady(
            f"the kernel has no WireGuard, and {_TUN} cannot be opened ({error.strerror}): "
            "load the module wireguard or tun, or give the container that device"
        ) from None

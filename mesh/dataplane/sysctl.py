"""The kernel settings a node needs, and the driver that writes them.

What the kernel lacks is skipped and what it refuses is reported: containers often have a read-only
/proc/sys.  Earlier values are not remembered, so they are not restored.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.model.address import Family
from mesh.model.report import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mesh.delta import Delta
    from mesh.model.link import DeviceNames

_OPTIONAL: Final = ("net/bridge/", "net/ipv6/")
"""Kernels without br_netfilter or IPv6 do not have these, and need none."""


SHARED: Final = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    # Containers of one bridge are redirected through the node; it must not tell them so.
    "net/ipv4/conf/all/send_redirects": "0",
    # Bridged packets reach iptables once, when they are routed.
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
}
"""Settings that are not of our own devices, by path below /proc/sys."""


def desired(names: DeviceNames, *, loopback: bool | None = False) -> dict[str, str]:
    """Settings by path below /proc/sys (program.md section 4).

    `loopback`: whether what the node sends from 127.0.0.1 may leave for its containers, and the
    answers come in; None leaves that as it is.  Never elsewhere than on the bridge, and only while
    rules keep containers from 127.0.0.1 (CVE-2020-8558).
    """
    settings = {
        **SHARED,
        f"net/ipv4/conf/{names.bridge}/send_redirects": "0",
        f"net/ipv4/conf/{names.steering}/send_redirects": "0",
        # The reverse path of what arrives here is looked up with its mark.
        f"net/ipv4/conf/{names.steering}/src_valid_mark": "1",
    }
    if loopback is not None:
        settings[f"net/ipv4/conf/{names.bridge}/route_localnet"] = str(int(loopback))
    for device in names:
        settings[f"net/ipv6/conf/{device}/disable_ipv6"] = "0"
    return settings


def accept_advertisements(devices: Iterable[str]) -> dict[str, str]:
    """Keep router advertisements on `devices`: by default a host that forwards ignores them."""
    return {f"net/ipv6/conf/{device}/accept_ra": "2" for device in devices}


def forwards(family: Family) -> bool:
    """Whether the kernel forwards in the network namespace of the calling thread."""
    setting = "ipv4/ip_forward" if family is Family.V4 else "ipv6/conf/all/forwarding"
    try:
        return Path("/proc/sys/net", setting).read_text("ascii").strip() != "0"
    except OSError:  # no IPv6, or not to be read: nothing is known against it
        return True


class SysctlDriver:
    """Reads and writes kernel settings below `root` (/proc/sys)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def read(self, keys: Iterable[str]) -> dict[str, str]:
        """The values of `keys`; what the kernel does not have is left out."""
        return await asyncio.to_thread(self._read, tuple(keys))

    async def apply(self, delta: Delta[str, str]) -> tuple[Problem, ...]:
        """Write what is added, in order; what could not be written, and why."""
        return await asyncio.to_thread(self._apply, delta.add)

    def _read(self, keys: tuple[str, ...]) -> dict[str, str]:
        found = {}
        for key in keys:
            try:
                found[key] = (self._root / key).read_text(encoding="ascii").strip()
            except OSError:
                continue
        return found

    def _apply(self, settings: Mapping[str, str]) -> tuple[Problem, ...]:
        problems = []
        for key, value in settings.items():
            try:
                with (self._root / key).open("r+", encoding="ascii") as file:
                    file.write(value)
            except FileNotFoundError:
                if not key.startswith(_OPTIONAL):
                    problems.append(_problem(key, value, "the kernel does not have it"))
            except OSError as error:
                problems.append(_problem(key, value, error.strerror or str(error)))
        return tuple(problems)


def _problem(key: str, value: str, reason: str) -> Problem:
    name = key.replace("/", ".")
    message = f"cannot be set to {value} ({reason}): run `sysctl -w {name}={value}` on the host"
    return Problem(about=f"sysctl {name}", message=message)

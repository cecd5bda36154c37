"""What this host's kernel and programs can do, tried where it harms nobody.

Trials run in a network namespace of their own that ends with them: the host's own tables, sets and
devices are never touched.  The kernel may load modules for a trial, as it would for the mesh.
"""

from __future__ import annotations

import asyncio
import shlex
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

from mesh.dataplane import command, netns
from mesh.dataplane.link import LinkDriver
from mesh.delta import Delta
from mesh.errors import ApplyFailed, CommandFailed, HostNotReady
from mesh.model import link

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from mesh.model.link import DeviceNames

T = TypeVar("T")

_SETS: Final = {
    "hash:ip": "hash:ip",
    "hash:net": "hash:net",
    "hash:ip,port with skbinfo": "hash:ip,port skbinfo",
    "hash:net,port with skbinfo": "hash:net,port skbinfo",
}
_MARKED: Final = "mesh-try-2"
"""The set of that table that carries marks."""

_EXTENSIONS: Final = {
    "set": "raw -m set --match-set mesh-try-0 src",
    "SET": f"mangle -j SET --map-set {_MARKED} dst,dst --map-mark",
    "CT": "raw -j CT --notrack",
    "HMARK": "mangle -j HMARK --hmark-tuple src --hmark-mod 9 --hmark-offset 1 --hmark-rnd 0x1",
    "addrtype": "raw -m addrtype --dst-type LOCAL",
    "bpf": "raw -m bpf --bytecode '1,6 0 0 65535'",
    "comment": "raw -m comment --comment try",
    "connmark": "mangle -m connmark --mark 0x1/0x1",
    "CONNMARK": "mangle -j CONNMARK --save-mark",
    "conntrack": "mangle -m conntrack --ctstate NEW",
    "mac": "raw -m mac --mac-source 02:00:00:00:00:01",
    "MARK": "mangle -j MARK --set-xmark 0x1/0x1",
    "statistic": "nat -m statistic --mode random --probability 0.5",
    "DNAT": "nat -p tcp -j DNAT --to-destination :80",
    "MASQUERADE": "nat -j MASQUERADE --random-fully",
    "REDIRECT": "nat -j REDIRECT",
    "REJECT": "filter -j REJECT",
    "TCPMSS": "mangle -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
}
"""A rule for every extension that the iptables program needs; its table comes first."""


async def version(*argv: str) -> str:
    """The first line that a program prints.  Raises CommandFailed."""
    lines = (await command.run(*argv)).splitlines()
    return lines[0].strip() if lines else ""


async def in_scratch(work: Callable[[], Coroutine[None, None, T]]) -> T:
    """Run `work` in a network namespace without anything in it.  Raises HostNotReady."""

    def run() -> T:
        try:
            netns.unshare(netns.CLONE_NEWNET)
        except OSError as error:
            text = f"no network namespace to try it in ({error.strerror}): run this as root"
            raise HostNotReady(text) from None
        return asyncio.run(work())

    with ThreadPoolExecutor(max_workers=1) as thread:  # it never comes back from there
        return await asyncio.get_running_loop().run_in_executor(thread, run)


async def lacking(flavour: str) -> list[str]:
    """The kinds of sets and the extensions that iptables cannot use here.  In a scratch namespace.

    Raises CommandFailed if not even a chain can be made.
    """
    found = []
    for number, (name, kind) in enumerate(_SETS.items()):
        if not await _works("ipset", "create", f"mesh-try-{number}", *kind.split()):
            found.append(f"ipset {name}")
    program = f"iptables-{flavour}"
    for table in ("raw", "mangle", "nat", "filter"):
        await command.run(program, "-w", "-t", table, "-N", "TRY")
    for name, rule in _EXTENSIONS.items():
        table, *words = shlex.split(rule)
        if not await _works(program, "-w", "-t", table, "-A", "TRY", *words):
            found.append(name)
    return found


async def _works(*argv: str) -> bool:
    try:
        await command.run(*argv)
    except CommandFailed:
        return False
    return True


async def devices(names: DeviceNames) -> tuple[bool, list[str]]:
    """Whether the kernel has WireGuard, and which other devices it cannot make.  In a scratch
    namespace.
    """
    links, refused = LinkDriver(names), []
    tunnel = link.Tunnel(vni=1, local="192.0.2.1", port=4790)
    try:
        in_kernel = await links.create_wireguard()
        for name, settings in (
            (names.bridge, link.Settings()),
            (names.steering, link.Settings(tunnel=tunnel)),
        ):
            try:
                await links.apply(Delta(add={link.Device(name): settings}))
            except ApplyFailed as error:
                refused.append(str(error))
    finally:
        await links.close()
    return in_kernel, refused

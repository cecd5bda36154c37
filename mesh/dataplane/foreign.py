"""What others on this host have that could be in the mesh's way: marks, routing rules.  Their
firewalls: mesh.dataplane.firewall.

Only looks, and asks for no table that does not exist: that would create it.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import closing
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.dataplane import command, hold, host, nfmessages
from mesh.dataplane.nfnetlink import Socket
from mesh.dataplane.xtfilter import Table
from mesh.errors import HostNotReady
from mesh.model.address import FAMILIES, Family
from mesh.model.link import PROTOCOL
from mesh.rules import xtables

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mesh.rules.marks import Layout

_PROGRAMS: Final = {Family.V4: "iptables", Family.V6: "ip6tables"}
_AF: Final = {Family.V4: 2, Family.V6: 10}
_XMARK: Final = re.compile(r"-j (MARK|CONNMARK) --set-xmark 0x([0-9a-f]+)/0x([0-9a-f]+)")
_SET: Final = re.compile(r"\b(meta|ct) mark set\b")
_OURS: Final = ("MESH-", "warren-mesh")
_WORD: Final = 0xFFFFFFFF
_TABLES: Final = (nfmessages.TABLE, hold.TABLE)
_COMPATIBLE: Final = frozenset(("raw", "mangle", "nat", "filter", "security"))
"""Tables of the families ip and ip6 that iptables-nft prints in its own words."""


class Marking(NamedTuple):
    """A rule of somebody else that changes marks: the packet's (MARK) or the flow's (CONNMARK), in
    these bits.
    """

    where: str
    kind: str
    bits: int
    rule: str


class RoutingRule(NamedTuple):
    """A routing rule of somebody else."""

    family: Family
    priority: int
    mark: int
    mask: int

    def __str__(self) -> str:
        mask = "" if self.mask == _WORD else f"/{self.mask:#x}"
        return f"IPv{self.family.value} rule {self.priority} (fwmark {self.mark:#x}{mask})"

    def is_about(self, bits: int) -> bool:
        """Whether it would route a packet that has nothing in its mark but some of these bits.

        One that wants other bits too is about packets that the host itself has marked: Tailscale's
        0x80000/0xff0000 never meets ours.
        """
        wanted = self.mark & self.mask
        return bool(wanted) and not wanted & ~bits


async def saved() -> dict[Table, str]:
    """What iptables-save prints of every flavour and family whose programs are here.

    Raises CommandFailed.
    """
    found = {}
    for flavour in ("nft", "legacy"):
        for family in FAMILIES:
            program = f"{_PROGRAMS[family]}-{flavour}-save"
            if host.has_program(program):
                found[Table(flavour, family)] = await command.run(program)
    return found


def markings(program: str, text: str) -> Iterator[Marking]:
    """The rules of others in what iptables-save printed that change marks.  Pure."""
    for table, saved in xtables.parse(text).items():
        for chain, rules in saved.chains.items():
            for rule in (f"{chain} {each}" for each in rules):
                found = _XMARK.search(rule)
                if found is not None and not any(word in rule for word in _OURS):
                    bits = int(found[2], 16) | int(found[3], 16)
                    yield Marking(f"{program} -t {table}", found[1], bits, rule)


def _has_nftables() -> bool:
    """Whether there is an nft to ask, and something that it can list."""
    if not host.has_program("nft"):
        return False
    try:
        with closing(Socket()) as netlink:
            return bool(nfmessages.tables(netlink))
    except PermissionError:
        return True  # nft says so better
    except OSError:
        return False


def _is_known(table: str) -> bool:
    """Whether a table is ours, or one that iptables-nft tells of."""
    family, _, name = table.partition(" ")
    return name in _TABLES or (family in ("ip", "ip6") and name in _COMPATIBLE)


async def nft_markings() -> list[Marking]:
    """The rules of others in nftables' own tables that change marks; which bits is not known.

    Raises CommandFailed.  Elements are not asked for: there may be many.
    """
    if not _has_nftables():
        return []
    found, table = list[Marking](), ""
    for line in (await command.run("nft", "-t", "list", "ruleset")).splitlines():
        if line.startswith("table "):
            table = line.removeprefix("table ").removesuffix(" {")
        elif (kind := _SET.search(line)) is not None and not _is_known(table):
            name = "MARK" if kind[1] == "meta" else "CONNMARK"
            found.append(Marking(f"nft table {table}", name, 0xFFFFFFFF, line.strip()))
    return found


def check_marks(layout: Layout, rules: Iterable[RoutingRule], tunnels: Mapping[str, int]) -> None:
    """Raise HostNotReady if packets are marked in the mesh's field for somebody's routing rules, or
    by WireGuard devices (their names and marks).  Pure.
    """
    field = layout.packet_mark
    users = [str(rule) for rule in rules if rule.is_about(field)]
    users += [
        f"WireGuard device {device} (fwmark {mark:#x})"
        for device, mark in tunnels.items()
        if mark & field
    ]
    if users:
        raise HostNotReady(
            f"packet_mark 0x{field:08x} overlaps {users[0]}: choose 12 other bits in "
            "[marks] of agent.toml, or remove that"
        )


async def routing_rules() -> list[RoutingRule]:
    """The routing rules that are not ours."""
    return await asyncio.to_thread(lambda: list(_routing_rules()))


def _routing_rules() -> Iterator[RoutingRule]:
    from pyroute2 import IPRoute

    with IPRoute(strict_check=True, groups=0) as netlink:
        for family in FAMILIES:
            for m in list(netlink.get_rules(family=_AF[family])):
                if m.get("protocol") != PROTOCOL:
                    mark, mask = m.get("fwmark") or 0, m.get("fwmask") or 0
                    yield RoutingRule(family, m.get("priority") or 0, mark, mask)

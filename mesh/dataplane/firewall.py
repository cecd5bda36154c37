"""Other people's FORWARD chains: our accept line at their top, where they may drop.

An accept is final only within its own table, so a DROP policy of Docker or ufw takes what our
program forwards.  Owns one rule per iptables flavour and family, recognised by its comment.  Never
creates a table or a chain, and touches a table only while somebody else uses it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.dataplane import command, nfmessages
from mesh.dataplane.nfnetlink import Socket
from mesh.dataplane.nfwatch import Watch
from mesh.errors import CommandFailed
from mesh.model.address import FAMILIES, Family
from mesh.model.report import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.rules.marks import Layout

_OURS: Final = "-m comment --comment warren-mesh -j ACCEPT"
"""How our line ends, whatever bit it began with."""

_NFPROTO: Final = {Family.V4: 2, Family.V6: 10}
_NAMES: Final = {
    Family.V4: "/proc/thread-self/net/ip_tables_names",
    Family.V6: "/proc/thread-self/net/ip6_tables_names",
}
_PROGRAM: Final = {Family.V4: "iptables", Family.V6: "ip6tables"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Table:
    """One filter table: a flavour of iptables ("nft" or "legacy") in one family."""

    flavour: str
    family: Family

    @property
    def program(self) -> str:
        """The program that edits it."""
        return f"{_PROGRAM[self.family]}-{self.flavour}"


def missing(listed: str, layout: Layout) -> bool:
    """Whether FORWARD, as `iptables -S FORWARD` lists it, may drop and does not begin with our
    line, or has another one of ours.  Pure.
    """
    policy, *rules = (line.replace('"', "") for line in listed.splitlines() if line[:1] == "-")
    ours = [f"-A FORWARD {rule}" for rule in _present(listed)]
    others = [rule for rule in rules if rule not in (*ours, "-A FORWARD -j MESH-FORWARD")]
    if not others and policy.endswith("ACCEPT"):
        return ours not in ([], [f"-A FORWARD {_rule(layout)}"])
    return ours != [f"-A FORWARD {_rule(layout)}"] or rules[:1] != ours


def change(listed: str, layout: Layout) -> str:
    """What `iptables-restore --noflush` does about it: our line, once, at the top.  Pure."""
    old = "".join(f"-D FORWARD {rule}\n" for rule in _present(listed))
    return f"*filter\n{old}-I FORWARD 1 {_rule(layout)}\nCOMMIT\n"


def _rule(layout: Layout) -> str:
    return f"-m connmark --mark {layout.ours:#x}/{layout.ours:#x} {_OURS}"


def _present(listed: str) -> list[str]:
    """Our lines in FORWARD: also of before the layout changed."""
    lines = (line.replace('"', "") for line in listed.splitlines())
    return [
        line.removeprefix("-A FORWARD ")
        for line in lines
        if line.startswith("-A FORWARD -m connmark ") and line.endswith(_OURS)
    ]


class Firewall:
    """Keeps our line in place.

    `layout` says what our flows carry; `ignored` is the port id of the socket whose changes are
    ours; `own` the flavour of iptables that drives our rules, which accept by themselves there.
    """

    def __init__(self, layout: Layout, ignored: int, own: str = "") -> None:
        self._layout = layout
        self._own = own
        self._socket = Socket()
        self._watch = Watch(ignored=ignored)
        self._seen: set[Table] = set()

    async def sync(self) -> tuple[Problem, ...]:
        """One pass over the tables in use; what could not be done, and which chain drops."""
        changed = self._changed()
        problems = []
        in_use = {table for table in self._in_use() if table.flavour != self._own}
        for table in in_use:
            if table.flavour == "legacy" or changed or table not in self._seen:
                try:
                    await _accept(table, self._layout)
                except CommandFailed as error:
                    problems.append(
                        Problem(about=f"firewall {table.program} FORWARD", message=str(error))
                    )
        self._seen = in_use
        return tuple(problems)

    async def remove(self) -> None:
        """Take our line out of every table."""
        for table in self._in_use():
            listed = await command.run(table.program, "-w", "-S", "FORWARD")
            for rule in _present(listed):
                await command.run(table.program, "-w", "-D", "FORWARD", *rule.split())

    def close(self) -> None:
        """Release the sockets."""
        self._socket.close()
        self._watch.close()

    def _changed(self) -> bool:
        """Whether anybody touched a filter table of nf_tables since the last pass."""
        events = self._watch.read()
        return events is None or any(event.table == "filter" for event in events)

    def _in_use(self) -> Iterator[Table]:
        """Looks only: to ask iptables-legacy for a table would create it."""
        tables = nfmessages.tables(self._socket)
        for family in FAMILIES:
            if (_NFPROTO[family], "filter") in tables:
                yield Table("nft", family)
            try:
                names = Path(_NAMES[family]).read_text(encoding="ascii").split()
            except OSError:  # the kernel has no legacy tables
                continue
            if "filter" in names:
                yield Table("legacy", family)


async def _accept(table: Table, layout: Layout) -> None:
    listed = await command.run(table.program, "-w", "-S", "FORWARD")
    if missing(listed, layout):
        text = change(listed, layout)
        await command.run(f"{table.program}-restore", "--noflush", "-w", input=text)
        log.warning("firewall=%s FORWARD may drop: accepting our flows at its top", table.program)

"""The programs that edit one flavour's tables, ipsets, and the bridge table beside them.

Runs them and nothing else: what they are told is decided by mesh.dataplane.iptables.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, Literal

from mesh.dataplane import command
from mesh.errors import CommandFailed
from mesh.model.address import Family
from mesh.rules import ipsets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Flavour = Literal["legacy", "nft"]

_log = logging.getLogger(__name__)

PROGRAMS: Final = {Family.V4: "iptables", Family.V6: "ip6tables"}
_LOCK_SECONDS: Final = "20"
"""How long to wait for other programs that hold the xtables lock."""

_RELEASE_SECONDS: Final = (0.02, 0.1, 0.5, 0)
"""How long to wait each time when a set is in use that should not be."""


class Programs:
    """The programs of one flavour, for the network namespace of the calling thread.

    `started` is told the process id of each that writes.
    """

    def __init__(self, flavour: Flavour, started: Callable[[int], None]) -> None:
        self.flavour = flavour
        self._started = started

    def name(self, family: Family) -> str:
        """What edits the tables of a family: "ip6tables-legacy"."""
        return f"{PROGRAMS[family]}-{self.flavour}"

    async def save(self, family: Family, *options: str) -> str:
        """All tables of a family, or what options ask for.  Raises CommandFailed."""
        return await command.run(f"{self.name(family)}-save", *options)

    async def restore(self, family: Family, text: str) -> None:
        """Change tables of a family.  Raises CommandFailed."""
        if text:
            tool = f"{self.name(family)}-restore"
            words = ("--noflush", "-w", _LOCK_SECONDS)
            await command.run(tool, *words, input=text, started=self._started)


async def ipset(lines: Iterable[str]) -> None:
    """Change sets.  Raises CommandFailed."""
    text = "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)
    if text:
        await command.run("ipset", "restore", "-exist", input=text)


async def our_sets() -> set[str]:
    """The names of the sets of the mesh.  Raises CommandFailed."""
    return ipsets.ours(await command.run("ipset", "list", "-n"))


async def destroy(names: list[str]) -> bool:
    """Destroy sets, of which the first is in use if any is; False if so.

    The kernel lets go of rules of iptables-nft some time after they are deleted.
    """
    for delay in _RELEASE_SECONDS:
        there = await our_sets() if names else ()
        try:
            await ipset(f"destroy {name}" for name in names if name in there)
        except CommandFailed as error:
            _log.info("iptables sets in use: %s", error)
            await asyncio.sleep(delay)
        else:
            return True
    return False


async def unload_bridge() -> None:
    """Delete the bridge table.  Not while the nftables program is there, which needs it too."""
    try:
        tables = (await command.run("nft", "list", "tables")).splitlines()
        if "table bridge mesh" in tables and "table inet mesh" not in tables:
            await command.run("nft", "delete", "table", "bridge", "mesh")
    except CommandFailed as error:
        _log.warning("iptables table=bridge stays: %s", error)

"""The filter table of one flavour of iptables and one family: read, and given our lines.

Owns the rules in INPUT and FORWARD that have our comment.  Never creates a table or a chain, and is
asked only while somebody else uses the table.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mesh.dataplane import command
from mesh.errors import CommandFailed
from mesh.model.address import Family
from mesh.rules import needs, passage_xtables
from mesh.rules.needs import Place

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.rules.needs import Need
    from mesh.rules.passage import Chains

_PROGRAM: Final = {Family.V4: "iptables", Family.V6: "ip6tables"}
_FAMILY: Final = {Family.V4: "ip", Family.V6: "ip6"}
CHAINS: Final = {needs.INPUT: "INPUT", needs.FORWARD: "FORWARD"}
_OURS: Final = re.compile(rf'-A (?:INPUT|FORWARD) .*--comment "?{needs.COMMENT}"? .*')


_MESH: Final = "-j MESH-FORWARD"
"""A backend's own jump, which may still be there when another one drives the rules."""


class Mixed(CommandFailed):
    """Rules that only nft understands are in the table; it has to be read with nft."""


@dataclass(frozen=True, slots=True)
class Table:
    """One filter table: a flavour of iptables ("nft" or "legacy") in one family."""

    flavour: str
    family: Family

    @property
    def program(self) -> str:
        """The program that edits it."""
        return f"{_PROGRAM[self.family]}-{self.flavour}"

    @property
    def name(self) -> str:
        """How people name it."""
        return self.program

    def places(self) -> list[tuple[str, Place]]:
        """Its base chains, each with the hook that calls it."""
        family = _FAMILY[self.family]
        return [(h, Place(self.program, family, "filter", chain)) for h, chain in CHAINS.items()]

    def is_served(self) -> bool:
        """Whether its programs are installed."""
        return shutil.which(f"{self.program}-save") is not None

    async def read(self) -> Saved:
        """All of it.  Raises Mixed or CommandFailed."""
        saved = Saved(self.program, await command.run(f"{self.program}-save", "-t", "filter"))
        if not saved.chains:
            raise Mixed(f"{self.program} cannot read table filter: nft was used in it")
        return saved


def accepting(match: str) -> str:
    """A line of ours that lets pass what matches."""
    return f"{match} -m comment --comment {needs.COMMENT} -j ACCEPT"


class Saved:
    """What iptables-save printed of a filter table."""

    def __init__(self, program: str, text: str) -> None:
        self._program = program
        self._lines = [line for line in text.splitlines() if line[:1] in ("-", ":", "*")]
        self._rules: dict[str, list[str]] = {chain: [] for chain in CHAINS.values()}
        for line in self._lines:
            chain, _, rule = line.removeprefix("-A ").partition(" ")
            if line.startswith("-A ") and chain in self._rules:
                self._rules[chain].append(rule)

    @property
    def chains(self) -> Chains:
        """All chains, with our lines."""
        return passage_xtables.parse("\n".join(self._lines))

    @property
    def foreign(self) -> Chains:
        """All chains without our lines."""
        theirs = (line for line in self._lines if not _OURS.fullmatch(line))
        return passage_xtables.parse("\n".join(theirs))

    def count(self, chain: str) -> int:
        """How many lines of ours a chain has, wherever they are in it."""
        return len(self._ours(chain))

    def may_drop(self, chain: str) -> bool:
        """Whether a chain has a policy or rules of others that may drop something."""
        policies = [line.split()[1] for line in self._lines if line.startswith(f":{chain} ")]
        others = len(self._rules[chain]) - self.count(chain) - (_MESH in self._rules[chain])
        return policies not in ([], ["ACCEPT"]) or others > 0

    def _ours(self, chain: str) -> list[str]:
        return [rule for rule in self._rules[chain] if _OURS.fullmatch(f"-A {chain} {rule}")]

    async def write(self, needed: Mapping[str, tuple[Need, ...]]) -> bool:
        """Have a line for each need first in its chain, and no other line; whether anything had to
        be written.  Raises CommandFailed.
        """
        text = self.change(
            {chain: [accepting(need.xtables) for need in these] for chain, these in needed.items()}
        )
        if text:
            await command.run(f"{self._program}-restore", "--noflush", "-w", input=text)
        return bool(text)

    def change(self, wanted: Mapping[str, list[str]]) -> str:
        """What makes our lines these, in this order: input of `iptables-restore --noflush`; nothing
        if they are so already.
        """
        commands: list[str] = []
        for chain, rules in self._rules.items():
            lines, ours = wanted.get(chain, []), self._ours(chain)
            first = [rule.replace('"', "") for rule in rules[: len(lines)]]
            if first != lines or len(ours) != len(lines):
                commands += (f"-D {chain} {rule}" for rule in ours)
                commands += (f"-I {chain} {n} {line}" for n, line in enumerate(lines, 1))
        return "\n".join(["*filter", *commands, "COMMIT\n"]) if commands else ""

"""Limits of connections as chains of the mangle table, and back: one chain per frontend id.

There because nothing else changes that table: iptables-legacy writes a table whole, and its counts
begin anew.  First packets alone come here, with the frontend's mark, before the translation.
Pure, mutable.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from mesh.model.address import Family
from mesh.rules import elements
from mesh.rules.connlimits import CLIENT6
from mesh.rules.xtables_tree import Names, Tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mesh.rules.elements import ElementKey
    from mesh.rules.marks import Layout
    from mesh.rules.xtables import Chains, Rules

NAMES: Final = Names("MESH-LIMITS", "MESH-U-", "MESH-L-")

_LEAF: Final = re.compile(r"MESH-L-([0-9a-f]{5})")
_LIMIT: Final = re.compile(r"-m connlimit --connlimit-(?:above|upto) (\d+) ")
_COUNTED: Final = re.compile(r"\[(\d+):\d+\] -A MESH-L-([0-9a-f]{5}) .*-j RETURN")


class Limits:
    """How many connections a client may have at each frontend, and the chains this comes to."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._held: dict[int, set[int]] = {}
        self._tree = Tree(NAMES, layout)

    def put(self, key: bytes) -> None:
        """There is this limit."""
        bits, limit = elements.connlimit_of(key)
        number = self._layout.id_of(bits)
        self._held.setdefault(number, set()).add(limit)
        self._tree.settle(number, exists=True)

    def drop(self, key: bytes) -> None:
        """There is no longer."""
        bits, limit = elements.connlimit_of(key)
        number = self._layout.id_of(bits)
        self._held[number].discard(limit)
        if not self._held[number]:
            del self._held[number]
            self._tree.settle(number, exists=False)

    def ids(self) -> set[int]:
        """The ids that have a chain."""
        return set(self._held)

    def chains(self, family: Family, ids: Iterable[int]) -> Chains:
        """The chains of some ids, and those that lead there."""
        wanted = list(ids)
        leaves = {
            NAMES.of_leaf(number): tuple(self._rules(family, min(self._held[number])))
            for number in wanted
            if number in self._held
        }
        return leaves | self._tree.above(wanted)

    def _rules(self, family: Family, limit: int) -> Iterator[str]:
        """What marks a connection that is too many, and a rule that counts those.

        IPv6 clients are counted both ways; the chains know whose address says which way is theirs.
        """
        over = f"-m connlimit --connlimit-above {limit} --connlimit-mask"
        if family is Family.V4:
            yield f"{over} {family.bits} --connlimit-saddr -j MESH-FULL"
        else:
            yield f"{over} {family.bits} --connlimit-saddr -j MESH-FULL-HOST"
            yield f"{over} {CLIENT6} --connlimit-saddr -j MESH-FULL-NET"
        layout = self._layout
        yield f"-m connmark --mark 0x{layout.hash:x}/0x{layout.size:x} -j RETURN"


def parse(family: Family, saved: Mapping[str, Rules], layout: Layout) -> Iterator[ElementKey]:
    """The elements in saved chains; of one that is not as we write it, none."""
    for name, rules in saved.items():
        leaf, told = _LEAF.fullmatch(name), _LIMIT.match(rules[0]) if rules else None
        if leaf is None or told is None:
            continue
        number = int(leaf[1], 16)
        key = elements.connlimit_key(layout.id_bits(number), int(told[1]))
        limits = Limits(layout)
        limits.put(key[1])
        if limits.chains(family, [number])[name] == rules:
            yield key


def chain(mark: int, layout: Layout) -> str:
    """The chain that counts towards the limit of a mark."""
    return NAMES.of_leaf(layout.id_of(mark))


def surplus(saved: str) -> dict[int, int]:
    """How many connections were too many, by frontend id; from `iptables-save -c`."""
    return {int(found[2], 16): int(found[1]) for found in _COUNTED.finditer(saved)}

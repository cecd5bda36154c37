"""The program's text as chains of rules in words, for mesh.rules.trace to walk.

Reads only what mesh.rules.program writes; knows nothing of packets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.rules import extras, program

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.rules.extras import Extras
    from mesh.rules.program import Parameters

_WORD: Final = re.compile(r'"[^"]*"|[{}()]|[^\s{}(),][^\s{}()]*[^\s{}(),]|[^\s{}(),]')
_BASE: Final = re.compile(r"type (\w+) hook (\w+) priority (-?\d+); policy accept;")
_ELEMENTS: Final = re.compile(r"add element inet mesh (\w+) { (.*) }")


class Rule(NamedTuple):
    """One rule: its text without what changes nothing, its words, and its comment."""

    text: str
    words: tuple[str, ...]
    comment: str


class Base(NamedTuple):
    """A chain that the kernel calls: where, and in which order."""

    priority: int
    chain: str
    kind: str
    hook: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the kernel makes of the text; `static` are the elements that stand in it."""

    bases: tuple[Base, ...]
    chains: Mapping[str, tuple[Rule, ...]]
    static: Mapping[str, Mapping[str, str]]

    def hooked(self, hook: str) -> tuple[Base, ...]:
        """The chains of a hook in their order."""
        return tuple(base for base in self.bases if base.hook == hook)


@lru_cache(maxsize=64)
def whole(parameters: Parameters, needed: Extras) -> Loaded:
    """A node's program with all that some elements need."""
    return load(extras.whole(program.build(parameters), needed))


@lru_cache(maxsize=64)
def load(text: str) -> Loaded:
    """Take the text of table inet mesh apart."""
    bases: list[Base] = []
    chains: dict[str, tuple[Rule, ...]] = {}
    static: dict[str, dict[str, str]] = {}
    chain, rules = "", list[Rule]()
    for line in map(str.strip, text.splitlines()):
        if line.startswith("chain "):
            chain, rules = line.split()[1], []
        elif line == "}" and chain:
            chains[chain], chain = tuple(rules), ""
        elif (found := _BASE.fullmatch(line)) is not None:
            kind, hook, priority = found.groups()
            bases.append(Base(int(priority), chain, kind, hook))
        elif chain:
            rules.append(_rule(line))
        elif (found := _ELEMENTS.fullmatch(line)) is not None:
            name, listed = found.groups()
            static.setdefault(name, {}).update(map(_element, listed.split(", ")))
    return Loaded(tuple(sorted(bases)), chains, static)


def _rule(line: str) -> Rule:
    text, _, comment = line.partition(' comment "')
    words = tuple(word for word in _WORD.findall(text) if word != "counter")
    return Rule(text.replace("counter ", ""), words, comment.rstrip('"'))


def _element(text: str) -> tuple[str, str]:
    key, _, data = text.partition(" : ")
    return key, data

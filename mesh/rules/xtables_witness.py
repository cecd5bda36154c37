"""Whether two readers of the same tables saw the same: iptables-save and python-iptables.

Each rule of ours as its words, whatever their order; what a word means is not asked.  Pure.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, Final

from mesh.rules import xtables

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mesh.rules.xtables import Saved


_OPTIONS: Final = {
    "src": "-s",
    "dst": "-d",
    "in-interface": "-i",
    "out-interface": "-o",
    "protocol": "-p",
}
_PROTOCOLS: Final = {"icmpv6": "ipv6-icmp"}
"""python-iptables and iptables-save call it differently."""

_IGNORED: Final = frozenset(("counters",))


def disagreements(
    ours: Mapping[str, set[str]], saved: Mapping[str, Saved], told: Mapping[str, Any]
) -> Iterator[str]:
    """What the witness saw otherwise, of the chains of ours in each table; a line each."""
    for table, names in ours.items():
        chains = told.get(table, {})
        for name in sorted(names | _named_like_ours(chains)):
            rules = saved[table].chains.get(name)
            if rules is None:
                yield f"{table} {name}: only python-iptables sees it"
            elif name not in chains:
                yield f"{table} {name}: python-iptables does not see it"
            elif len(rules) != len(chains[name]):
                yield (
                    f"{table} {name}: iptables-save has {len(rules)} rules, "
                    f"python-iptables {len(chains[name])}"
                )
            else:
                yield from _of_rules(f"{table} {name}", rules, chains[name])


def _named_like_ours(chains: Iterable[str]) -> set[str]:
    return {name for name in chains if xtables.OWN.fullmatch(name)}


def _of_rules(where: str, rules: Sequence[str], told: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for number, (text, rule) in enumerate(zip(rules, told, strict=True), 1):
        saved, seen = words_of_text(text), words(rule)
        if saved != seen:
            only = f"{' '.join(_less(saved, seen))} / {' '.join(_less(seen, saved))}"
            yield f"{where} rule {number}: iptables-save / python-iptables say {only}"


def _less(one: list[str], other: list[str]) -> list[str]:
    return [word for word in one if word not in other]


def words_of_text(rule: str) -> list[str]:
    """The words of a rule as iptables-save prints it; a negation belongs to its option."""
    found, negated = [], ""
    for word in shlex.split(rule):
        if word == "!":
            negated = "!"
        else:
            found.append(negated + word)
            negated = ""
    return sorted(found)


def words(rule: Mapping[str, Any]) -> list[str]:
    """The same words of a rule as python-iptables decodes it."""
    return sorted(_words(rule))


def _words(rule: Mapping[str, Any]) -> Iterator[str]:
    for name, value in rule.items():
        if name in _IGNORED:
            continue
        if name == "target":
            yield from _target(value)
        elif name in _OPTIONS:
            negated = "!" if value.startswith("!") else ""
            yield negated + _OPTIONS[name]
            plain = value.removeprefix("!")
            yield _PROTOCOLS.get(plain, plain)
        else:
            for each in value if isinstance(value, list) else [value]:
                yield from ("-m", name, *_parameters(each))


def _target(value: str | Mapping[str, Any]) -> Iterator[str]:
    if isinstance(value, str):
        yield from ("-j", value)
        return
    ((name, parameters),) = value.items()
    if name == "goto":
        yield from ("-g", parameters)
    else:
        yield from ("-j", name, *_parameters(parameters))


def _parameters(found: Mapping[str, str | list[str]]) -> Iterator[str]:
    for name, value in found.items():
        values = [value] if isinstance(value, str) else value
        if values[:1] == ["!"]:
            yield f"!--{name}"
            values = values[1:]
        else:
            yield f"--{name}"
        yield from (word for word in values if word)

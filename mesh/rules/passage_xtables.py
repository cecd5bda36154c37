"""Chains of iptables as iptables-save prints them, read for mesh.rules.passage.  Pure.

What is not understood is a condition that cannot be told.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from mesh.rules import passage
from mesh.rules.passage import Call, Chain, Rule, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mesh.rules.passage import Chains, Condition

_VERDICTS: Final = {
    "ACCEPT": Verdict.ACCEPT,
    "DROP": Verdict.DROP,
    "REJECT": Verdict.DROP,
    "RETURN": Verdict.RETURN,
    "QUEUE": Verdict.ACCEPT,  # a program decides
    "NFQUEUE": Verdict.ACCEPT,
}
_POLICIES: Final = {"ACCEPT": Verdict.ACCEPT, "DROP": Verdict.DROP}
_TELLING: Final = frozenset(
    {"comment", "conntrack", "state", "connmark", "addrtype", "multiport", "tcp", "udp"}
)
"""Matches that say everything by their options; others may do so without any."""


def parse(text: str) -> Chains:
    """The chains of the filter table, from what iptables-save printed."""
    chains: dict[str, Chain] = {}
    rules: dict[str, list[Rule]] = {}
    names = {line[1:].partition(" ")[0] for line in text.splitlines() if line.startswith(":")}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif table != "filter":
            continue
        elif line.startswith(":"):
            name, policy = line[1:].split()[:2]
            rules[name] = []
            chains[name] = Chain((), _POLICIES.get(policy, Verdict.CONTINUE))
        elif line.startswith("-A "):
            words = shlex.split(line)
            rules[words[1]].append(_rule(words[2:], names))
    return {name: Chain(tuple(rules[name]), chain.policy) for name, chain in chains.items()}


def _rule(words: list[str], names: Iterable[str]) -> Rule:
    """Words of a rule; options of its target come last and are not conditions."""
    for option in ("-j", "-g"):
        if option in words:
            at = words.index(option)
            target = words[at + 1]
            conditions = tuple(_conditions(words[:at]))
            if target in names:
                return Rule(conditions, Call(target, final=option == "-g"))
            return Rule(conditions, _VERDICTS.get(target, Verdict.CONTINUE))
    return Rule(tuple(_conditions(words)), Verdict.CONTINUE)


def _conditions(words: list[str]) -> list[Condition]:
    found: list[Condition] = []
    match, at = "", 0
    while at < len(words):
        opposite = words[at] == "!"
        at += opposite
        option, values = words[at], _values(words, at + 1)
        at += 1 + len(values)
        if option == "-m":
            match = values[0]
            found += [] if match in _TELLING else [passage.unknown]
        elif option != "--comment":
            condition = _condition(match, option, values)
            found.append(passage.negated(condition) if opposite else condition)
    return found


def _values(words: list[str], start: int) -> list[str]:
    """What follows an option, up to the next one."""
    end = start
    while end < len(words) and not words[end].startswith(("-", "!")):
        end += 1
    return words[start : max(end, start + (words[start - 1] == "--comment"))]


def _condition(match: str, option: str, values: list[str]) -> Condition:
    build = _OPTIONS.get(option)
    if build is None or len(values) != 1 or (option == "--mark" and match != "connmark"):
        return passage.unknown
    return build(values[0])


def _ports(text: str) -> Condition:
    ranges = [each.partition(":") for each in text.split(",")]
    try:
        return passage.port([(int(a or 0), int((b or 65535) if c else a)) for a, c, b in ranges])
    except ValueError:
        return passage.unknown


def _states(text: str) -> Condition:
    names = set(text.split(","))
    found = passage.state(names)
    if "SNAT" in names:
        found = passage.either(found, passage.unknown)
    return passage.either(found, passage.translated) if "DNAT" in names else found


def _mark(text: str) -> Condition:
    value, _, mask = text.partition("/")
    try:
        return passage.mark(int(value, 0), int(mask or "0xffffffff", 0))
    except ValueError:
        return passage.unknown


def _device(text: str) -> str:
    return f"{text[:-1]}*" if text.endswith("+") else text


_OPTIONS: Final[dict[str, Callable[[str], Condition]]] = {
    "-i": lambda text: passage.incoming([_device(text)]),
    "-o": lambda text: passage.outgoing([_device(text)]),
    "-p": lambda text: passage.protocol([text]),
    "--dport": _ports,
    "--dports": _ports,
    "--ctstate": _states,
    "--state": _states,
    "--mark": _mark,
    "--dst-type": lambda text: passage.local if text == "LOCAL" else passage.unknown,
}

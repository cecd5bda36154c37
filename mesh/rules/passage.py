"""Whether somebody else's chains let a packet through, as far as that can be told.  Pure.

Conditions that cannot be told (addresses, limits, sets) count as what helps the packet: only what
is dropped for certain is called dropped, so that no firewall is accused wrongly.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.model.address import Family

ELSEWHERE: Final = ""
"""An interface that is none of the mesh's, and not the loopback device; which one is not known."""

_DEEPEST: Final = 32
"""Chains that call each other at most; the kernel allows 16."""


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a flow, as a chain of others sees it.  None: may be anything.

    `ours` are the interfaces that belong to the mesh.  `mark` is the conntrack mark under `mask`:
    the other bits are not known.
    """

    family: Family
    iif: str
    oif: str = ELSEWHERE
    protocol: str | None = None
    port: int | None = None
    state: str = "new"
    translated: bool = False
    local: bool = False
    mark: int = 0
    mask: int = 0
    ours: frozenset[str] = frozenset()


Condition = Callable[[Packet], bool | None]
"""Whether a packet meets it; None if that cannot be told."""


class Verdict(enum.Enum):
    """What a rule decides; CONTINUE: nothing."""

    ACCEPT = "accept"
    DROP = "drop"
    RETURN = "return"
    CONTINUE = "continue"


class Call(NamedTuple):
    """Another chain decides; after `final` ones nothing comes back to the calling chain."""

    chain: str
    final: bool


class Rule(NamedTuple):
    """What happens to packets that meet all conditions."""

    conditions: tuple[Condition, ...]
    verdict: Verdict | Call


class Chain(NamedTuple):
    """Rules in order, and what is decided at their end: CONTINUE where another chain calls it."""

    rules: tuple[Rule, ...]
    policy: Verdict = Verdict.CONTINUE


Chains = Mapping[str, Chain]
"""The chains of one table, by name."""


def drops(chains: Chains, name: str, packet: Packet) -> bool:
    """Whether the base chain `name` drops the packet for certain."""
    return _outcome(chains, name, packet, 0) is Verdict.DROP


def _outcome(chains: Chains, name: str, packet: Packet, depth: int) -> Verdict:
    """What a chain makes of a packet at best: CONTINUE if it leaves the decision to its caller."""
    chain = chains.get(name)
    if chain is None or depth > _DEEPEST:
        return Verdict.ACCEPT
    may_return = False
    for rule in chain.rules:
        met = _all(rule.conditions, packet)
        if met is False:
            continue
        found, leaves = rule.verdict, rule.verdict is Verdict.RETURN
        if isinstance(found, Call):
            leaves = found.final
            found = _outcome(chains, found.chain, packet, depth + 1)
        if found is Verdict.ACCEPT:
            return found
        if found is Verdict.DROP:
            if met:
                return chain.policy if may_return else found
        elif leaves:
            if met:
                break
            may_return = True
    return chain.policy


def _all(conditions: Iterable[Condition], packet: Packet) -> bool | None:
    told: bool | None = True
    for condition in conditions:
        met = condition(packet)
        if met is False:
            return False
        if met is None:
            told = None
    return told


# ---- conditions


def unknown(_packet: Packet) -> bool | None:
    """What cannot be told."""
    return None


def negated(condition: Condition) -> Condition:
    """The opposite."""

    def opposite(packet: Packet) -> bool | None:
        met = condition(packet)
        return None if met is None else not met

    return opposite


def either(one: Condition, other: Condition) -> Condition:
    """One of both."""

    def meets(packet: Packet) -> bool | None:
        first, second = one(packet), other(packet)
        if first or second:
            return True
        return None if None in (first, second) else False

    return meets


def incoming(names: Iterable[str]) -> Condition:
    """Came in by one of these interfaces; a name may end in "*"."""
    wanted = tuple(names)
    return lambda packet: _is_among(packet.iif, wanted, packet.ours)


def outgoing(names: Iterable[str]) -> Condition:
    """Leaves by one of these interfaces."""
    wanted = tuple(names)
    return lambda packet: _is_among(packet.oif, wanted, packet.ours)


def _is_among(device: str, wanted: tuple[str, ...], ours: frozenset[str]) -> bool | None:
    if device != ELSEWHERE:
        return any(_fits(device, pattern) for pattern in wanted)
    return None if any(pattern not in ours and pattern != "lo" for pattern in wanted) else False


def _fits(device: str, pattern: str) -> bool:
    return device.startswith(pattern[:-1]) if pattern.endswith("*") else device == pattern


def protocol(names: Iterable[str]) -> Condition:
    """Is of one of these protocols, by name or number."""
    wanted = {_PROTOCOLS.get(name, name) for name in names}
    return lambda packet: None if packet.protocol is None else packet.protocol in wanted


_PROTOCOLS: Final = {
    "6": "tcp",
    "17": "udp",
    "1": "icmp",
    "58": "icmpv6",
    "ipv6-icmp": "icmpv6",
    "icmp6": "icmpv6",
}


def port(ranges: Iterable[tuple[int, int]]) -> Condition:
    """Goes to a port within these bounds."""
    wanted = tuple(ranges)
    return lambda packet: (
        None if packet.port is None else any(a <= packet.port <= b for a, b in wanted)
    )


def family(wanted: Family) -> Condition:
    """Is IPv4, or IPv6."""
    return lambda packet: packet.family is wanted


def state(names: Iterable[str]) -> Condition:
    """Is in one of these states, to conntrack."""
    wanted = frozenset(name.lower() for name in names)
    return lambda packet: packet.state in wanted


def translated(packet: Packet) -> bool | None:
    """Had its destination changed here."""
    return packet.translated


def local(packet: Packet) -> bool | None:
    """Is for this host."""
    return packet.local


def mark(value: int, mask: int) -> Condition:
    """Belongs to a flow whose mark is `value` under `mask`."""

    def meets(packet: Packet) -> bool | None:
        if (packet.mark ^ value) & mask & packet.mask:
            return False
        return None if mask & ~packet.mask else True

    return meets

"""What policies and the tasks of the cluster come to on one node.  Pure: same state, same answer.

A task that some policy selects is closed, but for what the rules of all that select it let in.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections import defaultdict
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from mesh.model.publish import PORTS, Protocol
from mesh.rules.guards import Door, Grant, Guard, Guards

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mesh.model.policy import IngressRule, IPBlock, NetworkPolicy, Peer

_EVERYWHERE: Final = ("0.0.0.0/0", "::/0")

_Rules = dict[str, "IngressRule"]
"""Rules by name: the policy's, and a digest of the rule.  A rule that is changed is another one, so
that nobody meets its new sources with its old ports.
"""


class Labelled(NamedTuple):
    """A task as policies see it."""

    node: str
    addresses: tuple[str, ...]
    labels: Mapping[str, str]


def plan(policies: Iterable[NetworkPolicy], tasks: Iterable[Labelled], node: str) -> Guards:
    """The guards of the tasks on `node`, and all grants that they need.

    An address that several tasks have is guarded by what selects any of them.
    """
    known, tasks = sorted(policies, key=lambda policy: policy.name), tuple(tasks)
    if not known:
        return Guards()
    selecting: defaultdict[str, set[str]] = defaultdict(set)
    for task in tasks:
        if task.node == node:
            for policy in known:
                if policy.pod_selector.matches(task.labels):
                    for address in task.addresses:
                        selecting[address].add(policy.name)
    alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for address, names in selecting.items():
        alike[tuple(sorted(names))].append(address)
    rules = {policy.name: dict(_named(policy)) for policy in known}
    guards = tuple(_guard(names, alike[names], rules) for names in sorted(alike))
    wanted = sorted({door.grant for guard in guards for door in guard.doors})
    by_name = {name: rule for each in rules.values() for name, rule in each.items()}
    sources = {
        name: _sources(by_name[name], tasks)
        for name in {name for grant in wanted for name in grant.split("+")}
    }
    return Guards(guards, tuple(_grant(grant, sources) for grant in wanted))


def _named(policy: NetworkPolicy) -> Iterator[tuple[str, IngressRule]]:
    for rule in policy.ingress:
        yield f"{policy.name}/{hashlib.sha256(msgspec.json.encode(rule)).hexdigest()[:16]}", rule


def _guard(names: tuple[str, ...], addresses: list[str], rules: Mapping[str, _Rules]) -> Guard:
    """What stands before the tasks that exactly these policies select."""
    own = {name: rule for policy in names for name, rule in rules[policy].items()}
    doors = tuple(door for protocol in Protocol for door in _doors(protocol, own))
    return Guard(f"guard {'+'.join(names)}", tuple(sorted(addresses)), doors)


def _doors(protocol: Protocol, rules: _Rules) -> Iterator[Door]:
    """The ranges of ports in which the same rules let in."""
    spans = {name: list(_spans(rule, protocol)) for name, rule in rules.items()}
    edges = {edge for each in spans.values() for first, last in each for edge in (first, last + 1)}
    starts = sorted(edges)
    open_: Door | None = None
    for start, end in pairwise(starts):
        letting = sorted(
            name
            for name, each in spans.items()
            if any(first <= start <= last for first, last in each)
        )
        grant = "+".join(letting)
        if open_ is not None and (open_.grant, open_.last + 1) == (grant, start):
            open_ = open_._replace(last=end - 1)
            continue
        if open_ is not None:
            yield open_
        open_ = Door(protocol, start, end - 1, grant) if letting else None
    if open_ is not None:
        yield open_


def _spans(rule: IngressRule, protocol: Protocol) -> Iterator[tuple[int, int]]:
    if not rule.ports:
        yield 0, PORTS[-1]
    for port in rule.ports:
        if port.protocol.protocol is protocol:
            yield port.span


class _Sources(NamedTuple):
    """Where a rule lets in from."""

    prefixes: frozenset[str]
    hosts: frozenset[str]


def _sources(rule: IngressRule, tasks: tuple[Labelled, ...]) -> _Sources:
    if not rule.from_:
        return _Sources(frozenset(_EVERYWHERE), frozenset())
    prefixes = {
        prefix for peer in rule.from_ if peer.ip_block for prefix in _prefixes(peer.ip_block)
    }
    return _Sources(frozenset(prefixes), frozenset(_hosts(rule.from_, tasks)))


def _hosts(peers: Iterable[Peer], tasks: tuple[Labelled, ...]) -> Iterator[str]:
    for peer in peers:
        if peer.pod_selector is not None:
            for task in tasks:
                if peer.pod_selector.matches(task.labels):
                    yield from task.addresses


def _prefixes(block: IPBlock) -> tuple[str, ...]:
    return _remainder(block.cidr, block.except_)


@lru_cache(maxsize=1024)
def _remainder(cidr: str, without: tuple[str, ...]) -> tuple[str, ...]:
    """A prefix less some within, as the fewest prefixes."""
    left: list[Any] = [ipaddress.ip_network(cidr)]
    for text in without:
        hole: Any = ipaddress.ip_network(text)
        left = [part for whole in left for part in _less(whole, hole)]
    return tuple(str(part) for part in sorted(left))


def _less(whole: Any, hole: Any) -> Iterable[Any]:
    if whole.subnet_of(hole):
        return ()
    return whole.address_exclude(hole) if hole.subnet_of(whole) else (whole,)


def _grant(key: str, sources: Mapping[str, _Sources]) -> Grant:
    of = [sources[name] for name in key.split("+")]
    prefixes = frozenset[str]().union(*(each.prefixes for each in of))
    hosts = frozenset[str]().union(*(each.hosts for each in of))
    return Grant(key, tuple(sorted(prefixes)), tuple(sorted(hosts)))

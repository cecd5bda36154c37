"""What must become of a packet, from what a cluster's records mean: docs, not rules.

The third opinion beside the two rule engines; shares nothing with them but the table of slots that
client affinity is defined by.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from mesh.model import address
from mesh.model.address import FAMILIES, Family
from mesh.model.health import Fallback
from mesh.model.publish import PublishMode
from mesh.model.service import Affinity, Prefer, Source
from mesh.rules import slots
from mesh.rules.forwarding import Backend
from mesh.rules.trace import Entry, Packet, Verdict
from tests.support import drawn
from tests.support.drawn import CLUSTER, HERE, Port, Rule, Service, World

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Expected:
    """What becomes of a packet.

    `shares` are the backends and how many of all draws each gets; `sticky`: the client has one of
    them for good.  `kept`: a backend elsewhere sees the address of a client from outside.
    """

    verdict: Verdict
    shares: Mapping[str, Fraction]
    sticky: bool = False
    kept: bool = True
    closed: frozenset[str] = frozenset()
    """Those of the backends that policies do not let the client in to."""

    @property
    def verdicts(self) -> set[Verdict]:
        """What may become of it."""
        found = {Verdict.REFUSED} if self.closed else set[Verdict]()
        return (
            found if self.closed and self.shares.keys() <= self.closed else found | {self.verdict}
        )


PASSED = Expected(Verdict.PASSED, {})
REFUSED = Expected(Verdict.REFUSED, {})
DROPPED = Expected(Verdict.DROPPED, {})


def expected(packet: Packet, world: World) -> Expected:
    found = _unguarded(packet, world)
    if packet.entry is Entry.NODE:
        return found  # a node reaches its replicas
    if found.verdict is Verdict.PASSED:
        return REFUSED if _is_closed(packet, packet.destination, packet.port, world) else found
    closed = set()
    for target in found.shares:
        host, _, port = target.rpartition(":")
        if _is_closed(packet, host.strip("[]"), int(port), world):
            closed.add(target)
    return replace(found, closed=frozenset(closed))


def _is_closed(packet: Packet, host: str, port: int, world: World) -> bool:
    """Whether policies keep the packet from a replica of this node."""
    owners = {
        address: service.name
        for service in world.services
        for index, one in enumerate(service.replicas)
        for address in service.addresses(index)
        if one.node == HERE
    }
    selecting = [p for p in world.policies if host in owners and p.service in (None, owners[host])]
    if not selecting or packet.source == host:
        return False
    return not any(_opens(r, packet, port, world) for policy in selecting for r in policy.rules)


def _opens(rule: Rule, packet: Packet, port: int, world: World) -> bool:
    spans = [(first, last) for protocol, first, last in rule.ports if protocol is packet.protocol]
    if rule.ports and not any(first <= port <= last for first, last in spans):
        return False
    return (
        not (rule.blocks or rule.services)
        or any(_in(packet.source, (c,)) and not _in(packet.source, x) for c, x in rule.blocks)
        or any(
            packet.source in service.addresses(index)
            for service in world.services
            if service.name in rule.services
            for index in range(len(service.replicas))
        )
    )


def _unguarded(packet: Packet, world: World) -> Expected:
    family = address.family_of(packet.destination)
    ours, vips = CLUSTER.prefixes(family), CLUSTER.vips(family)
    if packet.entry is Entry.OUTSIDE and _in(packet.destination, ours):
        return DROPPED
    if packet.entry is Entry.STEERING:
        subnet = CLUSTER.network(HERE).subnet(family)
        known = _in(packet.destination, (subnet, *CLUSTER.network(HERE).overlay))
        return DROPPED if _in(packet.source, ours) or not known else PASSED
    if _in(packet.destination, (vips,)):
        return _at_vip(packet, world)
    found = _published(packet, world)
    return found if found is not None else PASSED


def _in(host: str, prefixes: Iterable[str]) -> bool:
    return any(address.contains(prefix, host) for prefix in prefixes)


def _at_vip(packet: Packet, world: World) -> Expected:
    for service in world.services:
        if packet.destination in service.vips():
            if not service.ports:
                return DROPPED  # nothing was ever published: as if it were nobody's
            if (packet.port, packet.protocol) in {(p.target, p.protocol) for p in service.ports}:
                spread = service.prefer is Prefer.LOCAL
                tasks = _eligible(service, world)
                return _pool(packet, service, _near(service, tasks) if spread else tasks)
            return REFUSED
    return DROPPED


def _published(packet: Packet, world: World) -> Expected | None:
    """What answers on an address of a node: bound to it, on every node, on this node."""
    network = CLUSTER.network(HERE)
    here = {*drawn.underlay(HERE), *network.overlay, *(network.gateway(f) for f in FAMILIES)}
    others = {a for n in (2, 3) for a in (*drawn.underlay(n), *CLUSTER.network(n).overlay)}
    for service in world.services:
        for index, port in enumerate(service.ports):
            if (service.given(index), port.protocol) != (packet.port, packet.protocol):
                continue
            ingress = port.mode is PublishMode.INGRESS
            if packet.destination in here:
                return (
                    _ingress(packet, service, world)
                    if ingress
                    else _host(packet, port, service, world)
                )
            inside = packet.entry in (Entry.CONTAINER, Entry.NODE)
            everywhere = ingress and service.prefer is not Prefer.LOCAL_ONLY
            if packet.destination in others and inside and everywhere:
                return _ingress(packet, service, world)
    return None


def _ingress(packet: Packet, service: Service, world: World) -> Expected:
    tasks = _eligible(service, world)
    if service.prefer is Prefer.LOCAL_ONLY:
        tasks = [index for index in tasks if service.replicas[index].node == HERE]
    elif service.prefer is Prefer.LOCAL:
        tasks = _near(service, tasks)
    return _pool(packet, service, tasks)


def _host(packet: Packet, port: Port, service: Service, world: World) -> Expected | None:
    """The replica of this node that holds the port: the eldest, of those that run if any does."""
    if port.host_ip not in (None, packet.destination):
        return None
    local = [index for index, one in enumerate(service.replicas) if one.node == HERE]
    local.sort(key=lambda index: service.replicas[index].draining)
    if not local:
        return None
    one, found = service.replicas[local[0]], service.addresses(local[0])
    if not _is_allowed(packet, service):
        return DROPPED
    family = address.family_of(packet.destination)
    host = [each for each in found if address.family_of(each) is family]
    if not host or local[0] not in _eligible(service, world):
        return REFUSED
    assert one.node == HERE
    return Expected(Verdict.FORWARDED, {_shown(host[0], port.target): Fraction(1)})


def _eligible(service: Service, world: World) -> list[int]:
    running = [
        index
        for index, one in enumerate(service.replicas)
        if not one.draining and one.weight > 0 and one.node not in world.dead
    ]
    if service.fallback is None:
        return running
    healthy = [index for index in running if not service.replicas[index].unhealthy]
    return running if not healthy and service.fallback is Fallback.ANY else healthy


def _near(service: Service, tasks: list[int]) -> list[int]:
    """Those of this node, or all if there are none."""
    return [index for index in tasks if service.replicas[index].node == HERE] or tasks


def _is_allowed(packet: Packet, service: Service) -> bool:
    return not service.allow or _in(packet.source, service.allow)


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _pool(packet: Packet, service: Service, tasks: list[int]) -> Expected:
    if not _is_allowed(packet, service):
        return DROPPED
    target, family = _target(packet, service), address.family_of(packet.destination)
    weights = {
        host: service.replicas[index].weight
        for index in tasks
        for host in service.addresses(index)
        if address.family_of(host) is family
    }
    if not weights:
        return REFUSED
    sticky = service.affinity is Affinity.CLIENT_IP
    drawn_as = Counter(weights)
    if sticky:
        less = slots.steps(service.prefix.length(family), family)
        filled = slots.hashed([Backend(host, target, n) for host, n in weights.items()], less)
        drawn_as = Counter(backend.address for backend in filled)
    total = drawn_as.total()
    shares = {_shown(host, target): Fraction(n, total) for host, n in drawn_as.items()}
    return Expected(Verdict.FORWARDED, shares, sticky, service.source is Source.PRESERVE)


def _target(packet: Packet, service: Service) -> int:
    """The port of the replica: the VIP has the same, a published one leads there."""
    family: Family = address.family_of(packet.destination)
    if _in(packet.destination, (CLUSTER.vips(family),)):
        return packet.port
    return next(
        port.target
        for index, port in enumerate(service.ports)
        if (service.given(index), port.protocol) == (packet.port, packet.protocol)
    )

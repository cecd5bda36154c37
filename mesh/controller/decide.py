"""What a node or a service should hold, given who holds what now.

Pure: reads the picture, changes nothing.  What is held and still wanted stays as it is; only what
nobody else holds is taken; everything else that is held is freed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, assert_never

from msgspec import UNSET

from mesh.controller.places import PORT_POOLS, Place, Pool, share
from mesh.model import protected, spans
from mesh.model.allocation import LOCAL_HEALTH, NodeAllocation, PortAllocation, VipAllocation
from mesh.model.publish import Protocol, PublishMode
from mesh.model.report import Problem
from mesh.vip import allocator

if TYPE_CHECKING:
    from mesh.controller.picture import Owner, Picture, Record
    from mesh.model.cluster import Cluster
    from mesh.model.service import ServiceSpec

MOST_PROBLEMS: Final = 50
"""Problems told of one owner: a status must stay small enough to be stored."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to write for one owner.

    `waits` are the places, or whole pools, that it wanted and could not get; `cursors` is where the
    next search of a pool begins.
    """

    puts: dict[Place, Record] = field(default_factory=dict)
    frees: tuple[Place, ...] = ()
    problems: tuple[Problem, ...] = ()
    waits: frozenset[Place | Pool] = frozenset()
    cursors: dict[Pool, int] = field(default_factory=dict)


def decide(picture: Picture, cluster: Cluster, owner: Owner) -> Decision:
    """The decision about one owner; empty if all is as it should be."""
    claimant = picture.claimants.get(owner)
    if claimant is None:
        return Decision(frees=tuple(sorted(picture.held.get(owner, ()))))
    choice = _Choice(picture, owner)
    if claimant.flaw is not None:
        choice.problem("record", f"{claimant.flaw}; the last good version stays in force")
    match owner.kind:
        case "nodes" if claimant.flaw is None:
            _choose_number(choice, cluster)
        case "services" if claimant.spec is not None:
            _choose_vip(choice, cluster, claimant.spec)
            _choose_health_port(choice, cluster, claimant.spec)
            for protocol in Protocol:
                _choose_static_ports(choice, cluster, claimant.spec, protocol)
                _choose_dynamic_ports(choice, cluster, claimant.spec, protocol)
        case "nodes" | "services":
            choice.keep_everything()
        case _:
            assert_never(owner.kind)
    return choice.made()


class _Choice:
    """A decision in the making."""

    def __init__(self, picture: Picture, owner: Owner) -> None:
        self._picture = picture
        self.owner = owner
        self._held = picture.held.get(owner, frozenset[Place]())
        self._kept: set[Place] = set()
        self._puts: dict[Place, Record] = {}
        self._problems: list[Problem] = []
        self._waits: set[Place | Pool] = set()
        self._cursors: dict[Pool, int] = {}

    def mine(self, pool: Pool) -> list[Place]:
        """What the owner holds of a pool and has not settled yet, in the order it got it."""
        places = [p for p in self._held if p.pool == pool and p not in self._kept]
        taken = self._picture.taken[pool]
        return sorted(places, key=lambda p: (taken[p.number].revision, p.number))

    def record(self, place: Place) -> Record | None:
        """What is written at a place that the owner holds."""
        return self._picture.taken[place.pool][place.number].record

    def has(self, place: Place) -> bool:
        """Whether the owner has the place."""
        return place in self._held

    def is_obtainable(self, place: Place) -> bool:
        """Whether the owner has the place or may take it."""
        held = self._picture.at(place)
        return held is None or held.owner == self.owner

    def keep(self, place: Place, record: Record) -> None:
        """The owner is to hold the place, described by `record`."""
        self._kept.add(place)
        held = self._picture.at(place)
        if held is None or held.record != record:
            self._puts[place] = record

    def keep_everything(self) -> None:
        """The owner is to hold just what it holds."""
        self._kept |= self._held

    def refuse(self, place: Place, about: str, what: str, remedy: str) -> None:
        """The owner wants a place that another one has."""
        held = self._picture.taken[place.pool][place.number]
        who = held.owner
        name = f"service {who.name}" if who is not None else "an allocation that cannot be read"
        self.problem(about, f"{what} belongs to {name}; {remedy}")
        self._waits.add(place)

    def problem(self, about: str, message: str) -> None:
        """Something the operator should know about the owner."""
        self._problems.append(Problem(about=about, message=message))

    def fresh(
        self, pool: Pool, span: range, reserved: frozenset[int] = frozenset()
    ) -> Place | None:
        """A place nobody has, and no process of a node listens on; None, and the owner waits for
        the pool, if there is none.

        Node numbers are as low as possible; other numbers rest for a round after they were freed.
        """
        if pool in self._waits:
            return None
        taken, occupied, number = self._picture.taken[pool], self._picture.occupied, None
        cursor = self._cursors.get(pool, self._picture.cursors.get(pool, span.start))
        if pool not in self._picture.exhausted:
            number = spans.next_fit(
                lambda n: (
                    n in taken
                    or n in reserved
                    or (place := Place(pool, n)) in self._puts
                    or place in occupied
                ),
                span,
                cursor,
            )
        if number is None:
            self._waits.add(pool)
            return None
        if pool != "nodes":  # low node numbers keep the address plan readable
            self._cursors[pool] = number + 1
        return Place(pool, number)

    def _told(self) -> tuple[Problem, ...]:
        """The problems, or the first of them where nobody could read them all."""
        surplus = len(self._problems) - MOST_PROBLEMS
        if surplus <= 0:
            return tuple(self._problems)
        more = Problem(about="more", message=f"and {surplus} more problems; resolve these first")
        return (*self._problems[:MOST_PROBLEMS], more)

    def made(self) -> Decision:
        """The decision."""
        return Decision(
            puts=self._puts,
            frees=tuple(sorted(self._held - self._kept)),
            problems=self._told(),
            waits=frozenset(self._waits),
            cursors=self._cursors,
        )


def _choose_number(choice: _Choice, cluster: Cluster) -> None:
    span = allocator.node_numbers(cluster)
    held = [place for place in choice.mine("nodes") if place.number in span]
    place = held[0] if held else choice.fresh("nodes", span)
    if place is None:
        choice.problem(
            "number",
            f"all {len(span)} node numbers are taken; remove a node that is gone "
            "(`mesh node rm`), or choose wider pools at `mesh cluster init`",
        )
        return
    choice.keep(place, NodeAllocation(node=choice.owner.name))


def _choose_vip(choice: _Choice, cluster: Cluster, spec: ServiceSpec) -> None:
    """A VIP that is held stays until the one that is wanted instead can be had."""
    if spec.vip == "none":
        return
    span = allocator.vip_indexes(cluster)
    held = [place for place in choice.mine("vips") if place.number in span]
    place = held[0] if held else None
    if spec.vip != "auto":
        place = _explicit_vip(choice, cluster, spec.vip) or place
    elif place is None:
        place = choice.fresh("vips", span)
        if place is None:
            choice.problem(
                "vip",
                f"all {len(span)} VIPs of {cluster.vips4} are taken; remove a service, "
                'or give one that needs no VIP "vip": "none"',
            )
    if place is not None:
        addresses = allocator.vip_addresses(cluster, place.number)
        choice.keep(place, VipAllocation(service=spec.name, addresses=addresses))


def _explicit_vip(choice: _Choice, cluster: Cluster, vip: str) -> Place | None:
    try:
        place = Place("vips", allocator.vip_index(cluster, vip))
    except ValueError as error:
        choice.problem("vip", str(error))
        return None
    if choice.is_obtainable(place):
        return place
    choice.refuse(place, "vip", f"VIP {vip}", 'choose another one, or "auto"')
    return None


def _choose_static_ports(
    choice: _Choice, cluster: Cluster, spec: ServiceSpec, protocol: Protocol
) -> None:
    """Exactly the ports asked for; one that cannot be had does not hold up the others.

    Who selects nodes gets a share of a port, whoever else has one: nodes see to where they meet.
    """
    for port in spec.ports:
        if port.mode is not PublishMode.INGRESS or port.protocol is not protocol:
            continue
        if port.published is None:
            continue
        place = Place(PORT_POOLS[protocol], port.published)
        about = f"{port.published}/{protocol.value}"
        guard = protected.protection(cluster, protocol, port.published)
        if guard is not None and not (guard.forcible and port.force):
            choice.problem(about, f"port {about} {guard.reason}")
            continue
        part = Place(share(PORT_POOLS[protocol], spec.name), port.published)
        mine = part if spec.publish_on else place
        if choice.is_obtainable(place) or choice.has(mine):
            choice.keep(mine, PortAllocation(service=spec.name, target=port.target))
        else:
            choice.refuse(place, about, f"port {about}", "publish another port")


def _choose_health_port(choice: _Choice, cluster: Cluster, spec: ServiceSpec) -> None:
    port = spec.local_health_port
    if port is UNSET:
        return
    place, about = Place(PORT_POOLS[Protocol.TCP], port), f"{port}/tcp"
    if protected.protection(cluster, Protocol.TCP, port) is not None:
        choice.problem(about, f"local health port {about} is protected; choose another one")
    elif choice.is_obtainable(place):
        choice.keep(place, PortAllocation(service=spec.name, target=LOCAL_HEALTH))
    else:
        choice.refuse(place, about, f"local health port {about}", "choose another one")


def _choose_dynamic_ports(
    choice: _Choice, cluster: Cluster, spec: ServiceSpec, protocol: Protocol
) -> None:
    """As many ports of the dynamic range as asked for; those that are held lead to the same
    target as before if they can.
    """
    span, pool = allocator.dynamic_ports(cluster), PORT_POOLS[protocol]
    reserved = protected.barred(cluster, protocol)
    targets = sorted(
        port.target
        for port in spec.ports
        if port.mode is PublishMode.INGRESS and port.protocol is protocol and port.published is None
    )
    held = [p for p in choice.mine(pool) if p.number in span and p.number not in reserved]
    given: list[tuple[int, Place | None]] = []
    for target in targets:
        same = PortAllocation(service=spec.name, target=target)
        place = next((p for p in held if choice.record(p) == same), None)
        if place is not None:
            held.remove(place)
        given.append((target, place))
    for target, settled in given:
        place = settled or (held.pop(0) if held else choice.fresh(pool, span, reserved))
        if place is None:
            choice.problem(
                f"{target}/{pool}",
                f"all {len(span)} dynamic {pool} ports ({span[0]}-{span[-1]}) are taken; "
                "name a published port, or widen ingressPorts of the cluster",
            )
        else:
            choice.keep(place, PortAllocation(service=spec.name, target=target))

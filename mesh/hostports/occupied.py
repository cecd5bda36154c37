"""Who else listens on this node's ports, and which published ports were there before them.

Pure, mutable.  A port that somebody listens on is not taken from them, unless by force; one that
is in force is not given up to who came later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.model.listener import Binding, refusal
from mesh.model.report import Problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from mesh.model.listener import Listener, Port
    from mesh.model.publish import Protocol
    from mesh.model.service import ServiceSpec
    from mesh.model.view import HostClaim, IngressPort

_NOTHING: frozenset[Binding] = frozenset()


class Occupied:
    """The listeners of one node, next to what the mesh publishes there."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._listeners: Mapping[Port, tuple[Listener, ...]] = {}
        self._busy: frozenset[Port] = frozenset()
        self._ingress: dict[Port, str] = {}
        self._forced: dict[str, frozenset[Port]] = {}
        self._in_force: dict[str, frozenset[Binding]] = {}
        self._owners: dict[Port, set[tuple[str, Binding]]] = {}

    # ---- what is known

    def observe(
        self, listeners: Mapping[Port, tuple[Listener, ...]], busy: frozenset[Port]
    ) -> frozenset[Port]:
        """Who listens now, and which ports cannot be had for another reason; what changed."""
        before, self._listeners = self._listeners, listeners
        changed = {p for p in before.keys() | listeners if before.get(p) != listeners.get(p)}
        changed |= busy ^ self._busy
        self._busy = busy
        return frozenset(changed)

    def insist(self, service: str, spec: ServiceSpec | None) -> None:
        """Which ports a service wants by force."""
        self._forced.pop(service, None)
        ports = spec.ports if spec is not None else ()
        forced = [(p.protocol, p.published) for p in ports if p.force and p.published is not None]
        if forced:
            self._forced[service] = frozenset(forced)

    def reserve(self, port: Port, service: str | None) -> None:
        """An ingress port is allocated to `service`, or to nobody."""
        if service is None:
            self._ingress.pop(port, None)
        else:
            self._ingress[port] = service

    def put_in_force(self, service: str, bindings: frozenset[Binding]) -> frozenset[Binding]:
        """What of a service the kernel has now; what it had and has no more."""
        before = self._in_force.pop(service, _NOTHING)
        if bindings:
            self._in_force[service] = bindings
        for binding in bindings - before:
            self._owners.setdefault(binding[:2], set()).add((service, binding))
        for binding in before - bindings:
            owners = self._owners[binding[:2]]
            owners.discard((service, binding))
            if not owners:
                del self._owners[binding[:2]]
        return before - bindings

    # ---- what follows

    def is_taken(self, protocol: Protocol, number: int) -> bool:
        """Whether a port is not free to be given out."""
        return (protocol, number) in self._listeners or (protocol, number) in self._busy

    def is_in_force(self, protocol: Protocol, number: int) -> bool:
        """Whether anything leads to a port already."""
        return (protocol, number) in self._owners

    def has(self, binding: Binding) -> bool:
        """Whether just this leads to something."""
        return any(each == binding for _, each in self._owners.get(binding[:2], ()))

    def ingress_service(self, port: Port) -> str | None:
        """Who has an ingress port."""
        return self._ingress.get(port)

    def in_the_way(self, service: str, binding: Binding) -> Listener | None:
        """Who keeps a service from a port on this node."""
        if self._is_settled(service, binding):
            return None
        return self._met(binding)

    def admitted(self, service: str, ports: Collection[IngressPort]) -> tuple[IngressPort, ...]:
        """The ingress ports of a service that nobody on this node keeps from it, in order."""
        ordered = sorted(ports, key=_port_order) if len(ports) > 1 else ports
        if not self._listeners:
            return tuple(ordered)
        return tuple(
            port
            for port in ordered
            if port[:2] not in self._listeners
            or self.in_the_way(service, Binding(*port[:2], None)) is None
        )

    def problems(self) -> Iterator[Problem]:
        """Ingress ports that are not served here, and who came too late to be heard."""
        for port in sorted(self._listeners, key=lambda each: (each[0].value, each[1])):
            service = self._ingress.get(port)
            who = self.in_the_way(service, Binding(*port, None)) if service is not None else None
            if who is not None:
                message = f"{refusal(port, self._node, who)}; other nodes serve it"
                yield Problem(about=f"service {service}", message=message)
            for owner, binding in sorted(self._owners.get(port, ()), key=str):
                late = self._met(binding)
                if late is not None and port not in self._forced.get(owner, ()):
                    message = (
                        f"{late.owner} listens on port {port[1]}/{port[0].value} of node "
                        f"{self._node}, which leads to the service and stays so: stop it, or "
                        "publish another port"
                    )
                    yield Problem(about=f"service {owner}", message=message)

    def _is_settled(self, service: str, binding: Binding) -> bool:
        """Whether a service has a port whoever listens: by force, or because it was first."""
        port = binding[:2]
        if port in self._forced.get(service, ()):
            return True
        return (service, binding) in self._owners.get(port, ())

    def _met(self, binding: Binding) -> Listener | None:
        listeners = self._listeners.get(binding[:2], ())
        return next((one for one in listeners if one.meets(binding.address)), None)


def bindings(ingress: Iterable[IngressPort], granted: Iterable[HostClaim]) -> frozenset[Binding]:
    """The ports of this node that lead to a service."""
    found = [Binding(protocol, published, None) for protocol, published, _ in ingress]
    found += [Binding(claim.protocol, claim.published, claim.address) for claim in granted]
    return frozenset(found)


def _port_order(port: IngressPort) -> tuple[str, int, int]:
    return port.protocol.value, port.published, port.target

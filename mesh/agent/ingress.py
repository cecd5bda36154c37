"""Which ports of nodes the controller gave to which service, and who has each on this node.

Mutable, a part of mesh.agent.state.  Pure: no clock, no I/O.

Several services may have a port, each on the nodes that its selector names.  Where two of them
meet, the one that was given it first has it, by the revision at which its allocation was created:
every node comes to the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mesh.model import selector
from mesh.model.allocation import LOCAL_HEALTH
from mesh.model.report import Problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from mesh.model.listener import Port
    from mesh.model.service import ServiceSpec
    from mesh.model.view import IngressPort


class _Claim(NamedTuple):
    """What a service was given: a port on all nodes or, `shared`, on those that it selects."""

    service: str
    shared: bool


class Change(NamedTuple):
    """A port that has another owner on this node than before, if any."""

    port: Port
    before: str | None
    now: str | None


class IngressPorts:
    """The ingress ports of services, and those on which nodes tell of their replicas.

    Seen from the node `own`; from nobody's, "", every service has what it was given.
    """

    def __init__(self, own: str, specs: Mapping[str, ServiceSpec]) -> None:
        self._own = own
        self._specs = specs
        self._given: dict[str, dict[tuple[IngressPort, bool], bool]] = {}
        self._claims: dict[Port, dict[_Claim, int]] = {}
        self._owners: dict[Port, str] = {}
        self._refused: dict[Port, tuple[str, ...]] = {}
        self._unsettled: set[Port] = set()

    # ---- what is known

    def allocated(self, service: str, port: IngressPort, *, shared: bool, at: int | None) -> None:
        """A service was given a port at a revision, or no longer has it: None."""
        place, claim = port[:2], _Claim(service, shared)
        given, claims = self._given.setdefault(service, {}), self._claims.setdefault(place, {})
        if at is not None:
            given[port, shared] = True
            claims[claim] = at
        else:
            given.pop((port, shared), None)
            claims.pop(claim, None)
        if not given:
            del self._given[service]
        if not claims:
            del self._claims[place]
        self._unsettled.add(place)

    def reconsider(self, services: Iterable[str]) -> None:
        """Services are for other nodes than before, or this node has other labels."""
        for service in services:
            self._unsettled.update(port[:2] for port, _ in self._given.get(service, ()))

    def settle(self, labels: Mapping[str, str]) -> list[Change]:
        """Decide who has each port, with these labels of the node."""
        changes = []
        for port in self._unsettled:
            names = self._in_order(self._claims.get(port, {}), labels)
            self._refused.pop(port, None)
            if len(names) > 1:
                self._refused[port] = names[1:]
            before, now = self._owners.get(port), names[0] if names else None
            if before != now:
                changes.append(Change(port, before, now))
            if now is None:
                self._owners.pop(port, None)
            else:
                self._owners[port] = now
        self._unsettled.clear()
        return changes

    def _in_order(self, claims: Mapping[_Claim, int], labels: Mapping[str, str]) -> tuple[str, ...]:
        """The services that claim a port for this node; the first has it."""
        here = [claim for claim in claims if self._is_for(claim.service, labels)]
        if len(here) == 1:
            return (here[0].service,)
        here.sort(key=lambda claim: (claims[claim], claim))
        return tuple(dict.fromkeys(claim.service for claim in here))

    def _is_for(self, service: str, labels: Mapping[str, str]) -> bool:
        spec = self._specs.get(service)
        if spec is None or not spec.publish_on or not self._own:
            return True
        return selector.matches(spec.selector, labels)

    # ---- what follows

    def of(self, service: str) -> Collection[IngressPort]:
        """Those that a service has on this node, in no order."""
        return {
            port
            for port, _ in self._given.get(service, ())
            if port.target != LOCAL_HEALTH and self._has(service, port)
        }

    def everything(self) -> dict[str, Collection[IngressPort]]:
        """Those of every service that was given any."""
        return {service: self.of(service) for service in self._given}

    def local_health(self, spec: ServiceSpec) -> int | None:
        """The port on which nodes tell of a service, if it was given the one that it wants."""
        for port, _ in self._given.get(spec.name, ()) if spec.local_health_port else ():
            wanted = port.target == LOCAL_HEALTH and port.published == spec.local_health_port
            if wanted and self._has(spec.name, port):
                return port.published
        return None

    def problems(self) -> Iterator[Problem]:
        """Services that are not served here, because another was given the port before."""
        for port in sorted(self._refused, key=lambda each: (each[0].value, each[1])):
            about = f"port {port[1]}/{port[0].value} on node {self._own}"
            message = (
                f"{about} belongs to service {self._owners[port]}, which had it first: publish "
                "another port, or choose other nodes with --publish-on"
            )
            for service in self._refused[port]:
                yield Problem(about=f"service {service}", message=message)

    def _has(self, service: str, port: IngressPort) -> bool:
        return not self._own or self._owners.get(port[:2]) == service

"""Published ports as people and Swarm's tools read them.  Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from mesh.model.address import family_of, prefix_length
from mesh.model.publish import Protocol, PublishedPort, PublishMode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.model.cluster import Cluster
    from mesh.model.view import IngressPort, ServiceView


class Assigned(NamedTuple):
    """A published port with its number: None while the dynamic range has not given one.

    `granted` False: an ingress port that the controller has not given to the service (yet).
    """

    port: PublishedPort
    published: int | None
    granted: bool

    @property
    def warren(self) -> str:
        """As Warren prints it: "8080:80/tcp (ingress)"."""
        number = "dynamic" if self.published is None else str(self.published)
        address = f"{_bracketed(self.port.host_ip)}:" if self.port.host_ip else ""
        port = f"{address}{number}:{self.port.target}/{self.port.protocol.value}"
        return f"{port} ({self.port.mode.value}{'' if self.granted else ', not allocated yet'})"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def assign(view: ServiceView) -> list[Assigned]:
    """Every port of a service, in the order of its spec, with what the controller gave it."""
    free: list[IngressPort] = list(view.ingress)
    asked = {(p.protocol, p.published) for p in view.spec.ports if p.published is not None}
    found = []
    for port in view.spec.ports:
        if port.mode is PublishMode.HOST:
            found.append(Assigned(port, port.published, granted=True))
            continue
        match = next((i for i in free if _answers(i, port, asked)), None)
        if match is not None:
            free.remove(match)
        published = match.published if match is not None else port.published
        found.append(Assigned(port, published, granted=match is not None))
    return found


def of_host(view: ServiceView) -> list[Assigned]:
    """The host-mode ports: those that answer on the node of each task."""
    return [item for item in assign(view) if item.port.mode is PublishMode.HOST]


def _answers(given: IngressPort, port: PublishedPort, asked: set[tuple[Protocol, int]]) -> bool:
    """Whether an allocation is the one that `port` asks for; dynamic ports take what is left."""
    if (given.protocol, given.target) != (port.protocol, port.target):
        return False
    if port.published is None:
        return (given.protocol, given.published) not in asked
    return given.published == port.published


class _Run(NamedTuple):
    """Ports next to each other that read as one range; `step` is how the target moves (0, 1)."""

    first: Assigned
    last: Assigned
    step: int | None

    def grow(self, item: Assigned) -> _Run | None:
        """The run with one more port, or None if it does not belong to it."""
        one, other = self.last, item
        same = (one.port.protocol, one.port.mode, one.port.host_ip, one.granted)
        if same != (other.port.protocol, other.port.mode, other.port.host_ip, other.granted):
            return None
        step = other.port.target - one.port.target
        if (one.published or 0) + 1 != other.published or step not in (0, 1):
            return None
        return _Run(self.first, item, step) if self.step in (None, step) else None

    def __str__(self) -> str:
        port = self.first.port
        address = "*" if port.host_ip is None else _bracketed(port.host_ip)
        published = _range(self.first.published, self.last.published)
        target = _range(port.target, self.last.port.target)
        note = " (host)" if port.mode is PublishMode.HOST else ""
        note += "" if self.first.granted else " (pending)"
        return f"{address}:{published}->{target}/{port.protocol.value}{note}"


def _range(low: int | None, high: int | None) -> str:
    if low is None:
        return "?"
    return str(low) if low == high else f"{low}-{high}"


def notation(assigned: Iterable[Assigned]) -> str:
    """Swarm's PORTS column: "*:80-81->8080-8081/tcp, *:53->53/udp"; host mode is said so."""
    runs: list[_Run] = []
    for item in sorted(assigned, key=_order):
        grown = runs[-1].grow(item) if runs else None
        if grown is not None:
            runs[-1] = grown
        else:
            runs.append(_Run(item, item, None))
    return ", ".join(map(str, runs))


def _order(item: Assigned) -> tuple[str, str, int, int]:
    port = item.port
    return port.mode.value, port.protocol.value, item.published or 0, port.target


def endpoint(view: ServiceView, cluster: Cluster | None) -> dict[str, Any]:
    """The service's Endpoint as Swarm's API has it; a number not yet given is left out."""
    return {
        "Spec": {"Mode": "dnsrr" if view.spec.vip == "none" else "vip"},
        "Ports": [_swarm(item) for item in assign(view)],
        "VirtualIPs": [{"Addr": f"{vip}{_length(vip, cluster)}"} for vip in view.vips],
    }


def _swarm(item: Assigned) -> dict[str, Any]:
    port = {
        "Protocol": item.port.protocol.value,
        "TargetPort": item.port.target,
        "PublishedPort": item.published if item.granted else None,
        "PublishMode": item.port.mode.value,
    }
    return {name: value for name, value in port.items() if value is not None}


def _length(vip: str, cluster: Cluster | None) -> str:
    return f"/{prefix_length(cluster.vips(family_of(vip)))}" if cluster is not None else ""

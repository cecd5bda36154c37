"""Published ports as people and Swarm's tools read them.  Pure."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, NamedTuple

from mesh.model.address import family_of, prefix_length
from mesh.model.publish import Protocol, PublishedPort, PublishMode, bracketed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.model.cluster import Cluster
    from mesh.model.mapping import PortMapping
    from mesh.model.view import ServiceView


class Assigned(NamedTuple):
    """A published port with its number: None while the dynamic range has not given one.

    `granted` False: an ingress port that the controller has not given to the service (yet).
    """

    port: PublishedPort
    published: int | None
    granted: bool


def assign(view: ServiceView) -> list[Assigned]:
    """Every port of a service, in the order of its spec, with what the controller gave it.

    Host-mode ports that name none have another number on each node, and none here.
    """
    asked = {(p.protocol, p.published) for p in view.spec.ports if p.published is not None}
    named, dynamic = set[tuple[Protocol, int, int]](), defaultdict[Any, deque[int]](deque)
    for given in view.ingress:
        if (given.protocol, given.published) in asked:
            named.add((given.protocol, given.published, given.target))
        else:
            dynamic[given.protocol, given.target].append(given.published)
    return [_assigned(port, named, dynamic) for port in view.spec.ports]


def _assigned(
    port: PublishedPort, named: set[tuple[Protocol, int, int]], dynamic: dict[Any, deque[int]]
) -> Assigned:
    if port.mode is PublishMode.HOST:
        return Assigned(port, port.published, granted=True)
    if port.published is not None:
        granted = (port.protocol, port.published, port.target) in named
        return Assigned(port, port.published, granted)
    given = dynamic.get((port.protocol, port.target))
    return Assigned(port, given.popleft(), True) if given else Assigned(port, None, False)


def of_task(mappings: Iterable[PortMapping]) -> list[Assigned]:
    """The host ports that really lead to a task, as its node tells."""
    return [
        Assigned(
            PublishedPort(
                target=one.container_port,
                published=one.host_port,
                protocol=one.protocol,
                host_ip=one.host_ip or None,
            ),
            one.host_port,
            granted=True,
        )
        for one in mappings
    ]


class _Run(NamedTuple):
    """Ports next to each other that read as one range; `step` is how the target moves (0, 1)."""

    first: Assigned
    last: Assigned
    step: int | None

    def grow(self, item: Assigned) -> _Run | None:
        """The run with one more port, or None if it does not belong to it."""
        one, other = self.last, item
        if _nature(one) != _nature(other):
            return None
        step = other.port.target - one.port.target
        if one.published is None or other.published is None:
            follows = one.published is other.published and step == 1
        else:
            follows = one.published + 1 == other.published and step in (0, 1)
        return _Run(self.first, item, step) if follows and self.step in (None, step) else None

    @property
    def plain(self) -> str:
        """As Swarm prints it: "*:8080->80/tcp"."""
        port = self.first.port
        address = "*" if port.host_ip is None else bracketed(port.host_ip)
        return f"{address}:{self._published or '?'}->{self._target}/{port.protocol.value}"

    @property
    def swarm(self) -> str:
        """The same; host mode is said so."""
        note = " (host)" if self.first.port.mode is PublishMode.HOST else ""
        note += "" if self.first.granted else " (pending)"
        return f"{self.plain}{note}"

    @property
    def warren(self) -> str:
        """As Warren prints it: "8080:80/tcp (ingress)"."""
        port = self.first.port
        address = f"{bracketed(port.host_ip)}:" if port.host_ip else ""
        number = self._published or ("random" if port.random else "dynamic")
        note = "" if self.first.granted else ", not allocated yet"
        return f"{address}{number}:{self._target}/{port.protocol.value} ({port.mode.value}{note})"

    @property
    def _published(self) -> str:
        return _range(self.first.published, self.last.published)

    @property
    def _target(self) -> str:
        return _range(self.first.port.target, self.last.port.target)


def _nature(item: Assigned) -> tuple[object, ...]:
    """What ports of one range have in common."""
    port = item.port
    return port.protocol, port.mode, port.host_ip, bool(port.random), item.granted


def _range(low: int | None, high: int | None) -> str:
    if low is None:
        return ""
    return str(low) if low == high else f"{low}-{high}"


def _runs(assigned: Iterable[Assigned]) -> list[_Run]:
    runs: list[_Run] = []
    for item in assigned:
        grown = runs[-1].grow(item) if runs else None
        if grown is not None:
            runs[-1] = grown
        else:
            runs.append(_Run(item, item, None))
    return runs


def notation(assigned: Iterable[Assigned]) -> str:
    """Swarm's PORTS column: "*:80-81->8080-8081/tcp, *:53->53/udp"; host mode is said so.

    "?" stands for the number of a dynamic port that is not given yet, or another on each node.
    """
    return ", ".join(run.swarm for run in _runs(sorted(assigned, key=_order)))


def plain(assigned: Iterable[Assigned]) -> str:
    """The same where all of them are of one mode."""
    return ", ".join(run.plain for run in _runs(sorted(assigned, key=_order)))


def warren(assigned: Iterable[Assigned]) -> list[str]:
    """Ports as Warren prints them, "8080:80/tcp (ingress)", in their order; ranges as one."""
    return [run.warren for run in _runs(assigned)]


def _order(item: Assigned) -> tuple[str, str, str, int, int]:
    port = item.port
    place = (port.host_ip or "", item.published or 0, port.target)
    return port.mode.value, port.protocol.value, *place


def endpoint(view: ServiceView, cluster: Cluster | None) -> dict[str, Any]:
    """The service's Endpoint as Swarm's API has it; a number not yet given is left out."""
    return {
        "Spec": {"Mode": "dnsrr" if view.spec.vip == "none" else "vip"},
        "Ports": swarm(assign(view)),
        "VirtualIPs": [{"Addr": f"{vip}{_length(vip, cluster)}"} for vip in view.vips],
    }


def swarm(assigned: Iterable[Assigned]) -> list[dict[str, Any]]:
    """Ports as Swarm's API has them, and the address of those that answer on one only."""
    ports = (
        {
            "Name": item.port.name or None,
            "Protocol": item.port.protocol.value,
            "TargetPort": item.port.target,
            "PublishedPort": item.published if item.granted else None,
            "PublishMode": item.port.mode.value,
            "HostIP": item.port.host_ip,
        }
        for item in assigned
    )
    return [{name: value for name, value in port.items() if value is not None} for port in ports]


def _length(vip: str, cluster: Cluster | None) -> str:
    return f"/{prefix_length(cluster.vips(family_of(vip)))}" if cluster is not None else ""

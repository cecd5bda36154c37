"""What the demo runs and asks while nothing is disturbed: its rows as data.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from mesh.lab import demo_checks
from mesh.lab.demo_prober import Ask
from mesh.model.address import FAMILIES, family_of
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from mesh.model.service import ServiceSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mesh.lab.demo_checks import Seen, Verdict
    from mesh.lab.wire import NodeStatus
    from mesh.model.task import Task

NODES: Final = 3

SPOKEN: Final = (Protocol.TCP, Protocol.UDP)
"""What the lab's replicas answer."""

SERVICES: Final = (
    ServiceSpec(
        name="web",
        ports=tuple(
            PublishedPort(target=80, published=8080, protocol=one, mode=PublishMode.INGRESS)
            for one in SPOKEN
        ),
    ),
    ServiceSpec(
        name="db", ports=(PublishedPort(target=5432, published=5432, mode=PublishMode.HOST),)
    ),
)

TASKS: Final = {"web-1": "n1", "web-2": "n1", "web-3": "n2", "db-1": "n3"}
"""The node of every replica: n3 has none of web."""

WEB: Final = tuple(task for task in TASKS if task.startswith("web"))

ASKING_NODE: Final = "n3"
ASKING_REPLICAS: Final = ("web-1", "db-1")
"""Those inside who ask."""

CLIENTS: Final = {"c1": "on the link", "c2": "behind a router"}

DETOUR: Final = "n1"
"""The node a client outside routes closed addresses through."""

_CONNECTIONS: Final = 60
_FEW: Final = 10
_CLOSED_TIMEOUT: Final = 0.5
"""Seconds: what is open answers in milliseconds, and what is closed costs the reader's time."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Who has which addresses.  `clients` and `vips` hold IPv4 and IPv6."""

    nodes: tuple[NodeStatus, ...]
    clients: Mapping[str, tuple[str, str]]
    vips: tuple[str, ...]
    tasks: Mapping[str, Task]

    def node(self, name: str) -> NodeStatus:
        """A node by its name."""
        return next(node for node in self.nodes if node.name == name)


@dataclass(frozen=True, slots=True)
class Row:
    """Questions, each with the machine or replica that asks it, and the judge of all answers."""

    name: str
    asks: tuple[tuple[str, Ask], ...]
    judge: Callable[[Sequence[Seen]], Verdict]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that show one thing; `key` begins their names for programs."""

    key: str
    title: str
    rows: tuple[Row, ...]


def steady(scene: Scene) -> tuple[Group, ...]:
    """Everything that is shown before anything is disturbed."""
    return (_ingress(scene), _source(scene), _vip(scene), _host(scene), _closed(scene))


def outside(node: NodeStatus) -> tuple[str, str]:
    """A node's addresses on the underlay."""
    return node.underlay4, node.underlay6


def answered_by(name: str, nodes: Iterable[NodeStatus], replicas: Sequence[str]) -> Row:
    """A row that asks the ingress port of `nodes` from c1, and expects `replicas`."""
    hosts = [host for node in nodes for host in outside(node)]
    return Row(name, _asks("c1", hosts, 8080), partial(demo_checks.spread, replicas=replicas))


def directly(tasks: Iterable[Task]) -> tuple[tuple[str, Ask], ...]:
    """Questions to every replica itself, from the node that asks."""
    return tuple(
        (ASKING_NODE, Ask(host=host, port=port_of(task.service)))
        for task in tasks
        for host in task.addresses
    )


def port_of(service: str) -> int:
    """Where the replicas of a service listen."""
    return next(port.target for spec in SERVICES if spec.name == service for port in spec.ports)


def detour(scene: Scene) -> tuple[str, ...]:
    """A command, for c1, that routes every closed address through a node."""
    gateways = dict(zip(FAMILIES, outside(scene.node(DETOUR)), strict=True))
    routes = (
        f"ip route replace {host} via {gateways[family_of(host)]}"
        for hosts in _closed_hosts(scene).values()
        for host in hosts
    )
    return "sh", "-c", " && ".join(routes)


def _asks(machine: str, hosts: Sequence[str], port: int) -> tuple[tuple[str, Ask], ...]:
    each = _CONNECTIONS // len(hosts)
    return tuple((machine, Ask(host=host, port=port, count=each)) for host in hosts)


def _ingress(scene: Scene) -> Group:
    used = {TASKS[task] for task in WEB}
    rows = []
    for node in scene.nodes:
        name = node.name if node.name in used else f"{node.name}, without a replica"
        for protocol in SPOKEN:
            ask = partial(Ask, port=8080, udp=protocol is Protocol.UDP, count=_CONNECTIONS // 2)
            asks = tuple(("c1", ask(host=host)) for host in outside(node))
            judge = partial(demo_checks.spread, replicas=WEB)
            rows.append(Row(f"{name}, {protocol.name}", asks, judge))
    title = "web, 8080:80 in ingress mode: every node answers on IPv4 and IPv6"
    return Group("ingress", title, tuple(rows))


def _source(scene: Scene) -> Group:
    rows = []
    for client, place in CLIENTS.items():
        for i, family in enumerate(FAMILIES):
            asks = tuple(
                (client, Ask(host=outside(node)[i], port=8080, udp=udp, count=_FEW))
                for node in scene.nodes
                for udp in (False, True)
            )
            judge = partial(demo_checks.own_address, addresses=(scene.clients[client][i],))
            rows.append(Row(f"{client}, {place}, IPv{family.suffix}", asks, judge))
    title = "The replica sees the client's own address, whichever node it came through"
    return Group("source", title, tuple(rows))


def _vip(scene: Scene) -> Group:
    askers = {
        "db-1": "from a container on n3",
        "n3": "from the node n3",
        "web-1": "from web-1, also to itself",
    }
    rows = (
        Row(name, _asks(asker, scene.vips, 80), partial(demo_checks.spread, replicas=WEB))
        for asker, name in askers.items()
    )
    return Group("vip", f"The VIP of web answers inside: {' and '.join(scene.vips)}", tuple(rows))


def _host(scene: Scene) -> Group:
    rows = []
    for node in scene.nodes:
        asks = tuple(("c1", Ask(host=h, port=5432, count=_FEW)) for h in outside(node))
        if node.name == TASKS["db-1"]:
            judge = partial(demo_checks.spread, replicas=("db-1",))
            rows.append(Row(f"{node.name}, which runs db-1", asks, judge))
        else:
            rows.append(Row(node.name, asks, demo_checks.refused))
    title = "db, 5432:5432 in host mode: its node answers, the others refuse at once"
    return Group("host", title, tuple(rows))


def _closed_hosts(scene: Scene) -> dict[str, tuple[str, ...]]:
    replicas = tuple(host for task in ("web-1", "web-3") for host in scene.tasks[task].addresses)
    overlay = (host for node in scene.nodes for host in (node.overlay4, node.overlay6))
    return {
        "VIPs": scene.vips,
        "containers": replicas,
        "overlay addresses": tuple(host for host in overlay if host),
    }


def _closed(scene: Scene) -> Group:
    rows = []
    for name, hosts in _closed_hosts(scene).items():
        asks = tuple(
            ("c1", Ask(host=host, port=port, count=1, timeout=_CLOSED_TIMEOUT))
            for host in hosts
            for port in (80, 8080)
        )
        rows.append(Row(name, asks, demo_checks.unanswered))
    title = f"The rest is closed, even to a client that routes it through {DETOUR}"
    return Group("closed", title, tuple(rows))

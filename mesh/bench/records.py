"""A synthetic cluster of any size: what etcd would hold, made in memory.

Three replicas per service, both families, a VIP and an ingress port each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.model.address import FAMILIES
from mesh.model.allocation import NodeAllocation, PortAllocation, VipAllocation
from mesh.model.cluster import Cluster
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from mesh.model.service import ServiceSpec
from mesh.model.task import Task
from mesh.store import schema
from mesh.store.protocol import Change, KeyValue, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    import msgspec

KEYS: Final = schema.Keys()
CLUSTER: Final = Cluster(id="bench", prefix6="fd77:6265:6e63::/48")
NODES: Final = 3
REPLICAS: Final = 3
TARGET: Final = 80
"""Where replicas listen, and VIPs answer."""

TOGGLED: Final = "toggled"
"""In a live run, the one service whose replicas really answer."""

_FIRST_PORT: Final = 4096
"""Above what a cluster protects by default, and with room for 60 000."""


class Shape(NamedTuple):
    """Where replicas are, and which services speak UDP: one in so many (0: none)."""

    nodes: int
    udp_every: int


SPREAD: Final = Shape(nodes=NODES, udp_every=0)
"""A replica on each node."""

LOCAL: Final = Shape(nodes=1, udp_every=4)
"""All replicas on node 1, and every fourth service UDP: what one node can forward by itself."""


def service_name(index: int) -> str:
    """The name of service `index`."""
    return f"service-{index}"


def protocol_of(index: int, shape: Shape = SPREAD) -> Protocol:
    """What service `index` speaks."""
    last = shape.udp_every - 1
    return Protocol.UDP if shape.udp_every and index % shape.udp_every == last else Protocol.TCP


def published(index: int) -> int:
    """The ingress port of service `index`."""
    return _FIRST_PORT + index


def vips(index: int) -> tuple[str, ...]:
    """The VIPs of service `index`, one per family."""
    return tuple(address.nth(CLUSTER.vips(f), index + 1) for f in FAMILIES)


def task(service: int, replica: int, generation: int = 0, shape: Shape = SPREAD) -> Task:
    """A replica; another `generation` has other addresses."""
    node = 1 + replica % shape.nodes
    host = 2 + (service + replica // shape.nodes + 7 * generation) % 250
    name = service_name(service)
    return Task(
        service=name,
        id=f"{name}-{replica}",
        node=f"n{node}",
        addresses=tuple(address.nth(CLUSTER.node_subnet(node, f), host) for f in FAMILIES),
    )


def _item(key: str, record: msgspec.Struct, revision: int) -> KeyValue:
    return KeyValue(key, schema.encode(record), 1, revision, 1, 0)


def item(key: str, record: msgspec.Struct) -> KeyValue:
    """A record at revision 1."""
    return _item(key, record, 1)


def nodes() -> Iterator[KeyValue]:
    """The cluster and its nodes, which are all alive."""
    yield _item(KEYS.cluster, CLUSTER, 1)
    for number in range(1, NODES + 1):
        yield _item(KEYS.node_allocation(number), NodeAllocation(node=f"n{number}"), 1)
        yield KeyValue(KEYS.alive(f"n{number}"), b"{}", 1, 1, 1, 0)


def spec(name: str, index: int, shape: Shape = SPREAD, allow: tuple[str, ...] = ()) -> ServiceSpec:
    """The spec of service `index`; `allow` are the only clients it serves."""
    port = PublishedPort(
        target=TARGET,
        published=published(index),
        protocol=protocol_of(index, shape),
        mode=PublishMode.INGRESS,
    )
    return ServiceSpec(name=name, ports=(port,), allow=allow)


def _service(index: int, shape: Shape) -> Iterator[KeyValue]:
    name, protocol = service_name(index), protocol_of(index, shape)
    vip = VipAllocation(service=name, addresses=vips(index))
    yield _item(KEYS.service(name), spec(name, index, shape), 1)
    yield _item(KEYS.vip_allocation(index + 1), vip, 1)
    yield _item(
        KEYS.port_allocation(protocol.value, published(index)),
        PortAllocation(service=name, target=TARGET),
        1,
    )
    for replica in range(REPLICAS):
        record = task(index, replica, shape=shape)
        yield _item(KEYS.task(name, record.id), record, 1)


def everything(services: int, shape: Shape = SPREAD) -> Snapshot:
    """The whole cluster at revision 1."""
    items = list(nodes())
    for index in range(services):
        items += _service(index, shape)
    return Snapshot(tuple(items), 1)


def allowing(service: int, allow: tuple[str, ...], revision: int) -> Change:
    """A service serves these clients only; without any, all of them."""
    record = spec(service_name(service), service, allow=allow)
    key = KEYS.service(record.name)
    return Change(key, _item(key, record, revision), revision)


def replaced(service: int, replica: int, generation: int, revision: int) -> Change:
    """One replica got other addresses."""
    record = task(service, replica, generation)
    key = KEYS.task(record.service, record.id)
    return Change(key, _item(key, record, revision), revision)


def removed(service: int, replica: int, revision: int) -> Change:
    """One replica is gone."""
    record = task(service, replica)
    return Change(KEYS.task(record.service, record.id), None, revision)

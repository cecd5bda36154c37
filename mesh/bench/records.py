"""A synthetic cluster of any size: what etcd would hold, made in memory.

Three nodes, three replicas per service, both families, a VIP and an ingress port each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh.model import address
from mesh.model.address import FAMILIES
from mesh.model.allocation import NodeAllocation, PortAllocation, VipAllocation
from mesh.model.cluster import Cluster
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from mesh.model.service import ServiceSpec
from mesh.model.task import Task
from mesh.store import schema
from mesh.store.protocol import Change, Changes, KeyValue, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    import msgspec

KEYS: Final = schema.Keys()
CLUSTER: Final = Cluster(id="bench", prefix6="fd77:6265:6e63::/48")
NODES: Final = 3
REPLICAS: Final = 3
TOGGLED: Final = "toggled"
"""In a live run, the one service whose replicas really answer."""

_PORTS: Final = 60000
"""Services beyond this many per protocol share nothing: TCP first, then UDP."""


def service_name(index: int) -> str:
    """The name of service `index`."""
    return f"service-{index}"


def protocol_of(index: int) -> Protocol:
    """TCP for the first 60 000 services, then UDP: an ingress port has one owner."""
    return Protocol.TCP if index < _PORTS else Protocol.UDP


def published(index: int) -> int:
    """The ingress port of service `index`."""
    return 1024 + index % _PORTS


def task(service: int, replica: int, generation: int = 0) -> Task:
    """A replica; another `generation` has other addresses."""
    node = 1 + replica % NODES
    host = 2 + (service + replica // NODES + 7 * generation) % 250
    name = service_name(service)
    return Task(
        service=name,
        id=f"{name}-{replica}",
        node=f"n{node}",
        addresses=tuple(address.nth(CLUSTER.node_subnet(node, f), host) for f in FAMILIES),
    )


def _item(key: str, record: msgspec.Struct, revision: int) -> KeyValue:
    return KeyValue(key, schema.encode(record), 1, revision, 1, 0)


def _nodes() -> Iterator[KeyValue]:
    yield _item(KEYS.cluster, CLUSTER, 1)
    for number in range(1, NODES + 1):
        yield _item(KEYS.node_allocation(number), NodeAllocation(node=f"n{number}"), 1)
        yield KeyValue(KEYS.alive(f"n{number}"), b"{}", 1, 1, 1, 0)


def spec(name: str, index: int) -> ServiceSpec:
    """The spec of service `index`."""
    port = PublishedPort(
        target=80,
        published=published(index),
        protocol=protocol_of(index),
        mode=PublishMode.INGRESS,
    )
    return ServiceSpec(name=name, ports=(port,))


def _service(index: int) -> Iterator[KeyValue]:
    name, protocol = service_name(index), protocol_of(index)
    vips = tuple(address.nth(CLUSTER.vips(f), index + 1) for f in FAMILIES)
    yield _item(KEYS.service(name), spec(name, index), 1)
    yield _item(KEYS.vip_allocation(index + 1), VipAllocation(service=name, addresses=vips), 1)
    yield _item(
        KEYS.port_allocation(protocol.value, published(index)),
        PortAllocation(service=name, target=80),
        1,
    )
    for replica in range(REPLICAS):
        record = task(index, replica)
        yield _item(KEYS.task(name, record.id), record, 1)


def everything(services: int) -> Snapshot:
    """The whole cluster at revision 1."""
    items = list(_nodes())
    for index in range(services):
        items += _service(index)
    return Snapshot(tuple(items), 1)


def replaced(service: int, replica: int, generation: int, revision: int) -> Change:
    """One replica got other addresses."""
    record = task(service, replica, generation)
    key = KEYS.task(record.service, record.id)
    return Change(key, _item(key, record, revision), revision)


def removed(service: int, replica: int, revision: int) -> Change:
    """One replica is gone."""
    record = task(service, replica)
    return Change(KEYS.task(record.service, record.id), None, revision)


def batch(*changes: Change) -> Changes:
    """Changes of one etcd response."""
    return Changes(changes, changes[-1].revision)

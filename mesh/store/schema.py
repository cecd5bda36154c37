"""The keys of DESIGN section 6 and the codec of every record.  Pure.

A key is `<prefix>/<kind>/<name>…`.  `parse` turns a stored pair into a typed record or raises
InvalidRecord with the field, what was found and what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from mesh.errors import InvalidRecord
from mesh.model.allocation import NodeAllocation, PortAllocation, VipAllocation
from mesh.model.cluster import Cluster
from mesh.model.listener import Listening
from mesh.model.maintenance import Duty, Maintenance, NodeLabels
from mesh.model.mapping import Cursors, PortMapping
from mesh.model.node import Node
from mesh.model.policy import NetworkPolicy
from mesh.model.publish import PORTS, Protocol
from mesh.model.report import Applied, Health
from mesh.model.service import ServiceSpec
from mesh.model.task import Task

DEFAULT_PREFIX: Final = "/mesh"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Keys:
    """The key of everything, below one configurable prefix."""

    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        if not self.prefix.startswith("/") or self.prefix.endswith("/"):
            raise ValueError(f"prefix {self.prefix!r} must start with '/' and not end with one")

    @property
    def cluster(self) -> str:
        """The cluster's settings."""
        return f"{self.prefix}/cluster"

    def under(self, kind: str) -> str:
        """The prefix of every key of a kind."""
        return f"{self.prefix}/{kind}/"

    def node(self, name: str) -> str:
        """A node's identity."""
        return f"{self.prefix}/nodes/{name}"

    def maintenance(self, name: str) -> str:
        """What operators want of a node."""
        return f"{self.prefix}/maintenance/{name}"

    def labels(self, name: str) -> str:
        """The labels that operators gave a node."""
        return f"{self.prefix}/labels/{name}"

    def alive(self, name: str) -> str:
        """A node's liveness; held by a lease."""
        return f"{self.prefix}/alive/{name}"

    def service(self, name: str) -> str:
        """A service's spec."""
        return f"{self.prefix}/services/{name}"

    def task(self, service: str, task: str) -> str:
        """A task's spec."""
        return f"{self.prefix}/tasks/{service}/{task}"

    def tasks_of(self, service: str) -> str:
        """The prefix of a service's tasks."""
        return f"{self.prefix}/tasks/{service}/"

    def policy(self, name: str) -> str:
        """A network policy."""
        return f"{self.prefix}/policies/{name}"

    def node_allocation(self, number: int) -> str:
        """The owner of a node number."""
        return f"{self.prefix}/allocations/nodes/{number}"

    def vip_allocation(self, index: int) -> str:
        """The owner of the VIP `index` places into the range."""
        return f"{self.prefix}/allocations/vips/{index}"

    def port_allocation(self, protocol: str, port: int) -> str:
        """The owner of an ingress port."""
        return f"{self.prefix}/allocations/ports/{protocol}/{port}"

    def port_share(self, protocol: str, port: int, service: str) -> str:
        """An ingress port that a service has on the nodes that it selects."""
        return f"{self.prefix}/allocations/shares/{protocol}/{port}/{service}"

    @property
    def shares(self) -> str:
        """The prefix of all ingress ports of services that select nodes."""
        return f"{self.prefix}/allocations/shares/"

    @property
    def ports(self) -> str:
        """The prefix of the owners of all ingress ports."""
        return f"{self.prefix}/allocations/ports/"

    def cursor(self, pool: str) -> str:
        """Where the allocator of `pool` goes on, so that freed values rest."""
        return f"{self.prefix}/allocations/cursors/{pool}"

    def health(self, node: str, task: str = "") -> str:
        """The health of a task, as its node sees it, held by a lease; without one, the prefix of
        all of the node's.
        """
        return f"{self.prefix}/health/{node}/{task}"

    def applied(self, node: str) -> str:
        """What a node's kernel has."""
        return f"{self.prefix}/applied/{node}"

    def status(self, kind: str, name: str) -> str:
        """What the controller has to say about a thing."""
        return f"{self.prefix}/status/{kind}/{name}"

    def published(self, node: str, task: str = "") -> str:
        """What a node publishes of a task; without one, the prefix of all of the node's."""
        return f"{self.prefix}/published/{node}/{task}"

    def cursors(self, node: str) -> str:
        """Where a node's search for dynamic host ports goes on."""
        return f"{self.prefix}/cursors/{node}"

    def listeners(self, node: str) -> str:
        """What the processes of a node listen on."""
        return f"{self.prefix}/listeners/{node}"

    @property
    def leader(self) -> str:
        """The elected manager; held by a lease."""
        return f"{self.prefix}/status/leader"


_PROTOCOLS: Final = frozenset(protocol.value for protocol in Protocol)

_DUTIES: Final = frozenset(duty.value for duty in Duty)

_DECODERS: Final[dict[Any, Any]] = {}
"""One decoder per kind of record: building one costs more than using it."""


def decode(key: str, value: bytes, kind: type[T]) -> T:
    """The record in `value`.  Raises InvalidRecord naming the field."""
    try:
        decoder = _DECODERS.get(kind) or _DECODERS.setdefault(kind, msgspec.json.Decoder(kind))
        record: T = decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRecord(key, str(error)) from None
    return record


def encode(record: msgspec.Struct | tuple[msgspec.Struct, ...]) -> bytes:
    """A record as it is stored: JSON without spaces, camelCase, defaults written out."""
    return msgspec.json.encode(record)


def parse_service(key: str, value: bytes) -> ServiceSpec:
    """A service; its name must be the key's last part."""
    spec = decode(key, value, ServiceSpec)
    if spec.name != key.rpartition("/")[2]:
        raise InvalidRecord(key, f"name {spec.name!r} differs from the key")
    return spec


def parse_task(key: str, value: bytes) -> Task:
    """A task; its service and id must be the key's last two parts."""
    task = decode(key, value, Task)
    if key.split("/")[-2:] != [task.service, task.id]:
        raise InvalidRecord(key, f"service and id {task.service}/{task.id} differ from the key")
    return task


def parse_policy(key: str, value: bytes) -> NetworkPolicy:
    """A network policy; its name must be the key's last part."""
    policy = decode(key, value, NetworkPolicy)
    if policy.name != key.rpartition("/")[2]:
        raise InvalidRecord(key, f"name {policy.name!r} differs from the key")
    return policy


def parse_node(key: str, value: bytes) -> Node:
    """A node; its name must be the key's last part."""
    node = decode(key, value, Node)
    if node.name != key.rpartition("/")[2]:
        raise InvalidRecord(key, f"name {node.name!r} differs from the key")
    return node


def parse_maintenance(key: str, value: bytes) -> Maintenance:
    """What operators want of a node: a record, or its state alone, in quotes or not."""
    word = value.strip(b' "\n').decode(errors="replace")
    if word in _DUTIES:
        return Maintenance(state=Duty(word))
    return decode(key, value, Maintenance)


def parse_labels(key: str, value: bytes) -> NodeLabels:
    """The labels that operators gave a node."""
    return decode(key, value, NodeLabels)


def parse_allocation(
    key: str, value: bytes
) -> NodeAllocation | VipAllocation | PortAllocation | None:
    """What the controller gave to somebody; None for a key that no version knows."""
    match key.rpartition("/allocations/")[2].split("/"):
        case ["nodes", _]:
            parse_index(key)
            return decode(key, value, NodeAllocation)
        case ["vips", _]:
            parse_index(key)
            return decode(key, value, VipAllocation)
        case ["ports", protocol, _] if protocol in _PROTOCOLS:
            if parse_index(key) not in PORTS:
                raise InvalidRecord(key, "the key does not end in a port (1-65535)")
            return decode(key, value, PortAllocation)
        case ["shares", protocol, _, service] if protocol in _PROTOCOLS:
            if parse_index(key.rpartition("/")[0]) not in PORTS:
                raise InvalidRecord(key, "the key does not name a port (1-65535)")
            found = decode(key, value, PortAllocation)
            if found.service != service:
                raise InvalidRecord(key, f"service {found.service!r} differs from the key")
            return found
    return None


def parse_mappings(key: str, value: bytes) -> tuple[PortMapping, ...] | None:
    """What a node publishes of a task; None if nobody can read it: the node writes it again."""
    try:
        return decode(key, value, tuple[PortMapping, ...])
    except InvalidRecord:
        return None


def parse_health(key: str, value: bytes) -> tuple[Health, ...]:
    """What a node tells of a task's health, for each service that has a task of that name there."""
    return decode(key, value, tuple[Health, ...])


def parse_index(key: str) -> int:
    """The number a key ends in."""
    text = key.rpartition("/")[2]
    if not (text.isascii() and text.isdigit()):
        raise InvalidRecord(key, "the key does not end in a number")
    return int(text)


def json_schema() -> dict[str, object]:
    """JSON Schema of what users and automation write, keyed by kind."""
    kinds = {
        "cluster": Cluster,
        "service": ServiceSpec,
        "task": Task,
        "node": Node,
        "maintenance": Maintenance,
        "policy": NetworkPolicy,
        "labels": NodeLabels,
        "nodeAllocation": NodeAllocation,
        "vipAllocation": VipAllocation,
        "portAllocation": PortAllocation,
        "applied": Applied,
        "health": tuple[Health, ...],
        "published": tuple[PortMapping, ...],
        "cursors": Cursors,
        "listeners": Listening,
    }
    schemas, components = msgspec.json.schema_components(
        kinds.values(), ref_template="#/$defs/{name}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "properties": dict(zip(kinds, schemas, strict=True)),
        "$defs": components,
    }

"""Events as etcd would send them, for tests of what is pure."""

from __future__ import annotations

import json
from collections.abc import Mapping

from mesh.store.protocol import Change, Changes, KeyValue, Snapshot
from mesh.store.schema import Keys

KEYS = Keys("/mesh")
CLUSTER = {"id": "test", "prefix6": "fd12:3456:789a::/48"}

Record = Mapping[str, object] | bytes


def item(key: str, record: Record, revision: int = 1, created: int | None = None) -> KeyValue:
    """A stored key."""
    value = record if isinstance(record, bytes) else json.dumps(record).encode()
    return KeyValue(key, value, created or revision, revision, 1, 0)


def put(key: str, record: Record, revision: int, created: int | None = None) -> Changes:
    """One key written."""
    return Changes((Change(key, item(key, record, revision, created), revision),), revision)


def delete(key: str, revision: int) -> Changes:
    """One key deleted."""
    return Changes((Change(key, None, revision),), revision)


def snapshot(records: Mapping[str, Record], revision: int = 1) -> Snapshot:
    """Everything at one revision."""
    return Snapshot(tuple(item(key, value, revision) for key, value in records.items()), revision)


def cluster(nodes: int = 3) -> dict[str, Record]:
    """A cluster of live nodes n1, n2, … with their numbers."""
    records: dict[str, Record] = {KEYS.cluster: CLUSTER}
    for number in range(1, nodes + 1):
        records[KEYS.node_allocation(number)] = {"node": f"n{number}"}
        records[KEYS.alive(f"n{number}")] = {}
        records[KEYS.node(f"n{number}")] = {
            "name": f"n{number}",
            "role": "worker",
            "publicKey": "A" * 42 + f"{number}=",
            "endpoints": [f"192.0.2.{number}:51820"],
            "addresses": [f"192.0.2.{number}"],
        }
    return records


def service(name: str, *ports: Mapping[str, object], **more: object) -> dict[str, Record]:
    """A service's spec."""
    return {KEYS.service(name): {"name": name, "ports": list(ports), **more}}


def task(service_name: str, name: str, node: int, host: int, **more: object) -> dict[str, Record]:
    """A task with a v4 and a v6 address on node `n<node>`."""
    addresses = [f"10.0.{node}.{host}", f"fd12:3456:789a:{node}::{host:x}"]
    record = {"service": service_name, "id": name, "node": f"n{node}", "addresses": addresses}
    return {KEYS.task(service_name, name): record | more}


def health(
    service_name: str, name: str, node: int, host: int, *, healthy: bool = True, **more: object
) -> dict[str, Record]:
    """What node `n<node>` tells of such a task."""
    address = f"10.0.{node}.{host}"
    told = {"service": service_name, "healthy": healthy, "address": address, **more}
    return {KEYS.health(f"n{node}", name): json.dumps([told]).encode()}


def vip(service_name: str, index: int) -> dict[str, Record]:
    """The VIPs a service was given."""
    addresses = [f"10.1.0.{index}", f"fd12:3456:789a:f000::{index:x}"]
    return {KEYS.vip_allocation(index): {"service": service_name, "addresses": addresses}}


def ingress(service_name: str, port: int, target: int) -> dict[str, Record]:
    """An ingress port a service was given."""
    return {KEYS.port_allocation("tcp", port): {"service": service_name, "target": target}}

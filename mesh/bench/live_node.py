"""The part of `mesh bench live` that runs on the node: writes to etcd and watches the kernel.

`python -m mesh.bench.live_node measure BACKEND SERVICES ROUNDS` prints one JSON object with times
in seconds; `wipe` takes off what every backend left.
"""

from __future__ import annotations

import asyncio
import json
import select
import socket
import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.agent import config, etcd
from mesh.bench import records
from mesh.dataplane.nfwatch import Watch
from mesh.engine.backend import remove_all
from mesh.errors import MeshError
from mesh.lab import environment
from mesh.model.allocation import VipAllocation
from mesh.model.node import Node
from mesh.model.publish import PublishedPort, PublishMode
from mesh.model.report import Applied
from mesh.model.service import ServiceSpec
from mesh.model.task import Task, TaskState
from mesh.rules.program import Devices
from mesh.store import schema
from mesh.store.protocol import Put

if TYPE_CHECKING:
    from mesh.store.protocol import Store

_LIMIT: Final = 30.0
_REACHABLE_ROUNDS: Final = 200
_PUBLISH_ROUNDS: Final = 20
RANGE: Final = 1000
"""Ports of a range."""

_REPORTS: Final = 50
_REPORT_PAUSE: Final = 0.2
"""A node reports ten times a second at most."""

_RANGED: Final = "ranged"
_REQUEST: Final = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"


async def measure(backend: str, services: int, rounds: int) -> None:
    """Measure, and print."""
    settings = config.load(environment.CONFIG)
    async with etcd.opened(settings.etcd) as store:
        if backend == "nftables":
            watch = Watch()
            kernel = [await _to_kernel(store, watch, services, n) for n in range(rounds)]
        else:
            kernel = [await _to_report(store, services, n) for n in range(min(rounds, _REPORTS))]
        reachable = await _all_reachable(store, min(rounds, _REACHABLE_ROUNDS))
        first, publish = records.published(services + 1), min(rounds, _PUBLISH_ROUNDS)
        port = await _all_published(store, range(first, first + 1), publish)
        many = await _all_published(store, range(first, first + RANGE), publish)
    found = {"kernel": kernel, "reachable": reachable, "port": port, "range": many}
    json.dump(found, sys.stdout)


def _change(services: int, round_: int) -> tuple[str, bytes]:
    """A replica of some service gets other addresses."""
    service = round_ * 7919 % services
    record = records.task(service, round_ % records.REPLICAS, generation=1 + round_ % 200)
    record = msgspec.structs.replace(record, node="n1")
    return records.KEYS.task(record.service, record.id), schema.encode(record)


async def _to_kernel(store: Store, watch: Watch, services: int, round_: int) -> float:
    """Seconds from before the put until the kernel tells of a commit."""
    key, value = _change(services, round_)
    watch.read()
    began = time.perf_counter()
    await store.put(key, value)
    while not any(event.kind == "commit" for event in watch.read() or ()):
        ready, _, _ = select.select([watch], [], [], _LIMIT)
        if not ready:
            raise MeshError(f"the kernel did not change within {_LIMIT:g} s")
    return time.perf_counter() - began


async def _to_report(store: Store, services: int, round_: int) -> float:
    """Seconds from before the put until the node says in etcd that its kernel has it.

    For iptables, of whose changes the kernel does not tell: half a millisecond more than there is.
    """
    await asyncio.sleep(_REPORT_PAUSE)
    key, value = _change(services, round_)
    began = time.perf_counter()
    revision = await store.put(key, value)
    while time.perf_counter() < began + _LIMIT:
        found = await store.get(records.KEYS.applied("n1"))
        if found and schema.decode(found.key, found.value, Applied).revision >= revision:
            return time.perf_counter() - began
    raise MeshError(f"the node reported nothing within {_LIMIT:g} s")


async def wipe() -> None:
    """Take the rules of every backend off this node."""
    settings = config.load(environment.CONFIG)
    names = (settings.overlay_device, settings.steering_device, settings.bridge)
    await remove_all(Devices(*names, "02:00:00:00:00:00"))


async def _all_reachable(store: Store, rounds: int) -> list[float]:
    """Seconds from before the put until a new connection is answered by the new replica."""
    vip = await _vip(store)
    tasks = [
        schema.decode(item.key, item.value, Task)
        for item in (await store.list(records.KEYS.tasks_of(records.TOGGLED))).items
    ]
    found = []
    for round_ in range(rounds):
        chosen = tasks[round_ % len(tasks)]
        puts = [_put(task, serving=task is chosen) for task in tasks]
        began = time.perf_counter()
        await store.transact([], puts)
        while await asyncio.to_thread(_answering, vip) != chosen.id:
            if time.perf_counter() - began > _LIMIT:
                raise MeshError(f"{chosen.id} was not reached within {_LIMIT:g} s")
        found.append(time.perf_counter() - began)
    return found


async def _all_published(store: Store, ports: range, rounds: int) -> list[float]:
    """Seconds from before a service with ingress ports is put until the last of them answers."""
    keys = records.KEYS
    tasks = await store.list(keys.tasks_of(records.TOGGLED))
    node = await store.get(keys.node("n1"))
    if node is None or not tasks.items:
        raise MeshError("node n1, or its replicas, are gone from etcd")
    address = schema.decode(node.key, node.value, Node).addresses[0]
    replica = schema.decode(tasks.items[0].key, tasks.items[0].value, Task)
    task = msgspec.structs.replace(replica, service=_RANGED, id=_RANGED, state=TaskState.RUNNING)
    await store.put(keys.task(_RANGED, _RANGED), schema.encode(task))
    found = []
    for _ in range(rounds):
        await _until_free(store, ports)
        began = time.perf_counter()
        await store.put(keys.service(_RANGED), schema.encode(_ranged(ports)))
        while not await asyncio.to_thread(_answers, address, ports[-1]):
            if time.perf_counter() - began > _LIMIT:
                raise MeshError(f"port {ports[-1]} did not answer within {_LIMIT:g} s")
        found.append(time.perf_counter() - began)
        await store.delete(keys.service(_RANGED))
    await _until_free(store, ports)
    return found


def _ranged(ports: range) -> ServiceSpec:
    """Every port has a pool of its own, and the last one leads where replicas listen."""
    targets = {ports[-1]: records.TARGET}
    published = (
        PublishedPort(target=targets.get(n, n), published=n, mode=PublishMode.INGRESS)
        for n in ports
    )
    return ServiceSpec(name=_RANGED, ports=tuple(published), vip="none")


async def _until_free(store: Store, ports: range) -> None:
    """Wait until nobody has the last of some ports, and so none of them."""
    key, began = records.KEYS.port_allocation("tcp", ports[-1]), time.perf_counter()
    while await store.get(key) is not None:
        if time.perf_counter() - began > _LIMIT:
            raise MeshError(f"port {ports[-1]} was not freed within {_LIMIT:g} s")
        await asyncio.sleep(0.01)
    await asyncio.sleep(_REPORT_PAUSE)  # what follows from it is done


def _answers(address: str, port: int) -> bool:
    """Whether a new connection is answered."""
    try:
        with socket.create_connection((address, port), _LIMIT):
            return True
    except ConnectionRefusedError:
        return False


def _put(task: Task, *, serving: bool) -> Put:
    state = TaskState.RUNNING if serving else TaskState.DRAINING
    record = msgspec.structs.replace(task, state=state)
    return Put(records.KEYS.task(task.service, task.id), schema.encode(record))


async def _vip(store: Store) -> str:
    for item in (await store.list(records.KEYS.under("allocations/vips"))).items:
        vip = schema.decode(item.key, item.value, VipAllocation)
        if vip.service == records.TOGGLED:
            return vip.addresses[0]
    raise MeshError(f"service {records.TOGGLED} has no VIP")


def _answering(vip: str) -> str:
    """Which task answers a new connection."""
    with socket.create_connection((vip, 80), _LIMIT) as connection:
        connection.sendall(_REQUEST)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["replica"])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["measure", backend, services, rounds]:
            asyncio.run(measure(backend, int(services), int(rounds)))
        case ["wipe"]:
            asyncio.run(wipe())

"""What it costs to reach a replica on another node: routed, masqueraded, with the client's address.

As mesh.bench.dataplane measures: all ways take turns, one thread is client and server.
`python -m mesh.bench.across` measures, in namespaces of its own (mesh.bench.isolated).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from mesh.agent.planner import Plans
from mesh.agent.state import State
from mesh.bench import backends, figures, isolated, lanes, records, topology
from mesh.bench.connections import Server
from mesh.bench.lanes import Lane, Stage
from mesh.bench.pair import INGRESS, REPLICA, Pair
from mesh.bench.progress import tell
from mesh.bench.variants import AGAIN, DIRECT
from mesh.dataplane import netns
from mesh.engine.reconciler import Reconciler
from mesh.model import address
from mesh.model.address import FAMILIES, Family
from mesh.model.allocation import PortAllocation
from mesh.model.node import Node, Role
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from mesh.model.service import ServiceSpec, Source
from mesh.model.task import Task
from mesh.rules import marks
from mesh.store.protocol import KeyValue, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SERVICES: Final = 64
"""Of each kind, with one replica each; all are called in turn."""

_FIRST_PORT: Final = {Source.MASQUERADE: 8000, Source.PRESERVE: 9000}
_PROTOCOLS: Final = (Protocol.TCP, Protocol.UDP)


def run(chosen: Sequence[str], family: Family, rounds: int) -> list[dict[str, object]]:
    """The figures of every way, for each backend.  Raises MeshError if one does not work."""
    stages = [_routed(name, number, family) for number, name in enumerate((DIRECT, AGAIN))]
    stages += [meshed(name, number, family) for number, name in enumerate(chosen)]
    own = lanes.take_turns(stages, family, rounds)
    direct = stages[0].lanes[0]
    return [
        {
            "bench": "across",
            "backend": stage.name,
            "path": lane.path,
            "family": family.value,
            **lanes.compared(direct, lane, own),
            **_transfer(direct, lane),
        }
        for stage in stages
        for lane in stage.lanes
    ]


def _transfer(direct: Lane, lane: Lane) -> dict[str, object]:
    """What bytes cost on an open connection: kernel time of a mebibyte, round by round."""
    pairs = zip(direct.taken.downloads, lane.taken.downloads, strict=False)
    return {
        "mebibyte_us": round(figures.median(lane.taken.downloads) * 1e6, 1),
        "mebibyte_ratio_to_direct": round(figures.median([a / b for a, b in pairs]), 3),
    }


def _routed(name: str, number: int, family: Family) -> Stage:
    """No rules: the client calls the replicas' addresses."""
    tell(f"making {name}")
    pair = Pair(f"r{number}")
    pair.build(meshed=False)
    targets = [(_replica(index, family), records.TARGET) for index in range(_SERVICES)]
    lane = Lane("routed", targets, targets, targets[0])
    return Stage(name, pair.client, Server(pair.server, family), pair.forget_flows, [lane])


def meshed(backend: str, number: int, family: Family) -> Stage:
    """Our program on both nodes: the client calls ports of a node that has no replica."""
    tell(f"making {backend}")
    pair = Pair(f"m{number}")
    pair.build(meshed=True)
    for node, path in pair.nodes.items():
        with netns.entered(path):
            asyncio.run(_install(backend, node))
    server = Server(pair.server, family)
    ways = [
        Lane(source.value, targets, targets, targets[0])
        for source, first in _FIRST_PORT.items()
        for targets in [[(topology.NODE[family], first + index) for index in range(_SERVICES)]]
    ]
    return Stage(backend, pair.client, server, pair.forget_flows, ways)


async def _install(backend: str, node: int) -> None:
    """Bring a node's kernel in line the way an agent that starts does."""
    driver = backends.driver(backend, node)
    try:
        state = State(records.KEYS, f"n{node}")
        reconciler = Reconciler(Plans(state), driver, lambda _delta: None, marks.DEFAULT)
        state.apply(Snapshot(tuple(_records()), 1))
        await driver.prepare()
        await reconciler.start({})
    finally:
        driver.close()


def _replica(index: int, family: Family) -> str:
    return address.nth(records.CLUSTER.node_subnet(REPLICA, family), 2 + index)


def _records() -> Iterator[KeyValue]:
    yield from records.nodes()
    for number in (INGRESS, REPLICA):
        node = Node(
            name=f"n{number}",
            role=Role.WORKER,
            public_key=f"{number:043}=",
            endpoints=(f"198.51.100.{number}:51820",),
            addresses=tuple(topology.NODE.values()) if number == INGRESS else (),
        )
        yield records.item(records.KEYS.node(node.name), node)
    for source, first in _FIRST_PORT.items():
        for index in range(_SERVICES):
            yield from _service(source, index, first + index)


def _service(source: Source, index: int, port: int) -> Iterator[KeyValue]:
    name = f"{source.value}-{index}"
    ports = tuple(
        PublishedPort(
            target=records.TARGET, published=port, protocol=protocol, mode=PublishMode.INGRESS
        )
        for protocol in _PROTOCOLS
    )
    spec = ServiceSpec(name=name, ports=ports, source=source)
    yield records.item(records.KEYS.service(name), spec)
    for protocol in _PROTOCOLS:
        key = records.KEYS.port_allocation(protocol.value, port)
        yield records.item(key, PortAllocation(service=name, target=records.TARGET))
    addresses = tuple(_replica(index, family) for family in FAMILIES)
    task = Task(service=name, id=name, node=f"n{REPLICA}", addresses=addresses)
    yield records.item(records.KEYS.task(name, task.id), task)


def _work(wanted: Mapping[str, Any]) -> list[dict[str, object]]:
    return run(wanted["backends"], Family(wanted["family"]), wanted["rounds"])


if __name__ == "__main__":
    isolated.answer(_work)

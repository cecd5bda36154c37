"""Whole-cluster states in any order and any portions: what a node's kernel ends up with, by walking
packets through it.  The states and their address plan: tests/support/worlds.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.agent.planner import Plans
from mesh.agent.state import State
from mesh.dataplane.memory import MemoryDriver
from mesh.delta import Delta
from mesh.engine.desired import Touched
from mesh.engine.reconciler import Reconciler
from mesh.model.cluster import Cluster
from mesh.model.publish import Protocol
from mesh.rules import marks, trace
from mesh.rules.program import Devices, Parameters
from mesh.rules.trace import Entry, Packet, Path, Place, Verdict
from mesh.store.protocol import Change, Changes, Snapshot
from tests.support.records import KEYS
from tests.support.worlds import API_VIP, EXPANDERS, WEB_VIP, WORLDS, Answer, Etcd, History, World

if TYPE_CHECKING:
    from mesh.rules.elements import Elements

NODES: Final = ("n1", "n2")


# ---- the node


class Node:
    """An agent's pure half over a kernel of memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.driver = MemoryDriver()

    async def start(self, snapshot: Snapshot) -> None:
        """A new agent on whatever the kernel holds."""
        self.state = State(KEYS, self.name)
        self.state.apply(snapshot)
        await self.driver.prepare()
        self.reconciler = Reconciler(
            Plans(self.state), self.driver, lambda _delta: None, marks.DEFAULT
        )
        await self.reconciler.start({})

    def hear(self, changes: list[Change]) -> Touched:
        return self.state.apply(Changes(tuple(changes), changes[-1].revision if changes else 0))

    async def elements(self) -> Elements:
        return await self.driver.read()


Flush: TypeAlias = Callable[[Node, History], Iterator[World | Touched]]


def after_every_portion(node: Node, history: History) -> Iterator[World | Touched]:
    for world, portions in history:
        for portion in portions:
            yield node.hear(portion)
        yield world


def after_every_portion_and_again(node: Node, history: History) -> Iterator[World | Touched]:
    for world, portions in history:
        for portion in portions:
            touched = node.hear(portion)
            yield touched
            yield touched
        yield world


def after_every_world(node: Node, history: History) -> Iterator[World | Touched]:
    for world, portions in history:
        touched = [node.hear(portion) for portion in portions]
        yield _merged(touched)
        yield world


def at_the_end(node: Node, history: History) -> Iterator[World | Touched]:
    yield _merged(node.hear(portion) for _, portions in history for portion in portions)
    yield history[-1][0]


def _merged(touched: Iterable[Touched]) -> Touched:
    kept = list(touched)
    services = frozenset[str]().union(*(each.services for each in kept))
    return Touched(services, any(t.nodes for t in kept), any(t.policies for t in kept))


FLUSHES: Final = (
    after_every_portion,
    after_every_portion_and_again,
    after_every_world,
    at_the_end,
)


# ---- what must hold


def _place(name: str, found: Elements) -> Place:
    number = int(name[1:])
    cluster = Cluster(id="test", prefix6="fd12:3456:789a::/48")
    devices = Devices("warren0", "warren-x0", "warren-br0", cluster.network(number).bridge_mac)
    addresses = (f"192.0.2.{number}",)
    return Place(Parameters.of(cluster, number, devices), found, addresses)


def _answer(place: Place, destination: str, port: int, entry: Entry) -> Answer:
    number = place.parameters.network.number
    source = "203.0.113.9" if entry is Entry.OUTSIDE else f"10.0.{number}.2"
    packet = Packet(source, destination, Protocol.TCP, port, entry)
    walked = trace.walk(packet, place)
    # A container of web asks: one that reached itself would not get its answer otherwise.
    itself = [a.ending.path for a in walked.answers if a.target and a.target.address == source]
    assert itself in ([], [Path.HAIRPIN])
    return walked.backends if walked.verdict is Verdict.FORWARDED else walked.verdict


def _check_packets(name: str, found: Elements, world: World) -> None:
    place = _place(name, found)
    here = place.addresses[0]
    answers = {
        "port": _answer(place, here, 8080, Entry.OUTSIDE),
        "vip": _answer(place, WEB_VIP, 80, Entry.CONTAINER),
        "other": _answer(place, API_VIP, 81, Entry.CONTAINER),
        "db": _answer(place, here, 5432, Entry.OUTSIDE),
    }
    database = world.db if name == "n1" else Verdict.PASSED
    expected = {"port": world.port, "vip": world.vip, "other": world.other, "db": database}
    assert expected == answers, f"{world.name}, on {name}"


async def _check_fresh(node: Node, world: World) -> None:
    """A new agent that sees only the world, on a copy of this kernel, writes nothing."""
    etcd = Etcd()
    etcd.become(world.records)
    fresh = Node(node.name)
    await fresh.driver.prepare()
    held = await node.elements()
    await fresh.driver.apply(Delta(add=held))
    await fresh.start(etcd.snapshot())
    left = Delta.between(held, await fresh.elements())
    assert not left, f"{world.name}, on {node.name}"


async def _live(name: str, history: History, flush: Flush) -> None:
    node = Node(name)
    await node.start(Etcd().snapshot())
    for each in flush(node, history):
        if isinstance(each, World):
            _check_packets(name, await node.elements(), each)
            await _check_fresh(node, each)
        else:
            await node.reconciler.reconcile(each)


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("flush", FLUSHES)
@pytest.mark.parametrize("expand", EXPANDERS)
async def test_every_history_of_a_world_gives_the_same_kernel(
    name: str, flush: Flush, expand: Callable[[list[World]], History]
) -> None:
    await _live(name, expand(list(WORLDS)), flush)


@settings(max_examples=40, deadline=None)
@given(
    worlds=st.lists(st.sampled_from(WORLDS), min_size=1, max_size=6),
    expand=st.sampled_from(EXPANDERS),
    flush=st.sampled_from(FLUSHES),
)
def test_worlds_may_follow_each_other_in_any_order(
    worlds: list[World], expand: Callable[[list[World]], History], flush: Flush
) -> None:
    asyncio.run(_live("n1", expand(worlds), flush))


@pytest.mark.parametrize("before", WORLDS, ids=lambda world: world.name)
async def test_an_agent_that_restarts_in_another_world_brings_the_kernel_there(
    before: World,
) -> None:
    for after in WORLDS:
        etcd = Etcd()
        node = Node("n1")
        etcd.become(before.records)
        await node.start(etcd.snapshot())
        etcd.become(after.records)

        await node.start(etcd.snapshot())

        _check_packets("n1", await node.elements(), after)
        await _check_fresh(node, after)

"""The records of the host ports that a node publishes: written, kept, and withdrawn."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from mesh.agent.published import Published
from mesh.model.mapping import Cursors
from mesh.store.memory import MemoryStore
from mesh.store.protocol import Change, Changes, Snapshot
from mesh.store.schema import Keys
from tests.support.hostports import Node, port
from tests.support.stores import eventually, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mesh.store.protocol import KeyValue

KEYS = Keys()


class Agent:
    """The part of an agent that writes, over a store."""

    def __init__(self, store: MemoryStore, node: Node) -> None:
        self.store = store
        self.node = node
        self.told = 0
        self.published = Published(store, KEYS, "n1", node.ports, self.tell)

    def tell(self) -> None:
        self.told += 1

    def reconcile(self) -> None:
        self.node.settle()
        self.published.plan()
        self.published.wake()

    async def records(self) -> dict[str, list[int]]:
        items = (await self.store.list(KEYS.published("n1"))).items
        return {item.key.rpartition("/")[2]: _numbers(item) for item in items}

    async def shows(self, wanted: dict[str, list[int]]) -> None:
        async def as_wanted() -> bool:
            return await self.records() == wanted

        await eventually(as_wanted)


def _numbers(item: KeyValue) -> list[int]:
    return [mapping["hostPort"] for mapping in json.loads(item.value)]


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    made = Agent(MemoryStore(), Node())
    async with running(made.published.run()):
        yield made


async def test_what_is_published_is_written_and_withdrawn(agent: Agent) -> None:
    agent.node.publish("a", port(80), port(81, 8081), tasks=["a-1"])
    agent.reconcile()
    await agent.shows({"a-1": [32000, 8081]})

    agent.node.end("a", "a-1")
    agent.reconcile()
    await agent.shows({})


async def test_what_the_kernel_is_yet_to_get_is_not_written(agent: Agent) -> None:
    agent.node.publish("a", port(80), tasks=["a-1"])
    agent.node.settle()
    agent.published.plan()
    agent.node.publish("b", port(80), tasks=["b-1"])
    agent.node.settle()

    agent.published.wake()
    await agent.shows({"a-1": [32000]})
    agent.published.plan()
    assert await agent.records() == {"a-1": [32000]}

    agent.published.wake()
    await agent.shows({"a-1": [32000], "b-1": [32001]})


async def test_the_next_agent_goes_on_where_this_one_was(agent: Agent) -> None:
    agent.node.publish("a", port(80), port(81), tasks=["a-1"])
    agent.reconcile()
    await agent.shows({"a-1": [32000, 32001]})

    fresh = Node()
    await Published(agent.store, KEYS, "n1", fresh.ports, agent.tell).load()

    assert fresh.ports.cursors == Cursors(tcp=32002)


async def test_cursors_that_nobody_can_read_begin_anew(agent: Agent) -> None:
    await agent.store.put(KEYS.cursors("n1"), b'{"tcp": "all"}')

    await agent.published.load()

    assert agent.node.ports.cursors == Cursors()


async def test_nothing_is_lost_while_etcd_is_away(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.agent.published._RETRY_SECONDS", 0.01)
    agent.store.stop()
    agent.node.publish("a", port(), tasks=["a-1"])
    agent.reconcile()
    await asyncio.sleep(0.05)
    agent.store.start()

    await agent.shows({"a-1": [32000]})


async def test_many_records_take_several_transactions(agent: Agent) -> None:
    names = [f"t{number}" for number in range(300)]
    agent.node.publish("a", port(80, 8080), port(81, 8081), tasks=["a-1"])
    for name in names:
        agent.node.publish(name, port(80, 9000 + int(name[1:])), tasks=[name])
    agent.reconcile()

    await agent.shows({"a-1": [8080, 8081]} | {name: [9000 + int(name[1:])] for name in names})


async def test_large_records_take_several_transactions(agent: Agent) -> None:
    sizes: list[int] = []
    transact = agent.store.transact

    async def watched(conditions: object, operations: list[object]) -> object:
        sizes.append(sum(len(getattr(op, "value", b"")) for op in operations))
        return await transact(conditions, operations)  # type: ignore[arg-type]

    agent.store.transact = watched  # type: ignore[assignment, method-assign]
    for first in (10000, 20000, 30000):
        ports = (port(number, number) for number in range(first, first + 4000))
        agent.node.publish(f"s{first}", *ports, tasks=[f"t{first}"])
    agent.reconcile()
    await agent.shows({f"t{n}": [*range(n, n + 4000)] for n in (10000, 20000, 30000)})

    assert len(sizes) == 2
    assert max(sizes) < 1_500_000


async def test_a_record_that_etcd_would_not_take_is_reported(agent: Agent) -> None:
    agent.node.publish("a", *(port(n, n) for n in range(10000, 20200)), tasks=["a-1"])
    agent.node.publish("b", port(80, 8080), tasks=["b-1"])
    agent.reconcile()
    await agent.shows({"b-1": [8080]})

    (problem,) = agent.published.problems()
    assert problem.about == "task a-1"
    assert agent.told == 1

    agent.node.publish("a", port(80, 8081))
    agent.reconcile()
    await agent.shows({"a-1": [8081], "b-1": [8080]})
    assert list(agent.published.problems()) == []
    assert agent.told == 2


async def test_only_what_was_written_here_is_an_echo(agent: Agent) -> None:
    agent.node.publish("a", port(), tasks=["a-1"])
    agent.reconcile()
    await agent.shows({"a-1": [32000]})
    key = KEYS.published("n1", "a-1")
    own = Changes((Change(key, await agent.store.get(key), 5),), 5)
    other = Changes((Change(KEYS.task("a", "a-1"), None, 5),), 5)

    assert agent.published.is_echo(own)
    assert not agent.published.is_echo(other)
    assert not agent.published.is_echo(Changes((), 5))
    assert not agent.published.is_echo(Snapshot((), 5))
    agent.node.ports.recorded("a-1", ())  # somebody deleted it
    assert not agent.published.is_echo(own)
    agent.published.plan()
    agent.published.wake()
    await agent.shows({"a-1": [32000]})

"""Dynamic host ports and long ranges, from the record to the connection.

One lab of two nodes; every test leaves it as it found it.
"""

from __future__ import annotations

import signal
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support.cluster import PORT, Cluster, cluster, until, until_served
from tests.support.requests import REFUSED, SPOKEN, again, held, replicas
from tests.support.watched import generations, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

DYNAMIC: Final = [{"target": PORT, "protocol": protocol.value} for protocol in SPOKEN]
"""On each node another number may be given; TCP and UDP count apart."""

FIRST: Final = 32000
RANGE: Final = range(9000, 10000)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Cluster]:
    with cluster("publish", 2, ("a1", "n1"), ("a2", "n1"), ("b1", "n2")) as made:
        yield made


def numbers(mesh: Cluster, node: str, task: str) -> list[int]:
    """The numbers of a task's ports, in the order of the protocols."""
    record: list[dict[str, Any]] = mesh.records.get(f"published/{node}/{task}") or []
    assert [one["containerPort"] for one in record] == [PORT] * len(record)
    return [one["hostPort"] for one in record]


async def published(mesh: Cluster, node: str, task: str, count: int = len(SPOKEN)) -> list[int]:
    """Wait until the record of a task has as many ports."""
    await until(lambda: len(numbers(mesh, node, task)) == count, f"record of {task} on {node}")
    return numbers(mesh, node, task)


def objects(mesh: Cluster, node: str) -> bool:
    """Whether a node says that the settings of the cluster are not what they were."""
    return "/mesh/cluster" in mesh.problems(node)


async def withdraw(mesh: Cluster, service: str) -> None:
    mesh.remove(service)
    await mesh.settled()
    await until(lambda: not mesh.records.names("published/"), "no record is left")


async def test_a_dynamic_port_is_its_task_s_for_life_and_rests_afterwards(mesh: Cluster) -> None:
    mesh.service("dyn", *DYNAMIC)
    mesh.task("dyn", "a1")
    mesh.task("dyn", "b1")
    first, there = await published(mesh, "n1", "a1"), await published(mesh, "n2", "b1")

    assert first[0] == first[1]
    number = first[0]
    record = mesh.records.get("published/n1/a1")[0]
    assert list(record) == [
        *("hostPort", "containerPort", "protocol", "podName", "podIP", "service"),
    ]
    await until_served(mesh.from_outside(number, "n1"), {"a1"})
    await until_served(mesh.from_outside(there[0], "n2"), {"b1"})

    async with held(mesh.from_outside(number, "n1")) as connections:
        await mesh.signal("n1", signal.SIGKILL)
        await mesh.start_again("n1")
        mesh.task("dyn", "a2")
        second = await published(mesh, "n1", "a2")
        after = await again(connections)
    assert after == connections
    assert numbers(mesh, "n1", "a1") == first
    assert second == [number + 1, number + 1]

    mesh.untask("dyn", "a1")
    await mesh.settled()
    await until(lambda: numbers(mesh, "n1", "a1") == [], "the record goes with its task")
    assert await replicas(mesh.from_outside(number, "n1")) == {REFUSED}
    mesh.task("dyn", "a1")
    assert await published(mesh, "n1", "a1") == [number + 2, number + 2]
    await until_served(mesh.from_outside(number + 2, "n1"), {"a1"})

    await withdraw(mesh, "dyn")


async def test_numbers_are_the_same_after_everything_was_restarted_or_lost(mesh: Cluster) -> None:
    mesh.service("dyn", *DYNAMIC)
    for task in ("a1", "a2"):
        mesh.task("dyn", task)
    before = [await published(mesh, "n1", task) for task in ("a1", "a2")]

    for target in ("n1", "n2", "etcd"):
        await mesh.kill(target)
    for target in ("etcd", "n1", "n2"):
        await mesh.start_again(target)
    await until(mesh.answers)
    await mesh.settled()
    assert [numbers(mesh, "n1", task) for task in ("a1", "a2")] == before

    mesh.records.delete("published/n1/a1")
    assert await published(mesh, "n1", "a1") == before[0]

    kept = {
        f"{kind}{key}": record
        for kind in ("services/", "tasks/", "nodes/", "allocations/")
        for key, record in mesh.records.under(kind).items()
    }
    settings = mesh.records.get("cluster")
    mesh.records.delete_below("")
    for node in mesh.nodes:
        await until(partial(objects, mesh, node.name), f"{node.name} misses its settings")
    for key, record in kept.items():
        mesh.revision = mesh.records.put(key, record)
    mesh.revision = mesh.records.put("cluster", settings)
    after = [await published(mesh, "n1", task) for task in ("a1", "a2")]
    for one, (number, _) in zip(("a1", "a2"), before, strict=True):
        await until_served(mesh.from_outside(number, "n1"), {one})

    assert after == before
    await withdraw(mesh, "dyn")


async def test_a_range_comes_whole_although_the_controller_is_killed(mesh: Cluster) -> None:
    await until(lambda: bool(mesh.records.text("status/leader")), "one is elected")
    leader = mesh.records.text("status/leader")
    (other,) = (node.name for node in mesh.nodes if node.name != leader)

    with watched(mesh, other) as told:
        mesh.service("range", *({"target": PORT, "published": n, "mode": "ingress"} for n in RANGE))
        mesh.task("range", "a1")
        mesh.task("range", "b1")
        await mesh.kill(leader)
        await mesh.start_again(leader)
        await mesh.allocated("range")

    for port in (RANGE[0], RANGE[499], RANGE[-1]):
        asks = [ask for ask in mesh.from_outside(port) if ask.protocol is SPOKEN[0]]
        await until_served(asks * 4, {"a1", "b1"})
    beside = [ask for ask in mesh.from_outside(RANGE[-1] + 1) if ask.protocol is SPOKEN[0]]
    assert await replicas(beside) == {REFUSED}
    mesh.remove("range")
    await until(lambda: not mesh.records.names("allocations/ports/"), "all of it is free again")

    counts = generations(told, "meshports")  # more, where a replica came: the same ones anew
    assert counts[0] == 2 * len(RANGE)
    assert {count % counts[0] for count in counts} == {0}

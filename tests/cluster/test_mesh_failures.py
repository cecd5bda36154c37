"""What becomes of traffic when etcd, agents and whole nodes fail, and when they come back.

One lab of three nodes; replicas a1 on n1 and b1 on n2, n3 has none.  Every test leaves it so.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import scrape
from tests.support.cluster import PORT, Cluster, cluster, ingress, until, until_served
from tests.support.requests import Answer, again, ask_all, held, replicas, stream
from tests.support.watched import watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.requests import Ask

pytestmark = pytest.mark.cluster

WEB, OTHER = 8080, 8081
CYCLE: Final = 60
LIVENESS: Final = 5.0
"""Seconds until a node that says nothing is taken for dead: the cluster's default."""

SLACK: Final = 25.0
"""Seconds more that a crowded machine may take."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Cluster]:
    placed = (("a1", "n1"), ("a2", "n1"), ("b1", "n2"), ("b2", "n2"))
    with cluster("failures", 3, *placed) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    for service, port in (("web", WEB), ("other", OTHER)):
        mesh.service(service, *ingress(port))
        for replica in ("a1", "b1"):
            mesh.task(service, replica)
    await mesh.allocated("web", "other")


def everything(mesh: Cluster) -> list[Ask]:
    return mesh.from_outside(WEB) + mesh.asks(("a2", "b2"), mesh.vips("web"), PORT)


async def test_forwarding_goes_on_without_etcd_and_catches_up(mesh: Cluster) -> None:
    agents = [node.agent_pid for node in mesh.nodes]

    with watched(mesh, "n1") as changes:
        async with held(everything(mesh)) as first, stream(everything(mesh)) as traffic:
            await mesh.kill("etcd")
            await traffic.more(2 * CYCLE)
            meanwhile = await again(first)
            await mesh.start_again("etcd")
            await until(mesh.answers, "etcd is back")
            mesh.task("web", "a2")
            await mesh.settled()
            await traffic.landed()
            await until_served(8 * everything(mesh), {"a1", "a2", "b1"})
            mesh.untask("web", "a2")
            await mesh.settled()

    await mesh.refresh()
    assert traffic.failures == []
    assert first == meanwhile
    assert [node.agent_pid for node in mesh.nodes] == agents
    assert [line for line in changes if f". {WEB} :" in line]
    assert [line for line in changes if f". {OTHER} :" in line] == []


async def test_nodes_trust_each_other_after_etcd_hung_longer_than_any_lease(mesh: Cluster) -> None:
    async with stream(everything(mesh)) as traffic:
        await mesh.signal("etcd", signal.SIGSTOP)
        hangs_until = time.monotonic() + 1.6 * LIVENESS
        while time.monotonic() < hangs_until:
            await traffic.more(CYCLE)
        await mesh.signal("etcd", signal.SIGCONT)
        await traffic.more(4 * CYCLE)
        await until(lambda: mesh.records.under("alive/").keys() == {"n1", "n2", "n3"})
        mesh.task("web", "b2")
        await mesh.settled()
        await traffic.landed()
        await until_served(8 * everything(mesh), {"a1", "b1", "b2"})
        mesh.untask("web", "b2")
        await mesh.settled()

    assert traffic.failures == []


async def test_a_node_that_is_off_gets_nothing_until_it_is_back(mesh: Cluster) -> None:
    through = [*mesh.from_outside(WEB, "n1", "n2"), *mesh.asks(("a2",), mesh.vips("web"), PORT)]
    await mesh.start(("d1", "n3"))
    mesh.task("web", "d1")
    await mesh.settled()
    assert await replicas(8 * through) == {"a1", "b1", "d1"}

    began = time.monotonic()
    await mesh.power_off("n3")
    lost = mesh.containers["d1"].addresses[0]
    for node in ("n1", "n2"):
        await until(lambda n=node: lost not in mesh.elements(n, "targets")["targets4"])  # type: ignore[misc]
    noticed = time.monotonic() - began
    await until_served(8 * through, {"a1", "b1"})
    mesh.untask("web", "d1")
    await mesh.start_again("n3")
    await mesh.start(("d2", "n3"))
    mesh.task("web", "d2")
    await mesh.settled()
    await until_served(8 * mesh.from_outside(WEB), {"a1", "b1", "d2"})
    mesh.untask("web", "d2")
    await mesh.settled()

    assert noticed < LIVENESS + SLACK


async def test_another_manager_allocates_when_the_leader_is_gone(mesh: Cluster) -> None:
    leader = mesh.records.text("status/leader")
    others = [node.name for node in mesh.nodes if node.name != leader]

    async with stream(everything(mesh)) as traffic:
        await mesh.kill(leader)
        mesh.service("new", *ingress(8090))
        mesh.task("new", "a1")
        mesh.task("new", "b1")
        await until(lambda: mesh.is_allocated("new"), "somebody else allocates")
        successor = mesh.records.text("status/leader")
        await mesh.settled(*others)
        told = await ask_all(mesh.from_outside(8090, *others))
        await mesh.start_again(leader)
        await mesh.settled()
        await until(lambda: mesh.records.under("alive/").keys() == {"n1", "n2", "n3"})
        await until_served(8 * mesh.from_outside(8090), {"a1", "b1"})
        mesh.remove("new")
        await mesh.settled()

    assert successor in others
    assert {type(answer) for answer in told} == {Answer}
    assert traffic.failures == []


def _targets(mesh: Cluster, address: str) -> list[bool]:
    """Whether n2 and n3 send connections to an address."""
    return [address in mesh.elements(node, "targets")["targets4"] for node in ("n2", "n3")]


async def test_replicas_of_a_node_without_an_agent_rest_until_it_is_back(mesh: Cluster) -> None:
    gone = mesh.containers["a1"].addresses[0]

    async with stream(everything(mesh)) as traffic:
        await mesh.kill("n1")
        await until(lambda: not any(_targets(mesh, gone)), "n2 and n3 use other replicas")
        reach = [await _reach(mesh, node, "n1") for node in ("n2", "n3")]
        await traffic.landed()
        await until_served(8 * mesh.from_outside(WEB, "n2", "n3"), {"b1"})
        await mesh.start_again("n1")
        await until(lambda: all(_targets(mesh, gone)), "n2 and n3 use it again")
        await until_served(8 * mesh.from_outside(WEB, "n2", "n3"), {"a1", "b1"})

    assert traffic.failures == []
    assert reach == ["reachable", "reachable"], "the node's kernel answers for it"


async def _reach(mesh: Cluster, node: str, peer: str) -> str:
    """What a node holds of another one."""
    told = json.loads((await scrape.page(mesh, node, "/peers")).body)["peers"]
    (found,) = [each["reach"] for each in told if each["name"] == peer]
    return str(found)

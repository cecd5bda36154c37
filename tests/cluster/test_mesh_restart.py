"""What an agent's end, and changes of a service's replicas, do to its clients: nothing.

On every backend, one lab of three nodes with two replicas each, which every test leaves as it
found it.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.publish import Protocol
from tests.support import drivers
from tests.support.cluster import PORT, Cluster, cluster, ingress, until, until_served
from tests.support.requests import BRIEF, Answer, Ask, again, held, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

WEB: Final = 8080
REPLICAS: Final = ("a1", "b1", "d1", "a2", "b2", "d2")
CYCLE: Final = 72
"""Requests of every kind there is, about twice over."""

IDENTITY: Final = ("vips", "meshports", "targets", "known", "hairpin", "nodes", "via")


@pytest.fixture(scope="module", params=drivers.KERNEL)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    placed = ((id, {"a": "n1", "b": "n2", "d": "n3"}[id[0]]) for id in REPLICAS)
    with cluster("restart", 3, *placed, backend=request.param) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    mesh.service("web", *ingress(WEB))
    for replica in REPLICAS[:3]:
        mesh.task("web", replica)
    await mesh.allocated("web")


def everything(mesh: Cluster) -> list[Ask]:
    """From outside through every node, and from a container of every node to the VIP."""
    inside = mesh.asks(("a2", "b2", "d2"), mesh.vips("web"), PORT)
    return mesh.from_outside(WEB) + inside


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_no_connection_fails_when_an_agent_is_restarted(mesh: Cluster, number: int) -> None:
    before = mesh.elements("n1", *IDENTITY)

    async with held(everything(mesh)) as first, stream(everything(mesh)) as traffic:
        await traffic.more(CYCLE)
        await mesh.signal("n1", number)
        await until(lambda: not mesh.agent_runs("n1"))
        await traffic.more(CYCLE)
        without = await again(first)
        await mesh.start_again("n1")
        await mesh.settled()
        await traffic.more(CYCLE)
        afterwards = await again(first)

    assert traffic.failures == []
    assert all(isinstance(outcome, Answer) for outcome in first.values())
    assert first == without
    assert first == afterwards
    assert mesh.elements("n1", *IDENTITY) == before


async def test_an_agent_that_was_away_catches_up(mesh: Cluster) -> None:
    async with stream(everything(mesh)) as traffic:
        await mesh.kill("n2")
        mesh.task("web", "a2")
        mesh.untask("web", "b1")
        await traffic.more(CYCLE)
        await mesh.start_again("n2")
        await mesh.settled()
        await traffic.landed()
        await until_served(8 * mesh.from_outside(WEB), {"a1", "a2", "d1"})
        mesh.task("web", "b1")
        mesh.untask("web", "a2")
        await mesh.settled()

    assert traffic.failures == []


async def test_no_connection_fails_while_a_service_is_scaled(mesh: Cluster) -> None:
    async with stream(everything(mesh)) as traffic:
        await traffic.more(CYCLE)
        for replica in REPLICAS[3:]:
            mesh.task("web", replica)
        await mesh.settled()
        await traffic.landed()
        await until_served(8 * mesh.from_outside(WEB), set(REPLICAS))
        for replica in REPLICAS[:4]:
            mesh.untask("web", replica)
        await mesh.settled()
        await traffic.landed()
        await until_served(4 * mesh.from_outside(WEB), set(REPLICAS[4:]))
        for replica in REPLICAS[:3]:
            mesh.task("web", replica)
        for replica in REPLICAS[4:]:
            mesh.untask("web", replica)
        await mesh.settled()

    assert traffic.failures == []


async def test_flows_of_a_removed_replica_drain_on_tcp_and_move_on_udp(mesh: Cluster) -> None:
    async with held(everything(mesh)) as first:
        mesh.task("web", "a2")
        for replica in REPLICAS[:3]:
            mesh.untask("web", replica)
        await mesh.settled()

        async def moved() -> bool:
            # A datagram whose flow is forgotten before its answer is lost, as UDP may be.
            flows = (flow for flow in first if flow.asked.protocol is Protocol.UDP)
            now = await again(flows, BRIEF)
            return {a.replica if isinstance(a, Answer) else a for a in now.values()} == {"a2"}

        await until(moved, "UDP flows go to the replica that is left")
        tcp = {flow: was for flow, was in first.items() if flow.asked.protocol is Protocol.TCP}
        kept = await again(tcp)
        for replica in REPLICAS[:3]:
            mesh.task("web", replica)
        mesh.untask("web", "a2")
        await mesh.settled()

    assert kept == tcp


async def test_no_connection_fails_while_replicas_are_changed_without_a_pause(
    mesh: Cluster,
) -> None:
    """As fast as etcd takes it, so that nodes are always at different revisions."""
    async with stream(everything(mesh)) as traffic:
        for _ in range(12):
            for new, old in zip(REPLICAS[3:], REPLICAS[:3], strict=True):
                mesh.task("web", new)
                await asyncio.sleep(0)
                mesh.untask("web", old)
                await asyncio.sleep(0)
            for new, old in zip(REPLICAS[:3], REPLICAS[3:], strict=True):
                mesh.task("web", new)
                await asyncio.sleep(0)
                mesh.untask("web", old)
                await asyncio.sleep(0)
        await mesh.settled()
        await traffic.more(CYCLE)

    assert traffic.failures == []
    assert traffic.answered.keys() <= set(REPLICAS)


async def test_replicas_are_replaced_one_by_one_without_a_failure(mesh: Cluster) -> None:
    await mesh.start(("x1", "n1"), ("y1", "n2"))
    for replica in ("x1", "y1"):
        mesh.task("web", replica)
    for replica in REPLICAS[:3]:
        mesh.untask("web", replica)
    await mesh.settled()

    async with stream(everything(mesh)) as traffic:
        for old, new in (("x1", "x2"), ("y1", "y2")):
            await mesh.start((new, mesh.containers[old].node))
            mesh.task("web", new)
            await mesh.settled()
            mesh.untask("web", old)
            await mesh.settled()
            await traffic.landed()
            await mesh.kill(old)
            await traffic.more(CYCLE)
        await until_served(8 * mesh.from_outside(WEB), {"x2", "y2"})
        for replica in REPLICAS[:3]:
            mesh.task("web", replica)
        for replica in ("x2", "y2"):
            mesh.untask("web", replica)
        await mesh.settled()

    assert traffic.failures == []

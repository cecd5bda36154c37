"""A node whose overlay is cut while etcd still hears of it, as its neighbours and it see that.

On every backend, one lab of three nodes; replicas a1 on n1, b1 on n2, d1 and d2 on n3.  d2 is the
only one of service "only".  Every test leaves it so.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from mesh.model.publish import Protocol
from tests.support import drivers, scrape
from tests.support.cluster import PORT, Cluster, cluster, ingress, until, until_served
from tests.support.patience import QUICK
from tests.support.requests import BRIEF, SILENCE, Answer, again, held, replicas, stream
from tests.support.verbs import document

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.requests import Ask

pytestmark = pytest.mark.cluster

WEB, ONLY = 8080, 8081
CYCLE: Final = 60
WINDOW: Final = 15.0
"""Seconds until a neighbour must have noticed; one, on a machine that has time."""

PATIENCE: Final = 10.0
"""Seconds until a request is given up that went to where nobody answers."""

CUT: Final = """
table inet cut {
  chain in { type filter hook prerouting priority -500; udp dport 51820 drop; }
  chain out { type filter hook output priority -500; udp dport 51820 drop; }
}
"""


@pytest.fixture(scope="module", params=drivers.KERNEL)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    placed = (("a1", "n1"), ("a2", "n1"), ("b1", "n2"), ("d1", "n3"), ("d2", "n3"))
    with cluster("reach", 3, *placed, backend=request.param, reach=QUICK) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    mesh.service("web", *ingress(WEB))
    mesh.service("only", *ingress(ONLY))
    for service, replica in (("web", "a1"), ("web", "b1"), ("web", "d1"), ("only", "d2")):
        mesh.task(service, replica)
    await mesh.allocated("web", "only")


def nearby(mesh: Cluster) -> list[Ask]:
    """Through the neighbours of n3, and from a container of one."""
    return mesh.from_outside(WEB, "n1", "n2") + mesh.asks(("a2",), mesh.vips("web"), PORT)


def targets(mesh: Cluster, node: str, replica: str) -> bool:
    """Whether a node gives connections to a replica."""
    return mesh.containers[replica].addresses[0] in mesh.elements(node, "targets")["targets4"]


async def seen(mesh: Cluster, node: str) -> dict[str, Any]:
    """The peers of a node as its agent sees them."""
    told = json.loads((await scrape.page(mesh, node, "/peers")).body)
    return {each["name"]: each for each in told["peers"]}


async def until_reached(mesh: Cluster, *nodes: str) -> None:
    """Wait until these nodes reach all others."""

    async def reached() -> bool:
        views = [await seen(mesh, node) for node in nodes]
        return all(p["reach"] == "reachable" for view in views for p in view.values())

    await until(reached, "all nodes reach each other")


@asynccontextmanager
async def cut(mesh: Cluster, *nodes: str) -> AsyncIterator[None]:
    """The WireGuard of nodes hears and says nothing, for the time of a block; it ends well."""
    everyone = [node.name for node in mesh.nodes]
    await until_reached(mesh, *everyone)
    for node in nodes:
        mesh.sh(node, "nft", "-f", "-", input=CUT)
    try:
        yield
    finally:
        for node in nodes:
            mesh.sh(node, "nft", "delete", "table", "inet", "cut")
        await until_reached(mesh, *everyone)
        await until_served(8 * mesh.from_outside(WEB), {"a1", "b1", "d1"})


async def until_lost(mesh: Cluster) -> float:
    """Wait until n1 and n2 give n3 no connections; how long that took."""
    began = time.monotonic()
    for node in ("n1", "n2"):
        await until(lambda n=node: not targets(mesh, n, "d1"), f"{node} leaves n3 out")  # type: ignore[misc]
    return time.monotonic() - began


async def test_neighbours_leave_a_node_out_as_soon_as_they_cannot_reach_it(mesh: Cluster) -> None:
    async with cut(mesh):  # what is held later begins with all nodes in the pools
        pass
    async with held(2 * nearby(mesh)) as flows, stream(nearby(mesh), patience=PATIENCE) as traffic:
        kept = {f: was for f, was in flows.items() if isinstance(was, Answer) and was.node != "n3"}
        await traffic.more(CYCLE)
        before = list(traffic.failures)
        async with cut(mesh, "n3"):
            noticed = await until_lost(mesh)
            await traffic.landed()
            window = len(traffic.failures)
            alive = set(mesh.records.under("alive/"))
            reports = {n: mesh.records.get(f"applied/{n}")["unreachable"] for n in ("n1", "n2")}
            udp = [f for f in flows if f.asked.protocol is Protocol.UDP]
            await until(lambda: _moved(udp), "UDP flows go to replicas that are left")
            await traffic.more(2 * CYCLE)
            await traffic.landed()
            afterwards = len(traffic.failures)
            elsewhere = await again(kept)
            remaining = [targets(mesh, node, "d2") for node in ("n1", "n2")]
            told = [await said(mesh, *verb) for verb in (["status"], ["doctor"], ["rules", "diff"])]

    assert before == []
    assert noticed < WINDOW
    assert window == afterwards == len(traffic.failures), traffic.failures
    assert alive == {"n1", "n2", "n3"}
    assert reports == {"n1": ["n3"], "n2": ["n3"]}
    assert [
        f for f, was in kept.items() if f.asked.protocol is Protocol.TCP and elsewhere[f] != was
    ] == []
    assert remaining == [True, True], "a service without another replica keeps what it has"
    status, doctor, difference = told
    (lost,) = [node for node in status["nodes"] if node["name"] == "n3"]
    assert lost["unreachedBy"] == ["n1", "n2"]
    assert lost["peer"]["reach"] == "unreachable"
    assert lost["peer"]["leftOut"] is True
    (peers,) = [each for each in doctor["checks"] if each["name"] == "peers"]
    assert (peers["status"], "n3" in peers["evidence"]) == ("warn", True)
    assert difference["equal"] is True


async def said(mesh: Cluster, *verb: str) -> Any:
    """What a verb says on n1; requests go on meanwhile."""
    return await asyncio.to_thread(document, mesh, "n1", *verb)


async def _moved(flows: list[Any]) -> bool:
    # A datagram whose flow is forgotten before its answer is lost, as UDP may be.
    outcomes = (await again(flows, BRIEF)).values()
    return all(isinstance(each, Answer) and each.node != "n3" for each in outcomes)


async def test_a_node_that_is_cut_off_and_a_neighbour_with_a_new_agent_keep_their_pools(
    mesh: Cluster,
) -> None:
    through = mesh.from_outside(WEB, "n3")
    await until_reached(mesh, "n3")
    before = mesh.elements("n3", "targets", "meshports")

    async with cut(mesh, "n3"):
        await until_lost(mesh)
        await until(lambda: _cut_off(mesh), "n3 reaches nobody")
        after = mesh.elements("n3", "targets", "meshports")
        answered = await replicas(4 * through, BRIEF)
        left_out = [p["leftOut"] for p in (await seen(mesh, "n3")).values()]
        async with stream(nearby(mesh), patience=PATIENCE) as traffic:
            await mesh.kill("n1")
            await mesh.start_again("n1")
            await mesh.settled("n1")
            await traffic.more(2 * CYCLE)
        chosen = targets(mesh, "n1", "d1")

    assert after == before
    assert answered <= {"d1", SILENCE}
    assert "d1" in answered
    assert left_out == [False, False]
    assert traffic.failures == []
    assert chosen is False


async def _cut_off(mesh: Cluster) -> bool:
    return all(p["reach"] == "unreachable" for p in (await seen(mesh, "n3")).values())


async def test_peers_are_told_with_what_wireguard_knows_of_them(mesh: Cluster) -> None:
    await until_reached(mesh, "n1")

    found = await seen(mesh, "n1")

    assert found.keys() == {"n2", "n3"}
    for name, peer in found.items():
        assert peer["endpoint"] == f"{mesh.node(name).underlay4}:51820"
        assert 0 < peer["rtt"] < PATIENCE
        assert 0 <= peer["handshake"] < 190
        assert peer["received"] > 0
        assert peer["sent"] > 0

"""Policies in a cluster: on every way to a replica, whoever asks, through whichever node.

One lab of two nodes: a1 is the replica that a policy selects, k1 on its bridge and k2 on the other
node ask.  The policy lets in k2, of the service `friends`, and the client c1.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.publish import Protocol
from tests.support.cluster import PORT, Cluster, cluster, ingress, put, withdraw
from tests.support.requests import REFUSED, Answer, Outcome, again, ask_all, held
from tests.support.scrape import scrape
from tests.support.verbs import on_node

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.support.requests import Ask

pytestmark = pytest.mark.cluster

WEB: Final = 8080
FEW: Final = 8090
LET_IN: Final = ("k2", "c1", "n1", "a1")
OTHERS: Final = ("k1", "c2", "n2")


@pytest.fixture(scope="module", params=("nftables", "iptables-nft", "iptables-legacy"))
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    replicas = (("a1", "n1"), ("k1", "n1"), ("k2", "n2"))
    with cluster("policies", 2, *replicas, backend=request.param) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    mesh.service("web", *ingress(WEB))
    mesh.task("web", "a1")
    mesh.service("friends", labels={"kind": "friend"})
    mesh.task("friends", "k2")
    await mesh.allocated("web", "friends")


def policy(mesh: Cluster) -> dict[str, object]:
    blocks = [f"{a}/{128 if ':' in a else 32}" for a in mesh.addresses("c1")]
    peers = [{"podSelector": {"matchLabels": {"kind": "friend"}}}]
    return {
        "name": "web",
        "podSelector": {"matchLabels": {"service": "web"}},
        "ingress": [
            {"from": [*peers, *({"ipBlock": {"cidr": cidr}} for cidr in blocks)]},
            {"ports": [{"protocol": "SCTP"}]},
        ],
    }


def asks(mesh: Cluster, names: Iterable[str]) -> list[Ask]:
    """By every way: clients by both nodes, others by VIP, by the replica's address, too."""
    nodes = [a for node in ("n1", "n2") for a in mesh.addresses(node)]
    found = []
    for name in names:
        found += mesh.asks([name], nodes, WEB)
        if name not in ("c1", "c2"):
            found += mesh.asks([name], mesh.vips("web"), PORT)
        if name not in ("c1", "c2", "a1"):
            found += mesh.asks([name], mesh.containers["a1"].addresses, PORT)
    return found


async def told(mesh: Cluster, *names: str) -> dict[Ask, Outcome]:
    return await outcomes(asks(mesh, names))


def heard(mesh: Cluster, asks: Iterable[Ask]) -> list[Ask]:
    """Those whose refusal the client hears: with iptables not ICMP by way of another node, whose
    strict rp_filter does not like the replica's node as its source.
    """
    by_iptables = "iptables" in mesh.records.get("applied/n1")["backend"]
    mute = [(mesh.netns("c2"), address) for address in mesh.addresses("n2")] if by_iptables else []
    return [a for a in asks if a.protocol is Protocol.TCP or (a.netns, a.address) not in mute]


async def outcomes(found: list[Ask]) -> dict[Ask, Outcome]:
    return dict(zip(found, await ask_all(found), strict=True))


async def test_a_policy_holds_on_every_way(mesh: Cluster) -> None:
    everybody = await told(mesh, *LET_IN, *OTHERS)
    assert {one: said for one, said in everybody.items() if not isinstance(said, Answer)} == {}

    put(mesh, "policies/web", policy(mesh))
    await mesh.settled()
    welcome = await told(mesh, *LET_IN)
    others = await outcomes(heard(mesh, asks(mesh, OTHERS)))
    await withdraw(mesh, "policies/web")
    after = await told(mesh, *OTHERS)

    assert {one: said for one, said in welcome.items() if not isinstance(said, Answer)} == {}
    assert {one: said for one, said in others.items() if said != REFUSED} == {}
    assert {one: said for one, said in after.items() if not isinstance(said, Answer)} == {}


async def test_a_policy_follows_the_tasks(mesh: Cluster) -> None:
    put(mesh, "policies/web", policy(mesh))
    mesh.task("friends", "k1")
    await mesh.settled()
    friend = await told(mesh, "k1")
    mesh.untask("friends", "k1")
    await mesh.settled()
    stranger = await told(mesh, "k1")
    await withdraw(mesh, "policies/web")

    assert {one: said for one, said in friend.items() if not isinstance(said, Answer)} == {}
    assert {one: said for one, said in stranger.items() if said != REFUSED} == {}


def _trace(mesh: Cluster, node: str, source: str, address: str) -> str:
    """What a node says becomes of another connection."""
    return on_node(mesh, node, "trace", source, f"{address}:{FEW}")


async def test_every_node_lets_a_client_have_as_many_connections_as_the_service_says(
    mesh: Cluster,
) -> None:
    """The replica is on n1: what comes in by n2 counts there, and not on n1."""
    mesh.service("few", *ingress(FEW), limitConnections=2)
    mesh.task("few", "a1")
    await mesh.allocated("few")
    await mesh.settled()
    nodes = [mesh.addresses(node) for node in ("n1", "n2")]
    ways = [
        *mesh.asks(["c1"], [a for pair in nodes for a in pair], FEW),
        *mesh.asks(["c2"], [v4 for v4, _ in nodes], FEW),  # over IPv6 it is in c1's network
        *mesh.asks(["k1", "k2", "n2"], mesh.vips("few"), PORT),
    ]
    ways = [one for one in ways if one.protocol is Protocol.TCP]

    async with held(3 * ways) as opened:
        told = {one: [o for h, o in opened.items() if h.asked == one] for one in ways}
        served = [h for h, outcome in opened.items() if isinstance(outcome, Answer)]
        pages = [await scrape(mesh, node) for node in ("n1", "n2")]
        traces = [
            await asyncio.to_thread(_trace, mesh, "n2", mesh.addresses(who)[0], nodes[1][0])
            for who in ("c1", "n2")
        ]
        mesh.service("few", *ingress(FEW))
        await mesh.settled()
        more = await ask_all(3 * ways)
        still = await again(served)

    for way, outcomes in told.items():
        assert sum(isinstance(one, Answer) for one in outcomes) == 2, way
        assert outcomes.count(REFUSED) == 1, way
    metric = "mesh_connections_over_limit_total"
    assert sum(page.sum(metric, service="few") for page in pages) == len(ways)
    assert ["as many connections here" in trace for trace in traces] == [True, False]
    assert [one for one in (*more, *still.values()) if not isinstance(one, Answer)] == []
    await withdraw(mesh, "services/few", "tasks/few/a1")

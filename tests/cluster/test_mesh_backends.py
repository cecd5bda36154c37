"""A node's agent comes back with another rule backend, and no client notices.

One lab of three nodes; the first one changes.  Its clients come from outside and from containers,
by every node, to replicas here and elsewhere.
"""

from __future__ import annotations

import asyncio
from itertools import pairwise, product
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.address import FAMILIES, family_of
from mesh.rules import xtables
from tests.support.backends import World
from tests.support.cluster import PORT, Cluster, cluster, host, ingress, until
from tests.support.requests import Answer, Ask, Outcome, again, ask_all, held, stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

pytestmark = pytest.mark.cluster

NODE: Final = "n1"
WEB, FAR, MASQUERADED, HOSTED, LISTED, AFFINE = range(8080, 8086)
CYCLE: Final = 110
"""Requests of every kind there is, about once."""

ROUND: Final = (
    "iptables-legacy",
    "iptables-nft",
    "nftables",
    "iptables-legacy",
    "nftables",
    "iptables-nft",
    "iptables-legacy",
)
"""A way that goes once from each backend to each other one."""

CHANGES: Final = tuple(pairwise(ROUND))
IDENTITY: Final = (
    "vips", "meshports", "ports", "targets", "known", "hairpin", "nodes", "via", "zones", "limited",
    "allow",
)  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    placed = (("a1", "n1"), ("b1", "n2"), ("d1", "n3"), ("k1", "n1"), ("k2", "n2"))
    with cluster("backends", 3, *placed, backend=ROUND[0]) as made:
        asyncio.run(_furnish(made))
        yield World(made, NODE, ROUND[0])


async def _furnish(mesh: Cluster) -> None:
    everybody = ["10.0.0.0/8", "192.168.0.0/16", "198.51.100.0/24", "fd00::/8"]
    mesh.service("web", *ingress(WEB))
    mesh.service("far", *ingress(FAR))
    mesh.service("masqueraded", *ingress(MASQUERADED), source="masquerade")
    mesh.service("hosted", *host(HOSTED))
    mesh.service("listed", *ingress(LISTED), allow=everybody)
    mesh.service("affine", *ingress(AFFINE), affinity="client-ip")
    for service in ("web", "listed", "affine"):
        for replica in ("a1", "b1", "d1"):
            mesh.task(service, replica)
    mesh.task("far", "b1")
    mesh.task("masqueraded", "d1")
    mesh.task("hosted", "a1")
    await mesh.allocated("web", "far", "masqueraded", "listed", "affine")


def everything(mesh: Cluster) -> list[Ask]:
    """From outside by every node, from containers and from the node to VIPs."""
    ports = (WEB, FAR, MASQUERADED, LISTED, AFFINE)
    outside = [one for port in ports for one in mesh.from_outside(port)]
    outside += mesh.asks(("c1",), mesh.addresses(NODE), HOSTED)
    vips = (*mesh.vips("web"), *mesh.vips("far"), *mesh.vips("listed"))
    return outside + mesh.asks(("k1", "k2", NODE), vips, PORT)


def rulers(mesh: Cluster) -> set[str]:
    """The backends that have anything on the node; "ipset" if there are sets."""
    found = set()
    if "table inet mesh" in mesh.sh(NODE, "nft", "list", "tables"):
        found.add("nftables")
    for flavour, program, table in product(
        ("legacy", "nft"), ("iptables", "ip6tables"), xtables.TABLES
    ):
        listed = mesh.sh(NODE, f"{program}-{flavour}", "-w", "-t", table, "-S")
        if "MESH-" in listed or "warren-mesh" in listed:
            found.add(f"iptables-{flavour}")
    if mesh.sh(NODE, "ipset", "list", "-n"):
        found.add("ipset")
    return found


def expected_rulers(backend: str) -> set[str]:
    return {backend} if backend == "nftables" else {backend, "ipset"}


def unkept(mesh: Cluster, outcomes: Iterable[tuple[Ask, Outcome]]) -> list[object]:
    """Answers to clients outside whose address was not seen as it is."""
    clients = {mesh.netns(name): mesh.addresses(name) for name in ("c1", "c2")}
    return [
        (asked, outcome)
        for asked, outcome in outcomes
        if asked.netns in clients and asked.port != MASQUERADED
        if not isinstance(outcome, Answer)
        or outcome.client != clients[asked.netns][FAMILIES.index(family_of(asked.address))]
    ]


@pytest.mark.parametrize(("old", "new"), CHANGES)
async def test_no_connection_fails_and_nothing_of_the_old_backend_is_left(
    world: World, old: str, new: str
) -> None:
    mesh, asks = world.mesh, everything(world.mesh)
    if world.backend != old:
        await world.become(old)
    before = mesh.elements(NODE, *IDENTITY)

    async with held(world.lasting(asks)) as first, stream(asks, 0.003) as traffic:
        await traffic.more(CYCLE)
        await world.become(new)
        await mesh.settled()
        await traffic.more(CYCLE)
        afterwards = await again(first)
    fresh = await ask_all(asks)

    assert traffic.failures == []
    assert afterwards == first
    assert unkept(mesh, zip(asks, fresh, strict=True)) == []
    assert rulers(mesh) == expected_rulers(new)
    assert mesh.elements(NODE, *IDENTITY) == before
    assert mesh.problems(NODE) == "[]"


async def test_a_firewall_that_the_old_backend_got_past_lets_the_new_one_pass(world: World) -> None:
    mesh, asks = world.mesh, everything(world.mesh)
    tables = [f"{p}-{f}" for p in ("iptables", "ip6tables") for f in ("legacy", "nft")]
    if world.backend == "nftables":
        await world.become("iptables-nft")
    for program in tables:
        mesh.sh(NODE, program, "-w", "-P", "FORWARD", "DROP")

    try:
        await until(lambda: _pass(mesh, asks), "the firewall lets pass what is ours")
        async with held(world.lasting(asks)) as first, stream(asks, 0.003) as traffic:
            await world.become("nftables")
            await mesh.settled()
            await traffic.more(CYCLE)
            afterwards = await again(first)
    finally:
        for program in tables:
            mesh.sh(NODE, program, "-w", "-P", "FORWARD", "ACCEPT")
            mesh.sh(NODE, program, "-w", "-F", "FORWARD")

    assert traffic.failures == []
    assert afterwards == first


async def _pass(mesh: Cluster, asks: list[Ask]) -> bool:
    return all(isinstance(outcome, Answer) for outcome in await ask_all(asks, patience=1.5))

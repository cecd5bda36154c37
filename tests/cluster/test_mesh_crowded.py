"""A node with two thousand services whose agent starts anew: on its own rules, on those of another
version, beside another backend.  No client notices.

One lab of two nodes; the first one's agent starts again and again.
"""

from __future__ import annotations

import asyncio
from itertools import product
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.address import nth
from mesh.model.publish import Protocol
from tests.support import drivers
from tests.support.backends import World
from tests.support.cluster import PORT, Cluster, cluster, ingress
from tests.support.patience import UNMISSED
from tests.support.requests import Ask, Failure, Stream, again, held, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

NODE: Final = "n1"
WEB: Final = 8080
CROWD: Final = range(10_000, 12_000)
ASKED: Final = (CROWD[0], CROWD[999], CROWD[-1])
FIRST_VIP: Final = 1000
AT_ONCE: Final = 30
"""Services in one transaction of etcd, which takes 128 keys."""

CYCLE: Final = 60
"""Requests of every kind there is, about once."""

FEW: Final = 3
"""Datagrams."""

IDENTITY: Final = ("vips", "meshports", "targets", "known", "hairpin", "nodes", "via", "zones")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    placed = (("a1", "n1"), ("b1", "n2"), ("k1", "n1"))
    with cluster("crowded", 2, *placed, settings=UNMISSED) as made:
        asyncio.run(_furnish(made))
        yield World(made, NODE, "nftables")


async def _furnish(mesh: Cluster) -> None:
    """All of the crowd lead to one replica, which is elsewhere."""
    mesh.service("web", *ingress(WEB))
    for replica in ("a1", "b1"):
        mesh.task("web", replica)
    await mesh.allocated("web")
    for first in range(0, len(CROWD), AT_ONCE):
        records: dict[str, object] = {}
        for port in CROWD[first : first + AT_ONCE]:
            records |= _service(mesh, port)
        mesh.revision = mesh.records.change(records, ())
    await mesh.settled()


def _service(mesh: Cluster, port: int) -> dict[str, object]:
    """A service with everything that it is given."""
    name, replica, index = f"s{port}", mesh.containers["b1"], FIRST_VIP + port - CROWD[0]
    task = {"service": name, "id": f"{name}-1", "node": "n2", "addresses": replica.addresses}
    published = {"target": PORT, "published": port, "mode": "ingress"}
    return {
        f"services/{name}": {"name": name, "ports": [published]},
        f"tasks/{name}/{name}-1": task,
        f"allocations/ports/tcp/{port}": {"service": name, "target": PORT},
        f"allocations/vips/{index}": {"service": name, "addresses": _vips(mesh, index)},
    }


def _vips(mesh: Cluster, index: int) -> list[str]:
    return [nth(prefix, index) for (prefix,) in mesh.parameters(NODE).vips]


def everything(mesh: Cluster) -> list[Ask]:
    """From outside by both nodes, from a container and from the node to VIPs."""
    asks = mesh.from_outside(WEB) + mesh.asks(("k1", NODE), mesh.vips("web"), PORT)
    crowd = [one for port in ASKED for one in mesh.from_outside(port)]
    vips = [*_vips(mesh, FIRST_VIP), *_vips(mesh, FIRST_VIP + len(CROWD) - 1)]
    crowd += mesh.asks(("k1", NODE), vips, PORT)
    return asks + [one for one in crowd if one.protocol is Protocol.TCP]


OWN, OLDER, STRANGER = "own rules", "of another version", "with other sets"


def _pretend(world: World, found: str) -> None:
    """Let the agent find a program that is not its own."""
    if found == OWN:
        return
    if world.backend == "nftables":
        key = "1" if found == OLDER else "0"
        for verb, element in (("delete", key), ("add", f"{key} : 7")):
            world.mesh.sh(NODE, "nft", f"{verb} element inet mesh fingerprint {{ {element} }}")
        return
    flavour = world.backend.partition("-")[2]
    for program in ("iptables", "ip6tables"):
        rule = ("-R", "MESH-CANARY", "1", "-m", "comment", "--comment", "00000007.00000007")
        world.mesh.sh(NODE, f"{program}-{flavour}", "-w", "-t", "nat", *rule)


@pytest.mark.parametrize(
    ("backend", "found"), [*product(drivers.KERNEL, (OWN, OLDER)), ("nftables", STRANGER)]
)
async def test_no_connection_fails_when_an_agent_starts(
    world: World, backend: str, found: str
) -> None:
    mesh, asks = world.mesh, everything(world.mesh)
    if world.backend != backend:
        await _becomes_unnoticed(world, backend)
    before = mesh.elements(NODE, *IDENTITY)

    async with held(world.lasting(asks)) as first, stream(asks, 0.003) as traffic:
        await traffic.more(CYCLE)
        await mesh.kill(NODE)
        _pretend(world, found)
        await mesh.start_again(NODE)
        await mesh.settled()
        await traffic.more(CYCLE)
        afterwards = await again(first)

    assert _noticed(traffic, found) == []
    assert afterwards == first
    assert mesh.elements(NODE, *IDENTITY) == before


def _noticed(traffic: Stream, found: str) -> list[Failure]:
    """What clients noticed that they should not.

    While one program is exchanged for one with other sets, a datagram on its way may be lost.
    """
    lost = [one for one in traffic.failures if one.kind == "timed out" and "'udp'" in one.said]
    few = found == STRANGER and len(lost) <= FEW
    return [one for one in traffic.failures if not (few and one in lost)]


async def _becomes_unnoticed(world: World, backend: str) -> None:
    asks = everything(world.mesh)
    before = world.mesh.elements(NODE, *IDENTITY)
    async with held(world.lasting(asks)) as first, stream(asks, 0.003) as traffic:
        await world.become(backend)
        await world.mesh.settled()
        await traffic.more(CYCLE)
        afterwards = await again(first)
    assert traffic.failures == []
    assert afterwards == first
    assert world.mesh.elements(NODE, *IDENTITY) == before

"""Only what is published is reachable from outside, and nobody is believed to be somebody else.

One lab of two nodes, a1 on n1 and b1 on n2.  c1 is a hostile neighbour: it puts frames of its own
making on the nodes' link.  Sinks are sockets of this process in the replicas' namespaces; frames
arrive in order, so one that must arrive, sent last, proves that the ones before it did not.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from mesh.model.address import FAMILIES, Family
from tests.support.cluster import LIMIT, PORT, Cluster, cluster
from tests.support.frames import Datagram, vxlan
from tests.support.requests import BRIEF, SILENCE, ask_all

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

SINK: Final = 81
PUBLISHED: Final = {"a1": 8085, "b1": 8086}
LAST: Final = b"last"
DOMAINS: Final = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Cluster]:
    with cluster("security", 2, ("a1", "n1"), ("a2", "n1"), ("b1", "n2")) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    for replica, port in PUBLISHED.items():
        ports = {"target": SINK, "published": port, "protocol": "udp", "mode": "ingress"}
        mesh.service(f"sink-{replica}", ports, {"target": PORT, "mode": "host"})
        mesh.task(f"sink-{replica}", replica)
    await mesh.allocated(*(f"sink-{replica}" for replica in PUBLISHED))


class Sinks:
    """UDP sockets that remember what they were sent."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._sockets: list[socket.socket] = []

    def open(self, path: str, family: Family, address: str = "") -> None:
        """Listen in a namespace."""
        with netns.entered(path):
            sink = self._stack.enter_context(socket.socket(DOMAINS[family], socket.SOCK_DGRAM))
        if family is Family.V6:
            sink.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sink.bind((address, SINK))
        sink.setblocking(False)
        self._sockets.append(sink)

    async def until_last(self) -> set[bytes]:
        """Everything that arrived at any of them until all have got the last datagram."""
        loop, found = asyncio.get_running_loop(), set[bytes]()
        async with asyncio.timeout(LIMIT):
            for sink in self._sockets:
                while (said := await loop.sock_recv(sink, 2048)) != LAST:
                    found.add(said)
        return found


@pytest.fixture
def sinks() -> Iterator[Sinks]:
    with ExitStack() as stack:
        yield Sinks(stack)


def mac(mesh: Cluster, machine: str, device: str = "eth0") -> str:
    (link,) = json.loads(mesh.sh(machine, "ip", "-j", "link", "show", device))
    return str(link["address"])


@contextmanager
def link(mesh: Cluster, machine: str, device: str = "eth0") -> Iterator[socket.socket]:
    """A socket that puts frames on a machine's link."""
    with netns.entered(mesh.netns(machine)):
        own = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with own:
        own.bind((device, 0))
        yield own


def inside(mesh: Cluster, family: Family) -> dict[str, str]:
    """Addresses of the mesh, by what they are, none of which is anybody's business outside."""
    index = FAMILIES.index(family)
    one, other = (
        (node.overlay4, node.overlay6)[index] or ""
        for node in (mesh.node("n1"), mesh.node("n2"))
    )  # fmt: skip
    return {
        "a container of this node": mesh.containers["a1"].addresses[index],
        "a container of another node": mesh.containers["b1"].addresses[index],
        "this node in the overlay": one,
        "another node in the overlay": other,
        "a VIP": mesh.vips("sink-a1")[index],
        "another VIP": mesh.vips("sink-b1")[index],
    }


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_neighbour_reaches_nothing_inside_and_is_nobody_inside(
    mesh: Cluster, sinks: Sinks, family: Family
) -> None:
    index = FAMILIES.index(family)
    own, node = mesh.addresses("c1")[index], mesh.addresses("n1")[index]
    for replica in PUBLISHED:
        sinks.open(mesh.netns(replica), family)
    sinks.open(mesh.netns("n1"), family)
    hostile = {
        f"to {what}": Datagram(own, address, SINK, f"to {what}".encode())
        for what, address in inside(mesh, family).items()
    }
    for what, address in inside(mesh, family).items():
        for port in (*PUBLISHED.values(), SINK):
            said = f"as {what} to port {port}"
            hostile[said] = Datagram(address, node, port, said.encode())
    loopback = ("127.0.0.1", "::1")[index]
    hostile["to loopback"] = Datagram(own, loopback, SINK, b"to loopback")

    with link(mesh, "c1") as wire:
        ends = mac(mesh, "c1"), mac(mesh, "n1")
        for datagram in hostile.values():
            wire.send(datagram.frame(*ends))
        for port in (*PUBLISHED.values(), SINK):
            wire.send(Datagram(own, node, port, LAST).frame(*ends))
        arrived = await sinks.until_last()

    assert arrived == set()


async def test_nobody_enters_through_the_steering_port(mesh: Cluster, sinks: Sinks) -> None:
    settings = mesh.records.get("cluster")
    own, node = mesh.addresses("c1")[0], mesh.addresses("n1")[0]
    steering = mac(mesh, "n2", "warren-x0"), mac(mesh, "n1", "warren-x0")
    for replica in PUBLISHED:
        sinks.open(mesh.netns(replica), Family.V4)
    replicas = [mesh.containers[replica].addresses[0] for replica in PUBLISHED]
    injected = [
        Datagram(source, replica, SINK, f"{source} to {replica}".encode()).frame(*steering)
        for source in (own, *inside(mesh, Family.V4).values())
        for replica in replicas
    ]

    with link(mesh, "c1") as wire:
        ends = mac(mesh, "c1"), mac(mesh, "n1")
        for frame in injected:
            for target in (node, mesh.node("n1").overlay4 or ""):
                tunnelled = vxlan(settings["steeringVni"], frame)
                outer = Datagram(own, target, settings["steeringPort"], tunnelled)
                wire.send(outer.frame(*ends))
        for port in PUBLISHED.values():
            wire.send(Datagram(own, node, port, LAST).frame(*ends))
        arrived = await sinks.until_last()

    assert arrived == set()


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_container_cannot_pass_for_anybody_else(
    mesh: Cluster, sinks: Sinks, family: Family
) -> None:
    index = FAMILIES.index(family)
    own = mesh.containers["a2"].addresses[index]
    target = mesh.containers["b1"].addresses[index]
    sinks.open(mesh.netns("b1"), family)
    others = {**inside(mesh, family), "a client": mesh.addresses("c1")[index]}
    others.pop("a container of this node")  # of the same subnet: only the bridge could tell

    with link(mesh, "a2") as wire:
        ends = mac(mesh, "a2"), mac(mesh, "n1", "warren-br0")
        for what, address in others.items():
            wire.send(Datagram(address, target, SINK, what.encode()).frame(*ends))
        wire.send(Datagram(own, target, SINK, LAST).frame(*ends))
        arrived = await sinks.until_last()

    assert arrived == set()


async def test_a_routed_client_reaches_nothing_inside_through_a_node(mesh: Cluster) -> None:
    """With a router that would gladly send all of the mesh's addresses to a node."""
    settings = mesh.records.get("cluster")
    for prefix, node in (
        *((settings[name], mesh.addresses("n1")[0]) for name in ("containers4", "vips4")),
        (settings["prefix6"], mesh.addresses("n1")[1]),
    ):
        done = await mesh.lab.run("router", ["ip", "route", "replace", prefix, "via", node])
        assert done.code == 0, done.stderr
    targets = [address for f in FAMILIES for address in inside(mesh, f).values()]

    found = await ask_all(mesh.asks(["c2"], targets, PORT), BRIEF)
    dropped = mesh.sh("n1", "nft", "list", "chain", "inet", "mesh", "raw_pre")

    assert set(found) == {SILENCE}
    assert "counter packets 0 " not in dropped

"""What goes between nodes besides requests that succeed: refusals, errors, much data, large
datagrams; and what comes to the same replica by different ways.

On every backend, one lab of three nodes; replica b1 is on n2, a1 on n1 only asks.  Reverse-path
filters are strict, but for iptables, which cannot give errors another source.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from mesh.dataplane.conntrack import Conntrack
from mesh.model.address import FAMILIES, Family, family_of
from mesh.model.publish import Protocol
from mesh.rules import marks
from tests.support import drivers
from tests.support.cluster import LIMIT, PORT, Cluster, cluster, ingress, put
from tests.support.requests import BRIEF, REFUSED, Answer, Ask, ask_all, born, held

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.requests import Outcome

pytestmark = pytest.mark.cluster

WEB, MASQUERADED, CLOSED, NOBODY, HOST = 8080, 8081, 8082, 8083, 8086
BULK: Final = {"preserve": 8084, "masquerade": 8085}
LISTENER: Final = 5000
MUCH: Final = bytes(300_000)
LARGE: Final = bytes(8000)
"""A datagram of several fragments on any link."""

SMALL_MTU: Final = 1280
UNREACHABLE: Final = "OSError 113"
UNUSED: Final = 200
"""The last part of an address that no container has."""

SOURCE_PORT: Final = 23456
EVERYWHERE: Final = {Family.V4: "0.0.0.0", Family.V6: "::"}


@pytest.fixture(scope="module", params=drivers.KERNEL)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with cluster(
        f"ways-{request.param}", 3, ("a1", "n1"), ("b1", "n2"), backend=request.param
    ) as made:
        strictness = 1 if request.param == "nftables" else 2
        for node in made.nodes:
            made.sh(node.name, "sysctl", "-qw", f"net.ipv4.conf.all.rp_filter={strictness}")
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    mesh.service("web", *ingress(WEB))
    mesh.service("masqueraded", *ingress(MASQUERADED), source="masquerade")
    mesh.service("closed", *ingress(CLOSED, PORT + 1))
    mesh.service("nobody", *ingress(NOBODY))
    for source, port in BULK.items():
        mesh.service(f"bulk-{source}", *ingress(port, LISTENER)[:1], source=source)
    mesh.service("host", *ingress(HOST, LISTENER)[:1])
    for service in ("web", "masqueraded", "closed", *(f"bulk-{source}" for source in BULK)):
        mesh.task(service, "b1")
    nobodys = [
        f"{one.rpartition(end)[0]}{end}{UNUSED}"
        for one, end in zip(mesh.containers["b1"].addresses, (".", ":"), strict=True)
    ]
    own = [mesh.node("n2").overlay4, mesh.node("n2").overlay6]
    for service, addresses in (("nobody", nobodys), ("host", own)):
        task = {"service": service, "id": service, "node": "n2", "addresses": addresses}
        put(mesh, f"tasks/{service}/{service}", task)
    services = ("web", "masqueraded", "closed", "nobody", "bulk-preserve", "bulk-masquerade")
    await mesh.allocated(*services, "host")


def lasting(asks: list[Ask]) -> list[Ask]:
    """Those over TCP."""
    return [one for one in asks if one.protocol is Protocol.TCP]


async def expect(asks: list[Ask], wanted: Outcome) -> None:
    found = zip(asks, await ask_all(asks), strict=True)
    assert [(one, outcome) for one, outcome in found if outcome != wanted] == []


async def test_what_a_replica_refuses_its_client_hears_at_once(mesh: Cluster) -> None:
    """RST, and port unreachable, come back the way the request went."""
    inside = mesh.asks(("a1", "n1", "n2"), mesh.vips("closed"), PORT + 1)

    await expect(mesh.from_outside(CLOSED) + inside, REFUSED)


async def test_a_client_hears_that_a_replica_is_not_there(mesh: Cluster) -> None:
    """The replica's node says so, and the ingress node takes that from it and passes it on."""
    await expect(lasting(mesh.from_outside(NOBODY)), UNREACHABLE)


@pytest.mark.parametrize("port", [WEB, MASQUERADED])
async def test_datagrams_larger_than_any_link_arrive(mesh: Cluster, port: int) -> None:
    loop = asyncio.get_running_loop()
    asks = [one for one in mesh.from_outside(port) if one.protocol is Protocol.UDP]
    for one in asks:
        with born(one.netns, one.address, Protocol.UDP) as own:
            await loop.sock_connect(own, (one.address, one.port))
            said = b""
            async with asyncio.timeout(LIMIT):
                while not said:
                    with suppress(OSError):  # the first only finds out what fits
                        async with asyncio.timeout(BRIEF):
                            await loop.sock_sendall(own, LARGE)
                            said = await loop.sock_recv(own, 4096)
            assert b'"b1"' in said


@contextmanager
def echoing(path: str, addresses: dict[Family, str]) -> Iterator[dict[Family, socket.socket]]:
    """Listeners in a namespace."""
    with ExitStack() as room:
        found = {}
        for family, address in addresses.items():
            one = room.enter_context(born(path, address, Protocol.TCP))
            if family is Family.V6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((address, LISTENER))
            one.listen()
            found[family] = one
        yield found


async def exchange(one: Ask, listener: socket.socket) -> int:
    """Send much there and back; the largest segment that the client was told to send."""
    loop = asyncio.get_running_loop()

    async def send(own: socket.socket) -> None:
        await loop.sock_sendall(own, MUCH)

    async def receive(own: socket.socket) -> None:
        left = len(MUCH)
        while left:
            left -= len(await loop.sock_recv(own, 1 << 16)) or left
        assert not left

    async with asyncio.timeout(60):
        with born(one.netns, one.address, Protocol.TCP) as client:
            await loop.sock_connect(client, (one.address, one.port))
            told = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
            served, _ = await loop.sock_accept(listener)
            with served:
                await asyncio.gather(send(client), receive(served))
                await asyncio.gather(send(served), receive(client))
                return told


@pytest.mark.parametrize("source", BULK)
async def test_much_goes_both_ways_in_segments_that_fit(mesh: Cluster, source: str) -> None:
    device = "warren-x0" if source == "preserve" else "warren0"
    (link,) = json.loads(mesh.sh("n1", "ip", "-json", "link", "show", device))
    with echoing(mesh.netns("b1"), EVERYWHERE) as listeners:
        for one in lasting(mesh.from_outside(BULK[source], "n1")):
            family = family_of(one.address)
            largest = await exchange(one, listeners[family])

            assert largest <= link["mtu"] - (40 if family is Family.V4 else 60), one


async def test_a_narrow_link_to_the_client_is_found_out(mesh: Cluster) -> None:
    """Of what does not fit the ingress node tells the replica, whose address it does not have."""
    clients = mesh.addresses("c1")
    (way,) = json.loads(mesh.sh("n1", "ip", "-json", "route", "get", clients[0]))
    routes = [(client, "dev", way["dev"]) for client in clients]
    for route in routes:
        mesh.sh("n1", "ip", "route", "add", *route, "mtu", str(SMALL_MTU))
    try:
        with echoing(mesh.netns("b1"), EVERYWHERE) as listeners:
            for source, port in BULK.items():
                for address in mesh.addresses("n1"):
                    one = Ask(mesh.netns("c1"), address, port, Protocol.TCP)
                    assert await exchange(one, listeners[family_of(address)]), source
    finally:
        for route in routes:
            mesh.sh("n1", "ip", "route", "del", *route)


async def test_a_replica_on_the_hosts_network_answers(mesh: Cluster) -> None:
    own = mesh.node("n2")
    addresses = dict(zip(FAMILIES, (own.overlay4 or "", own.overlay6 or ""), strict=True))
    asks = lasting(mesh.from_outside(HOST) + mesh.asks(("a1", "n1"), mesh.vips("host"), LISTENER))
    with echoing(mesh.netns("n2"), addresses) as listeners:
        for one in asks:
            assert await exchange(one, listeners[family_of(one.address)]), one


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
async def test_one_port_of_a_client_may_come_by_every_node(
    mesh: Cluster, protocol: Protocol
) -> None:
    """To the replica they are the same, and yet each is answered by the way that it came."""
    asks = [one for one in mesh.from_outside(WEB) if one.protocol is protocol]
    async with held(asks, SOURCE_PORT) as first:
        assert {a.replica if isinstance(a, Answer) else a for a in first.values()} == {"b1"}


async def test_the_tunnel_of_steered_packets_is_not_tracked(mesh: Cluster) -> None:
    found = await ask_all(mesh.from_outside(WEB, "n1"))
    with netns.entered(mesh.netns("n1")):
        conntrack = Conntrack(marks.DEFAULT)
    try:
        flows = await conntrack.udp_flows(0, 0)
    finally:
        conntrack.close()

    assert {type(one) for one in found} == {Answer}
    assert flows
    assert 4790 not in {flow.destination[1] for flow in flows}

"""Where services answer and which replicas a node chooses among, as clients see it.

On every backend, one lab of three nodes; every test has a service of its own and leaves the labels
of the nodes as it found them: n1 and n2 in zone a, n3 in zone b.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from mesh.model.publish import Protocol
from tests.support import drivers
from tests.support.cluster import (
    LIMIT,
    PORT,
    Cluster,
    cluster,
    ingress,
    put,
    until,
    until_served,
)
from tests.support.requests import REFUSED, SPOKEN, born, replicas
from tests.support.verbs import document

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.requests import Ask

pytestmark = pytest.mark.cluster

REPLICAS: Final = ("a1", "b1", "d1")
ZONES: Final = {"n1": "a", "n2": "a", "n3": "b"}
TIMES: Final = 8
"""Requests of each kind: none of three replicas is missed by all of them."""


@pytest.fixture(scope="module", params=drivers.KERNEL)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    placed = ((id, {"a": "n1", "b": "n2", "d": "n3"}[id[0]]) for id in (*REPLICAS, "a2", "d2"))
    with cluster(f"placement-{request.param}", 3, *placed, backend=request.param) as made:
        for node, zone in ZONES.items():
            label(made, node, zone=zone)
        yield made


def label(mesh: Cluster, node: str, **labels: str) -> None:
    """Give a node labels, and no others."""
    put(mesh, f"labels/{node}", {"labels": labels})


async def serve(mesh: Cluster, name: str, published: int, **fields: object) -> None:
    """A service with all replicas, in force on every node."""
    mesh.service(name, *ingress(published), **fields)
    for replica in REPLICAS:
        mesh.task(name, replica)
    if "publishOn" in fields:
        await shared(mesh, name, published)
    else:
        await mesh.allocated(name)


async def shared(mesh: Cluster, name: str, published: int) -> None:
    """Wait until a service was given a port on the nodes that it selects."""
    keys = [f"allocations/shares/{p.value}/{published}/{name}" for p in SPOKEN]
    await until(lambda: all(mesh.records.get(key) is not None for key in keys))
    await until(lambda: bool(mesh.vips(name)))


def through(mesh: Cluster, published: int, *nodes: str) -> list[Ask]:
    """From outside, often enough to meet every replica."""
    return TIMES * mesh.from_outside(published, *nodes)


def inside(mesh: Cluster, name: str, container: str) -> list[Ask]:
    """From a container to the VIP."""
    return 2 * TIMES * mesh.asks((container,), mesh.vips(name), PORT)


async def test_a_node_prefers_the_replicas_of_its_zone_while_there_are_any(mesh: Cluster) -> None:
    await serve(mesh, "zoned", 8100, prefer="zone")
    await until_served(through(mesh, 8100, "n1", "n2"), {"a1", "b1"})
    await until_served(through(mesh, 8100, "n3"), {"d1"})
    await until_served(inside(mesh, "zoned", "a2"), {"a1", "b1"})
    await until_served(inside(mesh, "zoned", "d2"), {"d1"})
    there, _ = mesh.addresses("n3")
    source, _ = mesh.addresses("c1")
    shown = document(mesh, "n3", "trace", source, f"{there}:8100")

    put(mesh, "maintenance/n3", {"state": "draining"})
    await until_served(through(mesh, 8100, "n3"), {"a1", "b1"})
    put(mesh, "maintenance/n3", {"state": "active"})
    await until_served(through(mesh, 8100, "n3"), {"d1"})

    label(mesh, "n3", zone="a")
    await until_served(through(mesh, 8100), set(REPLICAS))
    label(mesh, "n3")
    label(mesh, "n2", zone="b")
    await until_served(through(mesh, 8100, "n1"), {"a1"})
    await until_served(through(mesh, 8100, "n3"), set(REPLICAS))
    for node, zone in ZONES.items():
        label(mesh, node, zone=zone)
    await mesh.settled()
    mesh.remove("zoned")

    assert shown["placement"] == "prefer zone: 1 of 3 replicas, those in zone 'b'"
    assert shown["agrees"] is True


@pytest.mark.parametrize(("prefer", "port"), [("local", 8101), ("local-only", 8102)])
async def test_a_local_replica_that_takes_no_connections_does_not_count(
    mesh: Cluster, prefer: str, port: int
) -> None:
    await serve(mesh, prefer, port, prefer=prefer)
    others = {"b1", "d1"} if prefer == "local" else {REFUSED}
    await until_served(through(mesh, port, "n1"), {"a1"})
    await until_served(through(mesh, port, "n2"), {"b1"})

    for change in ({"state": "draining"}, {"weight": 0}):
        mesh.task(prefer, "a1", **change)
        await until_served(through(mesh, port, "n1"), others)
        mesh.task(prefer, "a1")
        await until_served(through(mesh, port, "n1"), {"a1"})
    put(mesh, "maintenance/n1", {"state": "draining"})
    await until_served(through(mesh, port, "n1"), others)
    put(mesh, "maintenance/n1", {"state": "active"})
    await until_served(through(mesh, port, "n1"), {"a1"})
    mesh.remove(prefer)


async def test_clients_of_a_prefix_have_one_replica_through_every_node(mesh: Cluster) -> None:
    """The widest prefix there is: all clients of a family."""
    everybody = {"ipv4": 1, "ipv6": 4}
    await serve(mesh, "near", 8105, affinity="client-ip", affinityPrefix=everybody)
    asks = mesh.from_outside(8105)
    one, other = ([ask for ask in asks if (":" in ask.address) is v6] for v6 in (False, True))
    kept, of_v6 = await replicas(one), await replicas(other)
    (moved,) = kept

    mesh.task("near", moved, state="draining")
    await mesh.settled()
    after = await replicas(one)
    mesh.task("near", moved)
    await mesh.settled()
    again = await replicas(one)
    mesh.remove("near")

    assert (len(after), len(of_v6)) == (1, 1)
    assert after < set(REPLICAS) - kept
    assert again == kept


async def test_published_ports_answer_on_selected_nodes_only(mesh: Cluster) -> None:
    await serve(mesh, "some", 8106, publishOn="zone=a")
    await until_served(through(mesh, 8106, "n1", "n2"), set(REPLICAS))
    await until_served(through(mesh, 8106, "n3"), {REFUSED})
    await until_served(inside(mesh, "some", "d2"), set(REPLICAS))
    from_n3 = TIMES * mesh.asks(("d2", "n3"), mesh.addresses("n1"), 8106)
    await until_served(from_n3, set(REPLICAS))
    there, _ = mesh.addresses("n3")
    source, _ = mesh.addresses("c1")
    shown = document(mesh, "n3", "trace", source, f"{there}:8106")
    with born(mesh.netns("n3"), there, Protocol.TCP) as other:
        other.bind((there, 8106))  # is nobody's here

    label(mesh, "n3", zone="a")
    label(mesh, "n1", zone="b")
    await until_served(through(mesh, 8106, "n2", "n3"), set(REPLICAS))
    await until_served(through(mesh, 8106, "n1"), {REFUSED})
    for node, zone in ZONES.items():
        label(mesh, node, zone=zone)
    await mesh.settled()
    mesh.remove("some")

    assert shown["placement"] == "service some publishes that port, on nodes with zone=a"


async def test_two_services_have_one_port_on_different_nodes(mesh: Cluster) -> None:
    for name, selector, members in (("west", "zone=a", ("a1", "b1")), ("east", "side=e", ("d1",))):
        mesh.service(name, *ingress(8107), publishOn=selector)
        for replica in members:
            mesh.task(name, replica)
        await shared(mesh, name, 8107)
    label(mesh, "n3", side="e")
    await until_served(through(mesh, 8107, "n1", "n2"), {"a1", "b1"})
    await until_served(through(mesh, 8107, "n3"), {"d1"})

    label(mesh, "n3", side="e", zone="a")
    label(mesh, "n1", side="e")
    await until_served(through(mesh, 8107, "n2", "n3"), {"a1", "b1"})
    await until_served(through(mesh, 8107, "n1"), {"d1"})
    lost = "port 8107/tcp on node n3 belongs to service west"
    await until(lambda: lost in mesh.problems("n3"))
    unlabelled = mesh.problems("n1")
    await mesh.kill("n3")
    await mesh.start_again("n3")
    await until_served(through(mesh, 8107, "n3"), {"a1", "b1"})

    mesh.remove("west")
    await until_served(through(mesh, 8107, "n1", "n3"), {"d1"})
    await until_served(through(mesh, 8107, "n2"), {REFUSED})
    await until(lambda: lost not in mesh.problems("n3"))
    for node, zone in ZONES.items():
        label(mesh, node, zone=zone)
    await mesh.settled()
    mesh.remove("east")

    assert "8107" not in unlabelled


LOCAL: Final = 9100

Told = tuple[int, dict[str, Any]] | str
"""Status and body of an answer over HTTP, or what became of the connection."""


async def asked(mesh: Cluster, client: str, address: str, port: int) -> Told:
    """What a load balancer hears that asks after a node's health."""
    loop = asyncio.get_running_loop()
    with born(mesh.netns(client), address, Protocol.TCP) as own:
        try:
            async with asyncio.timeout(LIMIT):
                await loop.sock_connect(own, (address, port))
                await loop.sock_sendall(own, b"GET /any HTTP/1.1\r\nHost: x\r\n\r\n")
                said = b""
                while more := await loop.sock_recv(own, 4096):
                    said += more
        except OSError as error:
            return type(error).__name__
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def overlay(mesh: Cluster, node: str) -> tuple[str, ...]:
    """A node's addresses within the mesh."""
    one = mesh.node(node)
    return tuple(address for address in (one.overlay4, one.overlay6) if address is not None)


async def until_health(mesh: Cluster, name: str, port: int, **nodes: int | None) -> None:
    """Wait until nodes tell, on all addresses, of so many replicas, or refuse."""
    wanted = {
        (node, address): "ConnectionRefusedError"
        if count is None
        else (200 if count else 503, {"service": name, "node": node, "localReplicas": count})
        for node, count in nodes.items()
        for address in (*mesh.addresses(node), *overlay(mesh, node))
    }
    heard: dict[tuple[str, str], Told] = {}

    async def told_so() -> bool:
        for node, address in wanted:
            client = "c1" if address in mesh.addresses(node) else node
            heard[node, address] = await asked(mesh, client, address, port)
        return heard == wanted

    try:
        await until(told_so)
    except AssertionError:
        raise AssertionError(f"heard {heard}, not {wanted}") from None


async def test_nodes_tell_load_balancers_whether_they_have_replicas(mesh: Cluster) -> None:
    mesh.service("lb", *ingress(8103), prefer="local-only", localHealthPort=LOCAL)
    mesh.task("lb", "a1")
    mesh.task("lb", "a2")
    mesh.task("lb", "b1")
    await mesh.allocated("lb")
    await until_health(mesh, "lb", LOCAL, n1=2, n2=1, n3=0)

    mesh.task("lb", "a1", state="draining")
    mesh.task("lb", "b1", weight=0)
    await until_health(mesh, "lb", LOCAL, n1=1, n2=0, n3=0)
    put(mesh, "maintenance/n1", {"state": "draining"})
    mesh.task("lb", "b1")
    await until_health(mesh, "lb", LOCAL, n1=0, n2=1, n3=0)
    put(mesh, "maintenance/n1", {"state": "active"})
    await until_health(mesh, "lb", LOCAL, n1=1, n2=1, n3=0)

    await mesh.kill("n2")
    await until_health(mesh, "lb", LOCAL, n1=1, n2=None, n3=0)
    await mesh.start_again("n2")
    await until_health(mesh, "lb", LOCAL, n1=1, n2=1, n3=0)

    mesh.remove("lb")
    await until_health(mesh, "lb", LOCAL, n1=None, n2=None, n3=None)


async def test_a_health_port_that_a_process_has_is_told_and_served_when_it_is_gone(
    mesh: Cluster,
) -> None:
    there, _ = mesh.addresses("n3")
    with born(mesh.netns("n3"), there, Protocol.TCP) as other:
        other.bind((there, LOCAL + 1))
        other.listen()
        mesh.service("taken", *ingress(8104), localHealthPort=LOCAL + 1)
        mesh.task("taken", "d1")
        await mesh.allocated("taken")
        await until(lambda: f"local health port {LOCAL + 1}/tcp" in mesh.problems("n3"))
        await until_health(mesh, "taken", LOCAL + 1, n1=0, n2=0)
    await until_health(mesh, "taken", LOCAL + 1, n1=0, n2=0, n3=1)
    await until(lambda: "local health" not in mesh.problems("n3"))
    mesh.remove("taken")

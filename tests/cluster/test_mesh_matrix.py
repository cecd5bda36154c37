"""Who answers whom: every kind of client to every kind of target, and what address replicas see.

One lab of three nodes, which no test disturbs:

    n1  a1 a2 k1    n2  b1 k2    n3  k3      a, b: replicas; k: containers that only ask
    c1  on the nodes' link, c2 behind a router
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from mesh.model.address import FAMILIES, Family, family_of
from mesh.model.publish import Protocol
from tests.support.cluster import LIMIT, PORT, Cluster, cluster, host, ingress
from tests.support.requests import (
    BRIEF,
    REFUSED,
    SILENCE,
    SPOKEN,
    UNLIKELY,
    Answer,
    Ask,
    Outcome,
    ask_all,
    strayed,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

pytestmark = pytest.mark.cluster

CLIENTS: Final = ("c1", "c2")
NODES: Final = ("n1", "n2", "n3")
CONTAINERS: Final = {"k1": "n1", "k2": "n2", "k3": "n3"}
INSIDE: Final = (*CONTAINERS, *NODES)
EVERYBODY: Final = (*CLIENTS, *INSIDE)

WEB, MASQUERADED, HOSTED, EMPTY, WEIGHTED = 8080, 8081, 8082, 8083, 8084
SOURCES: Final = {"web": WEB, "masqueraded": MASQUERADED}
"""Services by what they show of a client from outside; clients inside are always themselves."""

REPLICAS: Final = {"a1": "n1", "a2": "n1", "b1": "n2"}
WEIGHTS: Final = {"web": {"a1": 1, "a2": 1, "b1": 1}, "weighted": {"a1": 5, "a2": 1, "b1": 3}}
DRAWS: Final = 160


@pytest.fixture(scope="module", params=("nftables", "iptables-nft", "iptables-legacy"))
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with cluster(
        "matrix", 3, *REPLICAS.items(), *CONTAINERS.items(), backend=request.param
    ) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    for service, weights in WEIGHTS.items():
        mesh.service(service, *ingress(WEB if service == "web" else WEIGHTED))
        for replica, weight in weights.items():
            mesh.task(service, replica, weight=weight)
    mesh.service("masqueraded", *ingress(MASQUERADED), source="masquerade")
    for replica in REPLICAS:
        mesh.task("masqueraded", replica)
    mesh.service("hosted", *host(HOSTED))
    mesh.task("hosted", "b1")
    mesh.service("empty", *ingress(EMPTY))
    await mesh.allocated(*WEIGHTS, "masqueraded", "hosted", "empty")


class Case(NamedTuple):
    """A request, and where it comes from by name."""

    client: str
    ask: Ask

    @property
    def family(self) -> Family:
        return family_of(self.ask.address)


def cases(mesh: Cluster, clients: Iterable[str], target: tuple[str, ...], port: int) -> list[Case]:
    """A request of each client to each address, on TCP and UDP."""
    return [
        Case(client, Ask(mesh.netns(client), address, port, protocol))
        for client in clients
        for address in target
        for protocol in SPOKEN
    ]


async def outcomes(cases: list[Case], patience: float | None = None) -> list[tuple[Case, Outcome]]:
    asks = [case.ask for case in cases]
    found = await (ask_all(asks) if patience is None else ask_all(asks, patience))
    return list(zip(cases, found, strict=True))


def own_address(mesh: Cluster, client: str, family: Family) -> str:
    """What a client calls itself: its address on its only link."""
    index = FAMILIES.index(family)
    if client in mesh.containers:
        return mesh.containers[client].addresses[index]
    return mesh.addresses(client)[index]


def overlay(mesh: Cluster, node: str, family: Family) -> str:
    one = mesh.node(node)
    found = (one.overlay4, one.overlay6)[FAMILIES.index(family)]
    assert found is not None
    return found


def expect_all(found: list[tuple[Case, Outcome]], wanted: Outcome) -> None:
    assert [(case, outcome) for case, outcome in found if outcome != wanted] == []


# ---- ingress


@pytest.mark.parametrize("node", NODES)
async def test_a_published_port_shows_clients_as_they_are(mesh: Cluster, node: str) -> None:
    found = await outcomes(6 * cases(mesh, CLIENTS, mesh.addresses(node), WEB))

    for case, answer in found:
        assert isinstance(answer, Answer), (case, answer)
        assert answer.client == own_address(mesh, case.client, case.family), case
    assert {a.replica for _, a in found if isinstance(a, Answer)} == {"a1", "a2", "b1"}


@pytest.mark.parametrize("service", SOURCES)
@pytest.mark.parametrize("node", NODES)
async def test_a_published_port_shows_containers_as_they_are(
    mesh: Cluster, node: str, service: str
) -> None:
    found = await outcomes(4 * cases(mesh, CONTAINERS, mesh.addresses(node), SOURCES[service]))

    for case, answer in found:
        assert isinstance(answer, Answer), (case, answer)
        assert answer.client == own_address(mesh, case.client, case.family), case
    assert {a.replica for _, a in found if isinstance(a, Answer)} == REPLICAS.keys()


@pytest.mark.parametrize("service", SOURCES)
@pytest.mark.parametrize("node", NODES)
async def test_a_published_port_shows_nodes_by_an_address_of_theirs(
    mesh: Cluster, node: str, service: str
) -> None:
    found = await outcomes(4 * cases(mesh, NODES, mesh.addresses(node), SOURCES[service]))

    for case, answer in found:
        assert isinstance(answer, Answer), (case, answer)
        own = overlay(mesh, case.client, case.family)
        local = {own, own_address(mesh, case.client, case.family)}
        assert answer.client in (local if answer.node == case.client else {own}), case
    assert {a.replica for _, a in found if isinstance(a, Answer)} == REPLICAS.keys()


@pytest.mark.parametrize("node", NODES)
async def test_a_masquerading_service_sees_the_ingress_node(mesh: Cluster, node: str) -> None:
    found = await outcomes(6 * cases(mesh, CLIENTS, mesh.addresses(node), MASQUERADED))

    for case, answer in found:
        assert isinstance(answer, Answer), (case, answer)
        here, there = own_address(mesh, case.client, case.family), overlay(mesh, node, case.family)
        assert answer.client == (here if answer.node == node else there), case
    assert {a.replica for _, a in found if isinstance(a, Answer)} == REPLICAS.keys()


@pytest.mark.parametrize("node", NODES)
async def test_a_published_port_without_a_backend_is_refused(mesh: Cluster, node: str) -> None:
    expect_all(await outcomes(cases(mesh, EVERYBODY, mesh.addresses(node), EMPTY)), REFUSED)


# ---- VIPs


@pytest.mark.parametrize("service", SOURCES)
async def test_a_vip_answers_whoever_is_inside(mesh: Cluster, service: str) -> None:
    found = await outcomes(4 * cases(mesh, INSIDE, mesh.vips(service), PORT))

    for case, answer in found:
        assert isinstance(answer, Answer), (case, answer)
        inside = case.client in CONTAINERS
        own = (own_address if inside else overlay)(mesh, case.client, case.family)
        assert answer.client == own, case
    assert {a.replica for _, a in found if isinstance(a, Answer)} == REPLICAS.keys()


@pytest.mark.parametrize("service", SOURCES)
async def test_replicas_reach_themselves_and_each_other(mesh: Cluster, service: str) -> None:
    """Each through the VIP, and through the published port of every node."""
    through = [(mesh.vips(service), PORT)]
    through += [(mesh.addresses(node), SOURCES[service]) for node in NODES]
    asked = [case for way, port in through for case in cases(mesh, REPLICAS, way, port)]

    found = await outcomes(3 * asked)

    for case, answer in found:
        assert isinstance(answer, Answer), (case, answer)
        itself = answer.client == own_address(mesh, case.client, case.family)
        assert itself is (answer.replica != case.client), case  # or it would answer directly
    for client in REPLICAS:
        told = {a.replica for case, a in found if case.client == client and isinstance(a, Answer)}
        assert told == REPLICAS.keys()


async def test_a_replica_reaches_itself_through_its_host_port(mesh: Cluster) -> None:
    through = cases(mesh, ["b1"], mesh.addresses("n2"), HOSTED)
    through += cases(mesh, ["b1"], mesh.vips("hosted"), PORT)

    for case, answer in await outcomes(through):
        assert isinstance(answer, Answer), (case, answer)
        assert answer.replica == "b1"
        assert answer.client not in mesh.containers["b1"].addresses


async def test_a_vip_without_a_backend_is_refused(mesh: Cluster) -> None:
    expect_all(await outcomes(cases(mesh, INSIDE, mesh.vips("empty"), PORT)), REFUSED)


@pytest.mark.parametrize("port", [PORT + 1, WEB])
async def test_a_vip_refuses_all_but_target_ports(mesh: Cluster, port: int) -> None:
    expect_all(await outcomes(cases(mesh, INSIDE, mesh.vips("web"), port)), REFUSED)


async def test_an_address_that_is_nobodys_vip_is_silent(mesh: Cluster) -> None:
    cluster = mesh.records.get("cluster")
    nobodys = ("10.1.99.99", f"{cluster['prefix6'].removesuffix('::/48')}:f000::9999")

    for case, outcome in await outcomes(cases(mesh, INSIDE, nobodys, PORT), BRIEF):
        # The kernel tells a local sender at once that its datagram was dropped: EPERM.
        told = case.client in NODES and case.ask.protocol is Protocol.UDP
        assert outcome == (REFUSED if told else SILENCE), case


# ---- host mode


async def test_a_host_port_answers_on_the_replicas_node(mesh: Cluster) -> None:
    found = await outcomes(cases(mesh, (*CLIENTS, "k2", "n2"), mesh.addresses("n2"), HOSTED))

    for case, answer in found:
        assert isinstance(answer, Answer), (case, answer)
        assert answer.replica == "b1"
        assert answer.client == own_address(mesh, case.client, case.family), case


async def test_other_nodes_come_to_a_host_port_from_outside(mesh: Cluster) -> None:
    found = await outcomes(cases(mesh, ("n1", "n3", "k1", "k3"), mesh.addresses("n2"), HOSTED))

    for case, answer in found:
        assert isinstance(answer, Answer), (case, answer)
        node = CONTAINERS.get(case.client, case.client)
        assert answer.client == own_address(mesh, node, case.family), case


@pytest.mark.parametrize("node", ["n1", "n3"])
async def test_a_host_port_is_refused_on_other_nodes(mesh: Cluster, node: str) -> None:
    expect_all(await outcomes(cases(mesh, EVERYBODY, mesh.addresses(node), HOSTED)), REFUSED)


# ---- other clients of etcd

AUTOMATION: Final = """
import json, sys
import etcd3
port, (service, tasks) = int(sys.argv[1]), json.load(sys.stdin)
client = etcd3.client(host="127.0.0.1", port=port, timeout=60)
events, cancel = client.watch_prefix("/mesh/allocations/")
client.put("/mesh/services/" + service["name"], json.dumps(service))
for task in tasks:
    key = "/mesh/tasks/" + service["name"] + "/" + task["id"]
    assert client.transaction(
        compare=[client.transactions.version(key) == 0],
        success=[client.transactions.put(key, json.dumps(task))], failure=[],
    )[0]
wanted, found = {"vips", "ports"}, {}
for event in events:
    if json.loads(event.value).get("service") == service["name"]:
        found[event.key.decode()] = json.loads(event.value)
        wanted.discard(event.key.decode().split("/")[3])
    if not wanted:
        break
cancel()
reports = client.get_prefix("/mesh/applied/")
print(json.dumps([found, {meta.key.decode(): json.loads(value) for value, meta in reports}]))
"""
"""What somebody else's program does with the `etcd3` package: write, and read what became of it."""


def automation(port: str, *said: object) -> Any:
    done = subprocess.run(
        (sys.executable, "-c", AUTOMATION, port),
        input=json.dumps(said), capture_output=True, text=True, check=False, timeout=LIMIT,
        env=os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(importlib.util.find_spec("etcd3") is None, reason="etcd3 is not installed")
async def test_what_the_etcd3_package_writes_is_served(mesh: Cluster) -> None:
    service = {"name": "foreign", "ports": [{"target": PORT, "published": 8095, "mode": "ingress"}]}
    replicas = [mesh.containers[name] for name in ("a2", "b1")]
    tasks = [
        {"service": "foreign", "id": one.id, "node": one.node, "addresses": one.addresses}
        for one in replicas
    ]

    allocated, applied = automation(mesh.status.etcd.rpartition(":")[2], service, tasks)
    await mesh.allocated("foreign")
    (vips,) = (found["addresses"] for key, found in allocated.items() if "/vips/" in key)
    published = mesh.asks(CLIENTS, mesh.addresses("n3"), 8095)
    found = await ask_all(
        one
        for one in 8 * (published + mesh.asks(["k3"], vips, PORT))
        if one.protocol is Protocol.TCP
    )
    mesh.remove("foreign")
    await mesh.settled()

    assert {a.replica if isinstance(a, Answer) else a for a in found} == {"a2", "b1"}
    assert "/mesh/allocations/ports/tcp/8095" in allocated
    assert applied.keys() == {f"/mesh/applied/{node}" for node in NODES}
    for report in applied.values():
        assert report["problems"] == []


# ---- balance


@pytest.mark.parametrize("service", WEIGHTS)
@pytest.mark.parametrize("protocol", SPOKEN)
@pytest.mark.parametrize("family", FAMILIES)
async def test_every_node_spreads_connections_by_weight(
    mesh: Cluster, family: Family, protocol: Protocol, service: str
) -> None:
    index, weights = FAMILIES.index(family), WEIGHTS[service]
    port = WEB if service == "web" else WEIGHTED
    outside = [Ask(mesh.netns("c2"), mesh.addresses(n)[index], port, protocol) for n in NODES]
    vip = Ask(mesh.netns("k3"), mesh.vips(service)[index], PORT, protocol)

    for one in (*outside, vip):
        assert strayed(await ask_all([one] * DRAWS), weights) < UNLIKELY, one

"""Published ports next to the node's own processes, from the record to the connection.

A port that leads to a service can be taken by nobody; one that somebody listens on is not taken
from them; a range comes and goes whole.  A lab per backend; every test leaves it as it found it.
"""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import asynccontextmanager
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from mesh.lab import environment
from mesh.model.publish import Protocol
from tests.support import drivers
from tests.support.cluster import PORT, Cluster, cluster, host, ingress, until, until_served
from tests.support.requests import REFUSED, Answer, Ask, ask, replicas
from tests.support.scrape import scrape
from tests.support.stranger import STRANGER, can_bind, stranger
from tests.support.watched import generations, watched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.cluster

HOST, MESHED, USED, LATE = range(8090, 8094)
SSH: Final = 22
RANGE: Final = range(9000, 10000)
KNOCKED: Final = RANGE[::111]
"""Those of the range that clients try."""

EPHEMERAL: Final = 32768
"""The first port that Linux lends to connections, and the mesh gives out."""


@pytest.fixture(scope="module", params=drivers.KERNEL)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    placed = (("a1", "n1"), ("b1", "n2"))
    with cluster(f"held-{request.param}", 2, *placed, backend=request.param) as made:
        yield made


def serve(mesh: Cluster, service: str, *tasks: str) -> None:
    for task in tasks:
        mesh.task(service, task)


async def withdraw(mesh: Cluster, *services: str) -> None:
    for service in services:
        mesh.remove(service)
    await mesh.settled()
    await until(lambda: not mesh.records.names("allocations/ports/"), "all ports are free again")
    await until(lambda: not mesh.records.names("published/"), "no record is left")


def can_bind_on(mesh: Cluster, port: int, *protocols: Protocol) -> list[str]:
    """The nodes on which a process can have anything of a port."""
    paths = {node.name: mesh.netns(node.name) for node in mesh.nodes}
    return [name for name, path in paths.items() if can_bind(path, port, *protocols)]


async def test_nobody_can_take_a_port_that_leads_to_a_service(mesh: Cluster) -> None:
    mesh.service("host", *host(HOST), {"target": PORT}, {"target": PORT, "protocol": "udp"})
    mesh.service("meshed", *ingress(MESHED))
    serve(mesh, "host", "a1")
    serve(mesh, "meshed", "a1")
    await mesh.allocated("meshed")
    await until(lambda: len(mesh.records.get("published/n1/a1") or ()) == 4)
    record = mesh.records.get("published/n1/a1")
    await until_served(mesh.from_outside(HOST, "n1"), {"a1"})

    def takers() -> list[list[str]]:
        given = [(one["hostPort"], Protocol(one["protocol"])) for one in record]
        return [can_bind_on(mesh, *one) for one in given] + [can_bind_on(mesh, MESHED)]

    before = takers()
    await mesh.kill("n1")
    files = Path(mesh.node("n1").config).parent / "ports"  # the node knows it by another name
    mesh.configure("n1", published_dir=str(environment.CONFIG.parent / "ports"))
    await mesh.start_again("n1")
    await mesh.settled()
    await until((files / "a1.json").exists)
    told = json.loads((files / "a1.json").read_text())
    after, again = takers(), mesh.records.get("published/n1/a1")
    served = await replicas([*mesh.from_outside(HOST, "n1"), *mesh.from_outside(MESHED)])
    await withdraw(mesh, "host", "meshed")
    await until(lambda: takers() == [["n1", "n2"]] * 5, "all of them can be had again")
    await until(lambda: not list(files.iterdir()), "the file goes with its task")

    assert before == after == [["n2"]] * 4 + [[]]
    assert told == again == record
    assert served == {"a1"}


async def test_a_host_port_is_not_taken_from_who_listens_and_given_when_they_go(
    mesh: Cluster,
) -> None:
    async with stranger(mesh, "n1", USED):
        mesh.service("host", *host(USED))
        serve(mesh, "host", "a1", "b1")
        await mesh.settled()
        await until_served(mesh.from_outside(USED, "n2"), {"b1"})
        owner = await replicas(mesh.from_outside(USED, "n1"))
        await until(lambda: "is used by python" in mesh.problems("n1"))
        told = mesh.problems("n1")
    await until_served(mesh.from_outside(USED, "n1"), {"a1"})
    await until(lambda: mesh.problems("n1") == "[]")
    await withdraw(mesh, "host")

    assert owner == {STRANGER}
    assert f"port {USED}/tcp on node n1 is used by python" in told
    assert "task a1 of service host" in told
    assert "(pid " in told


async def test_an_ingress_port_is_served_by_the_nodes_on_which_nobody_listens(
    mesh: Cluster,
) -> None:
    async with stranger(mesh, "n1", USED):
        mesh.service("meshed", *ingress(USED))
        serve(mesh, "meshed", "a1")
        await mesh.allocated("meshed")
        await until_served(mesh.from_outside(USED, "n2"), {"a1"})
        owner = await replicas(mesh.from_outside(USED, "n1"))
        by_vip = await replicas(mesh.asks(("n1",), mesh.vips("meshed"), PORT))
        await until(lambda: "is used by python" in mesh.problems("n1"))
        told = mesh.problems("n1"), mesh.problems("n2")

        forced = [{**port, "force": True} for port in ingress(USED)]
        mesh.service("meshed", *forced)
        await until_served(mesh.from_outside(USED), {"a1"})
        await until(lambda: mesh.problems("n1") == "[]")
        mesh.service("meshed", *ingress(USED))
        await mesh.settled()
        kept = await replicas(mesh.from_outside(USED))
    await until(lambda: can_bind_on(mesh, USED) == [], "held once the listener is gone")
    await withdraw(mesh, "meshed")

    assert owner == {STRANGER}
    assert by_vip == {"a1"}
    assert "service meshed" in told[0]
    assert told[1] == "[]"
    assert kept == {"a1"}  # it is in force, and is not given up again


async def test_who_comes_to_listen_while_the_agent_is_away_does_not_disturb_a_service(
    mesh: Cluster,
) -> None:
    mesh.service("meshed", *ingress(LATE))
    mesh.service("host", {"target": PORT})
    serve(mesh, "meshed", "a1")
    serve(mesh, "host", "a1")
    await mesh.allocated("meshed")
    await until_served(mesh.from_outside(LATE), {"a1"})
    await until(lambda: bool(mesh.records.get("published/n1/a1")))
    dynamic = mesh.records.get("published/n1/a1")[0]["hostPort"]

    await mesh.kill("n1")
    async with stranger(mesh, "n1", LATE), stranger(mesh, "n1", dynamic):
        await mesh.start_again("n1")
        await until(lambda: mesh.problems("n1").count("listens on port") == 3)
        told = mesh.problems("n1")
        served = await replicas(mesh.from_outside(LATE, "n1"))
        # Where the agent was away for long, the others missed its node, too.
        await until_served(mesh.from_outside(LATE), {"a1"})
        again = mesh.records.get("published/n1/a1")[0]["hostPort"]
    await until(lambda: mesh.problems("n1") == "[]")
    held = can_bind_on(mesh, LATE)
    await withdraw(mesh, "meshed", "host")

    assert f"listens on port {LATE}/tcp of node n1, which leads to the service" in told
    assert STRANGER not in served
    assert again == dynamic
    assert held == []


async def test_ssh_goes_on_whatever_somebody_publishes(mesh: Cluster) -> None:
    async with stranger(mesh, "n1", SSH):
        mesh.service("hijack", {"target": PORT, "published": SSH, "mode": "ingress"})
        serve(mesh, "hijack", "b1")
        await until(lambda: mesh.records.get("status/services/hijack") is not None)
        await mesh.settled()
        owner = await replicas(mesh.from_outside(SSH, "n1"))
        reason = mesh.records.get("status/services/hijack")["problems"][0]["message"]
        beside = await replicas(mesh.from_outside(SSH, "n2"))
        mesh.remove("hijack")
        await mesh.settled()

    assert owner == {STRANGER}
    assert beside == {REFUSED}
    assert "22/tcp is protected" in reason


async def test_numbers_that_somebody_has_are_not_given_out(mesh: Cluster) -> None:
    first = mesh.records.get("cluster")["hostPorts"][0]
    async with stranger(mesh, "n1", 30000), stranger(mesh, "n2", 30001):
        listening = "listeners/n2"
        await until(lambda: "30001" in str(mesh.records.get(listening)))
        await until(lambda: "30000" in str(mesh.records.get("listeners/n1")))
        mesh.service("dyn", {"target": PORT, "mode": "ingress"})
        await mesh.allocated("dyn")
        await until(lambda: bool(mesh.records.names("allocations/ports/tcp/")))
        given = list(mesh.records.under("allocations/ports/tcp/"))
        await withdraw(mesh, "dyn")
    mesh.service("dyn", {"target": PORT}, {"target": PORT, "protocol": "udp"})
    serve(mesh, "dyn", "a1")
    await until(lambda: bool(mesh.records.get("published/n1/a1")))
    base = mesh.records.get("published/n1/a1")[0]["hostPort"]
    await withdraw(mesh, "dyn")
    async with stranger(mesh, "n1", base + 1):
        mesh.service("dyn", {"target": PORT})
        serve(mesh, "dyn", "a1")
        await until(lambda: bool(mesh.records.get("published/n1/a1")))
        skipped = mesh.records.get("published/n1/a1")[0]["hostPort"]
        await until_served(mesh.asks(("c1",), mesh.addresses("n1"), skipped)[::2], {"a1"})
        await withdraw(mesh, "dyn")

    assert given == ["30002"] or int(given[0]) > 30001
    assert base >= first
    assert skipped == base + 2


async def test_the_kernel_lends_no_port_of_a_dynamic_range_while_no_agent_runs(
    mesh: Cluster,
) -> None:
    key = "net.ipv4.ip_local_reserved_ports"
    reserved = mesh.sh("n1", "sysctl", "-n", key).strip()
    lent = mesh.sh("n1", "sysctl", "-n", "net.ipv4.ip_local_port_range").split()

    await mesh.signal("n1", signal.SIGTERM)
    await until(lambda: not mesh.agent_runs("n1"))
    after = mesh.sh("n1", "sysctl", "-n", key).strip()
    await mesh.start_again("n1")
    await mesh.settled()

    assert lent[0] == str(EPHEMERAL)
    assert reserved == after == f"{EPHEMERAL}-32999"


# ---- ranges


def ranged() -> list[dict[str, object]]:
    """The range, each port with a pool of its own but for those that are tried."""
    return [
        {"target": PORT if n in KNOCKED else n, "published": n, "mode": "ingress"} for n in RANGE
    ]


async def writes(mesh: Cluster) -> list[int]:
    """How often each node's agent has written rules."""
    backend = mesh.records.get("applied/n1")["backend"]
    program = "netlink" if backend == "nftables" else f"{backend}-restore"
    found = [await scrape(mesh, node.name) for node in mesh.nodes]
    return [each.sum("network_iptables_commands_total", program=program) for each in found]


def forwarded(mesh: Cluster) -> list[int]:
    """How many ports each node forwards, both families together."""
    found = [mesh.elements(node.name, "meshports") for node in mesh.nodes]
    return [sum(len(lines.splitlines()) for lines in each.values()) for each in found]


@asynccontextmanager
async def knocking(mesh: Cluster) -> AsyncIterator[list[list[bool]]]:
    """Try ports of the range on every node, one after the other, for the time of a block: for each
    node in which order they were answered, or not.
    """
    paths, going = (mesh.netns("c1"), mesh.netns("c2")), True

    async def knock(address: str, found: list[bool]) -> None:
        for path, port in cycle(product(paths, KNOCKED)):
            outcome = await ask(Ask(path, address, port, Protocol.TCP))
            assert isinstance(outcome, Answer) or outcome == REFUSED
            found.append(isinstance(outcome, Answer))
            if not going and len(found) > len(KNOCKED):
                return

    addresses = [mesh.addresses(node.name)[0] for node in mesh.nodes]
    order: list[list[bool]] = [[] for _ in addresses]
    async with asyncio.TaskGroup() as tasks:
        for address, found in zip(addresses, order, strict=True):
            tasks.create_task(knock(address, found))
        await until(lambda: all(map(len, order)))
        yield order
        going = False


async def test_a_range_comes_and_goes_in_one_change_of_each_node(mesh: Cluster) -> None:
    in_one_step = mesh.records.get("applied/n1")["backend"] == "nftables"
    single = {"target": PORT, "published": MESHED, "mode": "ingress"}
    mesh.service("range", single, vip="none")
    serve(mesh, "range", "a1", "b1")
    await mesh.allocated("range")
    begun = await writes(mesh)

    with watched(mesh, "n1") as told:
        async with knocking(mesh) as coming:
            mesh.service("range", single, *ranged(), vip="none")
            await mesh.allocated("range")
        come, there = await writes(mesh), forwarded(mesh)
        async with knocking(mesh) as going:
            mesh.service("range", single, vip="none")
            await mesh.settled()
            await until(lambda: len(mesh.records.names("allocations/ports/")) == 1, "freed")
    gone, left = await writes(mesh), forwarded(mesh)
    await withdraw(mesh, "range")

    assert [after - before for before, after in zip(begun, come, strict=True)] == [1, 1]
    removals = 2 if in_one_step else 1  # pools that frontends led to go after them
    assert [after - before for before, after in zip(come, gone, strict=True)] == [removals] * 2
    assert (there, left) == ([2 * (len(RANGE) + 1)] * 2, [2] * 2)
    ends = [(order[0], order[-1]) for order in (*coming, *going)]
    assert ends == [(False, True)] * 2 + [(True, False)] * 2
    if in_one_step:  # ipset takes one entry after the other
        assert [sorted(order) for order in coming] == coming
        assert [sorted(order, reverse=True) for order in going] == going
        assert generations(told, "meshports") == [2 * len(RANGE)] * 2


async def test_of_a_range_only_what_a_process_has_on_a_node_is_left_out_there(
    mesh: Cluster,
) -> None:
    async with stranger(mesh, "n1", KNOCKED[1]):
        mesh.service("range", *ranged(), vip="none")
        serve(mesh, "range", "a1")
        await mesh.allocated("range")
        there = forwarded(mesh)
        others = [ask for n in KNOCKED for ask in tcp(mesh.from_outside(n)) if n != KNOCKED[1]]
        served = await replicas(others)
        owner = await replicas(tcp(mesh.from_outside(KNOCKED[1], "n1")))
        elsewhere = await replicas(tcp(mesh.from_outside(KNOCKED[1], "n2")))
    await until_served(tcp(mesh.from_outside(KNOCKED[1])), {"a1"})
    await withdraw(mesh, "range")

    assert there == [2 * (len(RANGE) - 1), 2 * len(RANGE)]
    assert (served, owner, elsewhere) == ({"a1"}, {STRANGER}, {"a1"})


def tcp(asks: list[Ask]) -> list[Ask]:
    return [ask for ask in asks if ask.protocol is Protocol.TCP]

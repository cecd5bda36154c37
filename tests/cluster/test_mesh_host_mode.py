"""Host mode from the record to the connection: replacements, ports that are taken, loopback.

One lab of two nodes for each backend; every test leaves it as it found it.  What else host mode
must do is in tests/netns/test_host_mode.py.
"""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from tests.support.cluster import PORT, Cluster, cluster, host, until, until_served
from tests.support.requests import REFUSED, Ask, ask_all, replicas, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.requests import Answer

pytestmark = pytest.mark.cluster

LOOPBACK: Final = ("127.0.0.1", "::1")
BUSY, TAKEN, OWN = 8080, 8443, 9090


@pytest.fixture(scope="module", params=("nftables", "iptables-nft", "iptables-legacy"))
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    placed = (("a1", "n1"), ("a2", "n1"), ("a3", "n1"), ("b1", "n2"))
    with cluster("hostmode", 2, *placed, backend=request.param) as made:
        yield made


async def withdraw(mesh: Cluster, *services: str) -> None:
    for service in services:
        mesh.remove(service)
    await mesh.settled()
    await until(lambda: not mesh.records.names("published/"), "no record is left")


def loopback(mesh: Cluster, node: str, port: int) -> list[Ask]:
    return mesh.asks((node,), LOOPBACK, port)


def everywhere(mesh: Cluster, port: int) -> list[Ask]:
    """Requests from outside, from both nodes and from containers, the task itself among them."""
    return mesh.asks(("c1", "n1", "n2", "a1", "a2", "b1"), mesh.addresses("n1"), port)


async def test_a_second_task_is_refused_with_the_owner_and_takes_over_when_that_drains(
    mesh: Cluster,
) -> None:
    """A start-first update, again and again, while clients come: none of them is refused."""
    mesh.service("web", *host(BUSY))
    mesh.task("web", "a1")
    await mesh.settled()
    mesh.task("web", "a2")
    await until(lambda: "belongs to task a1 of service web" in mesh.problems("n1"))
    asks = everywhere(mesh, BUSY)
    await until_served(asks, {"a1"})

    async with stream(asks) as traffic:
        for before, after in (("a1", "a2"), ("a2", "a3"), ("a3", "a1")) * 3:
            mesh.task("web", after)
            await traffic.more(20)
            mesh.task("web", before, state="draining")
            await mesh.settled("n1")
            await traffic.landed()
            assert await replicas(asks[:4]) == {after}
            mesh.untask("web", before)
            await traffic.more(20)

    assert traffic.failures == []
    assert set(traffic.answered) == {"a1", "a2", "a3"}
    await withdraw(mesh, "web")


async def test_a_task_has_all_of_its_ports_or_none(mesh: Cluster) -> None:
    one, other = mesh.from_outside(BUSY, "n1"), mesh.from_outside(TAKEN, "n1")
    mesh.service("first", *host(TAKEN))
    mesh.task("first", "a1")
    mesh.service("web", *host(BUSY), *host(TAKEN), {"target": PORT})
    mesh.task("web", "a2")
    await until(lambda: "none of the task's 5 ports is published" in mesh.problems("n1"))

    await until_served(other, {"a1"})
    assert await replicas(one) == {REFUSED}
    assert mesh.records.get("published/n1/a2") is None
    assert (is_free(mesh, BUSY), is_free(mesh, TAKEN)) == (True, False)

    mesh.untask("first", "a1")
    await until_served([*one, *other], {"a2"})
    await until(lambda: len(mesh.records.get("published/n1/a2") or ()) == 5)
    await until(lambda: "web" not in mesh.problems("n1"))
    assert not any(is_free(mesh, one["hostPort"]) for one in mesh.records.get("published/n1/a2"))
    await withdraw(mesh, "first", "web")
    await until(lambda: is_free(mesh, BUSY) and is_free(mesh, TAKEN))


async def test_loopback_addresses_are_published_on_where_the_node_allows_it(mesh: Cluster) -> None:
    ports = [
        {"target": PORT, "published": OWN, "protocol": protocol, "hostIP": address}
        for protocol in ("tcp", "udp")
        for address in LOOPBACK
    ]
    mesh.service("own", *ports)
    mesh.task("own", "a1")
    await until(lambda: "set loopback_ports = true" in mesh.problems("n1"))
    assert await replicas(loopback(mesh, "n1", OWN)) == {REFUSED}
    assert routed(mesh) == ("0", "")

    mesh.configure("n1", loopback_ports=True)
    await restart(mesh, signal.SIGTERM)
    await until_served(loopback(mesh, "n1", OWN), {"a1"})
    found: list[Answer] = await ask_all(loopback(mesh, "n1", OWN))  # type: ignore[assignment]
    own4, own6 = mesh.containers["a1"].addresses
    gateways = {own4.rpartition(".")[0] + ".1", own6.rpartition(":")[0] + ":1"}
    assert {answer.client for answer in found} == gateways
    others = mesh.asks(("c1", "n1", "n2", "a1", "a2"), mesh.addresses("n1"), OWN)
    assert await replicas(others) == {REFUSED}
    assert routed(mesh) == ("1", "local ::1 dev warren-br0 proto 77")

    async with stream(loopback(mesh, "n1", OWN)) as traffic:
        await traffic.more(40)
        await restart(mesh, signal.SIGKILL)
        await traffic.more(40)
    assert traffic.failures == []

    mesh.configure("n1", loopback_ports=False)
    await restart(mesh, signal.SIGTERM)
    await until(lambda: "set loopback_ports = true" in mesh.problems("n1"))
    assert await replicas(loopback(mesh, "n1", OWN)) == {REFUSED}
    await until(lambda: routed(mesh) == ("0", ""), "what was set for it is taken back")
    await withdraw(mesh, "own")


def is_free(mesh: Cluster, port: int) -> bool:
    """Whether a process of the node could have a port; the kernel's word, not the records'."""
    with netns.entered(mesh.netns("n1")):
        probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


async def restart(mesh: Cluster, number: int) -> None:
    await mesh.signal("n1", number)
    await until(lambda: not mesh.agent_runs("n1"))
    await mesh.start_again("n1")
    await mesh.settled()


def routed(mesh: Cluster) -> tuple[str, str]:
    """What lets answers to 127.0.0.1 and ::1 in."""
    key = "net.ipv4.conf.warren-br0.route_localnet"
    routes = mesh.sh("n1", "ip", "-6", "route", "show", "table", "all").splitlines()
    local = "".join(
        line.partition(" metric")[0] for line in routes if "local ::1 dev warren-br0" in line
    )
    return mesh.sh("n1", "sysctl", "-n", key).strip(), local

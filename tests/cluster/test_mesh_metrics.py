"""What an agent tells about itself is true: counts agree with what was done, on every backend.

One lab of two nodes for each backend; n2 forwards to replicas on n1, and is looked at.
"""

from __future__ import annotations

import asyncio
import re
import signal
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from mesh.model.publish import Protocol
from tests.support import drivers, readback
from tests.support.cluster import PORT, Cluster, cluster, host, ingress, until
from tests.support.requests import Answer, Ask, again, ask_all, held
from tests.support.scrape import page, scrape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.scrape import Scraped

pytestmark = pytest.mark.cluster

WEB: Final = 8080
OWN: Final = 9000
CONNECTIONS: Final = "network_published_port_connections"
BYTES: Final = "network_published_port_bytes"


@pytest.fixture(scope="module", params=drivers.KERNEL)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    name = f"metrics-{request.param}"
    with cluster(name, 2, ("a1", "n1"), ("a2", "n1"), ("b1", "n2"), backend=request.param) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    mesh.service("web", *ingress(WEB))
    mesh.task("web", "a1")
    await mesh.allocated("web")


def backend(mesh: Cluster) -> str:
    found: str = mesh.records.get("applied/n2")["backend"]
    return found


async def answered(asks: list[Ask]) -> int:
    """Send requests that all have to be answered; how many they were."""
    assert all(isinstance(outcome, Answer) for outcome in await ask_all(asks))
    return len(asks)


class Volume(NamedTuple):
    """Connections, bytes there, bytes back."""

    connections: int
    sent: int
    received: int

    def __sub__(self, other: Volume) -> Volume:
        return Volume(*map(int.__sub__, self, other))


def listed(mesh: Cluster, node: str) -> list[str]:
    """The node's flows as conntrack(8) prints them."""
    families = ("ipv4", "ipv6")
    return [
        line
        for family in families
        for line in mesh.sh(node, "conntrack", "-L", "-f", family).splitlines()
    ]


def kernel(mesh: Cluster, node: str, port: int) -> Volume:
    """The flows to a port of the node that the kernel has."""
    amounts = [
        re.findall(r"bytes=(\d+)", line)
        for line in listed(mesh, node)
        if re.findall(r"dport=(\d+)", line)[:1] == [str(port)]
    ]
    return Volume(len(amounts), sum(int(a) for a, _ in amounts), sum(int(b) for _, b in amounts))


async def forget(mesh: Cluster, node: str) -> None:
    """Have a node's flows end, as time does."""
    open = re.compile("SYN_|ESTABLISHED|FIN_WAIT|CLOSE_WAIT|LAST_ACK")
    ports = re.compile(f"dport=({WEB}|{OWN}|{PORT}) ")
    await until(
        lambda: not any(open.search(x) and ports.search(x) for x in listed(mesh, node)),
        "connections are closed",
    )
    mesh.sh(node, "conntrack", "-F")


def told(found: Scraped, port: int, **labels: str) -> Volume:
    """The same as the agent tells it."""
    return Volume(
        found.sum(CONNECTIONS, port=port, **labels),
        found.sum(BYTES, port=port, direction="in", **labels),
        found.sum(BYTES, port=port, direction="out", **labels),
    )


async def agreed(mesh: Cluster, node: str, port: int, before: Scraped) -> Scraped:
    """Wait until what the agent counted since `before` is what the kernel has."""
    found = before

    async def agree() -> bool:
        nonlocal found
        found = await scrape(mesh, node)
        return told(found, port) - told(before, port) == kernel(mesh, node, port)

    await until(agree, "what the agent tells is what the kernel has")
    return found


async def test_connections_and_bytes_of_a_port_are_what_the_kernel_counts(mesh: Cluster) -> None:
    await scrape(mesh, "n2")  # that there is one makes it count
    for times in (5, 2):
        await forget(mesh, "n2")
        before = await scrape(mesh, "n2")
        count = await answered(mesh.from_outside(WEB, "n2") * times)

        after = await agreed(mesh, "n2", WEB, before)
        assert (told(after, WEB) - told(before, WEB)).connections == count
        for protocol in ("tcp", "udp"):
            labels = {"service": "web", "mode": "ingress", "protocol": protocol}
            volume = told(after, WEB, **labels) - told(before, WEB, **labels)
            assert volume.connections == count // 2
            assert volume.received > 50 * count // 2  # an answer has more than 50 bytes

        await forget(mesh, "n2")
        assert kernel(mesh, "n2", WEB).connections == 0
        ended = told(await scrape(mesh, "n2"), WEB)
        assert ended.connections == told(after, WEB).connections
        assert min(ended - told(after, WEB)) >= 0


async def test_a_connection_counts_where_it_came_in_and_nowhere_else(mesh: Cluster) -> None:
    for _ in range(2):
        before = [await scrape(mesh, node) for node in ("n1", "n2")]
    count = await answered(mesh.from_outside(WEB, "n2"))
    after = [await scrape(mesh, node) for node in ("n1", "n2")]

    counts = [(told(b, WEB) - told(a, WEB)).connections for a, b in zip(before, after, strict=True)]
    assert counts == [0, count]


async def test_ports_of_every_mode_are_told_apart(mesh: Cluster) -> None:
    mesh.service("own", *host(OWN))
    mesh.task("own", "b1")
    await mesh.allocated("own")
    before = await scrape(mesh, "n2")

    hosted = await answered(mesh.from_outside(OWN, "n2"))
    vips = await answered(mesh.asks(["b1"], mesh.vips("own"), PORT) * 3)
    after = await scrape(mesh, "n2")

    assert told(after, OWN, service="own", mode="host").connections == hosted
    assert told(after, PORT, service="own", mode="vip").connections == vips
    for found, protocol in ((before, "tcp"), (after, "udp")):
        name = "network_ports_published_total"
        assert found.sum(name, mode="host", protocol=protocol) == 1
        assert found.sum(name, mode="ingress", protocol=protocol) == 1

    mesh.remove("own")
    await mesh.settled()
    await forget(mesh, "n2")

    async def forgotten() -> bool:
        found = await scrape(mesh, "n2")
        gone = not found.has(CONNECTIONS, service="own")
        return gone and not found.sum("network_ports_published_total", mode="host")

    await until(forgotten, "the port that is gone is not told of any more")


async def test_an_agent_that_starts_again_counts_what_is_new_to_it(mesh: Cluster) -> None:
    asks = [one for one in mesh.from_outside(WEB, "n2") if one.protocol is Protocol.TCP]
    await scrape(mesh, "n2")  # the kernel counts bytes of connections that begin from now on
    async with held(asks) as connections:
        await mesh.signal("n2", signal.SIGKILL)
        await mesh.start_again("n2")
        await until(lambda: _ready(mesh), "the agent is ready")
        assert told(await scrape(mesh, "n2"), WEB) == Volume(0, 0, 0)

        await again(connections)
        old = told(await scrape(mesh, "n2"), WEB)
        assert old.connections == 0
        assert min(old.sent, old.received) > 0

        count = await answered(asks)
        assert told(await scrape(mesh, "n2"), WEB).connections == count
    await forget(mesh, "n2")
    last = told(await scrape(mesh, "n2"), WEB)
    assert last - old > Volume(count, 0, 0)
    assert last.connections == count


async def _ready(mesh: Cluster) -> bool:
    try:
        return (await page(mesh, "n2", "/readyz")).status == 200
    except OSError:
        return False


async def test_a_refused_port_is_an_error_for_as_long_as_it_lasts(mesh: Cluster) -> None:
    before = await scrape(mesh, "n1")
    refusals = {"name": "network_publish_errors_total", "reason": "refused"}
    assert before.sum("mesh_services_refused") == 0

    for name, task in (("first", "a1"), ("second", "a2")):
        mesh.service(name, *host(9100))
        mesh.task(name, task)
        await mesh.allocated(name)

    async def refused() -> bool:
        return (await scrape(mesh, "n1")).sum("mesh_services_refused") == 1

    await until(refused, "one of two services is refused its port")
    after = await scrape(mesh, "n1")
    assert after.sum(**refusals) - before.sum(**refusals) == 1  # of a task, not of each port
    assert after.sum("mesh_problems", of="record") == 1
    assert after.sum("mesh_problems", of="node") == before.sum("mesh_problems", of="node")

    for name in ("first", "second"):
        mesh.remove(name)
    await mesh.settled()

    async def well() -> bool:
        return (await scrape(mesh, "n1")).sum("mesh_services_refused") == 0

    await until(well, "nobody is refused anything")
    assert (await scrape(mesh, "n1")).sum(**refusals) == after.sum(**refusals)


async def test_what_the_controller_refuses_counts_on_the_node_that_leads(mesh: Cluster) -> None:
    async def errors() -> int:
        name = "network_publish_errors_total"
        return sum([(await scrape(mesh, n)).sum(name, reason="controller") for n in ("n1", "n2")])

    leading = [(await scrape(mesh, node)).sum("mesh_leader") for node in ("n1", "n2")]
    before = await errors()
    mesh.service("thief", *ingress(WEB))

    async def refused() -> bool:
        return await errors() == before + 1

    await until(refused, "the controller refuses a port that is another service's")
    assert sorted(leading) == [0, 1]
    mesh.remove("thief")
    await mesh.settled()


async def test_changes_and_what_was_run_for_them_are_counted(mesh: Cluster) -> None:
    name = backend(mesh)
    before = await scrape(mesh, "n2")
    mesh.task("web", "a2")
    await mesh.settled()
    after = await scrape(mesh, "n2")

    def more(metric: str, **labels: str) -> int:
        return after.sum(metric, **labels) - before.sum(metric, **labels)

    program = "netlink" if name == "nftables" else f"{name}-restore"
    assert more("network_iptables_commands_total", program=program) > 0
    for metric in ("network_publish_duration", "mesh_reconcile_duration_seconds"):
        assert more(f"{metric}_count") > 0
        milliseconds = after.value(f"{metric}_sum") * 1000
        assert abs(milliseconds - round(milliseconds)) > 1e-5, "the clock is fine enough"
    assert more("mesh_elements_changed_total", change="added") > 0
    assert more("network_iptables_rules_total", backend=name) > 0
    assert after.sum("network_iptables_rules_total") == _elements(mesh, "n2", name)
    assert after.sum("mesh_revisions_behind") == 0
    assert after.sum("mesh_nodes") == after.sum("mesh_nodes_alive") == 2
    assert after.sum("mesh_build_info", backend=name) == 1

    mesh.untask("web", "a2")
    await mesh.settled()
    gone = await scrape(mesh, "n2")
    assert gone.sum("network_iptables_rules_total") == before.sum("network_iptables_rules_total")


def _elements(mesh: Cluster, node: str, driver: str) -> int:
    return len(readback.read(mesh.netns(node), driver, mesh.parameters(node)))


async def test_the_formats_that_prometheus_asks_for(mesh: Cluster) -> None:
    plain = await page(mesh, "n2", "/metrics", "text/plain;version=0.0.4")
    openmetrics = await page(mesh, "n2", "/metrics", "application/openmetrics-text;version=1.0.0")

    assert "content-type: text/plain; version=0.0.4" in plain.head.lower()
    assert "content-type: application/openmetrics-text; version=1.0.0" in openmetrics.head.lower()
    assert f"# TYPE {BYTES} counter\n" in plain.body
    assert openmetrics.body.endswith("\n# EOF\n")
    assert openmetrics.body.count("# EOF") == 1
    assert (await page(mesh, "n2", "/healthz")).status == 200
    assert (await page(mesh, "n2", "/elsewhere")).status == 404

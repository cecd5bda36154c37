"""Whatever is written to etcd, agents live, others are served, and it is told what is wrong.

One lab of two nodes, with a1 on n1 and b1 on n2, and traffic to service `web` under every test.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support.cluster import PORT, Cluster, cluster, ingress, put, until, withdraw
from tests.support.requests import REFUSED, replicas, stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.requests import Ask, Stream

pytestmark = pytest.mark.cluster

WEB, GOOD, FREE = 8080, 8081, 8090
CYCLE: Final = 48

GARBAGE: Final = (
    b"",
    b"\x00\xff\xfe",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"1e999",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"{}",
    b'{"name": null, "service": [], "id": {}, "node": 5}',
    json.dumps({"name": "x" * 500_000}).encode(),
)
"""No record of any kind."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Cluster]:
    with cluster("hostile", 2, ("a1", "n1"), ("a2", "n1"), ("b1", "n2")) as made:
        asyncio.run(_furnish(made))
        yield made


def frontends(mesh: Cluster) -> list[dict[str, str]]:
    """What every node's kernel has of the services' frontends."""
    return [mesh.elements(node.name, "vips", "meshports", "known") for node in mesh.nodes]


async def _furnish(mesh: Cluster) -> None:
    for service, port in (("web", WEB), ("good", GOOD)):
        mesh.service(service, *ingress(port))
        for replica in ("a1", "b1"):
            mesh.task(service, replica)
    await mesh.allocated("web", "good")


def everything(mesh: Cluster, port: int = WEB) -> list[Ask]:
    vip = mesh.vips({WEB: "web", GOOD: "good"}[port])
    return mesh.from_outside(port) + mesh.asks(("a2",), vip, PORT)


@pytest.fixture
async def traffic(mesh: Cluster, unharmed: Stream) -> AsyncIterator[Stream]:
    """The same, and the frontends are in the end as they were: marks, ids and all."""
    rules = frontends(mesh)

    yield unharmed

    await until(lambda: frontends(mesh) == rules, "the frontends are as they were")


@pytest.fixture
async def unharmed(mesh: Cluster) -> AsyncIterator[Stream]:
    """Traffic to `web` during a test, of which nothing may fail, on agents that may not die."""
    agents = [node.agent_pid for node in mesh.nodes]

    async with stream(everything(mesh)) as traffic:
        yield traffic
        await traffic.more(CYCLE)

    await mesh.refresh()
    assert traffic.failures == []
    assert [node.agent_pid for node in mesh.nodes] == agents


async def test_garbage_is_passed_over_and_told(mesh: Cluster, traffic: Stream) -> None:
    keys = (
        "services/bad", "tasks/web/bad", "tasks/bad/bad", "nodes/bad", "allocations/nodes/77",
        "allocations/vips/77", "allocations/ports/tcp/77", "health/n1/bad", "alive/bad",
        "maintenance/n1", "policies/bad", "applied/bad", "status/services/bad", "published/n1/bad",
        "nonsense", "services/", "tasks/web/", "tasks//", "tasks/web/a/b/c", "allocations/vips/-1",
        "allocations/vips/99999999999999999999", "allocations/ports/tcp/0",
        "allocations/ports/dccp/80", "allocations/none/1", "services/\x1b[31m\nred", "services/é☃",
        "nodes/../n1", "services/a\x00b", "labels/n1", "labels/bad",
        "allocations/shares/tcp/77/bad", "allocations/shares/tcp/0/bad",
    )  # fmt: skip
    for garbage in GARBAGE:
        for key in keys:
            put(mesh, key, garbage)
        await mesh.settled()

        for node in mesh.nodes:
            problems = mesh.problems(node.name)
            for key in ("services/bad", "tasks/web/bad", "nodes/bad"):
                assert f'"/mesh/{key}"' in problems, garbage[:80]
    await withdraw(mesh, *keys)
    await until(lambda: "/bad" not in "".join(mesh.problems(n.name) for n in mesh.nodes))


async def test_the_last_good_version_stays_in_force(mesh: Cluster, traffic: Stream) -> None:
    good = mesh.records.under("services/")["good"]
    task = mesh.records.under("tasks/good/")["a1"]
    settings = mesh.records.get("cluster")
    nodes = mesh.records.under("nodes/")
    keys = {"services/good": good, "tasks/good/a1": task, "cluster": settings}
    keys |= {f"nodes/{name}": record for name, record in nodes.items()}

    for key in keys:
        put(mesh, key, b'{"oops": 1}')
    await mesh.settled()
    told = mesh.problems("n1")
    meanwhile = await replicas(4 * everything(mesh, GOOD))
    for key, record in keys.items():
        put(mesh, key, record)
    await mesh.settled()

    assert meanwhile == {"a1", "b1"}
    for key in keys:
        assert f'"/mesh/{key}"' in told
    await until(lambda: mesh.problems("n1") == "[]", "nothing is wrong any more")


OUT_OF_RANGE: Final[tuple[dict[str, Any], ...]] = (
    {"ports": [{"target": 0}]},
    {"ports": [{"target": 80, "published": 65536}]},
    {"ports": [{"target": 80, "published": -1, "mode": "ingress"}]},
    {"ports": [{"target": 80.5}]},
    {"ports": [{"target": "80"}]},
    {"ports": [{"target": 80, "protocol": "dccp"}]},
    {"ports": [{"target": 80, "protocol": "tcp; flush ruleset"}]},
    {"ports": [{"target": 10**400}]},
    {"ports": [*ingress(FREE), *ingress(FREE)]},
    {"ports": [{"target": 80, "published": FREE, "hostIP": "::ffff:1.2.3.4%eth0"}]},
    {"vip": "10.1.0.1/24"},
    {"vip": "localhost"},
    {"allow": ["10.0.0.1/8"]},
    {"allow": ["0.0.0.0/0 accept"]},
    {"drain": "forever"},
    {"affinity": "strong"},
    {"health": {"type": "http", "interval": "0"}},
    {"source": None},
    {"labels": {"a": 1}},
    {"surprise": True},
    {"name": "other"},
)


async def test_services_out_of_range_are_refused_as_a_whole(mesh: Cluster, traffic: Stream) -> None:
    keys = [f"services/odd-{number}" for number in range(len(OUT_OF_RANGE))]
    for key, fields in zip(keys, OUT_OF_RANGE, strict=True):
        name = key.removeprefix("services/")
        put(mesh, key, {"name": name, "ports": ingress(FREE), **fields})
    await mesh.settled()
    told = mesh.problems("n1")
    await withdraw(mesh, *keys)

    assert [key for key in keys if f'"/mesh/{key}"' not in told] == []


async def test_a_vip_outside_the_range_is_not_taken(mesh: Cluster, traffic: Stream) -> None:
    """An allocation is the controller's to write; this one would hijack c1, a node and etcd."""
    stolen = [*mesh.addresses("c1"), "192.168.50.5", "127.0.0.1", "0.0.0.0", "10.0.0.1"]
    mesh.service("thief", {"target": PORT}, vip="none")
    mesh.task("thief", "a1")
    for index, address in enumerate(stolen, start=900):
        put(mesh, f"allocations/vips/{index}", {"service": "thief", "addresses": [address]})
    await mesh.settled()

    for node in mesh.nodes:
        held = "".join(mesh.elements(node.name, "vips", "known").values())
        assert [address for address in stolen if f" {address} " in held] == []
    for index in range(900, 900 + len(stolen)):
        mesh.records.delete(f"allocations/vips/{index}")
    mesh.remove("thief")
    await mesh.settled()


async def test_a_service_cannot_take_another_ones_vip_or_port(
    mesh: Cluster, traffic: Stream
) -> None:
    (address, *_) = mesh.vips("web")
    mesh.service("thief", *ingress(WEB), vip=address)
    mesh.task("thief", "a2")
    await mesh.settled()
    await until(lambda: bool(mesh.records.get("status/services/thief")), "the controller objects")
    told = json.dumps(mesh.records.get("status/services/thief"))
    answered = await replicas(4 * everything(mesh))
    mesh.remove("thief")
    await mesh.settled()

    assert answered == {"a1", "b1"}
    assert str(WEB) in told
    assert address in told


async def test_forged_allocations_of_a_vip_or_port_in_use_change_nothing(
    mesh: Cluster, traffic: Stream
) -> None:
    mesh.service("thief", *ingress(FREE), vip="none")
    mesh.task("thief", "a2")
    put(mesh, "allocations/vips/901", {"service": "thief", "addresses": mesh.vips("web")})
    put(mesh, "allocations/vips/902", {"service": "nobody", "addresses": mesh.vips("web")})
    await mesh.settled()
    answered = await replicas(4 * everything(mesh))
    for index in (901, 902):
        mesh.records.delete(f"allocations/vips/{index}")
    mesh.remove("thief")
    await mesh.settled()

    assert answered == {"a1", "b1"}


async def test_a_task_with_an_address_of_something_else_disturbs_nobody(
    mesh: Cluster, traffic: Stream
) -> None:
    """It may make its own service useless, no more."""
    foreign = {
        "vip": mesh.vips("web")[0],
        "node": mesh.addresses("n2")[0],
        "overlay": mesh.node("n2").overlay4,
        "gateway": "10.0.1.1",
        "client": mesh.addresses("c1")[0],
        "etcd": "192.168.50.5",
        "broadcast": "255.255.255.255",
        "loopback": "127.0.0.1",
        "unspecified": "0.0.0.0",
        "multicast": "224.0.0.1",
        "replica": mesh.containers["b1"].addresses[0],
        "mapped": "::ffff:10.0.1.2",
        "text": "10.0.1.2; drop",
    }
    mesh.service("odd", *ingress(FREE))
    for name, address in foreign.items():
        record = {"service": "odd", "id": name, "node": "n1", "addresses": [address]}
        put(mesh, f"tasks/odd/{name}", record)
    await mesh.allocated("odd")
    mesh.task("odd", "a1")
    await mesh.settled()
    answered = await replicas(4 * everything(mesh))
    told = mesh.problems("n2")
    mesh.remove("odd")
    await mesh.settled()

    assert answered == {"a1", "b1"}
    for name in ("loopback", "unspecified", "multicast", "text"):
        assert f'"/mesh/tasks/odd/{name}"' in told


async def test_tasks_of_no_service_no_node_and_twice_disturb_nobody(
    mesh: Cluster, traffic: Stream
) -> None:
    one = mesh.containers["a1"]
    twice = {"service": "good", "id": "twice", "node": "n1", "addresses": one.addresses}
    put(mesh, "tasks/good/twice", twice)
    put(mesh, "tasks/good/away", {**twice, "id": "away", "node": "n77"})
    put(mesh, "tasks/none/lost", {**twice, "service": "none", "id": "lost"})
    for number in range(300):
        addresses = [f"10.0.200.{number % 250}", *one.addresses]
        record = {**twice, "id": f"many-{number}", "addresses": addresses, "node": "n77"}
        put(mesh, f"tasks/good/many-{number}", record)
    await mesh.settled()
    answered = await replicas(4 * everything(mesh, GOOD))
    for number in range(300):
        mesh.records.delete(f"tasks/good/many-{number}")
    await withdraw(mesh, "tasks/good/twice", "tasks/good/away", "tasks/none/lost")

    assert answered == {"a1", "b1"}


async def test_a_service_with_a_thousand_ports_is_served_beside_the_others(
    mesh: Cluster, traffic: Stream
) -> None:
    ports = [{"target": n, "published": n, "mode": "host"} for n in range(10_000, 11_000)]
    mesh.service("wide", *ports, {"target": PORT, "published": FREE, "mode": "ingress"})
    mesh.task("wide", "a1")
    await mesh.allocated("wide")
    (address, _) = mesh.addresses("n2")
    answered = await replicas(4 * mesh.asks(["c1"], [address], FREE)[:1])
    mesh.remove("wide")
    await mesh.settled()

    assert answered == {"a1"}
    assert await replicas(4 * mesh.asks(["c1"], [address], FREE)) == {REFUSED}


async def test_nodes_that_cannot_be_are_no_peers_and_change_no_peer(
    mesh: Cluster, traffic: Stream
) -> None:
    real = mesh.records.under("nodes/")["n2"]
    before = {
        node.name: mesh.sh(node.name, "wg", "show", "warren0", "peers") for node in mesh.nodes
    }
    impostors = {
        "twin": {**real, "name": "twin"},
        "evil": {**real, "name": "evil", "publicKey": "A" * 43 + "="},
        "lost": {**real, "name": "lost", "endpoints": ["127.0.0.1:51820"]},
        "keyless": {**real, "name": "keyless", "publicKey": "no key"},
        "inside": {**real, "name": "inside", "addresses": mesh.vips("web")},
    }
    for name, record in impostors.items():
        put(mesh, f"nodes/{name}", record)
    await mesh.settled()
    await until(lambda: '"node twin"' in mesh.problems("n1"), "the twin's key is refused")
    answered = await replicas(4 * everything(mesh))
    await withdraw(mesh, *(f"nodes/{name}" for name in impostors))

    def peers() -> dict[str, str]:
        return {n.name: mesh.sh(n.name, "wg", "show", "warren0", "peers") for n in mesh.nodes}

    await until(lambda: peers() == before, "only the real peers are left")
    assert answered == {"a1", "b1"}


async def test_settings_of_another_cluster_are_not_taken_over(
    mesh: Cluster, traffic: Stream
) -> None:
    settings = mesh.records.get("cluster")

    for fields in (
        {"id": "somebody else's"},
        {"containers4": "10.128.0.0/12"},
        {"vips4": "172.16.0.0/16"},
        {"prefix6": "fd00:1:2::/48"},
    ):
        put(mesh, "cluster", {**settings, **fields})
        await until(lambda: "/mesh/cluster" in mesh.problems("n1"), "the agent objects")
        await traffic.more(CYCLE)
        put(mesh, "cluster", settings)
        await mesh.settled()
    mesh.records.delete("cluster")
    await until(lambda: "/mesh/cluster" in mesh.problems("n1"), "the agent objects")
    await traffic.more(CYCLE)
    put(mesh, "cluster", settings)
    await mesh.settled()
    await until(lambda: mesh.problems("n1") == "[]", "nothing is wrong any more")


async def test_agents_outlive_forged_node_numbers(mesh: Cluster) -> None:
    agents = [node.agent_pid for node in mesh.nodes]
    numbers = mesh.records.under("allocations/nodes/")
    right = {f"allocations/nodes/{number}": owner for number, owner in numbers.items()}
    wrong = {f"allocations/nodes/{int(number) + 10}": owner for number, owner in numbers.items()}

    mesh.records.change(wrong, right)
    for node in mesh.nodes:
        await until(lambda n=node.name: "number" in mesh.problems(n), "the agent objects")  # type: ignore[misc]
    mesh.revision = mesh.records.change(right, wrong)
    await mesh.settled()

    await until(lambda: mesh.problems("n1") == "[]", "nothing is wrong any more")
    await mesh.refresh()
    assert [node.agent_pid for node in mesh.nodes] == agents
    assert await replicas(4 * everything(mesh)) == {"a1", "b1"}


async def test_forwarding_outlives_an_etcd_that_lost_everything(
    mesh: Cluster, traffic: Stream
) -> None:
    """By somebody's `etcdctl del --prefix /mesh`; all of it comes back from a backup."""
    kinds = ["services/", "nodes/", "tasks/web/", "tasks/good/", "allocations/nodes/"]
    kinds += ["allocations/vips/", "allocations/ports/tcp/", "allocations/ports/udp/"]
    backup = {"cluster": mesh.records.get("cluster")}
    for kind in kinds:
        backup |= {f"{kind}{name}": record for name, record in mesh.records.under(kind).items()}

    mesh.records.delete_below("")
    await until(lambda: "/mesh/cluster" in mesh.problems("n1"), "the agent objects")
    await traffic.more(CYCLE)
    mesh.revision = mesh.records.change(backup, ())
    await mesh.settled()

    await until(lambda: mesh.records.under("alive/").keys() == {"n1", "n2"}, "all are alive again")
    await until(lambda: mesh.problems("n1") == "[]", "nothing is wrong any more")


async def test_a_living_node_says_so_again_when_somebody_buries_it(
    mesh: Cluster, traffic: Stream
) -> None:
    for node in mesh.nodes:
        mesh.records.delete(f"alive/{node.name}")

    await until(lambda: mesh.records.under("alive/").keys() == {"n1", "n2"}, "both are alive")

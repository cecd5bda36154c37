"""What an agent's end, etcd's, and changes of a service's replicas do to its clients: nothing.

On every backend, one lab of three nodes with ten replicas, of which three serve; every test leaves
it as it found it.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import asynccontextmanager
from itertools import islice
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.publish import Protocol
from tests.support import drivers
from tests.support.cluster import PORT, Cluster, cluster, ingress, until, until_served
from tests.support.requests import (
    BRIEF,
    UNLIKELY,
    Answer,
    Ask,
    again,
    ask_all,
    held,
    strayed,
    stream,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from tests.support.requests import Held, Outcome, Stream

pytestmark = pytest.mark.cluster

WEB, MORTAL, OTHER, CROWD = 8080, 8081, 8082, 8083
REPLICAS: Final = ("a1", "b1", "d1", "a2", "b2", "d2", "a3", "b3", "d3", "a4")
FIRST, OTHERS = REPLICAS[:3], REPLICAS[3:6]
CYCLE: Final = 80
"""Requests of every kind there is, twice over."""

BATCH: Final = 100
"""Records that one transaction of etcd may change: fewer than 128."""

FLAPS: Final = 300
PACE: Final = 0.01
"""Seconds between two changes of a replica that flaps."""

IDENTITY: Final = ("vips", "meshports", "targets", "known", "hairpin", "nodes", "via")


@pytest.fixture(scope="module", params=drivers.KERNEL)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    placed = ((id, {"a": "n1", "b": "n2", "d": "n3"}[id[0]]) for id in REPLICAS)
    with cluster("restart", 3, *placed, backend=request.param) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    mesh.service("web", *ingress(WEB))
    for replica in FIRST:
        mesh.task("web", replica)
    await mesh.allocated("web")


def everything(mesh: Cluster) -> list[Ask]:
    """From outside through every node, and to the VIP from containers, one of them a replica."""
    inside = mesh.asks(("a1", "a2", "b2", "d2"), mesh.vips("web"), PORT)
    return mesh.from_outside(WEB) + inside


@asynccontextmanager
async def load(mesh: Cluster) -> AsyncIterator[Stream]:
    """New connections of every kind, of which none may fail."""
    async with stream(everything(mesh)) as traffic:
        traffic.expect(FIRST)
        await traffic.more(CYCLE)
        yield traffic
        await traffic.more(CYCLE)

    assert traffic.failures == []
    assert traffic.counts == {"answered": traffic.sent}


async def become(mesh: Cluster, traffic: Stream, replicas: Iterable[str]) -> None:
    """Have these replicas serve, and no others."""
    before, after = traffic.expected, frozenset(replicas)
    traffic.expect(before | after)
    for replica in sorted(after - before):
        mesh.task("web", replica)
    for replica in sorted(before - after):
        mesh.untask("web", replica)
    await mesh.settled()
    traffic.expect(after)


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """So many at a time."""
    left = iter(items)
    while some := list(islice(left, size)):
        yield some


def lasting(flows: dict[Held, Outcome]) -> dict[Held, Outcome]:
    """Those that nothing moves: all but what has no connection to a replica on n1."""
    return {
        flow: outcome
        for flow, outcome in flows.items()
        if flow.asked.protocol is Protocol.TCP
        or not (isinstance(outcome, Answer) and outcome.node == "n1")
    }


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_no_connection_fails_when_an_agent_is_restarted(mesh: Cluster, number: int) -> None:
    before = mesh.elements("n1", *IDENTITY)

    async with held(everything(mesh)) as first, load(mesh) as traffic:
        await mesh.signal("n1", number)
        await until(lambda: not mesh.agent_runs("n1"))
        await traffic.more(CYCLE)
        without = await again(first)
        await mesh.start_again("n1")
        await mesh.settled()
        await traffic.more(CYCLE)
        afterwards = await again(first)

    assert all(isinstance(outcome, Answer) for outcome in first.values())
    assert first == without
    # Other nodes may have missed n1 for longer than they wait: new flows went elsewhere then.
    assert lasting(first) == {flow: afterwards[flow] for flow in lasting(first)}
    assert all(isinstance(outcome, Answer) for outcome in afterwards.values())
    assert mesh.elements("n1", *IDENTITY) == before


async def test_an_agent_that_was_away_catches_up(mesh: Cluster) -> None:
    async with load(mesh) as traffic:
        await mesh.kill("n2")
        becoming = asyncio.create_task(become(mesh, traffic, ("a1", "a2", "d1")))
        await traffic.more(CYCLE)
        await mesh.start_again("n2")
        await becoming
        await until_served(8 * mesh.from_outside(WEB), {"a1", "a2", "d1"})
        await become(mesh, traffic, FIRST)


async def test_no_connection_fails_while_a_service_is_scaled(mesh: Cluster) -> None:
    async with load(mesh) as traffic:
        await become(mesh, traffic, REPLICAS)
        await until_served(16 * mesh.from_outside(WEB), set(REPLICAS))
        await become(mesh, traffic, FIRST)


async def test_no_connection_fails_when_etcd_is_restarted(mesh: Cluster) -> None:
    async with load(mesh) as traffic:
        await mesh.kill("etcd")
        await traffic.more(CYCLE)
        await mesh.start_again("etcd")
        await until(mesh.answers, "etcd is back")
        await become(mesh, traffic, OTHERS)
        await until_served(8 * mesh.from_outside(WEB), set(OTHERS))
        await become(mesh, traffic, FIRST)


async def test_no_connection_fails_while_a_replica_flaps(mesh: Cluster) -> None:
    """Out and back in, a hundred changes a second, as far as etcd and this machine can."""

    def flap() -> None:
        due = time.monotonic()
        for _ in range(FLAPS // 2):
            for change in (mesh.untask, mesh.task):
                change("web", FIRST[0])
                due += PACE
                time.sleep(max(0.0, due - time.monotonic()))

    async with load(mesh) as traffic:
        await asyncio.to_thread(flap)
        await mesh.settled()
        before = traffic.answered[FIRST[0]]
        await until(lambda: traffic.answered[FIRST[0]] > before, "it serves again")


def _leads_to(mesh: Cluster, addresses: Iterable[str]) -> bool:
    """Whether any node sends connections there."""
    found = [str(mesh.elements(node.name, "targets")) for node in mesh.nodes]
    return any(address in held for held in found for address in addresses)


def _wired(mesh: Cluster, node: str) -> int:
    """How many containers a node's bridge has."""
    shown = mesh.sh(node, "ip", "-json", "link", "show", "master", "warren-br0")
    return len(json.loads(shown))


async def test_a_replica_that_is_killed_fails_only_what_it_had_begun(mesh: Cluster) -> None:
    """New connections to it wait until its node finds that it is gone, and go elsewhere then."""
    await mesh.start(("x1", "n1"))
    gone = mesh.containers["x1"].addresses
    check = {"type": "tcp", "interval": "200ms", "timeout": "1s", "fall": 2, "rise": 1}
    mesh.service("mortal", *ingress(MORTAL), health=check)
    for replica in ("x1", "b1", "d1"):
        mesh.task("mortal", replica)
    await mesh.allocated("mortal")
    asks = mesh.from_outside(MORTAL) + mesh.asks(("a2", "b2"), mesh.vips("mortal"), PORT)
    await until_served(8 * asks, {"x1", "b1", "d1"})

    wired = _wired(mesh, "n1")
    lasting = [one for one in asks if one.protocol is Protocol.TCP]
    datagrams = [one for one in asks if one.protocol is Protocol.UDP]
    async with held(4 * datagrams) as flows, stream(lasting) as traffic:
        await traffic.more(CYCLE)
        await mesh.kill("x1")
        # Until the kernel has taken its network down, it still says there that nobody listens.
        await until(lambda: _wired(mesh, "n1") < wired, "its network is gone")
        killed = time.monotonic()
        await until(lambda: not _leads_to(mesh, gone), "nobody sends anything to it")
        traffic.expect({"b1", "d1"})

        async def moved() -> bool:
            now = (await again(flows, BRIEF)).values()
            return {a.replica if isinstance(a, Answer) else a for a in now} == {"b1", "d1"}

        await until(moved, "all UDP flows have another replica")
        await traffic.more(CYCLE)
    mesh.remove("mortal")
    await mesh.settled()

    assert "x1" in {a.replica for a in flows.values() if isinstance(a, Answer)}
    assert [failure for failure in traffic.failures if failure.began > killed] == []


async def test_flows_of_a_removed_replica_drain_on_tcp_and_move_on_udp(mesh: Cluster) -> None:
    async with held(everything(mesh)) as first:
        mesh.task("web", "a2")
        for replica in FIRST:
            mesh.untask("web", replica)
        await mesh.settled()

        async def moved() -> bool:
            # A datagram whose flow is forgotten before its answer is lost, as UDP may be.
            flows = (flow for flow in first if flow.asked.protocol is Protocol.UDP)
            now = await again(flows, BRIEF)
            return {a.replica if isinstance(a, Answer) else a for a in now.values()} == {"a2"}

        await until(moved, "UDP flows go to the replica that is left")
        tcp = {flow: was for flow, was in first.items() if flow.asked.protocol is Protocol.TCP}
        kept = await again(tcp)
        for replica in FIRST:
            mesh.task("web", replica)
        mesh.untask("web", "a2")
        await mesh.settled()

    assert kept == tcp


async def test_no_connection_fails_while_replicas_are_changed_without_a_pause(
    mesh: Cluster,
) -> None:
    """As fast as etcd takes it, so that nodes are always at different revisions."""
    async with load(mesh) as traffic:
        traffic.expect(FIRST + OTHERS)
        for _ in range(12):
            for news, olds in ((OTHERS, FIRST), (FIRST, OTHERS)):
                for new, old in zip(news, olds, strict=True):
                    mesh.task("web", new)
                    await asyncio.sleep(0)
                    mesh.untask("web", old)
                    await asyncio.sleep(0)
        await mesh.settled()
        traffic.expect(FIRST)


async def test_replicas_are_replaced_one_by_one_without_a_failure(mesh: Cluster) -> None:
    fresh = {"a1": ("x2", "n1"), "b1": ("y2", "n2"), "d1": ("z2", "n3")}

    async with load(mesh) as traffic:
        for old, (new, node) in fresh.items():
            await mesh.start((new, node))
            await become(mesh, traffic, traffic.expected | {new})
            await become(mesh, traffic, traffic.expected - {old})
        await until_served(8 * mesh.from_outside(WEB), {new for new, _ in fresh.values()})
        for old, (new, _) in fresh.items():
            await become(mesh, traffic, traffic.expected | {old})
            await become(mesh, traffic, traffic.expected - {new})
            await traffic.landed()
            await mesh.kill(new)


async def test_a_canary_gets_its_share_and_no_other_flow_moves(mesh: Cluster) -> None:
    steps = ({"a1": 3, "b1": 3, "d1": 3, "a2": 1}, {"a1": 1, "b1": 1, "d1": 1, "a2": 3})
    mesh.service("other", *ingress(OTHER))
    mesh.task("other", "b2")
    await mesh.allocated("other")

    async with held(everything(mesh) + mesh.from_outside(OTHER)) as first, load(mesh) as traffic:
        for weights in steps:
            traffic.expect(weights)
            for replica, weight in weights.items():
                mesh.task("web", replica, weight=weight)
            await mesh.settled()
            found = await ask_all(4 * everything(mesh))
            kept = await again(first)

            assert strayed(found, weights) < UNLIKELY
            assert kept == first
        for replica in FIRST:
            mesh.task("web", replica)
        await become(mesh, traffic, FIRST)
    mesh.remove("other")
    await mesh.settled()


def _many(mesh: Cluster, replica: str, count: int) -> dict[str, object]:
    """Have a container answer at so many more addresses; records of a replica at each of them."""
    one = mesh.containers[replica]
    own = one.addresses[1]
    begin = own.rpartition("::")[0] + "::f:"
    for machine, way in ((replica, ("local", "dev", "lo")), (one.node, ("unicast", "via", own))):
        kind, *rest = way
        mesh.sh(machine, "ip", "-6", "route", "add", kind, f"{begin}0/112", *rest)
    return {
        f"tasks/crowd/{replica}-{number}": {
            "service": "crowd",
            "id": f"{replica}-{number}",
            "node": one.node,
            "addresses": [f"{begin}{number:x}"],
        }
        for number in range(1, count + 1)
    }


async def test_a_service_of_a_thousand_replicas_balances_and_changes(mesh: Cluster) -> None:
    """Few containers have the addresses of many: how often each answers tells of all of them."""
    crowd = {"a4": 500, "b3": 300, "d3": 200}
    mesh.service("crowd", ingress(CROWD)[0])
    records = {replica: _many(mesh, replica, count) for replica, count in crowd.items()}
    for each in records.values():
        for keys in batched(each, BATCH):
            mesh.revision = mesh.records.change({key: each[key] for key in keys}, ())
    await mesh.allocated("crowd")
    addresses = [mesh.addresses(node.name)[1] for node in mesh.nodes]
    asks = [Ask(mesh.netns("c1"), address, CROWD, Protocol.TCP) for address in addresses]

    async with stream(asks) as traffic:
        before = await ask_all(100 * asks)
        for keys in batched(records["a4"], BATCH):
            mesh.revision = mesh.records.change({}, keys)
        await mesh.settled()
        traffic.expect({"b3", "d3"})
        after = await ask_all(100 * asks)
    mesh.remove("crowd")
    await mesh.settled()

    assert traffic.failures == []
    assert strayed(before, crowd) < UNLIKELY
    assert strayed(after, {**crowd, "a4": 0}) < UNLIKELY

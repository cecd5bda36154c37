"""Nodes that leave bits of the marks to their hosts, each others, and change them while they serve.

n1  a1    n2  b1    n3  k3      a, b: replicas; k3: a container that only asks
c1  on the nodes' link, c2 behind a router
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from mesh.dataplane.conntrack import Conntrack
from mesh.model.publish import Protocol
from mesh.rules import marks
from tests.support.cluster import PORT, Cluster, cluster, ingress, until, until_served
from tests.support.hosts_own import HostsOwn, lost
from tests.support.layouts import HIGH, LOW, RAGGED, marks_of
from tests.support.patience import UNMISSED
from tests.support.requests import Answer, again, ask_all, held, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.rules.marks import Layout
    from mesh.rules.stale import Flow
    from tests.support.requests import Ask, Held, Outcome

pytestmark = pytest.mark.cluster

WEB: Final = 8080
LAYOUTS: Final = {"n1": HIGH, "n2": LOW}
CLIENTS: Final = ("c1", "c2")


@pytest.fixture(scope="module", params=("nftables", "iptables-nft", "iptables-legacy"))
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    placed = (("a1", "n1"), ("b1", "n2"), ("k3", "n3"))
    backend = request.param
    with cluster("marks", 3, *placed, backend=backend, layouts=LAYOUTS, settings=UNMISSED) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    mesh.service("web", *ingress(WEB))
    mesh.task("web", "a1")
    mesh.task("web", "b1")
    await mesh.allocated("web")


def everything(mesh: Cluster) -> list[Ask]:
    """From outside through every node, and from a container to the VIP."""
    return mesh.from_outside(WEB) + mesh.asks(["k3"], mesh.vips("web"), PORT)


def clients(mesh: Cluster) -> dict[str, tuple[str, str]]:
    """Who asks, by namespace, and what it calls itself."""
    found = {mesh.netns(name): mesh.addresses(name) for name in CLIENTS}
    return found | {mesh.netns("k3"): mesh.containers["k3"].addresses}


def expect_own_addresses(mesh: Cluster, asks: list[Ask], answers: list[Outcome]) -> None:
    own = clients(mesh)
    for one, answer in zip(asks, answers, strict=True):
        assert isinstance(answer, Answer), (one, answer)
        assert answer.client in own[one.netns], one
    assert {answer.replica for answer in answers if isinstance(answer, Answer)} == {"a1", "b1"}


async def flows(mesh: Cluster, node: str, layout: Layout) -> list[Flow]:
    """A node's answered flows of the mesh."""
    return [flow for flow in await _every_flow(mesh, node, layout) if flow.answered]


async def handles(mesh: Cluster, node: str, layout: Layout) -> set[bytes]:
    """What tells a node's flows of the mesh from later ones."""
    return {flow.handle for flow in await _every_flow(mesh, node, layout)}


async def _every_flow(mesh: Cluster, node: str, layout: Layout) -> list[Flow]:
    with netns.entered(mesh.netns(node)):
        made = Conntrack(layout)
    with closing(made) as conntrack:
        return await conntrack.flows(layout.ours, layout.ours)


async def test_clients_keep_their_addresses_and_hosts_their_bits(mesh: Cluster) -> None:
    hosts = {node: HostsOwn.of(layout) for node, layout in LAYOUTS.items()}
    # What is closing still may get the bits of an answer, and has none of a beginning.
    elder = {node: await handles(mesh, node, layout) for node, layout in LAYOUTS.items()}
    for node, host in hosts.items():
        # Replies that are steered back have the packet's mark of the mesh alone with nftables.
        text = host.text("ct direction original", steered=True)
        mesh.sh(node, "nft", "-f", "-", input=text)
    try:
        asks = 8 * everything(mesh)
        answers = await ask_all(asks)
        told = {node: await flows(mesh, node, layout) for node, layout in LAYOUTS.items()}
        counted = {
            node: lost(mesh.sh(node, "nft", "list", "counter", "inet", "host", "lost"))
            for node in hosts
        }
    finally:
        for node in hosts:
            mesh.sh(node, "nft", "delete", "table", "inet", "host")

    expect_own_addresses(mesh, asks, answers)
    assert counted == {"n1": 0, "n2": 0}
    for node, host in hosts.items():
        layout = host.layout
        assert {f.mark & layout.foreign for f in told[node]} >= {host.kept}, node
        steered = [flow for flow in told[node] if flow.mark & layout.via]
        assert {(flow.mark & layout.packet_mark) >> layout.node_shift for flow in steered} >= {3}
        fresh = [flow for flow in steered if flow.handle not in elder[node]]
        assert {flow.mark & layout.foreign for flow in fresh} == {host.kept}, node


async def _restart(mesh: Cluster, node: str, layout: Layout) -> None:
    mesh.configure(node, marks=marks_of(layout))
    await mesh.kill(node)
    await until(lambda: not mesh.agent_runs(node))
    await mesh.start_again(node)
    await mesh.settled()


def _same(before: dict[Held, Outcome], now: dict[Held, Outcome]) -> None:
    changed = {one.asked: (was, now[one]) for one, was in before.items() if was != now[one]}
    assert changed == {}


async def test_connections_go_on_when_a_node_takes_other_bits(mesh: Cluster) -> None:
    """Through the node, to its replica, and between others; each change is another kind."""
    asks = 3 * everything(mesh)

    async with held(asks) as first:
        assert all(isinstance(outcome, Answer) for outcome in first.values())
        for node, layout in (
            ("n1", marks.DEFAULT),
            ("n2", RAGGED),
            ("n1", HIGH),
            ("n2", LOW),
        ):
            await _restart(mesh, node, layout)
            _same(first, await again(first))
            answers = await ask_all(asks)
            expect_own_addresses(mesh, asks, answers)
            assert "mesh-hold" not in mesh.sh(node, "nft", "list", "tables")


async def test_new_connections_wait_while_a_node_takes_other_bits(mesh: Cluster) -> None:
    tcp = [one for one in everything(mesh) if one.protocol is Protocol.TCP]

    async with stream(tcp) as traffic:
        await traffic.more(100)
        await _restart(mesh, "n1", RAGGED)
        await traffic.more(100)
        await _restart(mesh, "n1", HIGH)
        await traffic.more(100)

    assert traffic.failures == []


async def test_what_nobody_can_tell_the_meaning_of_is_forgotten(mesh: Cluster) -> None:
    """As after an agent that was killed while it rewrote marks."""
    hold = (
        "table inet mesh-hold { chain postrouting {\n"
        "type filter hook postrouting priority -190;\n"
        f'ct mark & {HIGH.ours:#x} != 0 drop comment "doubtful {HIGH.ours:#x}"\n'
        "}\n}"
    )
    await ask_all(mesh.from_outside(WEB, "n1"))
    before = await flows(mesh, "n1", HIGH)
    await mesh.kill("n1")
    mesh.sh("n1", "nft", "-f", "-", input=hold)

    await mesh.start_again("n1")
    await mesh.settled()
    after = await flows(mesh, "n1", HIGH)

    assert before
    assert not {flow.handle for flow in before} & {flow.handle for flow in after}
    assert "mesh-hold" not in mesh.sh("n1", "nft", "list", "tables")
    await until_served(8 * mesh.from_outside(WEB), {"a1", "b1"})

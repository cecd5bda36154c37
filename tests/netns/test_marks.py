"""Packets of a node that leaves some bits of the marks to its host, which uses them.

The host marks every new connection before we do, every packet, and every connection again when it
is answered; none of it may get lost, and none of it may lead a packet astray.
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest
from msgspec import structs

from mesh.dataplane import command, witness
from mesh.dataplane.conntrack import Conntrack
from mesh.model.address import FAMILIES, Family, nth
from mesh.model.publish import Protocol
from mesh.model.service import WHOLE_ADDRESS, Affinity, AffinityPrefix
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from tests.support import drivers, rules
from tests.support.echo import REFUSED, SILENCE, ask, ping
from tests.support.hosts_own import HostsOwn, lost
from tests.support.layouts import HIGH, LOW, RAGGED
from tests.support.onenode import ADDRESSES, CONTAINERS, CROWD, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.rules.marks import Layout
    from mesh.rules.stale import Flow

pytestmark = pytest.mark.netns

WEB, SOLO, EMPTY, LIMITED, AFFINE, FINE, HOST, NEAR = range(30080, 30088)
VIPS: Final = {
    port: tuple(nth(rules.CLUSTER.vips(family), number) for family in FAMILIES)
    for number, port in enumerate((WEB, SOLO, EMPTY), 1)
}


def _services() -> Iterator[Forwarding]:
    both = tuple(Backend(a, SERVER_PORT) for name in CONTAINERS for a in ADDRESSES[name])
    one = tuple(Backend(a, SERVER_PORT) for a in ADDRESSES["c1"])
    fine = tuple(structs.replace(backend, weight=2 if backend in one else 1) for backend in both)
    fine = tuple(structs.replace(backend, weight=100 * backend.weight - 1) for backend in fine)
    pools = {WEB: both, SOLO: one, EMPTY: (), LIMITED: one, AFFINE: both, FINE: fine, HOST: one}
    pools[NEAR] = both
    for port, pool in pools.items():
        scope = Scope.NODE if port == HOST else Scope.INGRESS
        for protocol in Protocol:
            yield Forwarding(
                f"{port}/{protocol.value}",
                (
                    Frontend(scope, None, protocol, port),
                    *(Frontend(Scope.VIP, vip, protocol, 80) for vip in VIPS.get(port, ())),
                ),
                pool,
                affinity=Affinity.CLIENT_IP if port in (AFFINE, NEAR) else Affinity.NONE,
                prefix=AffinityPrefix(ipv4=26, ipv6=64) if port == NEAR else WHOLE_ADDRESS,
                allow=("198.51.100.0/24", "2001:db8:1::/48") if port == LIMITED else (),
            )


class World(NamedTuple):
    """The node, and what its host writes into marks."""

    one: OneNode
    host: HostsOwn

    def flows(self) -> list[Flow]:
        """The flows of ours, translated or not."""
        layout = self.host.layout

        async def read() -> list[Flow]:
            with closing(Conntrack(layout)) as conntrack:
                return await conntrack.flows(layout.ours, layout.ours)

        return self.one.node.run(read())

    def lost(self) -> int:
        """How many packets were routed, or left, with another mark than their host gave them."""
        return lost(self.one.node.sh("nft", "list", "counter", "inet", "host", "lost"))


@pytest.fixture(scope="module", params=[HIGH, LOW, RAGGED], ids=["high", "low", "ragged"])
def layout(request: pytest.FixtureRequest) -> Layout:
    found: Layout = request.param
    return found


@pytest.fixture(scope="module", params=drivers.KERNEL)
def world(request: pytest.FixtureRequest, layout: Layout) -> Iterator[World]:
    host = HostsOwn.of(layout)
    # With iptables first packets of any frontend are routed as if they were to be steered.
    steered = request.param != "nftables"
    with one_node(request.param, layout) as made:
        made.publish(_services())
        made.node.run(command.run("nft", "-f", "-", input=host.text("", steered=steered)))
        yield World(made, host)


def address_of(name: str | int, family: Family) -> str:
    found = VIPS[name] if isinstance(name, int) else ADDRESSES[name]
    return found[FAMILIES.index(family)]


BOTH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")


@BOTH
def test_everything_is_served_and_the_hosts_bits_are_kept(world: World, family: Family) -> None:
    asked: list[tuple[str, str | int, int, set[str], str]] = [
        ("client", "node", WEB, {"c1", "c2"}, "client"),
        ("client", "node", FINE, {"c1", "c2"}, "client"),
        ("client", "node", AFFINE, {"c1", "c2"}, "client"),
        ("client", "node", NEAR, {"c1", "c2"}, "client"),
        ("node", "node", NEAR, {"c1", "c2"}, "node"),
        ("node", "peer", NEAR, {"c1", "c2"}, "node"),
        ("client", "node", HOST, {"c1"}, "client"),
        ("c2", "node", SOLO, {"c1"}, "c2"),
        ("c2", SOLO, 80, {"c1"}, "c2"),
        ("c1", SOLO, 80, {"c1"}, "gateway"),
        ("c2", "peer", SOLO, {"c1"}, "c2"),
        ("node", SOLO, 80, {"c1"}, "overlay"),
        ("node", "node", SOLO, {"c1"}, "node"),
        ("node", "peer", SOLO, {"c1"}, "node"),
        ("node", "c2", SERVER_PORT, {"c2"}, "gateway"),
    ]
    before = world.lost()

    for who, target, port, servers, seen in asked:
        for protocol in Protocol:
            answer = ask(who, protocol, address_of(target, family), port)

            expected = {f"{server} {address_of(seen, family)}" for server in servers}
            assert answer in expected, (who, target, port, protocol)

    flows = world.flows()
    translated = [flow for flow in flows if flow.mark & world.host.layout.id]
    assert len(translated) >= 2 * (len(asked) - 1)
    kept = {flow.mark & world.host.layout.foreign for flow in flows if flow.answered}
    assert kept == {world.host.kept}
    assert world.lost() == before


@BOTH
def test_what_is_refused_and_dropped_still_is(world: World, family: Family) -> None:
    refused: list[tuple[str, str | int, int]] = [
        ("client", "node", EMPTY),
        ("c1", EMPTY, 80),
        ("node", EMPTY, 80),
        ("c1", WEB, 81),
        ("node", WEB, 81),
        ("client", "node", 39999),
        ("node", "loopback", WEB),
    ]
    for protocol in Protocol:
        for who, target, port in refused:
            answer = ask(who, protocol, address_of(target, family), port)
            assert answer == REFUSED, (who, target, port, protocol)
        there = address_of("node", family)
        assert ask("client", protocol, there, LIMITED, patience=0.3) == SILENCE
    assert ping("c1", address_of(WEB, family), patience=3)


@BOTH
def test_a_client_keeps_its_replica_with_affinity(world: World, family: Family) -> None:
    sources = [pair[FAMILIES.index(family)] for pair in CROWD]

    found = {
        source: {
            ask("client", protocol, address_of("node", family), AFFINE, source=source)
            for protocol in Protocol
            for _ in range(2)
        }
        for source in sources
    }

    assert all(len(answers) == 1 for answers in found.values())
    servers = Counter(answer.split()[0] for answers in found.values() for answer in answers)
    assert set(servers) == {"c1", "c2"}


@BOTH
def test_clients_of_a_prefix_share_a_replica(world: World, family: Family) -> None:
    sources = [pair[FAMILIES.index(family)] for pair in CROWD]

    found = {
        ask("client", protocol, address_of("node", family), NEAR, source=source)
        for source in sources
        for protocol in Protocol
    }

    assert len({answer.split()[0] for answer in found}) == 1
    assert world.lost() == 0


def test_what_is_written_is_read_back_and_others_read_the_same(world: World) -> None:
    """python-iptables reads legacy tables alone, in a process of its own."""
    held = world.one.node.run(world.one.driver.read())

    assert held == world.one.lowered(_services())
    if world.one.driver.name == "iptables-legacy" and witness.is_installed():
        parameters = replace(rules.PARAMETERS, layout=world.host.layout)
        compared = world.one.node.run(witness.compare(parameters))
        assert compared.rules > 100
        assert compared.disagreements == ()

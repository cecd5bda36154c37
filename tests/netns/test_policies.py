"""Who may connect to replicas that policies select: packets, on every way to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.address import FAMILIES, Family, nth
from mesh.model.publish import Protocol
from mesh.policy.plan import Labelled, plan
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.store import schema
from tests.support import drivers, rules
from tests.support.echo import REFUSED, ask
from tests.support.onenode import ADDRESSES, CROWD, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.rules.guards import Guards

pytestmark = pytest.mark.netns

PUBLISHED: Final = 30080
VIP: Final = tuple(nth(rules.CLUSTER.vips(family), 1) for family in FAMILIES)
WAYS: Final = {"published": (ADDRESSES["node"], PUBLISHED), "vip": (VIP, 80)}
DIRECT: Final = (ADDRESSES["c1"], SERVER_PORT)

FROM_C2: Final = '{"podSelector": {"matchLabels": {"service": "c2"}}}'
FROM_CROWD: Final = """
    {"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.0/26", "192.0.2.101/32"]}},
    {"ipBlock": {"cidr": "2001:db8::/64", "except": ["2001:db8::/122", "2001:db8::65/128"]}}
"""
"""CROWD, but for its second address; not the client's own address."""

EVERY: Final = pytest.mark.parametrize("protocol", Protocol, ids=lambda p: p.value)
BOTH: Final = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"v{f.suffix}")


def _forwardings() -> Iterator[Forwarding]:
    for protocol in Protocol:
        yield Forwarding(
            f"c1/{SERVER_PORT}/{protocol.value}",
            (
                Frontend(Scope.INGRESS, None, protocol, PUBLISHED),
                *(Frontend(Scope.VIP, vip, protocol, 80) for vip in VIP),
            ),
            tuple(Backend(address, SERVER_PORT) for address in ADDRESSES["c1"]),
        )


def guards(*ingress: str) -> Guards:
    """What policies for c1 come to, each with one rule; none at all without any."""
    tasks = [Labelled("n1", ADDRESSES[name], {"service": name}) for name in ("c1", "c2")]
    selector = '"podSelector": {"matchLabels": {"service": "c1"}}'
    texts = [f'{{"name": "p{n}", {selector}, "ingress": [{r}]}}' for n, r in enumerate(ingress)]
    keys = [f"/mesh/policies/p{n}" for n in range(len(texts))]
    policies = [
        schema.parse_policy(*each) for each in zip(keys, map(str.encode, texts), strict=True)
    ]
    return plan(policies, tasks, "n1")


@pytest.fixture(scope="module", params=drivers.KERNEL)
def world(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    with one_node(request.param) as made:
        yield made


def test_an_address_of_the_node_is_not_its_replica_s_alone(world: OneNode) -> None:
    """Or a policy for a task of the host's network would shut the host."""
    node = Labelled("n1", ADDRESSES["node"], {"service": "c1"})
    shut = schema.parse_policy("/mesh/policies/p", b'{"name": "p", "podSelector": {}}')
    world.servers.start("node", "node", SERVER_PORT)

    world.publish(_forwardings(), plan([shut], [node], "n1"))

    for address in ADDRESSES["node"]:
        assert ask("client", Protocol.TCP, address, SERVER_PORT).startswith("node ")


def install(world: OneNode, *ingress: str) -> None:
    world.publish(_forwardings(), guards(*ingress))


def ways(family: Family) -> Iterator[tuple[str, int]]:
    """Address and port of each way from containers to c1."""
    for hosts, port in (*WAYS.values(), DIRECT):
        yield hosts[FAMILIES.index(family)], port


@BOTH
@EVERY
def test_without_a_policy_everybody_may_connect(
    world: OneNode, family: Family, protocol: Protocol
) -> None:
    install(world)

    assert ask("client", protocol, *next(ways(family))) != REFUSED
    assert REFUSED not in [ask("c2", protocol, *way) for way in ways(family)]


@BOTH
@EVERY
def test_a_policy_without_rules_closes_every_way(
    world: OneNode, family: Family, protocol: Protocol
) -> None:
    install(world, "")

    assert ask("client", protocol, *next(ways(family))) == REFUSED
    assert [ask("c2", protocol, *way) for way in ways(family)] == [REFUSED] * 3


@BOTH
@EVERY
def test_a_replica_reaches_itself_and_its_node_reaches_it(
    world: OneNode, family: Family, protocol: Protocol
) -> None:
    install(world, "")
    direct, vip = (hosts[FAMILIES.index(family)] for hosts in (ADDRESSES["c1"], VIP))

    assert ask("c1", protocol, vip, 80).startswith("c1 ")
    assert ask("node", protocol, vip, 80).startswith("c1 ")
    assert ask("node", protocol, direct, SERVER_PORT).startswith("c1 ")


@BOTH
@EVERY
def test_only_selected_tasks_are_let_in(world: OneNode, family: Family, protocol: Protocol) -> None:
    install(world, f'{{"from": [{FROM_C2}]}}')
    own = ADDRESSES["c2"][FAMILIES.index(family)]

    assert [ask("c2", protocol, *way) for way in ways(family)] == [f"c1 {own}"] * 3
    assert ask("client", protocol, *next(ways(family))) == REFUSED


@BOTH
@EVERY
def test_blocks_let_in_but_for_their_exceptions(
    world: OneNode, family: Family, protocol: Protocol
) -> None:
    install(world, f'{{"from": [{FROM_CROWD}]}}')
    first, second, third = (pair[FAMILIES.index(family)] for pair in CROWD[:3])
    way = next(ways(family))

    assert ask("client", protocol, *way) == REFUSED
    assert ask("client", protocol, *way, source=first) == f"c1 {first}"
    assert ask("client", protocol, *way, source=second) == REFUSED
    assert ask("client", protocol, *way, source=third) == f"c1 {third}"


@BOTH
def test_rules_are_about_the_replica_s_own_ports_of_a_protocol(
    world: OneNode, family: Family
) -> None:
    way = next(ways(family))

    for ports, let_in in (
        ('{"port": 8080}', True),
        ('{"port": 8000, "endPort": 8099}', True),
        ("{}", True),
        ('{"port": 8081, "endPort": 9000}', False),
        ('{"port": 30080}', False),
        ('{"protocol": "UDP", "port": 8080}', False),
    ):
        install(world, f'{{"ports": [{ports}]}}')
        assert (ask("client", Protocol.TCP, *way) != REFUSED) is let_in, ports


@BOTH
def test_what_one_of_several_policies_lets_in_is_let_in(world: OneNode, family: Family) -> None:
    install(
        world,
        f'{{"from": [{FROM_C2}], "ports": [{{"port": 8080}}]}}',
        f'{{"from": [{FROM_CROWD}]}}',
    )
    way, crowd = next(ways(family)), CROWD[0][FAMILIES.index(family)]

    assert ask("c2", Protocol.TCP, *way) != REFUSED
    assert ask("client", Protocol.TCP, *way, source=crowd) != REFUSED
    assert ask("client", Protocol.TCP, *way) == REFUSED


def test_a_fresh_agent_adopts_guards_and_heals_them(world: OneNode) -> None:
    install(world, "")
    way = next(ways(Family.V4))

    assert world.starts_again() is False
    if world.driver.name == "nftables":
        world.node.sh("nft", "flush", "chain", "inet", "mesh", "guard")
    else:
        program = f"iptables-{world.driver.name.rpartition('-')[2]}"
        world.node.sh(program, "-F", "MESH-GUARD")
    assert ask("client", Protocol.TCP, *way) != REFUSED
    assert world.starts_again() is True
    healed = ask("client", Protocol.TCP, *way)
    if world.driver.name != "nftables":  # what was in its chains is written by whoever wants it
        world.node.run(world.driver.prepare())
        install(world, "")
        healed = ask("client", Protocol.TCP, *way)
    assert healed == REFUSED


def _guarding(world: OneNode) -> bool:
    """Whether packets meet rules of a guard."""
    if world.driver.name == "nftables":
        return "chain guard {" in world.node.sh("nft", "list", "table", "inet", "mesh")
    program = f"iptables-{world.driver.name.rpartition('-')[2]}"
    return "-A MESH-GUARD" in world.node.sh(program, "-S", "MESH-GUARD")


def test_packets_meet_no_guard_while_nobody_is_selected(world: OneNode) -> None:
    install(world, "")
    assert _guarding(world)

    install(world)

    assert not _guarding(world)
    assert world.starts_again() is False

"""How many connections at a time a client may have: real ones, held, on every way in."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.address import FAMILIES, Family, nth
from mesh.model.publish import Protocol
from mesh.model.service import Affinity
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from tests.support import drivers, rules
from tests.support.echo import REFUSED, ask
from tests.support.held import Holder, is_alive
from tests.support.onenode import ADDRESSES, CROWD, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from socket import socket

pytestmark = pytest.mark.netns

BOTH: Final = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"v{f.suffix}")
SERVER_PORT: Final = 8088
ECHO_PORT: Final = 8080
WEB, OTHER = 30080, 30081
VIP: Final = tuple(nth(rules.CLUSTER.vips(family), 1) for family in FAMILIES)
ELSEWHERE: Final = "2001:db8:1::10"
"""An address of the client in another network than its others."""


def _service(
    name: str, published: int, limit: int, protocol: Protocol, vips: tuple[str, ...]
) -> Forwarding:
    """Leads to c1."""
    port = SERVER_PORT if protocol is Protocol.TCP else ECHO_PORT
    return Forwarding(
        f"{name}/80/{protocol.value}",
        (
            Frontend(Scope.INGRESS, None, protocol, published),
            *(Frontend(Scope.VIP, vip, protocol, 80) for vip in vips),
        ),
        tuple(Backend(address, port) for address in ADDRESSES["c1"]),
        limit=limit,
    )


class World:
    """One node, and what clients hold there."""

    def __init__(self, one: OneNode, stack: ExitStack) -> None:
        self.one = one
        self.holder = Holder()
        stack.callback(self.holder.close)
        self.holder.serve("c1", SERVER_PORT)

    def limit(
        self, limit: int, other: int = 0, affinity: Affinity = Affinity.NONE, slots: int = 1
    ) -> None:
        """Publish a service that has a limit, and another with one of its own."""
        self.one.publish(
            service._replace(
                affinity=affinity,
                backends=service.backends * slots,
            )
            for protocol in (Protocol.TCP, Protocol.UDP)
            for service in (
                _service("web", WEB, limit, protocol, VIP),
                _service("other", OTHER, other, protocol, ()),
            )
        )

    def open(self, family: Family, who: str = "client", source: str = "") -> socket | None:
        """Connect to the limited service by the way that is this client's."""
        return self.holder.open(who, *way(family, who), source)


def way(family: Family, who: str) -> tuple[str, int]:
    """Address and port by which somebody reaches the limited service."""
    index = FAMILIES.index(family)
    return (ADDRESSES["node"][index], WEB) if who == "client" else (VIP[index], 80)


@pytest.fixture(scope="module", params=drivers.KERNEL)
def _world(request: pytest.FixtureRequest) -> Iterator[World]:
    with one_node(request.param) as made, ExitStack() as stack:
        made.client.sh("ip", "addr", "add", f"{ELSEWHERE}/128", "dev", "eth0", "nodad")
        route = ("2001:db8:1::/64", "via", ADDRESSES["client"][1])
        made.node.sh("ip", "route", "add", *route)
        yield World(made, stack)


@pytest.fixture
def world(_world: World) -> Iterator[World]:
    """With no connection of another test; what was counted goes with the last limit."""
    _world.limit(0)
    yield _world
    _world.holder.release()


@BOTH
@pytest.mark.parametrize("who", ["client", "c2", "c1", "node"])
def test_one_too_many_is_refused_and_the_others_go_on(
    world: World, family: Family, who: str
) -> None:
    world.limit(3)
    held = [world.open(family, who) for _ in range(3)]

    assert None not in held
    assert [world.open(family, who) for _ in range(2)] == [None, None]
    assert all(map(is_alive, world.holder.held()))


@BOTH
def test_who_closes_one_may_open_another(world: World, family: Family) -> None:
    world.limit(2)
    first, second = world.open(family), world.open(family)
    assert first is not None
    assert world.open(family) is None

    first.close()

    assert world.holder.open_within("client", *way(family, "client"))
    assert world.open(family) is None
    assert second is not None
    assert is_alive(second)


@BOTH
def test_every_client_has_a_count_of_its_own(world: World, family: Family) -> None:
    world.limit(1)
    another = CROWD[0][0] if family is Family.V4 else ELSEWHERE

    assert world.open(family) is not None
    assert world.open(family) is None
    assert world.open(family, source=another) is not None
    assert world.open(family, source=another) is None
    assert world.open(family, "c2") is not None
    assert world.open(family, "c1") is not None
    assert world.open(family, "node") is not None


def test_an_ipv6_client_outside_is_a_network(world: World) -> None:
    world.limit(1)

    assert world.open(Family.V6) is not None
    assert world.open(Family.V6, source=CROWD[0][1]) is None


@BOTH
def test_services_count_for_themselves_and_ways_to_one_together(
    world: World, family: Family
) -> None:
    world.limit(1, other=2)
    index = FAMILIES.index(family)
    node = ADDRESSES["node"][index]

    assert world.holder.open("c2", VIP[index], 80) is not None
    assert world.holder.open("c2", node, WEB) is None
    opened = [world.holder.open("c2", node, OTHER) for _ in range(3)]
    assert [one is not None for one in opened] == [True, True, False]


@BOTH
def test_a_service_without_a_limit_has_none(world: World, family: Family) -> None:
    world.limit(1)
    node = ADDRESSES["node"][FAMILIES.index(family)]

    opened = [world.holder.open("client", node, OTHER) for _ in range(5)]

    assert None not in opened


@BOTH
def test_with_affinity_it_is_the_same(world: World, family: Family) -> None:
    world.limit(2, affinity=Affinity.CLIENT_IP)

    opened = [world.open(family) for _ in range(3)]

    assert [one is not None for one in opened] == [True, True, False]


@BOTH
@pytest.mark.parametrize(("then", "more"), [(4, 4), (1, 1), (0, 6)])
def test_a_limit_that_changes_leaves_what_is_held_alone(
    world: World, family: Family, then: int, more: int
) -> None:
    """And counts what begins from then on."""
    world.limit(2)
    held = [world.open(family) for _ in range(2)]
    assert world.open(family) is None

    world.limit(then)

    assert None not in held
    assert all(map(is_alive, world.holder.held()))
    opened = [world.open(family) for _ in range(more)]
    assert None not in opened
    assert (world.open(family) is None) is bool(then)


@BOTH
def test_scaling_leaves_the_count_alone(world: World, family: Family) -> None:
    world.limit(2)
    assert None not in [world.open(family) for _ in range(2)]

    for slots in (2, 3):
        world.limit(2, slots=slots)

    assert world.open(family) is None


@BOTH
def test_datagrams_of_a_flow_too_many_are_refused(world: World, family: Family) -> None:
    world.limit(2)

    answers = [ask("client", Protocol.UDP, *way(family, "client")) for _ in range(4)]

    assert [answer == REFUSED for answer in answers] == [False, False, True, True]


def test_what_is_refused_is_counted_by_frontend(world: World) -> None:
    world.limit(1)
    number = world.one.ids.of("web/80/tcp")
    before = world.one.node.run(world.one.driver.surplus()).get(number, 0)

    for family in FAMILIES:
        opened = [world.open(family) for _ in range(3)]
        assert [one is not None for one in opened] == [True, False, False]

    found = world.one.node.run(world.one.driver.surplus())
    assert found.get(number, 0) - before == 4
    assert found.keys() - {number} <= {world.one.ids.of("web/80/udp")}


def _damage(one: OneNode) -> None:
    if one.driver.name == "nftables":
        one.node.sh("nft", "flush", "chain", "inet", "mesh", "connlimit")
    else:
        program = f"iptables-{one.driver.name.rpartition('-')[2]}"
        one.node.sh(program, "-t", "mangle", "-F", "MESH-LIMITS")


def test_a_fresh_agent_adopts_counts_and_heals_limits(world: World) -> None:
    world.limit(1)
    assert world.open(Family.V4) is not None

    assert world.one.starts_again() is False
    assert world.open(Family.V4) is None
    _damage(world.one)
    assert world.open(Family.V4) is not None
    assert world.one.starts_again() is True
    assert world.one.starts_again() is False
    world.one.node.run(world.one.driver.prepare())
    world.limit(1)

    opened = [world.open(Family.V4) for _ in range(3)]
    assert opened[-1] is None


def test_nothing_is_left_of_the_last_limit(world: World) -> None:
    world.limit(2, other=7)
    world.limit(0, other=7)
    world.limit(0)

    if world.one.driver.name == "nftables":
        listed = world.one.node.sh("nft", "list", "table", "inet", "mesh")
        assert [word for word in ("connlimit_", "counts4", "surplus") if word in listed] == []
    else:
        flavour = world.one.driver.name.rpartition("-")[2]
        for program in ("iptables", "ip6tables"):
            listed = world.one.node.sh(f"{program}-{flavour}-save", "-t", "mangle")
            assert "MESH-L-" not in listed
            assert "MESH-U-" not in listed
    assert world.one.starts_again() is False

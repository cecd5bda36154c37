"""Real packets through the program of one node: who answers, and whom the server sees."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest

from mesh.dataplane import command
from mesh.delta import Delta
from mesh.model.address import FAMILIES, Family, nth
from mesh.model.publish import Protocol
from mesh.model.service import Affinity
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from tests.support import drivers, rules
from tests.support.echo import REFUSED, SILENCE, ask, ping
from tests.support.onenode import ADDRESSES, CROWD, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

pytestmark = pytest.mark.netns

ANYONE: Final = ("c1", "c2")
VIPS: Final = {
    name: tuple(nth(rules.CLUSTER.vips(family), number) for family in FAMILIES)
    for name, number in (("web", 1), ("solo", 2), ("empty", 3), ("closed", 4), ("nobody", 99))
}


def _pool(name: str, replicas: tuple[str, ...], port: int = SERVER_PORT) -> tuple[Backend, ...]:
    weights = {"weighted": {"c1": 3}, "fine": {"c1": 200, "c2": 99}}.get(name, {})
    return tuple(Backend(a, port, weights.get(r, 1)) for r in replicas for a in ADDRESSES[r])


def _service(name: str, published: int, replicas: tuple[str, ...]) -> list[Forwarding]:
    """An ingress port in both protocols, with port 80 of a VIP if the service has one."""
    return [
        Forwarding(
            f"{name}/{protocol.value}",
            (
                Frontend(Scope.INGRESS, None, protocol, published),
                *(Frontend(Scope.VIP, vip, protocol, 80) for vip in VIPS.get(name, ())),
            ),
            _pool(name, replicas, 9 if name == "closed" else SERVER_PORT),
            affinity=Affinity.CLIENT_IP if name == "affine" else Affinity.NONE,
            allow=("198.51.100.0/24", "2001:db8:1::/48") if name == "limited" else (),
        )
        for protocol in Protocol
    ]


def _host_ports() -> list[Forwarding]:
    c2 = _pool("host", ("c2",))
    found = []
    for protocol in Protocol:
        anywhere = Frontend(Scope.NODE, None, protocol, 31000)
        found.append(Forwarding(f"host/{protocol.value}", (anywhere,), c2))
        # The same port as an ingress service: on this one address, host mode wins.
        here = tuple(Frontend(Scope.HOST_IP, a, protocol, 30081) for a in ADDRESSES["gateway"])
        found.append(Forwarding(f"hostip/{protocol.value}", here, c2))
    return found


SERVICES: Final = (
    *_service("web", 30080, ANYONE),
    *_service("solo", 30081, ("c1",)),
    *_service("empty", 30082, ()),
    *_service("closed", 30083, ("c1",)),
    *_service("limited", 30084, ("c1",)),
    *_service("affine", 30085, ANYONE),
    *_service("weighted", 30086, ANYONE),
    *_service("fine", 30087, ANYONE),
    *_host_ports(),
)


@pytest.fixture(scope="module", params=drivers.KERNEL)
def world(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    with one_node(request.param) as made:
        made.publish(SERVICES)
        yield made


def address_of(name: str, family: Family) -> str:
    return {**ADDRESSES, **VIPS}[name][FAMILIES.index(family)]


BOTH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")
EACH = pytest.mark.parametrize("protocol", Protocol, ids=lambda protocol: protocol.value)


@BOTH
@EACH
@pytest.mark.parametrize(
    ("who", "target", "port", "servers", "seen"),
    [
        # A published port, from outside: the client's address is kept.
        ("client", "node", 30080, ANYONE, "client"),
        ("client", "node", 31000, ("c2",), "client"),
        # From a container: at the node, at the gateway, at a VIP; a sibling sees who asks.
        ("c1", "node", 31000, ("c2",), "c1"),
        ("c2", "node", 30081, ("c1",), "c2"),
        ("c2", "overlay", 30081, ("c1",), "c2"),
        ("c2", "solo", 80, ("c1",), "c2"),
        ("c1", "gateway", 30081, ("c2",), "c1"),
        # To itself: only then does a replica see the node instead.
        ("c1", "solo", 80, ("c1",), "gateway"),
        ("c1", "node", 30081, ("c1",), "gateway"),
        # From the node itself.
        ("node", "solo", 80, ("c1",), "overlay"),
        ("node", "node", 30081, ("c1",), "node"),
        ("node", "gateway", 30081, ("c2",), "gateway"),
        ("node", "overlay", 31000, ("c2",), "overlay"),
        # Another node's address: balanced right here, without a detour.
        ("c2", "peer", 30081, ("c1",), "c2"),
        ("node", "peer", 30081, ("c1",), "node"),
        # Not ours: neighbours on the bridge find and reach each other.
        ("c1", "c2", SERVER_PORT, ("c2",), "c1"),
        ("node", "c2", SERVER_PORT, ("c2",), "gateway"),
    ],
)
def test_a_replica_answers_and_sees_the_right_client(
    world: OneNode,
    family: Family,
    protocol: Protocol,
    who: str,
    target: str,
    port: int,
    servers: tuple[str, ...],
    seen: str,
) -> None:
    answer = ask(who, protocol, address_of(target, family), port)

    assert answer in {f"{server} {address_of(seen, family)}" for server in servers}


@BOTH
@EACH
@pytest.mark.parametrize(
    ("who", "target", "port"),
    [
        # No backend: at once, wherever it is asked.
        ("client", "node", 30082),
        ("c1", "node", 30082),
        ("c1", "empty", 80),
        ("node", "node", 30082),
        ("node", "empty", 80),
        # A live VIP has only the ports of its service.
        ("c1", "web", 81),
        ("node", "web", 81),
        # Nobody's port, and the replica's own refusal: through the bridge, it is told by ICMP.
        ("client", "node", 39999),
        ("client", "node", 30083),
        ("c1", "closed", 80),
        ("c2", "closed", 80),
        # Published ports do not answer on the node's loopback.
        ("node", "loopback", 30080),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    world: OneNode, family: Family, protocol: Protocol, who: str, target: str, port: int
) -> None:
    assert ask(who, protocol, address_of(target, family), port) == REFUSED


@BOTH
@EACH
@pytest.mark.parametrize(
    ("who", "target", "port"),
    [
        # An address of the VIP range that no service has.
        ("c1", "nobody", 80),
        # The mesh's own addresses, routed at the node from outside.
        ("client", "web", 80),
        ("client", "c1", SERVER_PORT),
        ("client", "gateway", 30080),
        ("client", "overlay", 30080),
        # Not on the allow list.
        ("client", "node", 30084),
    ],
)
def test_what_is_nobody_elses_business_is_dropped(
    world: OneNode, family: Family, protocol: Protocol, who: str, target: str, port: int
) -> None:
    assert ask(who, protocol, address_of(target, family), port, patience=0.3) == SILENCE


@BOTH
@EACH
@pytest.mark.parametrize(
    ("port", "share"), [(30080, 1 / 2), (30086, 3 / 4), (30087, 200 / 299)], ids=str
)
def test_connections_are_spread_by_weight(
    world: OneNode, family: Family, protocol: Protocol, port: int, share: float
) -> None:
    count = 160
    there = address_of("node", family)

    found = Counter(ask("client", protocol, there, port).split()[0] for _ in range(count))

    # Five standard deviations at least.
    assert set(found) == {"c1", "c2"}
    assert found["c1"] / count == pytest.approx(share, abs=0.2)


@BOTH
def test_an_affine_client_has_one_replica_in_both_protocols(world: OneNode, family: Family) -> None:
    sources = [pair[FAMILIES.index(family)] for pair in CROWD]

    found = {
        source: {
            ask("client", protocol, address_of("node", family), 30085, source=source)
            for protocol in Protocol
            for _ in range(3)
        }
        for source in sources
    }

    assert all(len(answers) == 1 for answers in found.values())
    servers = Counter(answer.split()[0] for answers in found.values() for answer in answers)
    assert set(servers) == {"c1", "c2"}


@BOTH
def test_a_live_vip_answers_ping_and_a_dead_one_does_not(world: OneNode, family: Family) -> None:
    assert ping("c1", address_of("web", family), patience=3)
    assert not ping("c1", address_of("nobody", family), patience=0.3)


async def _pools_change(world: OneNode) -> None:
    """One replica, then both, then 299 slots; the frontends' marks change each time."""
    before = await world.driver.read()
    for services in (
        _service("web", 30080, ("c1",)),
        _service("web", 30080, ("c2",)),
        _service("fine", 30080, ANYONE),
    ):
        after = world.lowered([*services, *SERVICES[2:]])
        await world.driver.apply(Delta.between(before, after))
        await world.driver.apply(Delta.between(after, before))
        await asyncio.sleep(0)


async def _program_is_replaced(world: OneNode) -> None:
    """Another version of the program, then the first again."""
    for closed in (("192.0.2.99/32",), ("127.0.0.0/8",)):
        parameters = replace(rules.PARAMETERS, closed=(closed, ("::1",)))
        driver = drivers.make(world.driver.name, parameters)
        await driver.prepare()
        driver.close()


async def _program_has_other_sets(world: OneNode) -> None:
    """A program that cannot be replaced in place; of iptables there is none."""
    if world.driver.name != "nftables":
        await _program_is_replaced(world)
        return
    held = await world.driver.read()
    for verb, element in (("delete", "0"), ("add", "0 : 7")):
        await command.run("nft", f"{verb} element inet mesh fingerprint {{ {element} }}")
    driver = drivers.make(world.driver.name, rules.PARAMETERS)
    await driver.prepare()
    await driver.apply(Delta({}, held))
    await driver.attach()
    driver.close()


@pytest.mark.parametrize("churn", [_pools_change, _program_is_replaced, _program_has_other_sets])
def test_changes_lose_no_connection(
    world: OneNode, churn: Callable[[OneNode], Coroutine[Any, Any, None]]
) -> None:
    stopped = threading.Event()
    rounds = []

    def change() -> None:
        while not stopped.is_set():
            world.node.run(churn(world))
            rounds.append(1)

    answers: Counter[str] = Counter()
    thread = threading.Thread(target=change)
    thread.start()
    try:
        while len(rounds) < 20 or answers.total() < 800:
            answers.update(
                ask("client", protocol, address_of("node", family), 30080, patience=5).split()[0]
                for family in FAMILIES
                for protocol in Protocol
            )
    finally:
        stopped.set()
        thread.join()

    assert set(answers) <= {"c1", "c2"}

"""What the tracer says of a packet is what the kernel does with it."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.address import FAMILIES, Family, nth, packed
from mesh.model.publish import Protocol
from mesh.model.service import Affinity, AffinityPrefix
from mesh.rules import trace
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.trace import Entry, Packet, Path, Place, Verdict
from tests.support import drivers, rules
from tests.support.echo import REFUSED, SILENCE, ask
from tests.support.onenode import ADDRESSES, CROWD, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

VIPS: Final = {
    name: tuple(nth(rules.CLUSTER.vips(family), number) for family in FAMILIES)
    for number, name in enumerate(("web", "solo", "empty", "nobody"), 1)
}
ENTRIES: Final = {"c1": Entry.CONTAINER, "c2": Entry.CONTAINER, "node": Entry.NODE}
PORTS: Final = (30080, 30081, 30082, 30084, 31000, 39999)
QUESTIONS: Final = (
    *product(("client", "c1", "node"), ("node", "gateway", "overlay", "loopback"), PORTS),
    *product(("c1", "node"), ("peer",), (30080, 30081, 30082)),
    *product(("client", "c1", "node"), ("web", "solo", "empty", "nobody"), (80, 81)),
    *product(("client", "c1", "node"), ("c2",), (SERVER_PORT,)),
)


def _backends(*replicas: str) -> tuple[Backend, ...]:
    return tuple(Backend(a, SERVER_PORT) for name in replicas for a in ADDRESSES[name])


def _services() -> Iterator[Forwarding]:
    for protocol in Protocol:
        for name, port, replicas in (
            ("web", 30080, ("c1", "c2")),
            ("solo", 30081, ("c1",)),
            ("empty", 30082, ()),
        ):
            ingress = Frontend(Scope.INGRESS, None, protocol, port)
            vips = tuple(Frontend(Scope.VIP, vip, protocol, 80) for vip in VIPS[name])
            yield Forwarding(f"{name}/{protocol}", (ingress, *vips), _backends(*replicas))
        limited = Frontend(Scope.INGRESS, None, protocol, 30084)
        allow = ("10.0.1.0/24", "198.51.100.0/24", "2001:db8::1/128")
        yield Forwarding(f"limited/{protocol}", (limited,), _backends("c1"), allow=allow)
        affine = Frontend(Scope.INGRESS, None, protocol, 30085)
        pool = _backends("c1", "c2")
        yield Forwarding(f"affine/{protocol}", (affine,), pool, affinity=Affinity.CLIENT_IP)
        near = Frontend(Scope.INGRESS, None, protocol, 30086)
        some = AffinityPrefix(ipv4=31, ipv6=124)
        policy = {"affinity": Affinity.CLIENT_IP, "prefix": some}
        yield Forwarding(f"near/{protocol}", (near,), pool, **policy)  # type: ignore[arg-type]
        host = Frontend(Scope.NODE, None, protocol, 31000)
        yield Forwarding(f"host/{protocol}", (host,), _backends("c2"))
        here = tuple(Frontend(Scope.HOST_IP, a, protocol, 30081) for a in ADDRESSES["gateway"])
        yield Forwarding(f"hostip/{protocol}", here, _backends("c2"))


@pytest.fixture(scope="module", params=drivers.KERNEL)
def world(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    with one_node(request.param) as made:
        made.publish(_services())
        yield made


@pytest.fixture(scope="module")
def place(world: OneNode) -> Place:
    held = world.node.run(world.driver.read())
    return Place(rules.PARAMETERS, held, ADDRESSES["node"], backend=world.driver.name)


def address_of(name: str, family: Family) -> str:
    return {**ADDRESSES, **VIPS}[name][FAMILIES.index(family)]


def expected(walked: trace.Trace) -> set[str]:
    """Every answer that a client may get, as `ask` tells them."""
    names = {a: name for name, pair in ADDRESSES.items() for a in pair}
    match walked.verdict:
        case Verdict.DROPPED:
            # A datagram that the node itself may not send is an error at once (EPERM).
            one = walked.packet
            own = one.entry is Entry.NODE and one.protocol is not Protocol.TCP
            return {REFUSED if own else SILENCE}
        case Verdict.REFUSED:
            return {REFUSED}
        case Verdict.PASSED:
            # Nobody listens on the node itself; a container asked directly answers for itself.
            end = walked.ending
            server = names[walked.packet.destination]
            return {REFUSED} if end.path is Path.NODE else {f"{server} {end.seen}"}
        case Verdict.FORWARDED:
            return {
                f"{names[a.target.address]} {a.ending.seen}"
                for a in walked.answers
                if a.target is not None
            }


def _source(world: OneNode, who: str, there: str, family: Family) -> str:
    """The address that a client would use of itself."""
    if who != "node":
        return address_of(who, family)
    return str(world.node.sh("ip", "route", "get", there)).partition(" src ")[2].split()[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")
@pytest.mark.parametrize("protocol", Protocol, ids=lambda protocol: protocol.value)
def test_packets_do_what_the_trace_says(
    world: OneNode, place: Place, family: Family, protocol: Protocol
) -> None:
    wrong = {}
    for who, target, port in QUESTIONS:
        if target == "loopback" and who != "node":
            continue  # their own loopback, not the node's
        there = address_of(target, family)
        entry = ENTRIES.get(who, Entry.OUTSIDE)
        packet = Packet(_source(world, who, there, family), there, protocol, port, entry)
        wanted = expected(trace.walk(packet, place))

        answer = ask(who, protocol, there, port, patience=0.3 if SILENCE in wanted else 5)

        if answer not in wanted:
            wrong[who, target, port] = (answer, wanted)
    assert wrong == {}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")
def test_the_trace_knows_which_replica_an_affine_client_gets(
    world: OneNode, place: Place, family: Family
) -> None:
    index, there = FAMILIES.index(family), address_of("node", family)
    told, real = {}, {}

    for source in (pair[index] for pair in CROWD):
        walked = trace.walk(Packet(source, there, Protocol.UDP, 30085), place)
        (told[source],) = expected(walked)
        real[source] = ask("client", Protocol.UDP, there, 30085, source=source)

    assert told == real
    assert {answer.split()[0] for answer in real.values()} == {"c1", "c2"}


@pytest.mark.parametrize("protocol", Protocol, ids=lambda protocol: protocol.value)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")
def test_clients_of_one_prefix_have_the_replica_that_the_walk_names(
    world: OneNode, place: Place, family: Family, protocol: Protocol
) -> None:
    index, there = FAMILIES.index(family), address_of("node", family)
    told: dict[str, str] = {}
    real: dict[str, str] = {}
    by_prefix: dict[int, set[str]] = {}

    for source in (pair[index] for pair in CROWD):
        walked = trace.walk(Packet(source, there, protocol, 30086), place)
        (told[source],) = expected(walked)
        real[source] = ask("client", protocol, there, 30086, source=source)
        prefix = packed(source)[-1] >> (1 if family is Family.V4 else 4)
        by_prefix.setdefault(prefix, set()).add(real[source].split()[0])

    assert told == real
    assert len(by_prefix) == (8 if family is Family.V4 else 2)
    assert all(len(servers) == 1 for servers in by_prefix.values())

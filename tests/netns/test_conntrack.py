"""UDP clients and the flows that hold them, while pools and ports change under them."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from mesh.dataplane.conntrack import Conntrack
from mesh.dataplane.nfnetlink import Message, Socket
from mesh.delta import Delta
from mesh.errors import ApplyFailed
from mesh.model import address as parsed
from mesh.model.address import FAMILIES, Family, nth
from mesh.model.publish import Protocol
from mesh.rules import nft, stale
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.marks import DEFAULT
from mesh.rules.stale import Stale
from tests.support import drivers, rules
from tests.support.echo import REFUSED, SILENCE
from tests.support.namespaces import run
from tests.support.onenode import ADDRESSES, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mesh.rules.stale import Endpoint, Flow

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")
UDP, TCP = Protocol.UDP, Protocol.TCP
ALL: Final = ("c1", "c2")
VIPS: Final = tuple(nth(rules.CLUSTER.vips(family), 1) for family in FAMILIES)
WEB: Final = 30080
OTHER: Final = 30081


def service(port: int, replicas: Sequence[str], protocol: Protocol = UDP) -> Forwarding:
    pool = tuple(Backend(a, SERVER_PORT) for name in replicas for a in ADDRESSES[name])
    frontend = Frontend(Scope.INGRESS, None, protocol, port)
    return Forwarding(f"{port}/{protocol.value}", (frontend,), pool)


def with_vip(forwarding: Forwarding) -> Forwarding:
    vips = (Frontend(Scope.VIP, vip, UDP, 53) for vip in VIPS)
    return forwarding._replace(frontends=(*forwarding.frontends, *vips))


class Client:
    """A socket that keeps its port, and so its flow."""

    def __init__(self, namespace: str, protocol: Protocol, address: str, port: int) -> None:
        domain = socket.AF_INET6 if ":" in address else socket.AF_INET
        kind = socket.SOCK_DGRAM if protocol is UDP else socket.SOCK_STREAM
        with netns.entered(f"/run/netns/{namespace}"):
            self.socket = socket.socket(domain, kind)
        self.socket.settimeout(5)
        self.socket.connect((address, port))
        self.ends: list[Endpoint] = [
            (parsed.packed(end[0]), end[1])
            for end in (self.socket.getsockname(), self.socket.getpeername())
        ]

    def ask(self, patience: float = 5.0) -> str:
        """Which server answers."""
        self.socket.settimeout(patience)
        try:
            self.socket.send(b"?")
            return self.socket.recv(100).decode().split()[0]
        except ConnectionRefusedError:
            return REFUSED
        except TimeoutError:
            return SILENCE


@dataclass
class World:
    """One node whose flows are looked after, and clients."""

    one: OneNode
    conntrack: Conntrack
    clients: ExitStack
    forgot: tuple[Stale, ...] = ()

    def change(self, *forwardings: Forwarding) -> None:
        """What a reconciler does: first the maps, then the flows."""
        wanted = self.one.lowered(forwardings)

        async def reconcile() -> None:
            delta = Delta.between(await self.one.driver.read(), wanted)
            await self.one.driver.apply(delta)
            self.forgot = stale.after(delta, lambda _: wanted, DEFAULT)
            await self.conntrack.forget(self.forgot)

        self.one.node.run(reconcile())

    def client(
        self, address: str, port: int, protocol: Protocol = UDP, namespace: str = "client"
    ) -> Client:
        made = Client(namespace, protocol, address, port)
        self.clients.callback(made.socket.close)
        return made

    def clients_of(self, address: str, port: int, namespace: str = "client") -> dict[str, Client]:
        """A client of each replica, found by trying."""
        found: dict[str, Client] = {}
        for _ in range(100):
            client = self.client(address, port, namespace=namespace)
            found.setdefault(client.ask(), client)
            if len(found) == len(ALL):
                return found
        raise AssertionError(f"only {set(found)} answer")

    def flow(self, client: Client) -> Flow | None:
        """The entry of a client's flow, if there is one."""
        flows = self.one.node.run(self.conntrack.flows(DEFAULT.ours, DEFAULT.ours))
        found = [flow for flow in flows if [flow.source, flow.destination] == client.ends]
        assert len(found) < 2
        return found[0] if found else None

    def forget_everything(self) -> None:
        async def forget() -> None:
            await self.conntrack.delete(await self.conntrack.flows(0, 0))

        self.one.node.run(forget())


@pytest.fixture(scope="module", params=drivers.KERNEL)
def node(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    with one_node(request.param) as made:
        yield made


@pytest.fixture(params=["filters", "no filters"])
def world(
    request: pytest.FixtureRequest, node: OneNode, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """On this kernel, and as on one that can delete by tuple only."""
    if request.param == "no filters":
        monkeypatch.setattr(Socket, "each", _each_by_tuple)
    with netns.entered("/run/netns/node"), ExitStack() as stack:
        conntrack = Conntrack(DEFAULT)
        stack.callback(conntrack.close)
        found = World(node, conntrack, stack)
        found.forget_everything()
        yield found


_each = Socket.each
_FILTER: Final = (25 | 0x8000).to_bytes(2, "little")


def _each_by_tuple(self: Socket, messages: Sequence[Message]) -> list[int]:
    if any(_FILTER in message.body for message in messages):
        return [errno.EINVAL] * len(messages)
    return _each(self, messages)


def of(addresses: Sequence[str], family: Family) -> str:
    return addresses[FAMILIES.index(family)]


@BOTH
def test_a_client_whose_replica_leaves_is_answered_by_another_at_once(
    world: World, family: Family
) -> None:
    here = of(ADDRESSES["node"], family)
    rest = (service(OTHER, ALL), service(WEB, ["c1"], TCP))
    world.change(service(WEB, ALL), *rest)
    web, other = world.clients_of(here, WEB), world.clients_of(here, OTHER)
    connection = world.client(here, WEB, TCP)
    untouched = [web["c2"], *other.values(), connection]
    before = [world.flow(client) for client in untouched]

    world.change(service(WEB, ["c2"]), *rest)

    assert all(before)
    assert [world.flow(client) for client in untouched] == before
    assert web["c1"].ask() == "c2"
    assert other["c1"].ask() == "c1"


@BOTH
def test_clients_of_a_service_without_replicas_are_refused_and_served_again(
    world: World, family: Family
) -> None:
    here = of(ADDRESSES["node"], family)
    world.change(service(WEB, ALL), service(OTHER, ALL))
    clients = world.clients_of(here, WEB).values()
    other = world.clients_of(here, OTHER)["c1"]
    before = world.flow(other)

    world.change(service(WEB, []), service(OTHER, ALL))

    assert [client.ask() for client in clients] == [REFUSED, REFUSED]
    assert world.flow(other) == before

    world.change(service(WEB, ["c1"]), service(OTHER, ALL))

    assert world.forgot == ()
    assert [client.ask() for client in clients] == ["c1", "c1"]


@BOTH
def test_clients_of_a_port_that_is_withdrawn_are_refused(world: World, family: Family) -> None:
    here = of(ADDRESSES["node"], family)
    world.change(service(WEB, ALL), service(OTHER, ALL))
    clients = world.clients_of(here, WEB).values()
    other = world.clients_of(here, OTHER)["c1"]
    before = world.flow(other)

    world.change(service(OTHER, ALL))

    assert [client.ask() for client in clients] == [REFUSED, REFUSED]
    assert world.flow(other) == before


@BOTH
def test_a_withdrawn_port_leaves_the_flows_to_the_vip_alone(world: World, family: Family) -> None:
    web = with_vip(service(WEB, ALL))
    world.change(web)
    to_port = world.clients_of(of(ADDRESSES["node"], family), WEB)["c1"]
    to_vip = world.clients_of(of(VIPS, family), 53, namespace="c2")["c1"]
    before = world.flow(to_vip)

    world.change(web._replace(frontends=web.frontends[1:]))

    assert to_port.ask() == REFUSED
    assert before is not None
    assert world.flow(to_vip) == before


@BOTH
@pytest.mark.parametrize("who", ["client", "c1"])
def test_a_client_that_came_before_its_port_is_answered_once_there_is_one(
    world: World, family: Family, who: str
) -> None:
    world.change()
    here = of(ADDRESSES["node"], family)
    early = world.client(here, WEB, namespace=who)
    stranger = world.client(here, OTHER, namespace=who)

    assert [early.ask(), stranger.ask()] == [REFUSED, REFUSED]
    world.change(service(WEB, ["c2"]))

    assert early.ask() == "c2"


@BOTH
def test_a_client_that_came_before_its_vip_is_answered_once_there_is_one(
    world: World, family: Family
) -> None:
    world.change()
    early = world.client(of(VIPS, family), 53, namespace="c1")

    assert early.ask(patience=0.2) == SILENCE
    world.change(with_vip(service(WEB, ["c2"])))

    assert early.ask() == "c2"


@BOTH
def test_a_new_port_leaves_answered_flows_to_the_same_port_elsewhere_alone(
    world: World, family: Family
) -> None:
    world.change()
    sibling = world.client(of(ADDRESSES["c2"], family), SERVER_PORT, namespace="c1")
    assert sibling.ask() == "c2"
    before = world.flow(sibling)

    world.change(service(SERVER_PORT, ["c1"]))

    assert world.forgot != ()
    assert before is not None
    assert world.flow(sibling) == before


@BOTH
def test_many_services_may_lose_replicas_in_one_change(world: World, family: Family) -> None:
    here = of(ADDRESSES["node"], family)
    ports = range(30100, 30108)
    world.change(*(service(port, ALL) for port in ports))
    clients = [world.clients_of(here, port) for port in ports]
    before = [world.flow(each["c2"]) for each in clients]

    world.change(*(service(port, ["c2"]) for port in ports))

    assert [each["c1"].ask() for each in clients] == ["c2"] * len(ports)
    assert [world.flow(each["c2"]) for each in clients] == before


@BOTH
def test_a_fresh_agent_finds_the_flows_that_another_left_behind(
    world: World, family: Family
) -> None:
    here = of(ADDRESSES["node"], family)
    world.change(service(WEB, ALL))
    clients = world.clients_of(here, WEB)
    before = world.flow(clients["c2"])
    left = service(WEB, ["c2"])
    world.one.publish([left])
    assert clients["c1"].ask() == "c1"

    async def look() -> None:
        flows = await world.conntrack.udp_flows(DEFAULT.ours, DEFAULT.ours | DEFAULT.via)
        held = nft.lower(left, world.one.ids)
        await world.conntrack.delete(stale.among(flows, lambda _: held, DEFAULT))

    world.one.node.run(look())

    assert clients["c1"].ask() == "c2"
    assert world.flow(clients["c2"]) == before


@contextmanager
def marked_flows(count: int, zone: str = "") -> Iterator[Conntrack]:
    """The table of a namespace with flows that are marked as those of frontend 1."""
    mark = DEFAULT.ours | DEFAULT.id_bits(1)
    with rules.namespace(), ExitStack() as stack:
        run("ip", "link", "set", "lo", "up")
        rules.nft("add table inet x")
        for name, priority, action in (("early", -300, zone), ("late", 0, f"ct mark set {mark}")):
            hook = f"type filter hook output priority {priority};"
            rules.nft(f"add chain inet x {name} {{ {hook} }}")
            if action:
                rules.nft(f"add rule inet x {name} {action}")
        sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        for port in range(1000, 1000 + count):
            sender.sendto(b"?", ("127.0.0.255", port))
        conntrack = Conntrack(DEFAULT)
        stack.callback(conntrack.close)
        yield conntrack


@pytest.mark.parametrize("zone", ["", "ct zone set 7", "ct original zone set 7"])
async def test_a_flow_in_any_zone_can_be_deleted(zone: str) -> None:
    with marked_flows(1, zone) as conntrack:
        flows = await conntrack.flows(DEFAULT.ours, DEFAULT.ours)
        await conntrack.delete([*flows, *flows])

        assert len(flows) == 1
        assert await conntrack.flows(DEFAULT.ours, DEFAULT.ours) == []


async def test_hundreds_of_flows_are_deleted() -> None:
    with marked_flows(200) as conntrack:
        flows = await conntrack.udp_flows(DEFAULT.ours, DEFAULT.ours)
        await conntrack.delete(flows)

        assert len(flows) == 200
        assert await conntrack.flows(DEFAULT.ours, DEFAULT.ours) == []


async def test_what_is_not_this_very_flow_is_not_deleted() -> None:
    with marked_flows(1) as conntrack:
        before = await conntrack.flows(DEFAULT.ours, DEFAULT.ours)
        handle = before[0].handle
        other = handle[:-1] + bytes((handle[-1] ^ 1,))  # the end of its id

        await conntrack.delete([before[0]._replace(handle=other)])

        assert await conntrack.flows(DEFAULT.ours, DEFAULT.ours) == before


async def test_a_refusal_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Socket, "each", lambda _, messages: [errno.EPERM] * len(messages))
    conntrack = Conntrack(DEFAULT)

    with pytest.raises(ApplyFailed, match=r"^conntrack: .*Operation not permitted.*CAP_NET_ADMIN"):
        await conntrack.forget([Stale(DEFAULT.ours, DEFAULT.flows)])

    conntrack.close()

"""Both sides of a connection that is ended hear of it: reset at their next segment, not silence."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from mesh.dataplane.conntrack import Conntrack
from mesh.model import address as parsed
from mesh.model.address import FAMILIES, Family, nth
from mesh.model.publish import Protocol
from mesh.rules import marks
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from tests.support import drivers, rules
from tests.support.onenode import ADDRESSES, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.rules.stale import Flow

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")
VIPS: Final = tuple(nth(rules.CLUSTER.vips(family), 1) for family in FAMILIES)
SERVER_PORT: Final = 8088
PUBLISHED: Final = 30080
LAYOUT: Final = marks.DEFAULT

_DOMAIN: Final = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}


@pytest.fixture(scope="module", params=drivers.KERNEL)
def world(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    with one_node(request.param) as made:
        yield made


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def publish(world: OneNode, where: str) -> None:
    """A service whose replica is a container, or the node itself."""
    frontends = [Frontend(Scope.INGRESS, None, Protocol.TCP, PUBLISHED)]
    frontends += (Frontend(Scope.VIP, vip, Protocol.TCP, 80) for vip in VIPS)
    backends = tuple(Backend(a, SERVER_PORT) for a in ADDRESSES[where])
    world.publish([Forwarding("web/80/tcp", tuple(frontends), backends)])


def opened(namespace: str, family: Family, sockets: ExitStack) -> socket.socket:
    with netns.entered(f"/run/netns/{namespace}"):
        made = sockets.enter_context(socket.socket(_DOMAIN[family], socket.SOCK_STREAM))
    made.settimeout(5)
    return made


def connect(
    who: str,
    where: str,
    family: Family,
    sockets: ExitStack,
    source: tuple[object, ...] | None = None,
) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection to the service, from a port of the client or any."""
    listener = opened("node" if where == "overlay" else where, family, sockets)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", SERVER_PORT))
    listener.listen()
    client = opened(who, family, sockets)
    index = FAMILIES.index(family)
    target = (ADDRESSES["node"][index], PUBLISHED) if who == "client" else (VIPS[index], 80)
    if source is not None:
        client.bind(source)
    client.connect(target)
    server = sockets.enter_context(listener.accept()[0])
    listener.close()
    server.settimeout(5)
    client.sendall(b"ping")
    assert server.recv(100) == b"ping"
    return client, server


def end_all(world: OneNode, where: str) -> list[Flow]:
    """End every connection to the replica that is not ended yet; these."""
    addresses = frozenset(map(parsed.packed, ADDRESSES[where]))
    with netns.entered("/run/netns/node"):
        conntrack = Conntrack(LAYOUT)

    async def end() -> list[Flow]:
        flows = [
            flow
            for flow in await conntrack.flows_to(addresses)
            if flow.live and flow.backend[0] in addresses and not LAYOUT.is_ended(flow.mark)
        ]
        await conntrack.end(flows)
        return flows

    try:
        return world.node.run(end())
    finally:
        conntrack.close()


def is_reset(one: socket.socket) -> bool:
    """Whether a side that says something hears that nobody listens any more."""
    try:
        one.sendall(b"more")
        return one.recv(100) == b"never"
    except ConnectionResetError:
        return True


PATHS = pytest.mark.parametrize(
    ("who", "where"),
    [("client", "c1"), ("c2", "c1"), ("node", "c1"), ("client", "overlay"), ("c2", "overlay")],
)


@BOTH
@PATHS
def test_both_sides_hear_that_a_connection_was_ended(
    world: OneNode, sockets: ExitStack, family: Family, who: str, where: str
) -> None:
    publish(world, where)
    client, server = connect(who, where, family, sockets)

    ended = end_all(world, where)

    assert len(ended) == 1
    assert is_reset(client)
    assert is_reset(server)
    assert end_all(world, where) == []


@BOTH
def test_a_client_that_only_closes_ends_too(
    world: OneNode, sockets: ExitStack, family: Family
) -> None:
    publish(world, "c1")
    client, _ = connect("client", "c1", family, sockets)
    end_all(world, "c1")

    client.shutdown(socket.SHUT_WR)

    with pytest.raises(ConnectionResetError):
        client.recv(100)


@BOTH
@PATHS
def test_a_client_may_connect_anew_from_the_same_port(
    world: OneNode, sockets: ExitStack, family: Family, who: str, where: str
) -> None:
    publish(world, where)
    client, _ = connect(who, where, family, sockets)
    here = client.getsockname()
    end_all(world, where)
    assert is_reset(client)
    client.close()

    again, server = connect(who, where, family, sockets, here)

    server.sendall(b"pong")
    assert again.recv(100) == b"pong"


@BOTH
def test_what_began_afterwards_goes_on(world: OneNode, sockets: ExitStack, family: Family) -> None:
    publish(world, "c1")
    first, _ = connect("client", "c1", family, sockets)
    end_all(world, "c1")
    second, server = connect("client", "c1", family, sockets)

    server.sendall(b"pong")

    assert second.recv(100) == b"pong"
    assert is_reset(first)

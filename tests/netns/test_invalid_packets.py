"""Segments that conntrack cannot place are not translated: whoever got one would answer RST."""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from mesh.model import address as parsed
from mesh.model.address import FAMILIES, Family, nth
from mesh.model.publish import Protocol
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from tests.support import drivers, rules
from tests.support.onenode import ADDRESSES, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")
VIPS: Final = tuple(nth(rules.CLUSTER.vips(family), 1) for family in FAMILIES)
SERVER: Final = "c1"
SERVER_PORT: Final = 8088
PUBLISHED: Final = 30080

_DOMAIN: Final = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_REPAIR, _QUEUE, _SEQUENCE = 19, 20, 21
_RECEIVING, _SENDING = 1, 2
_FAR: Final = 1 << 30
_ACK: Final = 0x10


@dataclass(frozen=True)
class Connection:
    """A connection through the node, and how far it has come as the client sees it."""

    client: socket.socket
    server: socket.socket
    sent: int
    received: int

    def works(self) -> bool:
        """Whether both ends still hear each other."""
        try:
            self.client.sendall(b"ping")
            if self.server.recv(100) != b"ping":
                return False
            self.server.sendall(b"pong")
            return self.client.recv(100) == b"pong"
        except ConnectionResetError:
            return False


@pytest.fixture(scope="module", params=drivers.KERNEL)
def world(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    frontends = [Frontend(Scope.INGRESS, None, Protocol.TCP, PUBLISHED)]
    frontends += (Frontend(Scope.VIP, vip, Protocol.TCP, 80) for vip in VIPS)
    backends = tuple(Backend(a, SERVER_PORT) for a in ADDRESSES[SERVER])
    with one_node(request.param) as made:
        made.publish([Forwarding("web", tuple(frontends), backends)])
        yield made


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def address_of(name: str, family: Family) -> str:
    return {**ADDRESSES, "vip": VIPS}[name][FAMILIES.index(family)]


def opened(namespace: str, family: Family, sockets: ExitStack) -> socket.socket:
    with netns.entered(f"/run/netns/{namespace}"):
        made = sockets.enter_context(socket.socket(_DOMAIN[family], socket.SOCK_STREAM))
    made.settimeout(5)
    return made


def connect(who: str, target: str, family: Family, sockets: ExitStack) -> Connection:
    listener = opened(SERVER, family, sockets)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", SERVER_PORT))
    listener.listen()
    client = opened(who, family, sockets)
    client.connect((address_of(target, family), 80 if target == "vip" else PUBLISHED))
    server = sockets.enter_context(listener.accept()[0])
    server.settimeout(5)
    made = Connection(client, server, _sequence(client, _SENDING), _sequence(client, _RECEIVING))
    assert made.works()
    return Connection(client, server, made.sent + 4, made.received + 4)


def _sequence(connection: socket.socket, queue: int) -> int:
    """The next sequence number of a direction, as tcp(7) in repair mode tells it."""
    connection.setsockopt(socket.IPPROTO_TCP, _REPAIR, 1)
    connection.setsockopt(socket.IPPROTO_TCP, _QUEUE, queue)
    number = connection.getsockopt(socket.IPPROTO_TCP, _SEQUENCE)
    connection.setsockopt(socket.IPPROTO_TCP, _REPAIR, -1)  # off, without a window probe
    return number & 0xFFFFFFFF


def send_segment(
    namespace: str, source: tuple[str, int], target: tuple[str, int], sequence: int, ack: int
) -> None:
    """Send a segment far outside the window, with an acknowledgement that a RST would repeat."""
    family = parsed.family_of(source[0])
    number, body = (sequence + _FAR) & 0xFFFFFFFF, b"late"
    head = struct.pack(
        ">HHIIBBHHH", source[1], target[1], number, ack & 0xFFFFFFFF, 5 << 4, _ACK, 500, 0, 0
    )
    ends = parsed.packed(source[0]) + parsed.packed(target[0])
    pseudo = ends + struct.pack(">II", len(head + body), socket.IPPROTO_TCP)
    words = struct.unpack(f">{len(pseudo + head + body) // 2}H", pseudo + head + body)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    with netns.entered(f"/run/netns/{namespace}"):
        raw = socket.socket(_DOMAIN[family], socket.SOCK_RAW, socket.IPPROTO_TCP)
    with raw:
        raw.bind((source[0], 0))
        with suppress(PermissionError):  # what the output hook drops
            raw.sendto(head[:16] + struct.pack(">H", checksum) + head[18:] + body, (target[0], 0))


PATHS = pytest.mark.parametrize(
    ("who", "target"),
    [("client", "node"), ("c2", "vip"), ("c2", "node"), ("node", "vip"), ("node", "node")],
)


@BOTH
@PATHS
def test_a_clients_segment_outside_the_window_resets_nothing(
    world: OneNode, sockets: ExitStack, family: Family, who: str, target: str
) -> None:
    connection = connect(who, target, family, sockets)
    here, there = connection.client.getsockname()[:2], connection.client.getpeername()[:2]

    send_segment(who, here, there, connection.sent, connection.received)

    assert connection.works()


@BOTH
@PATHS
def test_a_replicas_segment_outside_the_window_resets_nothing(
    world: OneNode, sockets: ExitStack, family: Family, who: str, target: str
) -> None:
    connection = connect(who, target, family, sockets)
    here, there = connection.server.getsockname()[:2], connection.server.getpeername()[:2]

    send_segment(SERVER, here, there, connection.received, connection.sent)

    assert connection.works()


@BOTH
@pytest.mark.parametrize("who", ["c2", "node"])
def test_a_vip_refuses_what_somebody_leaves_untracked(
    world: OneNode, sockets: ExitStack, family: Family, who: str
) -> None:
    untracked = (
        "add table inet theirs; "
        "add chain inet theirs pre { type filter hook prerouting priority -300; }; "
        "add chain inet theirs out { type filter hook output priority -300; }; "
        "add rule inet theirs pre udp dport 81 notrack; "
        "add rule inet theirs out udp dport 81 notrack"
    )
    with netns.entered("/run/netns/node"):
        rules.nft(untracked)
        sockets.callback(world.node.sh, "nft", "delete", "table", "inet", "theirs")
    with netns.entered(f"/run/netns/{who}"):
        client = sockets.enter_context(socket.socket(_DOMAIN[family], socket.SOCK_DGRAM))
    client.settimeout(5)
    client.connect((address_of("vip", family), 81))

    with suppress(PermissionError):  # what the output hook refuses
        client.send(b"ping")
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)

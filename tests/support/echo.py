"""Servers that say who they are and whom they see, and clients that say how it went."""

from __future__ import annotations

import errno
import random
import selectors
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.dataplane import netns
from mesh.model.address import Family, family_of
from mesh.model.publish import Protocol
from tests.support import sctp

if TYPE_CHECKING:
    from collections.abc import Callable

REFUSED: Final = "refused"
SILENCE: Final = "silence"

_DOMAIN: Final = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_KIND: Final = {
    Protocol.TCP: socket.SOCK_STREAM,
    Protocol.UDP: socket.SOCK_DGRAM,
    Protocol.SCTP: socket.SOCK_RAW,  # no kernel need have its sockets
}
_SCTP_PORTS: Final = range(40000, 60000)

_ECHO_REQUEST: Final = {Family.V4: 8, Family.V6: 128}
_ICMP: Final = {Family.V4: socket.IPPROTO_ICMP, Family.V6: socket.IPPROTO_ICMPV6}


def _socket(namespace: str, family: Family, protocol: Protocol) -> socket.socket:
    with netns.entered(f"/run/netns/{namespace}"):
        number = protocol.number if protocol is Protocol.SCTP else 0
        return socket.socket(_DOMAIN[family], _KIND[protocol], number)


class EchoServers:
    """One thread that serves every protocol in both families in many namespaces.

    Each answer is the server's name and the address it saw: "c1 192.0.2.10".
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop, wake = socket.socketpair()
        self._sockets = [wake]
        self._selector.register(wake, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._serve, name="echo")
        self._thread.start()

    def start(self, name: str, namespace: str, port: int) -> None:
        """Serve `port` on every address of a namespace."""
        for family in Family:
            for protocol in Protocol:
                server = _socket(namespace, family, protocol)
                self._sockets.append(server)
                if protocol is not Protocol.SCTP:
                    _bind(server, family, port)
                if protocol is Protocol.TCP:
                    server.listen(64)
                answer = _ANSWERS[protocol]
                self._selector.register(server, selectors.EVENT_READ, (answer, name, port))

    def close(self) -> None:
        """End all servers."""
        self._stop.send(b"x")
        self._thread.join()
        for each in [*self._sockets, self._stop]:
            each.close()
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                answer: Callable[[socket.socket, str, int], None]
                answer, name, port = key.data
                assert isinstance(key.fileobj, socket.socket)
                answer(key.fileobj, name, port)


def _bind(server: socket.socket, family: Family, port: int) -> None:
    if family is Family.V6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("", port))


def _accept(server: socket.socket, name: str, _port: int) -> None:
    connection, peer = server.accept()
    with connection:
        connection.sendall(f"{name} {peer[0]}".encode())


def _reply(server: socket.socket, name: str, _port: int) -> None:
    _, peer = server.recvfrom(100)
    server.sendto(f"{name} {peer[0]}".encode(), peer)


def _associate(server: socket.socket, name: str, port: int) -> None:
    data, peer = server.recvfrom(1000)
    packet = _sctp(server, data)
    if packet.kind == sctp.INIT:
        kind = sctp.INIT_ACK if packet.destination == port else sctp.ABORT
        server.sendto(packet.answer(kind, f"{name} {peer[0]}").packed(), (peer[0], 0))


_ANSWERS: Final = {Protocol.TCP: _accept, Protocol.UDP: _reply, Protocol.SCTP: _associate}


def _sctp(raw: socket.socket, data: bytes) -> sctp.Packet:
    """What a raw socket received, of which IPv4's also show the IP header."""
    return sctp.Packet.parse(data[(data[0] & 15) * 4 :] if raw.family == socket.AF_INET else data)


def ask(
    namespace: str,
    protocol: Protocol,
    address: str,
    port: int,
    *,
    source: str = "",
    patience: float = 10.0,
) -> str:
    """What a server answers to a client in `namespace`, REFUSED, or SILENCE after `patience` s."""
    with _socket(namespace, family_of(address), protocol) as client:
        client.settimeout(patience)
        if source:
            client.bind((source, 0))
        try:
            if protocol is Protocol.SCTP:
                return _ask_sctp(client, address, port, patience)
            client.connect((address, port))
            if protocol is Protocol.UDP:
                client.send(b"?")
            return client.recv(100).decode()
        except (ConnectionRefusedError, PermissionError):
            # The output hook answers a refused datagram of its own node with EPERM.
            return REFUSED
        except TimeoutError:
            return SILENCE


def _ask_sctp(client: socket.socket, address: str, port: int, patience: float) -> str:
    own, until = random.choice(_SCTP_PORTS), time.monotonic() + patience
    client.connect((address, 0))
    client.send(sctp.init(own, port).packed())
    while (left := until - time.monotonic()) > 0:
        client.settimeout(left)
        try:
            packet = _sctp(client, client.recv(1000))
        except OSError as error:
            if error.errno not in _NO_SCTP:
                raise
            return REFUSED
        if (packet.source, packet.destination) == (own, port):
            return REFUSED  # it came back to this very host, which does not know the protocol
        if (packet.source, packet.destination) == (port, own):
            return packet.text if packet.kind == sctp.INIT_ACK else REFUSED
    return SILENCE


_NO_SCTP: Final = (errno.ENOPROTOOPT, errno.EPROTO)
"""What ICMP and ICMPv6 say for a host that does not know the protocol."""


def ping(namespace: str, address: str, *, patience: float) -> bool:
    """Whether `address` answers one echo request within `patience` seconds."""
    family = family_of(address)
    with netns.entered(f"/run/netns/{namespace}"):
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0")  # of both families
        client = socket.socket(_DOMAIN[family], socket.SOCK_DGRAM, _ICMP[family])
    with client:
        client.settimeout(patience)
        client.connect((address, 0))
        client.send(bytes((_ECHO_REQUEST[family], 0, 0, 0, 0, 0, 0, 1)))
        try:
            return bool(client.recv(100))
        except TimeoutError:
            return False

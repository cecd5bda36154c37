"""Servers that say who they are and whom they see, and clients that say how it went."""

from __future__ import annotations

import selectors
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.dataplane import netns
from mesh.model.address import Family, family_of
from mesh.model.publish import Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

REFUSED: Final = "refused"
SILENCE: Final = "silence"

_DOMAIN: Final = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_KIND: Final = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}


_ECHO_REQUEST: Final = {Family.V4: 8, Family.V6: 128}
_ICMP: Final = {Family.V4: socket.IPPROTO_ICMP, Family.V6: socket.IPPROTO_ICMPV6}


def _socket(namespace: str, family: Family, protocol: Protocol) -> socket.socket:
    with netns.entered(f"/run/netns/{namespace}"):
        return socket.socket(_DOMAIN[family], _KIND[protocol])


class EchoServers:
    """One thread that serves TCP and UDP of both families in many namespaces.

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
                if family is Family.V6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind(("", port))
                if protocol is Protocol.TCP:
                    server.listen(64)
                answer = self._accept if protocol is Protocol.TCP else self._reply
                self._sockets.append(server)
                self._selector.register(server, selectors.EVENT_READ, (answer, name))

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
                answer: Callable[[socket.socket, str], None]
                answer, name = key.data
                assert isinstance(key.fileobj, socket.socket)
                answer(key.fileobj, name)

    @staticmethod
    def _accept(server: socket.socket, name: str) -> None:
        connection, peer = server.accept()
        with connection:
            connection.sendall(f"{name} {peer[0]}".encode())

    @staticmethod
    def _reply(server: socket.socket, name: str) -> None:
        _, peer = server.recvfrom(100)
        server.sendto(f"{name} {peer[0]}".encode(), peer)


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
            client.connect((address, port))
            if protocol is Protocol.UDP:
                client.send(b"?")
            return client.recv(100).decode()
        except (ConnectionRefusedError, PermissionError):
            # The output hook answers a refused datagram of its own node with EPERM.
            return REFUSED
        except TimeoutError:
            return SILENCE


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

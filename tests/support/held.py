"""Connections that clients hold open, and servers that hold their end until it is closed."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from mesh.dataplane import netns
from mesh.model.address import Family, family_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_DOMAIN: Final = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_PATIENCE: Final = 20.0


class Holder:
    """Serves a TCP port of namespaces, and the clients that connect there."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop, wake = socket.socketpair()
        self._servers = [wake]
        self._clients: list[socket.socket] = []
        self._selector.register(wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="holder", daemon=True)
        self._thread.start()

    def serve(self, namespace: str, port: int) -> None:
        """Take every connection to a port, on every address."""
        for domain in _DOMAIN.values():
            with netns.entered(f"/run/netns/{namespace}"):
                server = socket.socket(domain, socket.SOCK_STREAM)
            if domain == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            server.listen(64)
            self._servers.append(server)
            self._selector.register(server, selectors.EVENT_READ)
            self._wake()

    def _wake(self) -> None:
        """epoll hears of what is registered while it waits; others have to look again."""
        self._stop.send(b".")

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                one = key.fileobj
                assert isinstance(one, socket.socket)
                if one is self._servers[0]:
                    if one.recv(1) == b"x":
                        return
                elif one in self._servers:
                    self._selector.register(one.accept()[0], selectors.EVENT_READ)
                else:
                    self._answer(one)

    def _answer(self, one: socket.socket) -> None:
        said = b""
        with suppress(ConnectionError):
            said = one.recv(100)
        if said:
            one.sendall(said)
        else:
            self._selector.unregister(one)
            one.close()

    def open(
        self, namespace: str, address: str, port: int, source: str = ""
    ) -> socket.socket | None:
        """A connection that is served; None if it was refused."""
        with netns.entered(f"/run/netns/{namespace}"):
            client = socket.socket(_DOMAIN[family_of(address)], socket.SOCK_STREAM)
        client.settimeout(_PATIENCE)
        if source:
            client.bind((source, 0))
        try:
            client.connect((address, port))
        except ConnectionRefusedError:
            client.close()
            return None
        self._clients.append(client)
        assert is_alive(client)
        return client

    def open_within(self, namespace: str, address: str, port: int) -> bool:
        """Whether a connection is served before patience ends: the kernel may not have heard yet
        that another one is closed.
        """
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            if self.open(namespace, address, port) is not None:
                return True
            time.sleep(0.05)
        return False

    def held(self) -> Iterator[socket.socket]:
        """The connections that clients have."""
        yield from (client for client in self._clients if client.fileno() >= 0)

    def release(self) -> None:
        """Close what clients hold."""
        for client in self._clients:
            if client.fileno() < 0:
                continue
            # A reset: nothing of it is left that could count.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        self._clients.clear()

    def close(self) -> None:
        """End all of it."""
        self.release()
        self._stop.send(b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._stop.close()
        self._selector.close()


def is_alive(client: socket.socket) -> bool:
    """Whether a connection still carries what both ends say."""
    try:
        client.sendall(b"!")
        return client.recv(100) == b"!"
    except ConnectionError:
        return False

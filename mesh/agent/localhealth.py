"""Tells load balancers outside whether this node has replicas of a service that may be used.

Over HTTP, on a port per service, on all addresses of the node: 200 while there are any, else 503.
Owns the listening sockets; never decides which replicas may be used.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.agent import http
from mesh.agent.http import Reply
from mesh.model.report import Problem
from mesh.vip import eligibility

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    import h11

    from mesh.agent.state import State

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 2.0
_MOST: Final = 256
"""Clients at once, of all ports: a load balancer has a few."""

_BACKLOG: Final = 128
_KIND: Final = "application/json"


class LocalHealth:
    """The end points of one node.  `told` is called when `problems` changed."""

    def __init__(self, state: State, told: Callable[[], None]) -> None:
        self._state = state
        self._told = told
        self._wanted: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._servers: dict[str, tuple[int, asyncio.Server]] = {}
        self._lacking = asyncio.Event()
        self._failed: dict[str, str] = {}
        self._clients = 0

    def look(self, services: Iterable[str]) -> None:
        """These services are as the kernel is to have them now.

        What is told does not change otherwise: not while etcd has lost its records.  Ports that are
        not to be are closed at once.
        """
        node = self._state.node_view()
        for service in services:
            view = self._state.service_view(service)
            port = view.local_health if view is not None else None
            self._wanted.pop(service, None)
            if view is not None and node is not None and port is not None:
                self._wanted[service] = port
                self._counts[service] = len(eligibility.local(view, node))
            held = self._servers.get(service)
            if held is not None and held[0] != port:
                held[1].close()
                del self._servers[service]
                log.info("local health service=%s port=none", service)
        if self._failed.keys() - self._wanted.keys():
            self._failed = {name: why for name, why in self._failed.items() if name in self._wanted}
            self._told()
        if self._wanted.keys() - self._servers.keys():
            self._lacking.set()

    async def run(self) -> None:
        """Listen for ever where it is wanted; where somebody else does, say so and try again."""
        try:
            while True:
                await self._lacking.wait()
                self._lacking.clear()
                await self._listen(sorted(self._wanted.keys() - self._servers.keys()))
                if self._failed:
                    await asyncio.sleep(_RETRY_SECONDS)
                    self._lacking.set()
        finally:
            for _, server in self._servers.values():
                server.close()

    def inodes(self) -> frozenset[int]:
        """The sockets that listen."""
        servers = (server for _, server in self._servers.values())
        return frozenset(_inode(one) for server in servers for one in server.sockets)

    def problems(self) -> Iterable[Problem]:
        """Ports that somebody else has."""
        for service, why in sorted(self._failed.items()):
            yield Problem(about=f"service {service}", message=why)

    async def _listen(self, services: Collection[str]) -> None:
        before, self._failed = self._failed, {}
        for service in services:
            port = self._wanted.get(service)
            if port is None:
                continue
            try:
                one = _bound(port)
            except OSError as error:
                self._failed[service] = (
                    f"local health port {port}/tcp cannot be listened on "
                    f"({error.strerror or error}), load balancers take this node for down: end "
                    "who has it, or choose another --local-health-port"
                )
                continue
            server = await asyncio.start_server(partial(self._serve, service), sock=one)
            self._servers[service] = port, server
            log.info("local health service=%s port=%d", service, port)
        if self._failed != before:
            for service, why in self._failed.items():
                log.warning("service %s: %s", service, why)
            self._told()

    async def _serve(
        self, service: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._clients += 1
        try:
            await http.serve(reader, writer, partial(self._reply, service))
        finally:
            self._clients -= 1

    async def _reply(self, service: str, request: h11.Request) -> Reply:
        """Whatever the path is: load balancers ask for what they like."""
        if self._clients > _MOST:
            return http.BUSY
        if not http.only_reads(request):
            return http.READ_ONLY
        count = self._counts[service]
        body = {"service": service, "node": self._state.node, "localReplicas": count}
        status = HTTPStatus.OK if count else HTTPStatus.SERVICE_UNAVAILABLE
        return Reply(msgspec.json.encode(body) + b"\n", _KIND, status)


def _bound(port: int) -> socket.socket:
    """Listens on every address; of IPv4 alone, where the kernel has no IPv6.  Raises OSError.

    SO_REUSEADDR is for connections that are over (TIME_WAIT): nobody else can listen as well.
    """
    everywhere = "::" if os.path.exists("/proc/net/if_inet6") else "0.0.0.0"
    family = socket.AF_INET6 if ":" in everywhere else socket.AF_INET
    return socket.create_server(
        (everywhere, port), family=family, backlog=_BACKLOG, dualstack_ipv6=":" in everywhere
    )


def _inode(one: socket.socket) -> int:
    return os.fstat(one.fileno()).st_ino

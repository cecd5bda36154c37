"""A process of a node that is none of the mesh's, and listens on a port of it."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from mesh.dataplane import netns
from mesh.model.publish import Protocol
from tests.support.cluster import until
from tests.support.requests import SPOKEN, Answer, Ask, ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.cluster import Cluster

STRANGER = "stranger"
"""How it answers, in the words of the lab's replicas: TCP and UDP, both families."""

_KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}


@asynccontextmanager
async def stranger(mesh: Cluster, node: str, port: int) -> AsyncIterator[None]:
    """Run one for a block; it listens from the beginning."""
    machine = mesh.netns(node).split("/")[2]
    serve = (sys.executable, "-m", "mesh.lab.replica", "--udp", "--port", str(port))
    argv = (sys.executable, "-m", "mesh.lab.inside", machine, *serve)
    environment = {"MESH_TASK": STRANGER, "MESH_NODE": node, "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(argv, env=environment) as process:  # noqa: ASYNC220 - starts at once
        try:
            here = Ask(mesh.netns(node), "127.0.0.1", port, Protocol.TCP)

            async def listens() -> bool:
                assert process.poll() is None, "the stranger ended"
                return isinstance(await ask(here), Answer)

            await until(listens, "the stranger listens")
            yield
        finally:
            process.terminate()


@contextmanager
def binds(path: str, protocol: Protocol, port: int, address: str = "") -> Iterator[None]:
    """Bind a port in a namespace, as servers do.  Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with netns.entered(path):
        own = socket.socket(family, _KINDS[protocol])
    with own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind((address, port))
        if protocol is Protocol.TCP:
            own.listen()
        yield


def can_bind(path: str, port: int, *protocols: Protocol) -> bool:
    """Whether anything of a port can be had in a namespace, over any of some protocols."""
    for protocol in protocols or SPOKEN:
        for address in ("", "127.0.0.1", "::", "::1"):
            try:
                with binds(path, protocol, port, address):
                    return True
            except OSError:
                continue
    return False

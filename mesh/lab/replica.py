"""A replica for demonstrations and tests: tells every client which task answered, and whom.

`python -m mesh.lab.replica [--port 80] [--udp]`.  One JSON object per HTTP request or datagram.
Imports little, so that a container is up at once; never reads what it is sent.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from contextlib import suppress
from typing import Final

_USAGE: Final = "usage: python -m mesh.lab.replica [--port PORT] [--udp]"
_REQUEST_LIMIT: Final = 16384
_IDLE_SECONDS: Final = 3600


def answer(client: str) -> bytes:
    """What a client at the address `client` is told."""
    plain = client.removeprefix("::ffff:")  # IPv4, as a socket of both families shows it
    said = {
        "replica": os.environ.get("MESH_TASK"),
        "node": os.environ.get("MESH_NODE"),
        "client": plain,
    }
    return json.dumps(said).encode() + b"\n"


def _answer_datagram(own: socket.socket) -> None:
    with suppress(OSError):  # of an earlier answer, which the client no longer waits for
        _, client = own.recvfrom(_REQUEST_LIMIT)
        own.sendto(answer(client[0]), client)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests on one connection until the client ends it, or asks for its end."""
    with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        while True:
            async with asyncio.timeout(_IDLE_SECONDS):
                request = await reader.readuntil(b"\r\n\r\n")
            body = answer(writer.get_extra_info("peername")[0])
            ends = b"connection: close" in request.lower() or b"HTTP/1.0" in request
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n%s\r\n%s"
                % (len(body), b"Connection: close\r\n" if ends else b"", body)
            )
            await writer.drain()
            if ends:
                break
    writer.close()


def _socket(kind: socket.SocketKind, port: int) -> socket.socket:
    """One socket for both families, or for IPv4 where there is no IPv6."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    own = socket.socket(family, kind)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family is socket.AF_INET6:
        own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    own.bind(("", port))
    own.setblocking(False)
    return own


async def _run(port: int, *, udp: bool) -> None:
    loop = asyncio.get_running_loop()
    if udp:
        datagrams = _socket(socket.SOCK_DGRAM, port)
        loop.add_reader(datagrams, _answer_datagram, datagrams)
    listener = _socket(socket.SOCK_STREAM, port)
    server = await asyncio.start_server(_serve, sock=listener, limit=_REQUEST_LIMIT, backlog=1024)
    await server.serve_forever()


def main(arguments: list[str]) -> None:
    """Serve until killed."""
    port, udp = "80", False
    words = iter(arguments)
    for word in words:
        if word == "--udp":
            udp = True
        elif word == "--port":
            port = next(words, "")
        else:
            sys.exit(_USAGE)
    if not port.isdigit():
        sys.exit(_USAGE)
    try:
        asyncio.run(_run(int(port), udp=udp))
    except OSError as error:
        sys.exit(f"replica: port {port}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a task may do to who probes it: servers of every kind, on a port of their own."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from mesh.health import probe

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

    from mesh.health.target import Target

    Run = Callable[[Awaitable[Any]], Any]
    """How a coroutine is run on some event loop."""

    Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

PATIENT: Final = 20.0
BRIEF: Final = 0.3
"""Seconds for a probe that is to succeed, and for one that is to wait in vain."""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@asynccontextmanager
async def served(
    serve: Serve, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """The port on which each connection is served so."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(one, host, port, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def saying(*answers: bytes, pause: float = 0) -> Serve:
    """Reads a request, and answers with these parts."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for answer in answers:
            writer.write(answer)
            await writer.drain()
            await asyncio.sleep(pause)

    return serve


@asynccontextmanager
async def unaccepted(host: str = "127.0.0.1") -> AsyncIterator[int]:
    """The port of somebody who listens, and never takes a connection."""
    with socket.create_server((host, 0)) as listener:
        yield listener.getsockname()[1]


async def probed(target: Target, timeout: float = PATIENT) -> str:
    """Why one probe of a target fails; empty if it does not."""
    with ThreadPoolExecutor(1) as executor:
        return await probe.run(target, timeout, executor)

"""One request over HTTP, answered: what the agent's end points have in common.

With h11 for the protocol, on the agent's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, NamedTuple

import h11

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_PATIENCE: Final = 10.0
"""Seconds for a client to ask, and for it to take what it is told."""

_TEXT: Final = "text/plain; charset=utf-8"


class Reply(NamedTuple):
    """What is said."""

    body: bytes
    kind: str = _TEXT
    status: HTTPStatus = HTTPStatus.OK


READ_ONLY: Final = Reply(b"only GET and HEAD\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
BUSY: Final = Reply(b"too many clients\n", status=HTTPStatus.SERVICE_UNAVAILABLE)


def only_reads(request: h11.Request) -> bool:
    """Whether a request changes nothing."""
    return request.method in (b"GET", b"HEAD")


async def serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    reply: Callable[[h11.Request], Awaitable[Reply]],
) -> None:
    """One client: one request, one answer."""
    try:
        with contextlib.suppress(TimeoutError, ConnectionError):
            await _exchange(reader, writer, reply)
    finally:
        writer.close()


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    reply: Callable[[h11.Request], Awaitable[Reply]],
) -> None:
    connection = h11.Connection(h11.SERVER)
    request: h11.Request | None = None
    try:
        async with asyncio.timeout(_PATIENCE):
            request = await _asked(connection, reader)
        if request is None:
            return
        said = await reply(request)
    except h11.RemoteProtocolError as error:
        said = Reply(f"{error}\n".encode(), status=HTTPStatus(error.error_status_hint))
    headers = [
        ("Content-Type", said.kind),
        ("Content-Length", str(len(said.body))),
        ("Connection", "close"),
    ]
    status, reason = said.status, said.status.phrase
    events: list[h11.Event] = [h11.Response(status_code=status, headers=headers, reason=reason)]
    if request is None or request.method != b"HEAD":
        events.append(h11.Data(data=said.body))
    async with asyncio.timeout(_PATIENCE):
        for event in (*events, h11.EndOfMessage()):
            writer.write(connection.send(event) or b"")
        await writer.drain()


async def _asked(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """The request; None if there is none.  What may follow it is not waited for."""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        connection.receive_data(await reader.read(4096))

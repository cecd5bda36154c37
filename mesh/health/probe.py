"""One probe of one task: a connection, a request or a command, and what came of it.

Owns the connection from its beginning to its end.  Never judges, and never reads without a bound.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Final

import h11

from mesh.errors import clipped
from mesh.health import command
from mesh.health.target import Exec, Http

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Executor

    from mesh.health.target import Target, Tcp

MOST_BODY: Final = 1 << 16
"""Bytes of an answer that are read; whoever sends more has answered."""

_MOST_HEADERS: Final = 1 << 14

_PARTING_SECONDS: Final = 0.5
"""How long the other end may take to say goodbye."""

_LATE_SECONDS: Final = 0.1
"""A time-out noticed this much late says more about this process than about the task."""


class Unsure(Exception):
    """This process had no time, or no means, to tell whether the task passes."""


async def run(target: Target, timeout: float, executor: Executor) -> str:
    """Probe once: why the task fails, in a few words; empty if it passes.

    `executor` is where commands are waited for.  Raises Unsure.
    """
    try:
        return clipped(await _run(target, timeout, executor))
    except OSError as error:
        if error.errno in command.OWN_FAULTS:
            raise Unsure from error
        known = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
        return clipped(known.lower())


async def _run(target: Target, timeout: float, executor: Executor) -> str:
    if isinstance(target, Exec):
        return await command.run(target, timeout, executor)
    stage = _Stage()
    if isinstance(target, Http):
        return await _in_time(_request(target, stage), timeout, stage)
    family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as own:
        own.setblocking(False)
        reason = await _in_time(_connect(own, target), timeout, stage)
        if not reason:
            await _part(own)
        return reason


class _Stage:
    """How far a probe has come: what is still missing."""

    awaited = "connection"


async def _in_time(
    probing: Coroutine[None, None, str | None], timeout: float, stage: _Stage
) -> str:
    loop = asyncio.get_running_loop()
    due = loop.time() + timeout
    try:
        async with asyncio.timeout_at(due):
            return await probing or ""
    except TimeoutError:
        if loop.time() > due + max(_LATE_SECONDS, timeout / 4):
            raise Unsure from None
        return f"no {stage.awaited} within {timeout:g} s"
    except ssl.SSLCertVerificationError as error:
        return f"certificate: {error.verify_message}"
    except ssl.SSLError as error:
        return f"TLS: {error.reason or error}".lower()
    except ValueError as error:  # a host that TLS cannot ask for
        return f"host: {error}"


async def _connect(own: socket.socket, target: Tcp) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(own, (target.address, target.port))


async def _part(own: socket.socket) -> None:
    """Part without a reset, which servers would log as a client's failure."""
    loop = asyncio.get_running_loop()
    seen = 0
    with suppress(OSError, TimeoutError):
        own.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(_PARTING_SECONDS):
            while seen < MOST_BODY and (said := await loop.sock_recv(own, 4096)):
                seen += len(said)


async def _request(target: Http, stage: _Stage) -> str:
    loop = asyncio.get_running_loop()
    tls = _tls(verify=target.verify) if target.tls else None
    name = target.name if target.tls else None
    exchange = _Exchange(target, stage, loop.create_future())
    transport, _ = await loop.create_connection(
        lambda: exchange, target.address, target.port, ssl=tls, server_hostname=name
    )
    try:
        return await exchange.outcome
    finally:
        transport.close()


class _Exchange(asyncio.Protocol):
    """A request on a connection of its own; `outcome` is what the probe comes to."""

    def __init__(self, target: Http, stage: _Stage, outcome: asyncio.Future[str]) -> None:
        self._target = target
        self._stage = stage
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEADERS)
        self._status = 0
        self._seen = 0
        self.outcome = outcome

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stage.awaited = "answer"
        request = h11.Request(
            method="GET",
            target=self._target.path,
            headers=[
                ("Host", self._target.host),
                ("User-Agent", "warren-mesh"),
                ("Accept", "*/*"),
                ("Connection", "close"),
            ],
        )
        said = (self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b"")
        transport.write(said)  # type: ignore[attr-defined]  # uvloop's are of no class of asyncio's

    def data_received(self, data: bytes) -> None:
        self._seen += len(data)
        self._hear(data)

    def eof_received(self) -> None:
        self._hear(b"")

    def connection_lost(self, error: Exception | None) -> None:
        self._end(_closed(self._stage, error))

    def _hear(self, data: bytes) -> None:
        if self.outcome.done():
            return
        try:
            self._http.receive_data(data)
            while not self._over(self._http.next_event()):
                pass
        except h11.RemoteProtocolError as error:
            self._end(f"no HTTP: {error}" if data else _closed(self._stage, None))

    def _over(self, event: object) -> bool:
        """Whether nothing follows an event by now."""
        if isinstance(event, h11.Response):
            self._status = event.status_code
            self._stage.awaited = "complete answer"
            return False
        if isinstance(event, h11.Data | h11.InformationalResponse):
            return False
        if isinstance(event, h11.EndOfMessage) or (self._status and self._seen > MOST_BODY):
            self._end(self._judged())
        elif isinstance(event, h11.ConnectionClosed):
            self._end(_closed(self._stage, None))
        return True  # also when more is to come

    def _judged(self) -> str:
        passes = any(self._status in one for one in self._target.passing)
        return "" if passes else f"HTTP {self._status}"

    def _end(self, reason: str) -> None:
        if not self.outcome.done():
            self.outcome.set_result(reason)


def _closed(stage: _Stage, error: Exception | None) -> str:
    why = f": {error}" if error is not None else ""
    return f"closed before a {stage.awaited}{why}"


@cache
def _tls(*, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context

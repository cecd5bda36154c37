"""Requests to replicas (mesh.lab.replica) from any namespace, many at once, and their outcomes.

Sockets are made in the client's namespace by this very process, so that a thousand requests cost
no more than their packets.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.dataplane import netns
from mesh.model.address import Family, family_of
from mesh.model.publish import Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

REFUSED: Final = "refused"
SILENCE: Final = "silence"
RESET: Final = "ConnectionResetError"
CLOSED: Final = "closed"
"""Ended before an answer, in good order."""

SPOKEN: Final = (Protocol.TCP, Protocol.UDP)
"""What the lab's replicas answer."""

PATIENCE: Final = 30.0
"""Seconds until an answer that should come is given up."""

BRIEF: Final = 1.5
"""Seconds of silence that count as no answer, where none should come."""

UNLIKELY: Final = 30.7
"""Chi-square that fair draws among up to four exceed once in a million times."""

_DOMAIN: Final = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_KIND: Final = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
_REQUEST: Final = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
_KEPT: Final = b"GET / HTTP/1.1\r\n\r\n"
_ROOM: Final = 64
"""Requests at once: more would only measure this process."""


class Ask(NamedTuple):
    """One request: from a namespace, to an address and port."""

    netns: str
    address: str
    port: int
    protocol: Protocol


class Answer(NamedTuple):
    """Which replica answered, on which node, and what source address it saw."""

    replica: str
    node: str
    client: str


Outcome = Answer | str
"""An answer, REFUSED, SILENCE, or the name of another error."""


def born(path: str, address: str, protocol: Protocol) -> socket.socket:
    """A socket in a namespace that can talk to `address`."""
    with netns.entered(path):
        own = socket.socket(_DOMAIN[family_of(address)], _KIND[protocol])
    own.setblocking(False)
    return own


async def ask(one: Ask, patience: float = PATIENCE) -> Outcome:
    """Send one request from a new port."""
    with born(one.netns, one.address, one.protocol) as own:
        try:
            async with asyncio.timeout(patience):
                said = await _exchange(own, one)
        except (ConnectionRefusedError, PermissionError):
            # The output hook answers a refused datagram of its own node with EPERM.
            return REFUSED
        except TimeoutError:
            return SILENCE
        except ConnectionResetError:
            return RESET
        except OSError as error:
            return type(error).__name__ + f" {error.errno}"
    if not said:
        return CLOSED
    return _answer(said)


def _answer(said: bytes) -> Answer:
    told = json.loads(said.rpartition(b"\r\n\r\n")[2])
    return Answer(told["replica"], told["node"], told["client"])


async def _exchange(own: socket.socket, one: Ask) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(own, (one.address, one.port))
    if one.protocol is Protocol.UDP:
        await loop.sock_sendall(own, b"?")
        return await loop.sock_recv(own, 4096)
    await loop.sock_sendall(own, _REQUEST)
    said = b""
    while more := await loop.sock_recv(own, 4096):
        said += more
    return said


class Held:
    """A TCP connection that stays open, or a UDP flow from one port: a `port` of its own choice, or
    any.
    """

    def __init__(self, asked: Ask, port: int = 0) -> None:
        self.asked = asked
        self._socket = born(asked.netns, asked.address, asked.protocol)
        if port:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("", port))

    async def again(self, patience: float = PATIENCE) -> Outcome:
        """Ask once more."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(patience):
                if self._fresh:
                    await loop.sock_connect(self._socket, (self.asked.address, self.asked.port))
                await loop.sock_sendall(self._socket, _KEPT)
                said = b""
                while not said.endswith(b"}\n"):
                    more = await loop.sock_recv(self._socket, 4096)
                    if not more:
                        return CLOSED
                    said += more
        except TimeoutError:
            return SILENCE
        except OSError as error:
            return REFUSED if isinstance(error, ConnectionRefusedError) else type(error).__name__
        return _answer(said)

    @property
    def _fresh(self) -> bool:
        try:
            self._socket.getpeername()
        except OSError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


@asynccontextmanager
async def held(asks: Iterable[Ask], port: int = 0) -> AsyncIterator[dict[Held, Outcome]]:
    """Connections that stay open for the time of a block, and their first outcomes.

    All from one `port`, if it is given.
    """
    connections = [Held(one, port) for one in asks]
    try:
        outcomes = await asyncio.gather(*(one.again() for one in connections))
        yield dict(zip(connections, outcomes, strict=True))
    finally:
        for one in connections:
            one.close()


async def again(connections: Iterable[Held], patience: float = PATIENCE) -> dict[Held, Outcome]:
    """What open connections answer now."""
    each = list(connections)
    outcomes = await asyncio.gather(*(one.again(patience) for one in each))
    return dict(zip(each, outcomes, strict=True))


async def ask_all(asks: Iterable[Ask], patience: float = PATIENCE) -> list[Outcome]:
    """The outcomes, in the order of the requests."""
    room = asyncio.Semaphore(_ROOM)

    async def within(one: Ask) -> Outcome:
        async with room:
            return await ask(one, patience)

    return await asyncio.gather(*map(within, asks))


async def replicas(asks: Iterable[Ask], patience: float = PATIENCE) -> set[str]:
    """Who answers; an outcome that is no answer stands for itself."""
    found = await ask_all(asks, patience)
    return {one.replica if isinstance(one, Answer) else one for one in found}


_KINDS: Final = {REFUSED: REFUSED, RESET: "reset", CLOSED: "reset", SILENCE: "timed out"}


def strayed(found: Iterable[Outcome], weights: Mapping[str, int]) -> float:
    """Chi-square of who answered against what weights promise; all answered, and nobody else."""
    told = Counter(a.replica if isinstance(a, Answer) else a for a in found)
    assert told.keys() == {replica for replica, weight in weights.items() if weight}, told
    share = told.total() / sum(weights.values())
    wanted = {replica: share * weights[replica] for replica in told}
    return sum((told[replica] - count) ** 2 / count for replica, count in wanted.items())


class Failure(NamedTuple):
    """A request that was not answered by whom it should; `began` as time.monotonic() tells it."""

    kind: str
    began: float
    said: str


@dataclass
class Stream:
    """New connections, again and again, from the moment it began.

    `counts` has what became of them: answered, misrouted, refused, reset, timed out, other.
    """

    asks: Sequence[Ask]
    sent: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    slowest: float = 0.0
    flying: set[asyncio.Task[None]] = field(default_factory=set)
    expected: frozenset[str] = frozenset()

    def expect(self, replicas: Iterable[str]) -> None:
        """Who may answer from now on, for what is on its way beside those of before.

        An answer of somebody else is misrouted.  Before the first time, anybody may answer.
        """
        self.expected = frozenset(replicas)

    @property
    def failed(self) -> dict[str, int]:
        """How many failed, by kind."""
        return {kind: count for kind, count in self.counts.items() if kind != "answered"}

    def begin(self, asked: Ask, patience: float) -> None:
        task = asyncio.create_task(self._one(asked, patience))
        self.flying.add(task)
        task.add_done_callback(self.flying.discard)

    async def landed(self) -> None:
        """Wait until what is on its way now has ended."""
        await asyncio.gather(*self.flying)

    async def _one(self, asked: Ask, patience: float) -> None:
        began, expected = time.monotonic(), self.expected
        self.sent += 1
        outcome = await ask(asked, patience)
        took = time.monotonic() - began
        if isinstance(outcome, Answer):
            self.answered[outcome.replica] += 1
            self.slowest = max(self.slowest, took)
            right = not expected or outcome.replica in expected | self.expected
            kind = "answered" if right else "misrouted"
        else:
            kind = _KINDS.get(outcome, "other")
        self.counts[kind] += 1
        if kind != "answered":
            self.failures.append(Failure(kind, began, f"{outcome} after {took:.2f} s: {asked}"))

    async def more(self, count: int) -> None:
        """Wait until `count` more requests were sent, however slow this machine is."""
        goal = self.sent + count
        while self.sent < goal:  # noqa: ASYNC110 - the stream itself goes at a fixed pace
            await asyncio.sleep(0.02)


@asynccontextmanager
async def stream(
    asks: Sequence[Ask], interval: float = 0.005, patience: float = PATIENCE
) -> AsyncIterator[Stream]:
    """Send the requests in turn, one every `interval` seconds, for the time of a block.

    None is awaited before the next is sent; after the block all have ended.
    """
    made, going = Stream(asks), True

    async def flow() -> None:
        while going:
            for one in asks:
                made.begin(one, patience)
                await asyncio.sleep(interval)
        await made.landed()

    flowing = asyncio.create_task(flow())
    try:
        yield made
    finally:
        going = False
        await flowing

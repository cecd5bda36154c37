"""`python -m mesh.lab.demo_prober`: connects from a machine of a lab, as it is asked to on stdin.

One JSON line per question and per answer; ends with its input.  Judges nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.lab import probe, wire
from mesh.lab.demo_checks import Seen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_REQUEST: Final = b"GET / HTTP/1.1\r\nHost: mesh\r\n\r\n"


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What to connect to, and how often: `count` times, `parallel` at a time.

    `count` None goes on until told to stop, one every `pause` seconds; `held` asks on one
    connection that is kept open.  What takes `timeout` seconds has failed.
    """

    host: str
    port: int
    udp: bool = False
    count: int | None = 1
    parallel: int = 8
    pause: float = 0.0
    held: bool = False
    timeout: float = 2.0


class Line(msgspec.Struct, frozen=True):
    """A question and its number; or, without one, the word to stop working on that number."""

    number: int
    ask: Ask | None = None


class Answer(msgspec.Struct, frozen=True):
    """Everything that was seen for a question."""

    number: int
    seen: tuple[Seen, ...]


async def once(ask: Ask) -> Seen:
    """Ask on a connection of its own."""
    tally, began = probe.Tally(), time.monotonic()
    await probe.probe(probe.Target(ask.host, ask.port, ask.udp, ask.timeout), tally)
    return Seen(
        host=ask.host,
        began=began,
        seconds=time.monotonic() - began,
        replica=next(iter(tally.replicas), None),
        client=next(iter(tally.clients), None),
        failure=next(iter(tally.failures), None),
    )


async def many(ask: Ask, stop: asyncio.Event) -> tuple[Seen, ...]:
    """Ask on many connections."""
    room = asyncio.Semaphore(ask.parallel)

    async def one() -> Seen:
        async with room:
            return await once(ask)

    async with asyncio.TaskGroup() as group:
        if ask.count is not None:
            tasks = [group.create_task(one()) for _ in range(ask.count)]
        else:
            tasks = [group.create_task(once(ask)) async for _ in _ticks(ask.pause, stop)]
    return tuple(task.result() for task in tasks)


async def held(ask: Ask, stop: asyncio.Event) -> tuple[Seen, ...]:
    """Ask on one connection; what fails on it is the last thing seen."""
    seen: list[Seen] = []
    began = time.monotonic()
    try:
        async with asyncio.timeout(ask.timeout):
            reader, writer = await asyncio.open_connection(ask.host, ask.port)
        async for _ in _ticks(ask.pause, stop):
            began = time.monotonic()
            async with asyncio.timeout(ask.timeout):
                writer.write(_REQUEST)
                await reader.readuntil(b"\r\n\r\n")
                said = json.loads(await reader.readline())
            seconds = time.monotonic() - began
            seen.append(Seen(ask.host, began, seconds, said["replica"], said["client"]))
        writer.close()
    except (OSError, EOFError, ValueError) as error:
        kind = type(error).__name__
        seen.append(Seen(ask.host, began, time.monotonic() - began, failure=kind))
    return tuple(seen)


async def _ticks(pause: float, stop: asyncio.Event) -> AsyncIterator[int]:
    """A number every `pause` seconds until `stop` is set; late ones are not made up for."""
    for number in itertools.count():
        if stop.is_set():
            return
        yield number
        try:
            await asyncio.wait_for(stop.wait(), pause)
        except TimeoutError:
            continue


async def _serve() -> None:
    reader = asyncio.StreamReader(wire.LINE_LIMIT)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    stops: dict[int, asyncio.Event] = {}

    async def answer(number: int, ask: Ask) -> None:
        seen = await (held if ask.held else many)(ask, stops[number])
        sys.stdout.buffer.write(msgspec.json.encode(Answer(number, seen)) + b"\n")
        sys.stdout.buffer.flush()

    async with asyncio.TaskGroup() as group:
        tasks = []
        while said := await reader.readline():
            line = msgspec.json.decode(said, type=Line)
            if line.ask is not None:
                stops[line.number] = asyncio.Event()
                tasks.append(group.create_task(answer(line.number, line.ask)))
            else:
                stops[line.number].set()
        for task in tasks:
            task.cancel()


if __name__ == "__main__":
    asyncio.run(_serve())

"""A client for demonstrations and tests: asks an address many times, and counts who answered.

`python -m mesh.lab.probe http://ADDR:PORT --count N --timeout S [--udp] [--interval S] [--json]`.
Every probe has a source port of its own.  Exits 0 if all were answered, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_REQUEST = b"GET / HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n"
_ANSWER_LIMIT = 65536


@dataclass(slots=True)
class Tally:
    """Outcomes of probes: counts by replica, by client address as seen there, and of failures.

    `failures` counts refused, reset, unreachable, timeout, other; `seconds` are the answered ones'.
    """

    sent: int = 0
    replicas: Counter[str] = field(default_factory=Counter)
    clients: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: times in milliseconds, every kind of failure present."""
        ordered = sorted(self.seconds)
        return {
            "sent": self.sent,
            "answered": sum(self.replicas.values()),
            "replicas": dict(sorted(self.replicas.items())),
            "clients": dict(self.clients),
            **{kind: self.failures[kind] for kind in _FAILURES},
            "p50Ms": round(ordered[len(ordered) // 2] * 1000, 3) if ordered else None,
            "maxMs": round(ordered[-1] * 1000, 3) if ordered else None,
        }


_FAILURES = ("refused", "reset", "unreachable", "timeout", "other")


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask: an address of either family, a port, and how."""

    host: str
    port: int
    udp: bool
    timeout: float


async def probe(target: Target, tally: Tally) -> None:
    """Ask once, from a new port, and count the outcome."""
    tally.sent += 1
    began = time.monotonic()
    try:
        async with asyncio.timeout(target.timeout):
            said = await (_datagram(target) if target.udp else _request(target))
        answer = json.loads(said)
        tally.replicas[str(answer["replica"])] += 1
        tally.clients[answer["client"]] += 1
        tally.seconds.append(time.monotonic() - began)
    except (OSError, ValueError, KeyError, TypeError) as error:
        tally.failures[_kind(error)] += 1


def _kind(error: Exception) -> str:
    match error:
        case ConnectionRefusedError():
            return "refused"
        case ConnectionError():
            return "reset"
        case TimeoutError():
            return "timeout"
        case OSError():
            return "unreachable"
        case _:
            return "other"


async def _request(target: Target) -> bytes:
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        writer.write(_REQUEST)
        said = await reader.read(_ANSWER_LIMIT)
        while more := await reader.read(_ANSWER_LIMIT):
            said += more
    finally:
        writer.close()
    if not said:
        raise ConnectionResetError
    return said.partition(b"\r\n\r\n")[2]


async def _datagram(target: Target) -> bytes:
    family = socket.AF_INET6 if ":" in target.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as own:
        own.setblocking(False)
        own.connect((target.host, target.port))
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(own, b"?")
        return await loop.sock_recv(own, _ANSWER_LIMIT)


async def run(target: Target, count: int, interval: float, parallel: int) -> Tally:
    """Probe `count` times: every `interval` seconds, or `parallel` at a time if that is 0."""
    tally, room = Tally(), asyncio.Semaphore(parallel)

    async def one() -> None:
        async with room:
            await probe(target, tally)

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
            await asyncio.sleep(interval)
    return tally


def main(arguments: list[str]) -> int:
    """Probe, print the tally, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mesh.lab.probe", description=__doc__)
    parser.add_argument("url", help="http://ADDR:PORT")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds")
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between probes")
    parser.add_argument("--parallel", type=int, default=8, help="at most this many at once")
    parser.add_argument("--udp", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    url = urlsplit(given.url)
    if not url.hostname:
        parser.error(f"{given.url!r}: write http://ADDR:PORT")
    target = Target(url.hostname, url.port or 80, given.udp, given.timeout)
    told = asyncio.run(run(target, given.count, given.interval, given.parallel)).as_dict()
    if given.json:
        text = json.dumps(told)
    else:
        text = "\n".join(f"{name}: {value}" for name, value in told.items())
    sys.stdout.write(text + "\n")
    return 0 if told["answered"] == told["sent"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

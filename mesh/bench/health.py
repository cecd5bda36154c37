"""What it costs a node to have many tasks checked: the agent's prober alone, against a server that
answers everything.

Runs in a network namespace of its own (`isolated`).  The server is a process of its own and not
counted.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from mesh.bench import figures, isolated
from mesh.bench.progress import tell
from mesh.errors import MeshError
from mesh.health.judge import Pace, Verdict
from mesh.health.prober import Prober
from mesh.health.target import Exec, Http, Target, Tcp

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PORT: Final = 8080
_START_SECONDS: Final = 20.0
_ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def measure(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record for each type of check."""
    with _server():
        return [_run(_measured(kind, arguments)) for kind in arguments["types"]]


def _run(work: Any) -> dict[str, Any]:
    """On the event loop that the agent uses."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


async def _measured(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    count, interval, seconds = arguments["checks"], arguments["interval"], arguments["seconds"]
    pace = Pace(interval, timeout=interval, rise=2, fall=3, start_period=0)
    healthy: set[object] = set()
    failures: list[str] = []

    def told(key: object, verdict: Verdict, reason: str) -> None:
        healthy.add(key)
        if verdict is not Verdict.HEALTHY:
            failures.append(f"{key} is {verdict.value}: {reason}")

    before = figures.rss_mb("self")
    prober = Prober(told, random.random)
    began = time.perf_counter()
    for number in range(count):
        prober.watch(number, _target(kind, number), pace)
    await _until_all(healthy, count)
    settled = time.perf_counter() - began
    tell(f"{kind}: {count} checks, {seconds:g} s")
    await asyncio.sleep(interval)
    used, began = _used(), time.perf_counter()
    await asyncio.sleep(seconds)
    used, passed = _used() - used, time.perf_counter() - began
    after = figures.rss_mb("self")
    await prober.close()
    if failures:
        raise MeshError(f"{kind}: {len(failures)} checks failed, as {failures[0]}")
    return {
        "bench": "health",
        "type": kind,
        "checks": count,
        "interval_s": interval,
        "cpu_percent": round(100 * used / passed, 2),
        "us_per_check": round(1e6 * used / passed * interval / count, 1),
        "all_healthy_ms": figures.milliseconds(settled),
        "rss_mb": after,
        "rss_added_mb": round(after - before, 1),
    }


def _used() -> float:
    """Processor seconds of this process and of the commands that it waited for."""
    return sum(os.times()[:4])


async def _until_all(healthy: set[object], count: int) -> None:
    deadline = time.perf_counter() + _START_SECONDS + count / 100
    while len(healthy) < count:
        if time.perf_counter() > deadline:
            raise MeshError(f"only {len(healthy)} of {count} checks passed")
        await asyncio.sleep(0.01)


def _target(kind: str, number: int) -> Target:
    """Every task has an address of its own, of those that loopback has anyway."""
    address = f"127.1.{number // 250}.{number % 250 + 1}"
    if kind == "tcp":
        return Tcp(address, _PORT)
    if kind == "exec":
        return Exec(address, "/proc/self/ns/net", ("true",), ())
    passing = (range(200, 400),)
    return Http(address, _PORT, "/healthz", address, passing, tls=False, verify=True)


@contextmanager
def _server() -> Iterator[None]:
    argv = (sys.executable, "-m", "mesh.bench.health", "serve")
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            if not server.stdout.readline():
                raise MeshError("the server that is to be checked did not start")
            yield
        finally:
            server.kill()


class _Answers(asyncio.Protocol):
    """Answers whatever it is sent, and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, _data: bytes) -> None:
        self._transport.write(_ANSWER)  # type: ignore[attr-defined]
        self._transport.close()


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Answers, "0.0.0.0", _PORT, backlog=4096)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        _run(_serve())
    else:
        isolated.answer(measure)

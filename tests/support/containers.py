"""A node for containers: the bridge as its agent makes it, its place in a cluster, tasks on it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.agent.config import AgentConfig
from mesh.containers import run
from mesh.model.address import Family
from mesh.model.allocation import NodeAllocation
from mesh.model.cluster import Cluster
from mesh.store import schema
from mesh.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from mesh.model.task import Task

KEYS = schema.Keys()
CLUSTER = Cluster(id="test", prefix6="fd11:2233:4455::/48", liveness_ttl=2)
NETWORK = CLUSTER.network(3)
BRIDGE = "warren-br0"
SERVE = """
import socket, sys
servers = [socket.create_server(("", 8080)), socket.create_server(("::", 8080),
           family=socket.AF_INET6)]
import select
while True:
    for server in select.select(servers, [], [])[0]:
        server.accept()[0].sendall(b"hello")
"""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def links() -> set[str]:
    return {link["ifname"] for link in json.loads(ip("-j", "link"))}


@contextmanager
def node_bridge() -> Iterator[str]:
    """The node's bridge with the gateway addresses; its end takes every link on it along."""
    ip("link", "set", "lo", "up")
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    ip("addr", "add", f"{NETWORK.gateway(Family.V4)}/24", "dev", BRIDGE)
    ip("-6", "addr", "add", f"{NETWORK.gateway(Family.V6)}/64", "dev", BRIDGE, "nodad")
    yield BRIDGE
    ip("link", "del", BRIDGE)


async def cluster_of_one() -> MemoryStore:
    """A cluster whose node n1 has number 3."""
    store = MemoryStore()
    await store.put(KEYS.cluster, schema.encode(CLUSTER))
    await store.put(KEYS.node_allocation(3), schema.encode(NodeAllocation(node="n1")))
    return store


def node_config(state: Path) -> AgentConfig:
    """Node n1, with its claims in the directory `state`."""
    return AgentConfig(node="n1", state_dir=str(state), bridge=BRIDGE)


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


def shell(program: str) -> tuple[str, ...]:
    return ("sh", "-c", program)


async def until(condition: Callable[[], Awaitable[Any] | Any], seconds: float = 20) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(seconds):
        while True:
            holds = condition()
            if asyncio.iscoroutine(holds):
                holds = await holds
            if holds:
                return
            await asyncio.sleep(0.01)


class Running:
    """A task under way in this process."""

    def __init__(self, stop: asyncio.Event, ending: asyncio.Task[int]) -> None:
        self.stop = stop
        self.ending = ending

    async def end(self) -> int:
        self.stop.set()
        return await self.ending


@asynccontextmanager
async def running(
    store: MemoryStore, config: AgentConfig, options: run.RunOptions
) -> AsyncIterator[Running]:
    """A task, at least until it is registered."""
    stop = asyncio.Event()
    ending = asyncio.create_task(run.run_until(stop, store, KEYS, config, options))

    async def begun() -> bool:
        return ending.done() or await record(store, options) is not None

    try:
        await until(begun)
        yield Running(stop, ending)
    finally:
        stop.set()
        await asyncio.gather(ending, return_exceptions=True)


async def record(store: MemoryStore, options: run.RunOptions) -> Task | None:
    key = KEYS.task(options.service, options.id)
    found = await store.get(key)
    return None if found is None else schema.parse_task(key, found.value)


async def gone(store: MemoryStore, options: run.RunOptions) -> bool:
    return await record(store, options) is None


def inhabitants(task: str) -> set[str]:
    """The commands of every process that was told it is `task`, at any depth."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"MESH_TASK={task}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.add((path / "cmdline").read_text())
        except OSError:
            continue
    return found

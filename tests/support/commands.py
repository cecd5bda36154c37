"""The command line on an in-memory store, and a cluster to look at."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from mesh.cli import main
from mesh.store.schema import Keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from click.testing import Result

    from mesh.agent.config import EtcdConfig
    from mesh.store.memory import MemoryStore
    from mesh.store.protocol import Store

KEYS = Keys("/mesh")
PUBLIC_KEY = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="


class CommandLine:
    """Runs `mesh` in this process; `asked` is the etcd that the last verb wanted."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.asked: EtcdConfig | None = None

    @asynccontextmanager
    async def connect(self, etcd: EtcdConfig) -> AsyncIterator[Store]:
        self.asked = etcd
        yield self.store

    def run(self, *args: str, env: dict[str, str] | None = None) -> Result:
        names = ("MESH_ETCD", "MESH_CONFIG", "MESH_ETCD_USER", "MESH_PUBLISH_MODE")
        clean = dict.fromkeys(names)
        return CliRunner(env={**clean, **(env or {})}).invoke(main.mesh, args, obj=self.connect)

    def ok(self, *args: str) -> str:
        """What a verb printed that must succeed."""
        result = self.run(*args)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *args: str) -> Any:
        """The document that a verb printed, which must succeed."""
        return json.loads(self.ok(*args, "--json"))

    def put(self, key: str, record: object) -> int:
        """Write a record; the revision of the write."""
        value = record if isinstance(record, bytes) else json.dumps(record).encode()
        return asyncio.run(self.store.put(key, value))

    def get(self, key: str) -> Any:
        """A record, or None."""
        found = asyncio.run(self.store.get(key))
        return None if found is None else json.loads(found.value)

    def add_node(self, name: str, number: int, *, alive: bool = True) -> None:
        """A node as its agent and the controller would have it."""
        node = {
            "name": name,
            "role": "manager",
            "publicKey": PUBLIC_KEY,
            "endpoints": [f"192.0.2.{number}:51820"],
            "addresses": [f"192.0.2.{number}"],
        }
        self.put(KEYS.node(name), node)
        self.put(KEYS.node_allocation(number), {"node": name})
        if alive:
            self.put(KEYS.alive(name), {})
        self.apply(name)

    def apply(self, name: str, **more: object) -> None:
        """Report that a node's kernel has everything."""
        revision = asyncio.run(self.store.list("/")).revision
        report = {"revision": revision, "backend": "nftables", "version": "1", **more}
        self.put(KEYS.applied(name), report)

    def allocate(self, service: str, index: int, *ports: tuple[str, int, int]) -> None:
        """Give a service a VIP and (protocol, published, target) ports, as the controller does."""
        vips = [f"10.1.0.{index}", f"fd12:3456:789a:f000::{index:x}"]
        self.put(KEYS.vip_allocation(index), {"service": service, "addresses": vips})
        for protocol, published, target in ports:
            key = KEYS.port_allocation(protocol, published)
            self.put(key, {"service": service, "target": target})


def add_web(cli: CommandLine) -> None:
    """A service with two replicas; the second is not healthy."""
    cli.allocate("web", 1, ("tcp", 8080, 80))
    ports = ("-p", "8080:80", "--publish-mode", "ingress")
    cli.ok("service", "create", "web", *ports, "--health", "http:/healthz")
    for number in (1, 2):
        address = f"10.0.{number}.5"
        cli.ok("task", "add", "web", f"web-{number}", "--node", f"n{number}", "-a", address)
    judge(cli, 1, healthy=True)
    judge(cli, 2, healthy=False, reason="HTTP 500")


def judge(cli: CommandLine, number: int, *, healthy: bool, **more: object) -> None:
    """Have the node of one of these two replicas tell of its health."""
    told = {"service": "web", "healthy": healthy, "address": f"10.0.{number}.5", **more}
    cli.put(KEYS.health(f"n{number}", f"web-{number}"), [told])


def start_cluster(cli: CommandLine) -> None:
    """A cluster of two nodes and a manager that leads."""
    cli.ok("cluster", "init", "--prefix6", "fd12:3456:789a::/48")
    cli.add_node("n1", 1)
    cli.add_node("n2", 2)
    cli.put(KEYS.leader, b"n1")


def words(table: str) -> list[list[str]]:
    """The words of every line."""
    return [line.split() for line in table.splitlines()]

"""A lab whose replicas say that they are ill when a test wants them to.

Replicas a1 on n1 and b1 on n2 serve `web`; a2 and b2 are clients inside.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.support.cluster import PORT, Cluster, cluster, host, ingress, until, until_served
from tests.support.probed import QUICK, HealthServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.requests import Ask

WEB, HOST = 8080, 8081
BOTH: Final = {"a1", "b1"}


@dataclass
class World:
    """A lab, and its replicas' health by their names."""

    mesh: Cluster
    health: dict[str, HealthServer]

    def everything(self, port: int = WEB) -> list[Ask]:
        """From outside through every node, and from containers to the VIP."""
        mesh = self.mesh
        return mesh.from_outside(port) + mesh.asks(("a2", "b2"), mesh.vips("web"), PORT)

    def told(self, replica: str, service: str = "web") -> dict[str, Any]:
        """What the replica's node tells of it; nothing yet: nothing."""
        node = self.mesh.containers[replica].node
        found = self.mesh.records.get(f"health/{node}/{replica}") or []
        return next((one for one in found if one["service"] == service), {})

    async def until_told(self, *, healthy: bool, replica: str) -> None:
        await until(lambda: self.told(replica).get("healthy") is healthy, f"{replica}'s verdict")

    @contextmanager
    def ill(self, *replicas: str) -> Iterator[None]:
        """Have replicas say so for the time of a block."""
        for replica in replicas:
            self.health[replica].status = 503
        try:
            yield
        finally:
            for replica in replicas:
                self.health[replica].status = 200

    async def all_well(self) -> None:
        for replica in BOTH:
            await self.until_told(healthy=True, replica=replica)
        await until_served(8 * self.everything(), BOTH)


@contextmanager
def healthy_lab(name: str, backend: str = "auto") -> Iterator[World]:
    """Build it, and wait until all are well."""
    placed = (("a1", "n1"), ("a2", "n1"), ("b1", "n2"), ("b2", "n2"))
    with cluster(name, 3, *placed, backend=backend) as mesh, ExitStack() as stack:
        health = {}
        for replica in sorted(BOTH):
            health[replica] = HealthServer(mesh.containers[replica].netns)
            stack.callback(health[replica].close)
        made = World(mesh, health)
        asyncio.run(_furnish(made))
        yield made


async def _furnish(world: World) -> None:
    mesh = world.mesh
    mesh.service("web", *ingress(WEB), *host(HOST), health=QUICK)
    for replica in sorted(BOTH):
        mesh.task("web", replica)
    await mesh.allocated("web")
    await world.all_well()

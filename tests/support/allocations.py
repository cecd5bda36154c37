"""A cluster's allocations: what a controller is asked for in a store, and what it wrote there."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from msgspec import UNSET

from mesh.controller.lead import lead
from mesh.model.allocation import NodeAllocation, PortAllocation, VipAllocation
from mesh.model.cluster import Cluster
from mesh.model.node import Node, Role
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from mesh.model.report import Status
from mesh.model.service import ServiceSpec
from mesh.store.protocol import Compare
from mesh.store.schema import Keys, decode, encode
from tests.support.stores import eventually, running

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator

    from mesh.store.protocol import Store

KEYS = Keys()
CLUSTER = Cluster(
    id="c",
    prefix6="fd00:1::/48",
    vips4="10.1.0.0/29",
    overlay4="10.0.0.0/29",
    ingress_ports=(30000, 30002),
)


def ingress(
    published: int | None, target: int = 80, protocol: Protocol = Protocol.TCP
) -> PublishedPort:
    return PublishedPort(
        target=target, published=published, protocol=protocol, mode=PublishMode.INGRESS
    )


class Allocations:
    """A store, what tests ask for in it, and what was given."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def service(
        self,
        name: str,
        *ports: PublishedPort,
        vip: str = "auto",
        local_health: int | None = None,
        publish_on: str | None = None,
    ) -> None:
        spec = ServiceSpec(
            name=name,
            ports=ports,
            vip=vip,
            local_health_port=local_health or UNSET,
            publish_on=publish_on or UNSET,
        )
        await self.store.put(KEYS.service(name), encode(spec))

    async def node(self, name: str) -> None:
        node = Node(
            name=name, role=Role.WORKER, public_key="A" * 43 + "=", endpoints=(), addresses=()
        )
        await self.store.put(KEYS.node(name), encode(node))

    async def elect(self) -> Compare:
        """Make somebody else the leader: the guard that holds from now on."""
        return Compare(KEYS.leader, await self.store.put(KEYS.leader, b"somebody"))

    async def vips(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for item in (await self.store.list(KEYS.under("allocations/vips"))).items:
            record = decode(item.key, item.value, VipAllocation)
            index = int(item.key.rpartition("/")[2])
            assert record.addresses == (f"10.1.0.{index}", f"fd00:1:0:f000::{index}")
            found[record.service] = (*found.get(record.service, ()), index)
        return found

    async def shares(self) -> dict[str, int]:
        """The ports of services that select nodes, and where they lead."""
        return {
            item.key.removeprefix(KEYS.shares): decode(item.key, item.value, PortAllocation).target
            for item in (await self.store.list(KEYS.shares)).items
        }

    async def ports(self) -> dict[str, tuple[str, int]]:
        return {
            item.key.removeprefix(KEYS.under("allocations/ports")): (record.service, record.target)
            for item in (await self.store.list(KEYS.under("allocations/ports"))).items
            for record in (decode(item.key, item.value, PortAllocation),)
        }

    async def numbers(self) -> dict[str, int]:
        return {
            decode(item.key, item.value, NodeAllocation).node: int(item.key.rpartition("/")[2])
            for item in (await self.store.list(KEYS.under("allocations/nodes"))).items
        }

    async def problems(self) -> dict[str, tuple[str, ...]]:
        """What each service's and node's status is about."""
        return {
            item.key.removeprefix(KEYS.under("status")): tuple(
                problem.about for problem in decode(item.key, item.value, Status).problems
            )
            for item in (
                await self.store.list(KEYS.under("status/services"), KEYS.under("status/nodes"))
            ).items
        }

    @asynccontextmanager
    async def controller(self) -> AsyncIterator[asyncio.Task[None]]:
        """A newly elected leader at work."""
        async with running(lead(self.store, KEYS, await self.elect())) as task:
            yield task

    async def settled(self) -> None:
        """Wait until the controller has dealt with everything written so far.

        It works in the order of revisions, so a node that is written now gets its number last.
        """
        await self.node("last")
        await eventually(self._has_last)
        await self.store.delete(KEYS.node("last"))
        await eventually(self._lacks_last)

    async def _has_last(self) -> bool:
        return "last" in await self.numbers() or "nodes/last" in await self.problems()

    async def _lacks_last(self) -> bool:
        return not await self._has_last()

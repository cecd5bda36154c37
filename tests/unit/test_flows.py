"""When a connection to a backend that left is forgotten: not while an answer may be on its way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from mesh.delta import Delta
from mesh.engine.flows import Flows
from mesh.model import address
from mesh.model.publish import Protocol
from mesh.rules import marks, nft
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from mesh.rules.stale import Flow

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.dataplane.conntrack import Conntrack
    from mesh.rules.elements import Elements

WEB = (Frontend(Scope.INGRESS, None, Protocol.TCP, 30080),)
LEAVES, STAYS = Backend("10.0.1.1", 80), Backend("10.0.1.2", 80)
RTT = 0.3
"""Seconds: of the slowest that a replica's answer may take, and still be waited for."""


class Asked:
    """A connection table whose one entry was asked just now, and what was deleted of it when."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.deleted: list[tuple[float, Flow]] = []

    async def unanswered(self) -> list[Flow]:
        return [self.flow]

    async def delete_unanswered(self, flows: Iterable[Flow]) -> None:
        self.deleted += ((asyncio.get_running_loop().time(), flow) for flow in flows)

    async def forget(self, _: object) -> None:
        pass

    async def udp_flows(self, *_: int) -> list[Flow]:
        return []

    async def delete(self, flows: Iterable[Flow]) -> None:
        assert not list(flows)


class Node:
    """What a node's kernel holds, and a connection to the backend that leaves."""

    def __init__(self) -> None:
        self.ids = Ids()
        self.now = self.before = self.lowered(LEAVES, STAYS)
        mark = marks.DEFAULT.frontend(self.ids.of("web/80/tcp"), 2)
        client, node, backend = (
            (address.packed(a), 80) for a in ("192.0.2.9", "192.0.2.1", "10.0.1.1")
        )
        self.asked = Asked(
            Flow(mark, Protocol.TCP.number, client, node, backend, False, b"1", answered=False)
        )
        self.flows = Flows(cast("Conntrack", self.asked), marks.DEFAULT)

    def lowered(self, *backends: Backend) -> Elements:
        return nft.lower(Forwarding("web/80/tcp", WEB, backends), self.ids)

    async def settle(self) -> None:
        self.now = self.lowered(STAYS)
        self.flows.written(Delta.between(self.before, self.now))
        await self.flows.settle(lambda _: self.now, lambda _: {})


async def test_it_is_given_time_to_be_answered() -> None:
    node = Node()
    began = asyncio.get_running_loop().time()

    await node.settle()

    ((when, flow),) = node.asked.deleted
    assert flow == node.asked.flow
    assert when >= began + RTT


async def test_a_backend_that_is_back_meanwhile_is_waited_for() -> None:
    node = Node()

    settling = asyncio.create_task(node.settle())
    await asyncio.sleep(0)
    node.now = node.before
    await settling

    assert node.asked.deleted == []

"""The host's own firewall, looked after for as long as the agent runs.

Owns the loop that keeps our flows accepted there, and what it needs to know of this node.  Never
decides what a firewall drops (mesh.rules.needs).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from mesh.engine.healing import Repair
from mesh.model import address
from mesh.model.address import FAMILIES
from mesh.model.node import split_endpoint
from mesh.rules.needs import Wanted

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.agent.state import State
    from mesh.dataplane.firewall import Firewall
    from mesh.model.address import Family
    from mesh.model.report import Problem
    from mesh.rules.program import Parameters

    Healed = Callable[[Repair, str, str], None]

_LOOK_SECONDS: Final = 1.0
"""How often the firewall is looked at without being told of a change: 20 microseconds."""

_SETTLE_SECONDS: Final = 0.05
"""Changes come in bursts; one pass answers a whole burst."""

_REPLICAS_SECONDS: Final = 60.0
"""How often tasks are searched for replicas that use this node's own addresses."""

_AT_ONCE: Final = 200
"""Services that are searched before others have their turn: about a millisecond."""


class Neighbours:
    """Keeps our flows accepted.  `told` is called when `problems` changed, `healed` when lines of
    ours had to be put back, with where, and who had removed them.
    """

    def __init__(
        self, state: State, firewall: Firewall, told: Callable[[], None], healed: Healed
    ) -> None:
        self._state = state
        self._firewall = firewall
        self._told = told
        self._healed = healed
        self._local_replicas = False
        self.problems: tuple[Problem, ...] = ()

    async def run(self, parameters: Parameters) -> None:
        """Look after it for ever."""
        due, clock = 0.0, asyncio.get_running_loop().time
        while True:
            if clock() >= due:
                self._local_replicas = await self._has_local_replicas()
                due = clock() + _REPLICAS_SECONDS
            await self.look(parameters)
            await self._firewall.wait(_LOOK_SECONDS)
            await asyncio.sleep(_SETTLE_SECONDS)

    async def look(self, parameters: Parameters) -> None:
        """One pass."""
        wanted = self._wanted(parameters)
        if wanted is None:
            return
        before, self.problems = self.problems, await self._firewall.sync(wanted)
        if self.problems != before:
            self._told()
        for where, by in self._firewall.replaced():
            self._healed(Repair(lines=1), f"our line in {where} removed", by)

    def _wanted(self, parameters: Parameters) -> Wanted | None:
        cluster = self._state.cluster
        if cluster is None:
            return None
        wanted = Wanted.of(parameters, cluster.wireguard_port, self._endpoints())
        return replace(wanted, local_replicas=self._local_replicas)

    def _endpoints(self) -> frozenset[Family]:
        """In which families peers send to this node: by the first endpoint that they can use."""
        nodes = self._state.peers()
        own = nodes.pop(self._state.node, None)
        if own is None:
            return frozenset()
        ways = [address.family_of(split_endpoint(each)[0]) for each in own.node.endpoints]
        usable = (
            {address.family_of(each) for each in peer.node.addresses} or set(FAMILIES)
            for peer in nodes.values()
        )
        return frozenset(way for those in usable for way in [w for w in ways if w in those][:1])

    async def _has_local_replicas(self) -> bool:
        own = self._state.peers().get(self._state.node)
        addresses = frozenset(own.node.addresses) if own is not None else frozenset()
        for count, name in enumerate(tuple(self._state.services())):
            view = self._state.service_view(name)
            for task in view.tasks if view is not None else ():
                if task.node == self._state.node and not addresses.isdisjoint(task.addresses):
                    return True
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return False

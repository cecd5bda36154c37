"""This node's rules as a whole: the backend, the reconciler, and what looks after them.

Owns the loops that heal, pass foreign firewalls and forget stale flows.  Decides nothing about
services.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from mesh.agent import backend
from mesh.agent.flows import Flows
from mesh.agent.reconciler import Reconciler
from mesh.dataplane.conntrack import Conntrack
from mesh.dataplane.firewall import Firewall
from mesh.errors import ApplyFailed, CommandFailed, HostNotReady, NotFound

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from mesh.agent.backend import Chosen
    from mesh.agent.state import State, Touched
    from mesh.model.report import Problem
    from mesh.rules.elements import Elements
    from mesh.rules.marks import Layout
    from mesh.rules.program import Parameters

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 0.2

_FIREWALL_SECONDS: Final = 1.0
"""How often the host's firewall is looked at: 20 microseconds, unless iptables-legacy is in use."""

SETTLE_SECONDS: Final = 0.05
"""Notifications come in bursts; one pass answers a whole burst."""


class Rules:
    """What this node forwards.  `told` is called when `problems` may have changed."""

    def __init__(
        self, state: State, chosen: Chosen, layout: Layout, told: Callable[[], None]
    ) -> None:
        self._driver = chosen.driver
        self._flows = Flows(Conntrack(layout), layout)
        flavour = chosen.driver.name.removeprefix("iptables-")
        self._firewall = Firewall(layout, ignored=chosen.driver.port, own=flavour)
        self._refused: tuple[Problem, ...] = ()
        self._reconciler = Reconciler(state, self._driver, self._flows.written, layout)
        self._told = told

    async def start(self, parameters: Parameters) -> None:
        """Take over what the kernel holds, write the difference, retire other backends.

        A firewall that drops what only the other backend's chains accept hears of it before.
        """
        before = await backend.read_others(self._driver, parameters)
        await self._until_done(partial(self._start, before))
        self._refused = await self._firewall.sync()
        await backend.retire_others(self._driver, parameters)

    async def _start(self, before: Elements) -> int:
        await self._reconciler.start(before)
        return 0

    async def reconcile(self, touched: Touched) -> None:
        """Plan the touched services again and write what differs, whatever it takes."""
        await self._until_done(partial(self._reconciler.reconcile, touched))

    def look_after(self, tasks: asyncio.TaskGroup) -> None:
        """Start everything that goes on besides."""
        tasks.create_task(self._keep_healed(), name="healer")
        tasks.create_task(self._keep_accepted(), name="firewall")
        tasks.create_task(
            self._flows.run(self._reconciler.held, self._reconciler.held_udp), name="flows"
        )

    def problems(self) -> Iterable[Problem]:
        """What could not be installed, is in the way, or could not be forgotten."""
        yield from self._refused
        yield from self._driver.problems()
        yield from self._reconciler.problems()
        yield from self._flows.problems

    async def _keep_healed(self) -> None:
        """Put back what somebody else removes from our tables, or adds to them."""
        while True:
            what = await self._driver.tampered()
            await asyncio.sleep(SETTLE_SECONDS)
            differed = await self._until_done(self._reconciler.heal)
            if differed:
                log.warning("healed elements=%d after=%r", differed, what)

    async def _keep_accepted(self) -> None:
        """Keep our flows accepted by the host's own firewall, also after it is reloaded."""
        while True:
            before, self._refused = self._refused, await self._firewall.sync()
            if self._refused != before:
                self._told()
            await asyncio.sleep(_FIREWALL_SECONDS)

    async def _until_done(self, step: Callable[[], Awaitable[int]]) -> int:
        """Do a step; as long as the rules cannot be written, try to heal them instead.

        Somebody may delete the table in the middle of it.
        """
        while True:
            try:
                return await step()
            except (ApplyFailed, CommandFailed, HostNotReady, NotFound) as error:
                log.error("rules not in line, trying again: %s", error)
            await asyncio.sleep(_RETRY_SECONDS)
            step = self._reconciler.heal

    def close(self) -> None:
        """Release sockets; the kernel keeps forwarding."""
        self._driver.close()
        self._flows.close()
        self._firewall.close()

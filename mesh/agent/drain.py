"""Watches the connections of draining tasks, tells how many are left, and ends them when their time
is up.

Owns the loop.  Which connections these are is decided in mesh.rules.ended, when their time is up in
mesh.agent.drains.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from mesh.agent.drains import Deadlines
from mesh.errors import ApplyFailed
from mesh.model.report import Connections, Drained, Problem
from mesh.rules import ended

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mesh.agent.state import State
    from mesh.dataplane.conntrack import Conntrack
    from mesh.engine.traffic import Traffic
    from mesh.rules.ended import Established, Leaving, Name
    from mesh.rules.marks import Layout

log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 1.0
"""Between two looks while anything is left: each walks the whole connection table."""

_REST_SECONDS: Final = 0.2
"""The same at least, however often tasks begin to drain."""

_SHARE: Final = 10
"""A look may take a tenth of the time: a table of a million connections is looked at less often."""


class Drain:
    """The draining tasks of the cluster, as one node's connections see them.

    `pool` gives the key of the pool that has a frontend id, `told` hears of another `report`, and
    `traffic` of flows that were ended.
    """

    def __init__(
        self,
        state: State,
        conntrack: Conntrack,
        layout: Layout,
        traffic: Traffic,
        pool: Callable[[int], str | None],
        told: Callable[[], None],
    ) -> None:
        self._state = state
        self._conntrack = conntrack
        self._layout = layout
        self._traffic = traffic
        self._pool = pool
        self._told = told
        self._deadlines = Deadlines()
        self._revision = 0
        self._seen = -1
        self._wake = asyncio.Event()
        self.report = Drained()
        self.problems: tuple[Problem, ...] = ()

    def applied(self, revision: int) -> None:
        """The kernel has everything up to `revision`."""
        self._revision = max(self._revision, revision)
        if self._state.drains.version != self._seen:
            self._wake.set()

    async def run(self) -> None:
        """Look for ever, but only while anything drains."""
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            pause = await self._look(began)
            rest = max(_REST_SECONDS, _SHARE * (clock() - began))
            await asyncio.sleep(rest)
            try:
                async with asyncio.timeout(None if pause is None else max(0, pause - rest)):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _look(self, now: float) -> float | None:
        """Count, and end what is due; seconds until the next look, None: when something changes."""
        revision, leaving = self._revision, self._state.leaving()
        # What the kernel does not have yet is news again when it does.
        self._seen = self._state.drains.version if revision >= self._state.revision else -1
        self._deadlines.see(leaving, now)
        if not leaving:
            self._tell(Drained(revision=revision))
            return None
        try:
            found = await self._established(leaving)
            due = self._deadlines.due(now)
            await self._end({name: found[name] for name in due})
        except ApplyFailed as error:
            log.warning("connections of draining tasks not ended, trying again: %s", error)
            self.problems = (Problem(about="drain", message=str(error)),)
            self._told()
            return _LOOK_SECONDS
        self.problems = ()
        left = tuple(
            Connections(service=name[0], task=name[1], count=len(each.translated))
            for name, each in sorted(found.items())
            if each.translated and name not in due
        )
        self._tell(Drained(revision=revision, left=left))
        if self._deadlines.over(now):
            return None
        soon = self._deadlines.next(now)
        return _LOOK_SECONDS if soon is None else min(soon, _LOOK_SECONDS)

    async def _established(self, leaving: Mapping[Name, Leaving]) -> dict[Name, Established]:
        addresses = frozenset[bytes]().union(*(one.addresses for one in leaving.values()))
        flows = await self._conntrack.flows_to(addresses)
        return ended.connections(flows, leaving, self._pool, self._layout)

    async def _end(self, due: Mapping[Name, Established]) -> None:
        flows = [flow for each in due.values() for side in each for flow in side]
        await self._conntrack.end(flows)
        self._traffic.untold(sum(len(each.translated) for each in due.values()))
        for (service, task), each in due.items():
            if each.translated or each.arrived:
                log.info(
                    "drained task=%s/%s ended=%d arrived=%d",
                    service, task, len(each.translated), len(each.arrived),
                )  # fmt: skip

    def _tell(self, report: Drained) -> None:
        if report != self.report:
            self.report = report
            self._told()

    def close(self) -> None:
        """Release the socket."""
        self._conntrack.close()

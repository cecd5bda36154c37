"""Forgets flows that nothing serves any more: after the rules changed, and off their path.

Owns the queue between the two.  What is stale is decided in mesh.rules.stale, from the ledger as it
is when the flows are looked at.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from mesh.errors import ApplyFailed
from mesh.model.report import Problem
from mesh.rules import elements, stale

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.dataplane.conntrack import Conntrack
    from mesh.dataplane.protocol import ElementDelta
    from mesh.rules.elements import Elements
    from mesh.rules.marks import Layout

    Held = Callable[[int], Elements]

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0

_GRACE_SECONDS: Final = 0.2
"""What is asked once and answered has its answer by then; forgotten sooner, it would be lost."""

_ANSWER_SECONDS: Final = 0.6
"""Whoever is there answers a connection by then, and its client asks again after one second."""

_LOOK_SECONDS: Final = 0.5
"""Between two looks for stranded connections: each walks the whole table, some 30 ms."""


class Flows:
    """The flows of one node, kept in line with its rules.  `failed` is told when that fails."""

    def __init__(
        self, conntrack: Conntrack, layout: Layout, failed: Callable[[], None] = lambda: None
    ) -> None:
        self._failed = failed
        self._conntrack = conntrack
        self._layout = layout
        self._written: list[ElementDelta] = []
        self._doubted = True  # the agent before this one may have been killed too early
        self._shrunk = asyncio.Event()
        self._wake = asyncio.Event()
        self.problems: tuple[Problem, ...] = ()

    def written(self, delta: ElementDelta) -> None:
        """The kernel has this change now."""
        self._written.append(delta)
        self._wake.set()
        if any(name in elements.TARGETS for name, _ in delta.remove):
            self._shrunk.set()

    async def run(self, held: Held, held_udp: Held) -> None:
        """Forget for ever.  `held` and `held_udp` give the elements of a frontend id."""
        self._wake.set()
        self._shrunk.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_pinned(held_udp))
            tasks.create_task(self._keep_stranded(held))

    async def _keep_pinned(self, held: Held) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            deltas, self._written = self._written, []
            await asyncio.sleep(_GRACE_SECONDS)  # what is written meanwhile gets as much
            try:
                await self._forget(deltas, held)
            except ApplyFailed as error:
                self._tell(error)
                self._doubted = True
                self._wake.set()
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self.problems = ()

    async def _forget(self, deltas: list[ElementDelta], held: Held) -> None:
        layout = self._layout
        due = {each for delta in deltas for each in stale.after(delta, held, layout)}
        # What was stale, served, and is stale again has clients that wait for an answer.
        due -= {each for delta in self._written for each in stale.after(delta, held, layout)}
        await self._conntrack.forget(due)
        if self._doubted:
            self._doubted = False
            flows = await self._conntrack.udp_flows(layout.ours, layout.ours | layout.via)
            await self._conntrack.delete(stale.among(flows, held, layout))

    async def _keep_stranded(self, held: Held) -> None:
        """Give connections to a backend that left without an answer another try."""
        while True:
            await self._shrunk.wait()
            self._shrunk.clear()
            try:
                await self._forget_stranded(held)
            except ApplyFailed as error:
                self._tell(error)
                self._shrunk.set()
            await asyncio.sleep(_LOOK_SECONDS)

    async def settle(self, held: Held, held_udp: Held) -> None:
        """Forget once what is due by now, for whoever does not `run`.  Raises ApplyFailed."""
        deltas, self._written = self._written, []
        await self._forget(deltas, held_udp)
        if self._shrunk.is_set():
            self._shrunk.clear()
            await self._forget_stranded(held)

    async def _forget_stranded(self, held: Held) -> None:
        """A replica that left may be well: the answer to what it was just asked is on its way, and
        would find a connection that nobody knows.
        """
        asked = await self._conntrack.unanswered()
        if any(stale.stranded(asked, held, self._layout)):
            await asyncio.sleep(_ANSWER_SECONDS)
            left = stale.stranded(asked, held, self._layout)
            await self._conntrack.delete_unanswered(left)

    def _tell(self, error: ApplyFailed) -> None:
        self._failed()
        log.warning("flows not forgotten, trying again: %s", error)
        self.problems = (Problem(about="conntrack", message=str(error)),)

    def close(self) -> None:
        """Release the socket."""
        self._conntrack.close()

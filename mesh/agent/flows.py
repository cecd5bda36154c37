"""Forgets UDP flows that nothing serves any more: after the rules changed, and off their path.

Owns the queue between the two.  What is stale is decided in mesh.rules.stale, from the ledger as it
is when the flows are looked at; never touches TCP, which drains.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from mesh.errors import ApplyFailed
from mesh.model.report import Problem
from mesh.rules import marks, stale

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.dataplane.conntrack import Conntrack
    from mesh.dataplane.protocol import ElementDelta
    from mesh.rules.elements import Elements

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0


class Flows:
    """The flows of one node, kept in line with its rules."""

    def __init__(self, conntrack: Conntrack) -> None:
        self._conntrack = conntrack
        self._written: list[ElementDelta] = []
        self._doubted = True  # the agent before this one may have been killed too early
        self._wake = asyncio.Event()
        self.problems: tuple[Problem, ...] = ()

    def written(self, delta: ElementDelta) -> None:
        """The kernel has this change now."""
        self._written.append(delta)
        self._wake.set()

    def doubt(self) -> None:
        """What was written is not known in detail: look at every flow of ours."""
        self._doubted = True
        self._wake.set()

    async def run(self, held: Callable[[int], Elements]) -> None:
        """Forget for ever.  `held` gives the elements of a frontend id that serves UDP."""
        self._wake.set()
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._forget(held)
            except ApplyFailed as error:
                log.warning("flows not forgotten, trying again: %s", error)
                self.problems = (Problem(about="conntrack", message=str(error)),)
                self.doubt()
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self.problems = ()

    async def _forget(self, held: Callable[[int], Elements]) -> None:
        deltas, self._written = self._written, []
        await self._conntrack.forget(
            [each for delta in deltas for each in stale.after(delta, held)]
        )
        if self._doubted:
            self._doubted = False
            flows = await self._conntrack.udp_flows(marks.OURS, marks.OURS | marks.VIA)
            await self._conntrack.delete(stale.among(flows, held))

    def close(self) -> None:
        """Release the socket."""
        self._conntrack.close()

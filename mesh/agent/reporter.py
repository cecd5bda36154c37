"""Tells the cluster what this node's kernel has: `/mesh/applied/<node>`, and nothing more often
than a watcher could use.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from mesh import __version__
from mesh.errors import StoreUnavailable
from mesh.model.report import Applied, Problem
from mesh.store import schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mesh.agent.reach import Reachability
    from mesh.agent.rules import Rules
    from mesh.engine.backend import Chosen
    from mesh.store.protocol import Store

log = logging.getLogger(__name__)

_PAUSE: Final = 0.1
"""Seconds between two reports at least: every one is a write to etcd."""

_RETRY: Final = 1.0

_MOST: Final = 50
"""Problems told; a node with more is told to look here."""


class Reporter:
    """Writes the last report that differs from the one before."""

    def __init__(
        self,
        store: Store,
        key: str,
        chosen: Chosen,
        rules: Rules,
        reach: Reachability,
    ) -> None:
        self._store = store
        self._key = key
        self._chosen = chosen
        self._rules = rules
        self._reach = reach
        self._wake = asyncio.Event()
        self.revision = 0
        """What the kernel has."""

    def applied(self, revision: int) -> None:
        """The kernel now has everything up to `revision`."""
        self.revision = revision
        self._wake.set()

    def wake(self) -> None:
        """The problems may have changed."""
        self._wake.set()

    async def run(
        self, problems: Callable[[], Iterable[Problem]], orders_in: Callable[[], float]
    ) -> None:
        """Report for ever; not while a revision does not stand for all before it."""
        last = b""
        while True:
            await self._wake.wait()
            await asyncio.sleep(orders_in())
            self._wake.clear()
            report = schema.encode(self._report(problems()))
            if report != last:
                try:
                    await self._store.put(self._key, report)
                    last = report
                except StoreUnavailable as error:
                    log.debug("report not written: %s", error)
                    self._wake.set()
                    await asyncio.sleep(_RETRY)
            await asyncio.sleep(_PAUSE)

    def _report(self, problems: Iterable[Problem]) -> Applied:
        told = list(problems)
        if len(told) > _MOST:
            more = Problem(about="agent", message=f"{len(told) - _MOST} more problems in its log")
            told = [*told[:_MOST], more]
        return Applied(
            revision=self.revision,
            backend=self._chosen.driver.name,
            reason=self._chosen.reason,
            version=__version__,
            problems=tuple(told),
            healings=self._rules.healings,
            drained=self._rules.drain.report,
            unreachable=tuple(sorted(self._reach.left_out)),
        )

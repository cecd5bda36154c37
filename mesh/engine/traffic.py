"""Keeps count of what goes through this node's ports, once somebody asked for it.

Owns when the kernel is asked: of flows that end as they do, some at once; of those that are there
when the counts are read, and then for at most a twentieth of the time.  Adding up is decided in
mesh.rules.traffic.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.dataplane.cttraffic import Traffic as Driver
from mesh.dataplane.sysctl import SysctlDriver
from mesh.delta import Delta
from mesh.model.report import Problem
from mesh.rules.traffic import Account

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from mesh.dataplane.cttraffic import Statistics
    from mesh.rules.marks import Layout
    from mesh.rules.traffic import Counted, Entrance, Port, Volume

log = logging.getLogger(__name__)

_PAUSE: Final = 0.05
"""Seconds in which flows that ended are left to gather: room is for thirteen thousand."""

_SLICE: Final = 4
"""How many times as many as one call gives are read before others have their turn: 2 ms."""

_SHARE: Final = 20
"""A look at all flows is followed by as many times the processor time it took without one."""

_CHEAP: Final = 0.05
"""Seconds of a look that nobody minds: twenty thousand flows."""

_COUNTS: Final = "net/netfilter/nf_conntrack_acct"
_EVENTS: Final = "net/netfilter/nf_conntrack_events"


class Traffic:
    """The counts of this node.  Costs nothing until `read` is called for the first time.

    `pool` gives the key of a frontend id, `name` the port that an entrance of a pool is; `told` is
    called when `problems` changed.
    """

    def __init__(
        self,
        layout: Layout,
        pool: Callable[[int], str | None],
        name: Callable[[str, Entrance], Port],
        told: Callable[[], None],
    ) -> None:
        self._told = told
        self._layout = layout
        self._account = Account(layout, pool, name)
        self._driver: Driver | None = None
        self._sysctl = SysctlDriver(Path("/proc/sys"))
        self._reading = asyncio.Lock()
        self._paused = False
        self._due = 0.0
        self._took = 0.0
        self._lost = 0
        self._untold = 0
        self.lost = 0
        """Flows that ended without being counted: there were too many at once, or `untold`."""
        self.problems: tuple[Problem, ...] = ()

    async def read(self, published: Collection[Port]) -> Mapping[Port, Volume]:
        """What went through each port that had any traffic.  `published` are those there are now:
        others are forgotten when their last flow has ended.  Where the kernel refuses, what it told
        before.
        """
        clock = asyncio.get_running_loop().time
        async with self._reading:
            if clock() >= self._due:
                self._took = 0.0
                await self._try(published)
                self._due = clock() + self._took * _SHARE if self._took > _CHEAP else 0.0
            return self._account.totals

    async def statistics(self) -> Statistics | None:
        """The connection table as a whole; None if the kernel does not tell."""
        async with self._reading:
            if self._driver is None:
                return None
            with contextlib.suppress(OSError):
                return await asyncio.to_thread(self._driver.statistics)
            return None

    def close(self) -> None:
        """Stop counting."""
        if self._driver is not None:
            asyncio.get_running_loop().remove_reader(self._driver.fileno())
            self._driver.close()
            self._driver = None

    async def _try(self, published: Collection[Port]) -> None:
        before, self.problems = self.problems, await self._settings()
        try:
            if self._driver is None:
                await self._begin()
            else:
                await self._look(self._driver, published)
        except OSError as error:
            message = (
                f"connections cannot be counted: {error.strerror or error}: "
                "check for CAP_NET_ADMIN and the module nf_conntrack_netlink"
            )
            self.problems = (*self.problems, Problem(about="conntrack", message=message))
        if self.problems != before:
            for problem in self.problems:
                log.warning("%s: %s", problem.about, problem.message)
            self._told()

    async def _settings(self) -> tuple[Problem, ...]:
        """Have the kernel count bytes, and tell of ends; where it does, nothing is written."""
        held = await self._sysctl.read((_COUNTS, _EVENTS))
        wanted = {key: "1" for key in (_COUNTS, _EVENTS) if held.get(key) == "0"}
        return await self._sysctl.apply(Delta({}, wanted)) if wanted else ()

    async def _begin(self) -> None:
        driver = Driver(self._layout)
        try:
            self._account.begin(await asyncio.to_thread(driver.begun))
        except BaseException:
            driver.close()
            raise
        self._driver = driver
        self._wait(driver)

    async def _look(self, driver: Driver, published: Collection[Port]) -> None:
        self._stop(driver)
        try:
            while self._some_ended(driver):  # noqa: ASYNC110 - others have their turn
                await asyncio.sleep(0)
            lost = driver.lost() + self._untold
            there, self._took = await asyncio.to_thread(_timed, driver, self._account.elders)
            self._account.there(there, some_lost=lost > self._lost)
            self._account.forget(published, there)
            self.lost += lost - self._lost
            self._lost = lost
        finally:
            if self._driver is driver:
                self._wait(driver)

    def untold(self, count: int) -> None:
        """So many flows were given marks by which the kernel does not tell of their end."""
        self._untold += count

    # ---- flows that end

    def _wait(self, driver: Driver) -> None:
        self._paused = False
        asyncio.get_running_loop().add_reader(driver.fileno(), self._gather, driver)

    def _stop(self, driver: Driver) -> None:
        self._paused = True
        asyncio.get_running_loop().remove_reader(driver.fileno())

    def _gather(self, driver: Driver) -> None:
        """One has ended; more will have in a moment."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(driver.fileno())
        loop.call_later(_PAUSE, self._take, driver)

    def _take(self, driver: Driver) -> None:
        if self._paused or self._driver is not driver:
            return
        if self._some_ended(driver):
            asyncio.get_running_loop().call_soon(self._take, driver)
        else:
            self._wait(driver)

    def _some_ended(self, driver: Driver) -> bool:
        """Count some that ended; whether there may be more."""
        for _ in range(_SLICE):
            counted = driver.ended(self._account.elders)
            if counted is None:
                return False
            self._account.ended(counted)
        return True


def _timed(driver: Driver, elders: Collection[int]) -> tuple[Counted, float]:
    """All flows there are, and the processor time it took to read them."""
    began = time.thread_time()
    found = driver.there(elders)
    return found, time.thread_time() - began

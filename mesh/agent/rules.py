"""This node's rules as a whole: the backend, the reconciler, and what looks after them.

Owns the loops that heal, and that pass foreign firewalls and forget stale flows.  Decides nothing
about services.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.agent import ports
from mesh.agent.drain import Drain
from mesh.agent.neighbours import Neighbours
from mesh.agent.planner import Plans
from mesh.dataplane.conntrack import Conntrack
from mesh.dataplane.firewall import Firewall
from mesh.engine import backend, backoff
from mesh.engine.flows import Flows
from mesh.engine.healing import SOMEBODY, WINDOW, History
from mesh.engine.reconciler import Reconciler
from mesh.engine.traffic import Traffic
from mesh.errors import ApplyFailed, CommandFailed, HostNotReady, NotFound
from mesh.model.report import Healings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from mesh.agent.state import State
    from mesh.agent.tally import Tally
    from mesh.dataplane.firewall import Mode
    from mesh.dataplane.protocol import ElementDelta
    from mesh.engine.backend import Chosen
    from mesh.engine.desired import Touched
    from mesh.engine.healing import Repair
    from mesh.model.report import Problem
    from mesh.rules.elements import ElementKey
    from mesh.rules.program import Parameters

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 0.2

SETTLE_SECONDS: Final = 0.05
"""Notifications come in bursts; one pass answers a whole burst."""

_STRUGGLE_SECONDS: Final = 0.5
"""The same at most, when somebody keeps breaking what was just healed."""

_TELL_SECONDS: Final = 10.0
"""Between two reports of healings at least: each is a write to etcd."""


class Installed(NamedTuple):
    """What the kernel has: how many elements by which backend, which frontends, each with its
    service (read in another thread: there may be ten thousand), and what was healed.
    """

    backend: str
    elements: int
    frontends: Callable[[], Iterator[tuple[ElementKey, str]]]
    healings: Healings


class Rules:
    """What this node forwards.  `told` is called when `problems` may have changed."""

    def __init__(
        self,
        state: State,
        chosen: Chosen,
        parameters: Parameters,
        mode: Mode,
        told: Callable[[], None],
        tally: Tally,
    ) -> None:
        layout = parameters.layout
        self._driver = chosen.driver
        self.read_some = chosen.driver.read_some
        self._flows = Flows(Conntrack(layout), layout, tally.not_forgotten)
        self._tally = tally
        flavour = chosen.driver.name.removeprefix("iptables-")
        self._firewall = Firewall(chosen.driver.port, flavour, mode)
        self._neighbours = Neighbours(state, self._firewall, told, self._healed)
        self._reconciler = Reconciler(
            Plans(state), self._driver, self._written, layout, tally.not_written
        )
        vips = tuple(chain.from_iterable(parameters.vips))
        self.traffic = Traffic(layout, self._reconciler.pool, partial(ports.named, vips), told)
        self.drain = Drain(
            state, Conntrack(layout), layout, self.traffic, self._reconciler.pool, told
        )
        self._history = History()
        self._news = asyncio.Event()
        self._refused = asyncio.Event()
        self._struggle: tuple[Problem, ...] = ()
        self.healings = Healings()
        self._told = told

    async def start(self, parameters: Parameters) -> None:
        """Take over what the kernel holds, write the difference, retire other backends.

        A firewall that drops what only the other backend's chains accept hears of it before.
        """
        before = await backend.read_others(self._driver, parameters)
        await self._until_done(partial(self._reconciler.start, before))
        self._reconciler.repaired()  # nobody else's fault
        await self._neighbours.look(parameters)
        await backend.retire_others(self._driver, parameters)

    async def reconcile(self, touched: Touched) -> None:
        """Plan the touched services again and write what differs, whatever it takes."""
        began = time.monotonic()  # the loop's own clock has milliseconds, on uvloop
        await self._until_done(partial(self._reconciler.reconcile, touched))
        self._tally.reconciling.add(time.monotonic() - began)

    def look_after(self, parameters: Parameters, tasks: asyncio.TaskGroup) -> None:
        """Start everything that goes on besides."""
        tasks.create_task(self._keep_healed(), name="healer")
        tasks.create_task(self._keep_told(), name="healings")
        tasks.create_task(self._keep_retrying(), name="retries")
        tasks.create_task(self._neighbours.run(parameters), name="firewall")
        tasks.create_task(self.drain.run(), name="drain")
        tasks.create_task(
            self._flows.run(self._reconciler.held, self._reconciler.held_udp), name="flows"
        )

    def problems(self) -> Iterable[Problem]:
        """What could not be installed, is in the way, or could not be forgotten."""
        yield from self._struggle
        yield from self._neighbours.problems
        yield from self._driver.problems()
        yield from self._reconciler.problems()
        yield from self._flows.problems
        yield from self.drain.problems
        yield from self.traffic.problems

    def installed(self) -> Installed:
        """What there is now."""
        return Installed(
            backend=self._driver.name,
            elements=self._reconciler.installed(),
            frontends=self._reconciler.frontends(),
            healings=self._history.report(),
        )

    async def surplus(self) -> dict[str, int]:
        """How many connections limits refused, by service; nothing where it cannot be read."""
        found: Counter[str] = Counter()
        try:
            counted = await self._driver.surplus()
        except (CommandFailed, HostNotReady, NotFound) as error:
            log.warning("surplus connections cannot be read: %s", error)
            return {}
        for number, count in counted.items():
            if (pool := self._reconciler.pool(number)) is not None:
                found[pool.partition("/")[0]] += count
        return dict(found)

    def _written(self, delta: ElementDelta) -> None:
        self._flows.written(delta)
        self._tally.written(delta)

    async def _keep_healed(self) -> None:
        """Put back what somebody else removes from our tables, or adds to them."""
        clock, pause, last = asyncio.get_running_loop().time, SETTLE_SECONDS, 0.0
        while True:
            found = await self._driver.tampered(pause)
            pause = min(2 * pause, _STRUGGLE_SECONDS) if clock() < last + 1 else SETTLE_SECONDS
            mend = self._reconciler.heal
            if found.elements is not None:
                mend = partial(self._reconciler.repair, found.elements)
            await self._until_done(mend)
            repair = self._reconciler.repaired()
            if repair:
                last = clock()
                self._healed(repair, found.what, found.by)

    def _healed(self, repair: Repair, what: str, by: str) -> None:
        """Count a healing, and say so."""
        if self._history.add(time.time(), repair, what, by):
            log.warning(
                'healed elements=%d program=%s lines=%d by=%s what="%s" times=%d',
                repair.elements,
                "reloaded" if repair.program else "kept",
                repair.lines,
                by or SOMEBODY,
                what,
                self._history.report().total,
            )
        self._news.set()

    async def _keep_told(self) -> None:
        """Let others know of healings: of the first at once, of a struggle now and then."""
        while True:
            try:
                async with asyncio.timeout(WINDOW if self._struggle else None):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            problem = self._history.problem(time.time())
            self._struggle = (problem,) if problem is not None else ()
            self.healings = self._history.report()
            self._told()
            await asyncio.sleep(_TELL_SECONDS)

    async def _keep_retrying(self) -> None:
        """Try again whom the kernel refused, each by itself and later each time."""
        clock, due = asyncio.get_running_loop().time, dict[tuple[str, int], float]()
        while True:
            tried = self._reconciler.refused.items()
            due = {key: due.get(key, clock() + backoff.delay(key[1])) for key in tried}
            try:
                async with asyncio.timeout_at(min(due.values(), default=None)):
                    await self._refused.wait()
            except TimeoutError:
                pass
            self._refused.clear()
            for owner, _ in [key for key, at in due.items() if at <= clock()]:
                await self._until_done(partial(self._reconciler.retry, owner))
                self._told()

    async def _until_done(self, step: Callable[[], Awaitable[object]]) -> None:
        """Do a step; as long as the rules cannot be written, try to heal them instead.

        Somebody may delete the table in the middle of it.
        """
        while True:
            try:
                await step()
                if self._reconciler.refused:
                    self._refused.set()
                return
            except (ApplyFailed, CommandFailed, HostNotReady, NotFound) as error:
                log.error("rules not in line, trying again: %s", error)
            await asyncio.sleep(_RETRY_SECONDS)
            step = self._reconciler.heal

    def close(self) -> None:
        """Release sockets; the kernel keeps forwarding."""
        self.traffic.close()
        self._driver.close()
        self._flows.close()
        self.drain.close()
        self._firewall.close()

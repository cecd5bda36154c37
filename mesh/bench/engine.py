"""What the engine costs without etcd: from an event in the agent to the kernel's acknowledgement.

State, planner, ledger and the real driver; only the store is replaced by ready-made events.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import TYPE_CHECKING

from mesh.agent.reconciler import Reconciler
from mesh.agent.state import State
from mesh.bench import figures, records
from mesh.delta import Delta
from mesh.store.protocol import Changes

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.dataplane.protocol import Driver
    from mesh.store.protocol import Change

_BATCH = 1000


async def run(driver: Driver, services: int, rounds: int) -> dict[str, object]:
    """The figures of one size; `rounds` single changes are timed."""
    state = State(records.KEYS, "n1")
    reconciler = Reconciler(state, driver, lambda _delta: None)
    await driver.prepare()
    state.apply(records.everything(services))
    gc.collect()
    began = time.perf_counter()
    await reconciler.start({})
    install = time.perf_counter() - began
    gc.freeze()
    rss = figures.rss_mb("self")
    clock = _Clock(state, reconciler, services)
    swaps = await clock.each(rounds, clock.swap)
    counts = await clock.each(rounds // 2 * 2, clock.count)
    batches = await clock.each(5, clock.batch)
    return {
        "bench": "engine",
        "backend": driver.name,
        "services": services,
        "install_ms": figures.milliseconds(install),
        "change_us": figures.percentiles(swaps, 1e6),
        "count_change_us": figures.percentiles(counts, 1e6),
        "batch1000_ms": figures.milliseconds(figures.median(batches)),
        "drift_ms": figures.milliseconds(await _drift(driver)),
        "resync_ms": figures.milliseconds(await _resync(driver)),
        "rss_mb": rss,
    }


class _Clock:
    """Feeds events one after the other and times each."""

    def __init__(self, state: State, reconciler: Reconciler, services: int) -> None:
        self._state = state
        self._reconciler = reconciler
        self._services = services
        self._revision = 1

    async def each(self, rounds: int, make: Callable[[int], list[Change]]) -> list[float]:
        taken = []
        for index in range(rounds):
            event = Changes(tuple(make(index)), self._revision)
            began = time.perf_counter()
            await self._reconciler.reconcile(self._state.apply(event))
            taken.append(time.perf_counter() - began)
            await asyncio.sleep(0)
        return taken

    def _next(self) -> int:
        self._revision += 1
        return self._revision

    def swap(self, index: int) -> list[Change]:
        """One replica replaced by another, of a service somewhere."""
        service = index * 7919 % self._services
        return [records.replaced(service, index % records.REPLICAS, index + 1, self._next())]

    def count(self, index: int) -> list[Change]:
        """Three replicas become two, and in the next round three again."""
        service = index // 2 * 7919 % self._services
        if index % 2 == 0:
            return [records.removed(service, 0, self._next())]
        return [records.replaced(service, 0, 0, self._next())]

    def batch(self, index: int) -> list[Change]:
        """One replica replaced in each of a thousand services (or all, if there are fewer)."""
        return [
            records.replaced(service, 1, 1000 + index, self._next())
            for service in range(min(_BATCH, self._services))
        ]


async def _drift(driver: Driver) -> float:
    """Reading everything back and finding that nothing differs."""
    desired = await driver.read()
    began = time.perf_counter()
    delta = Delta.between(await driver.read(), desired)
    assert not delta, "the kernel changed by itself"
    return time.perf_counter() - began


async def _resync(driver: Driver) -> float:
    """Every element removed and added again, in one batch."""
    desired = await driver.read()
    began = time.perf_counter()
    await driver.apply(Delta(desired, desired))
    return time.perf_counter() - began

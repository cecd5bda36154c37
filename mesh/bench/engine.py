"""What the engine costs without etcd: from an event in the agent to the kernel's acknowledgement,
and from the ready change.

State, planner, ledger and the real driver; only the store is replaced by ready-made events.
`python -m mesh.bench.engine` measures one backend at one size (mesh.bench.isolated).
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import TYPE_CHECKING, Any, Final

from mesh.agent.planner import Plans
from mesh.agent.state import State
from mesh.bench import backends, drift, figures, isolated, names, records
from mesh.bench.progress import tell
from mesh.delta import Delta
from mesh.engine.reconciler import Reconciler
from mesh.model import address
from mesh.rules import marks
from mesh.store.protocol import Changes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from mesh.dataplane.protocol import Driver, ElementDelta
    from mesh.store.protocol import Change

_BATCH: Final = 1000
_BATCHES: Final = 5

_SERIES_SECONDS: Final = 20.0
"""A series of changes ends after so long, for backends that take seconds for one."""

_RANGES: Final = 1000
_HOLDERS: Final = 100
"""While one service's source ranges change, so many others hold that many, of each family."""

_FEW: Final = 10

_SAMPLES: Final = 10
_SAMPLE_SECONDS: Final = 0.1


async def run(backend: str, services: int, rounds: int) -> dict[str, object]:
    """The figures of one backend at one size; `rounds` single changes are timed, at most."""

    def say(what: str) -> None:
        tell(f"{names.case(backend, services)}: {what}")

    say("installing")
    driver = backends.driver(backend)
    state = State(records.KEYS, "n1")
    clock = _Clock(state, driver, services)
    await driver.prepare()
    state.apply(records.everything(services))
    gc.collect()
    install = await _seconds(clock.reconciler.start({}))
    gc.freeze()
    found: dict[str, object] = {"bench": "engine", "backend": backend, "services": services}
    found["install_ms"] = figures.milliseconds(install)
    rss = figures.rss_mb("self")
    say("one replica changes")
    changes, applied = await clock.each(rounds, clock.swap), await clock.again()
    found["change_us"] = figures.percentiles(changes, 1e6)
    found["apply_us"] = figures.percentiles(applied, 1e6)
    say("a replica comes and goes")
    found["count_change_us"] = figures.percentiles(await clock.each(rounds, clock.count), 1e6)
    say(f"{_BATCH} changes at once")
    changes, applied = await clock.each(_BATCHES, clock.batch), await clock.again()
    found["batch1000_ms"] = figures.milliseconds(figures.median(changes))
    found["apply_batch1000_ms"] = figures.milliseconds(figures.median(applied))
    say("source ranges change")
    found |= await clock.ranges(rounds)
    say("reading everything back")
    found["drift_ms"] = figures.milliseconds(await _drift(driver))
    say("somebody changes elements")
    heals = 5 if backend == "nftables" else 1
    found["repair_ms"] = await drift.repairs(backend, driver, clock.reconciler, heals)
    say("writing everything again")
    found["resync_ms"] = figures.milliseconds(
        await drift.rewrite(backend, driver, clock.reconciler)
    )
    say("etcd lists everything again")
    found["relist_ms"] = figures.milliseconds(await clock.relist())
    say("taking everything away")
    return found | {"rss_mb": rss, "kernel_mb": await _freed(driver)}


class _Clock:
    """Feeds events one after the other and times each."""

    def __init__(self, state: State, driver: Driver, services: int) -> None:
        self.reconciler = Reconciler(Plans(state), driver, self._note, marks.DEFAULT)
        self._state = state
        self._driver = driver
        self._services = services
        self._revision = 1
        self._written: list[ElementDelta] | None = None

    def _note(self, delta: ElementDelta) -> None:
        if self._written is not None:
            self._written.append(delta)

    async def each(self, rounds: int, make: Callable[[int], list[Change]]) -> list[float]:
        """Seconds of each change; an even number of them, so that what came has gone again."""
        taken: list[float] = []
        self._written = []
        ends = time.perf_counter() + _SERIES_SECONDS
        while len(taken) < rounds and (time.perf_counter() < ends or len(taken) < 2):
            taken += [await self._timed(make(len(taken) + part)) for part in range(2)]
        return taken

    async def again(self) -> list[float]:
        """Seconds of the last series' changes without planning: undone, and done again."""
        written, undone = self._written or [], 0
        taken: list[float] = []
        ends = time.perf_counter() + _SERIES_SECONDS / 2
        while undone < len(written) and time.perf_counter() < ends:
            undone += 1
            delta = written[-undone]
            taken.append(await self._applied(Delta(delta.add, delta.remove)))
        return taken + [await self._applied(delta) for delta in written[len(written) - undone :]]

    async def _timed(self, changes: list[Change]) -> float:
        event = Changes(tuple(changes), self._revision)
        began = time.perf_counter()
        await self.reconciler.reconcile(self._state.apply(event))
        taken = time.perf_counter() - began
        await asyncio.sleep(0)
        return taken

    async def _applied(self, delta: ElementDelta) -> float:
        taken = await _seconds(self._driver.apply(delta))
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
            records.replaced(service, 1, 1001 + index, self._next())
            for service in range(min(_BATCH, self._services))
        ]

    async def ranges(self, rounds: int) -> dict[str, object]:
        """One service's source ranges change, while others hold many."""
        holders = min(_HOLDERS, self._services - 1)
        share = _RANGES // holders if holders else 0

        def everyone(*, hold: bool) -> list[Change]:
            return [
                records.allowing(n, _ranges(n * share, share) if hold else (), self._next())
                for n in range(holders)
            ]

        def change(index: int) -> list[Change]:
            first = _RANGES + index % 2
            return [records.allowing(self._services - 1, _ranges(first, _FEW), self._next())]

        await self._timed(everyone(hold=True))
        await self._timed(change(0))
        taken = await self.each(rounds, lambda index: change(index + 1))
        last = records.allowing(self._services - 1, (), self._next())
        await self._timed([*everyone(hold=False), last])
        figure = figures.percentiles(taken, 1e6)
        return {"allow_change_us": figure, "allow_ranges": holders * share}

    async def relist(self) -> float:
        """Seconds to take in a whole snapshot in which nothing differs."""
        snapshot = records.everything(self._services)
        await self.reconciler.reconcile(self._state.apply(snapshot))
        began = time.perf_counter()
        await self.reconciler.reconcile(self._state.apply(snapshot))
        return time.perf_counter() - began


async def _seconds(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def _ranges(first: int, count: int) -> tuple[str, ...]:
    """Prefixes of both families that neither touch nor repeat."""
    numbers = range(first, first + count)
    four = (f"{address.nth('100.64.0.0/10', 32 * n)}/28" for n in numbers)
    return (*four, *(f"{address.nth('fd99::/64', n << 17)}/112" for n in numbers))


async def _drift(driver: Driver) -> float:
    """Seconds to read everything back and find that nothing differs."""
    desired = await driver.read()
    began = time.perf_counter()
    delta = Delta.between(await driver.read(), desired)
    assert not delta, "the kernel changed by itself"
    return time.perf_counter() - began


async def _freed(driver: Driver) -> float | None:
    """By how many MiB the kernel's memory shrinks when the rules go.

    Not by how many it grew: installing takes long, and others use memory as well meanwhile.
    """
    samples = [figures.kernel_mb()]
    await driver.remove()
    driver.close()
    for _ in range(_SAMPLES):  # the kernel frees after a while
        await asyncio.sleep(_SAMPLE_SECONDS)
        samples.append(figures.kernel_mb())
    told = [sample for sample in samples if sample is not None]
    return round(told[0] - min(told), 1) if told else None


def _measure(wanted: Mapping[str, Any]) -> dict[str, object]:
    return asyncio.run(run(wanted["backend"], wanted["services"], wanted["rounds"]))


if __name__ == "__main__":
    isolated.answer(_measure)

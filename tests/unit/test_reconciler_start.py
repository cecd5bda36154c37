"""How an agent takes over a kernel: whole before packets meet it, nothing lost if it fails."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mesh.agent.planner import Plans
from mesh.agent.state import State
from mesh.dataplane.memory import MemoryDriver
from mesh.engine.reconciler import Reconciler
from mesh.errors import ApplyFailed, NotFound
from mesh.rules import marks
from tests.support import records
from tests.support.records import KEYS

if TYPE_CHECKING:
    from mesh.dataplane.protocol import ElementDelta
    from mesh.engine.desired import Lowered
    from mesh.rules.elements import ElementKey, Elements
    from mesh.rules.ids import Ids

SERVICES = range(1, 8)


class Kernel(MemoryDriver):
    """Remembers what it held when packets first met it, and what was ever taken out."""

    chunk = 2

    def __init__(self) -> None:
        super().__init__()
        self.attached: Elements | None = None
        self.removed: set[ElementKey] = set()
        self.failing: list[Exception] = []
        self.applied = 0

    async def attach(self) -> None:
        if self.attached is None:
            self.attached = await self.read()

    async def apply(self, delta: ElementDelta) -> None:
        if self.failing:
            raise self.failing.pop()
        self.applied += 1
        self.removed |= delta.remove.keys() - delta.add.keys()
        await super().apply(delta)


def a_state(services: range = SERVICES) -> State:
    found = records.cluster()
    for number in services:
        name, port = f"web{number}", 8000 + number
        found |= records.service(name, {"target": 80, "published": port, "mode": "ingress"})
        found |= records.task(name, f"{name}-1", 1, number + 1)
        found |= records.vip(name, number) | records.ingress(name, port, 80)
    state = State(KEYS, "n1")
    state.apply(records.snapshot(found))
    return state


async def started(kernel: Kernel, state: State, before: Elements | None = None) -> Reconciler:
    await kernel.prepare()
    made = Reconciler(Plans(state), kernel, lambda _delta: None, marks.DEFAULT)
    await made.start(before or {})
    return made


class Slow(Kernel):
    """Takes its time, and writes down when."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    async def apply(self, delta: ElementDelta) -> None:
        self._log.append("begin")
        for _ in range(3):
            await asyncio.sleep(0)
        await super().apply(delta)
        self._log.append("end")


class Noting(Plans):
    """Writes down when a service is planned."""

    def __init__(self, state: State, log: list[str]) -> None:
        super().__init__(state)
        self._log = log

    def lower(self, service: str, ids: Ids) -> Lowered:
        self._log.append("plan")
        return super().lower(service, ids)


async def test_packets_meet_the_rules_once_all_services_are_in() -> None:
    kernel = Kernel()

    await started(kernel, a_state())

    assert kernel.applied > len(SERVICES) // kernel.chunk
    assert kernel.attached == await kernel.read()


async def test_what_nobody_wants_is_gone_before_packets_meet_it() -> None:
    kernel = Kernel()
    await started(kernel, a_state())
    kernel.attached = None

    await started(kernel, a_state(SERVICES[:2]))

    assert kernel.removed
    assert kernel.attached == await kernel.read()


@pytest.mark.parametrize("failures", [1, 2])
async def test_a_start_that_fails_half_way_takes_nothing_from_a_service(failures: int) -> None:
    kernel = Kernel()
    await started(kernel, a_state(SERVICES[1:]))
    held = await kernel.read()
    kernel.failing = [ApplyFailed("refused") for _ in range(failures)]

    await started(kernel, a_state())

    assert not kernel.removed & held.keys()
    assert (await kernel.read()).keys() > held.keys()


async def test_a_start_whose_kernel_was_emptied_is_healed_whole() -> None:
    kernel, whole = Kernel(), Kernel()
    await started(whole, a_state())
    await kernel.prepare()
    reconciler = Reconciler(Plans(a_state()), kernel, lambda _delta: None, marks.DEFAULT)
    kernel.failing = [NotFound("the table is gone")]
    with pytest.raises(NotFound):
        await reconciler.start({})

    await reconciler.heal()

    assert await kernel.read() == await whole.read()
    assert kernel.attached == await kernel.read()


async def test_a_chunk_is_planned_while_the_kernel_takes_in_the_one_before() -> None:
    log: list[str] = []
    kernel = Slow(log)
    await kernel.prepare()

    await Reconciler(Noting(a_state(), log), kernel, lambda _delta: None, marks.DEFAULT).start({})

    chunk = ["begin", "plan", "plan", "end"]
    assert log == chunk * (len(SERVICES) // 2) + ["begin", "plan", "end", "begin", "end"]
    assert kernel.attached == await kernel.read()

"""What the kernel refuses: told for as long as it lasts, and nobody else's trouble."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.agent.planner import Plans
from mesh.agent.state import State
from mesh.dataplane.memory import MemoryDriver
from mesh.engine import backoff
from mesh.engine.desired import Touched
from mesh.engine.reconciler import Reconciler
from mesh.errors import ApplyFailed
from mesh.rules import marks
from tests.support import records
from tests.support.records import KEYS

if TYPE_CHECKING:
    from mesh.dataplane.protocol import ElementDelta

_BAD = bytes((10, 0, 1, 66))


class Kernel(MemoryDriver):
    """Refuses every element that leads to one replica."""

    refusing = True

    async def apply(self, delta: ElementDelta) -> None:
        if self.refusing and any(data.startswith(_BAD) for data in delta.add.values()):
            raise ApplyFailed("targets4: refused")
        await super().apply(delta)


class Node:
    """A reconciler with two services, of which one is refused."""

    def __init__(self) -> None:
        found = records.cluster()
        for number, name in enumerate(("bad", "good"), 1):
            port = 8000 + number
            found |= records.service(name, {"target": 80, "published": port, "mode": "ingress"})
            found |= records.vip(name, number) | records.ingress(name, port, 80)
        found |= records.task("bad", "bad-1", 1, 66) | records.task("good", "good-1", 1, 2)
        self.state = State(KEYS, "n1")
        self.state.apply(records.snapshot(found))
        self.kernel = Kernel()
        plans = Plans(self.state)
        self.reconciler = Reconciler(plans, self.kernel, lambda _delta: None, marks.DEFAULT)
        self._revision = 1

    async def start(self) -> Node:
        await self.kernel.prepare()
        await self.reconciler.start({})
        return self

    async def move(self, service: str, host: int) -> None:
        """The replica of a service gets another address."""
        self._revision += 1
        ((key, record),) = records.task(service, f"{service}-1", 1, host).items()
        touched = self.state.apply(records.put(key, record, self._revision))
        assert touched == Touched(frozenset({service}), nodes=False)
        await self.reconciler.reconcile(touched)

    def told(self) -> list[str]:
        return [problem.about for problem in self.reconciler.problems()]


async def test_a_refused_service_is_told_until_it_is_let_in() -> None:
    node = await Node().start()
    assert node.told() == ["service bad"]

    await node.move("good", 3)
    assert node.told() == ["service bad"]

    await node.move("bad", 4)
    assert node.told() == []
    assert any(
        data.startswith(bytes((10, 0, 1, 4))) for data in (await node.kernel.read()).values()
    )


async def test_a_service_that_stays_refused_keeps_nobody_from_changing() -> None:
    node = await Node().start()

    await node.move("good", 3)
    await node.move("good", 5)

    held = (await node.kernel.read()).values()
    assert any(data.startswith(bytes((10, 0, 1, 5))) for data in held)
    assert not any(data.startswith(bytes((10, 0, 1, 3))) for data in held)


async def test_who_is_refused_is_tried_again_by_itself() -> None:
    node = await Node().start()
    whole = await node.kernel.read()

    await node.reconciler.retry("bad")
    await node.reconciler.retry("bad")
    refused = dict(node.reconciler.refused)
    (problem,) = node.reconciler.problems()
    kept = await node.kernel.read()
    node.kernel.refusing = False
    await node.reconciler.retry("bad")

    assert refused == {"bad": 3}
    assert problem.message == "targets4: refused; tried 3 times, and again after 4 s"
    assert kept == whole
    assert (node.told(), node.reconciler.refused) == ([], {})
    assert any(data.startswith(_BAD) for data in (await node.kernel.read()).values())


async def test_who_was_let_in_begins_anew() -> None:
    node = await Node().start()
    await node.reconciler.retry("bad")
    await node.move("bad", 4)
    await node.move("bad", 66)

    assert node.reconciler.refused == {"bad": 1}


async def test_nobody_is_tried_who_went_meanwhile() -> None:
    node = await Node().start()
    touched = node.state.apply(records.delete("/mesh/services/bad", 7))
    await node.reconciler.reconcile(touched)
    before = await node.kernel.read()
    node.kernel.refusing = False

    await node.reconciler.retry("bad")

    assert (node.told(), node.reconciler.refused) == ([], {})
    assert await node.kernel.read() == before


def test_tries_come_later_each_time_but_not_for_ever() -> None:
    delays = [backoff.delay(tries) for tries in range(1, 9)]

    assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff.delay(10**9) == 60


async def test_a_healing_lets_in_what_is_refused_no_longer() -> None:
    node = await Node().start()
    node.kernel.refusing = False

    await node.reconciler.heal()

    assert node.told() == []
    assert any(data.startswith(_BAD) for data in (await node.kernel.read()).values())

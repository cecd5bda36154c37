"""What the kernel refuses: told for as long as it lasts, and nobody else's trouble."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.agent.planner import Plans
from mesh.agent.state import State
from mesh.dataplane.memory import MemoryDriver
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


async def test_a_healing_lets_in_what_is_refused_no_longer() -> None:
    node = await Node().start()
    node.kernel.refusing = False

    await node.reconciler.heal()

    assert node.told() == []
    assert any(data.startswith(_BAD) for data in (await node.kernel.read()).values())

"""An agent's rules while the kernel refuses a service: it is tried again until it is let in."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import pytest

from mesh.agent.rules import Rules
from mesh.agent.state import State
from mesh.agent.tally import Tally
from mesh.dataplane.firewall import Mode
from mesh.engine import backoff
from mesh.engine.backend import Chosen
from mesh.errors import ApplyFailed
from mesh.rules.program import Devices, Parameters
from tests.support import drivers, records
from tests.support.cluster import until
from tests.support.namespaces import Namespace
from tests.support.records import KEYS
from tests.support.rules import DEVICES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.dataplane.protocol import Driver, ElementDelta

pytestmark = pytest.mark.netns

BAD: Final = bytes((10, 0, 1, 66))
"""The replica that the kernel does not want to hear of."""


class Refusing:
    """A driver's `apply` that refuses what leads to one replica, for as long as it is told to."""

    def __init__(self, driver: Driver) -> None:
        self.going = True
        self.tries = 0
        self._apply = driver.apply
        driver.apply = self.apply  # type: ignore[method-assign]

    async def apply(self, delta: ElementDelta) -> None:
        if self.going and any(data.startswith(BAD) for data in delta.add.values()):
            self.tries += 1
            raise ApplyFailed("targets4: Cannot allocate memory")
        await self._apply(delta)


@pytest.fixture
def node() -> Iterator[Namespace]:
    node = Namespace("refusing")
    yield node
    node.close()


@pytest.mark.parametrize("backend", drivers.KERNEL)
def test_it_is_let_in_by_itself_once_the_kernel_can(
    node: Namespace, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(backoff, "_FIRST", 0.01)
    state = State(KEYS, "n1")
    found = records.cluster()
    for name, host in (("bad", 66), ("good", 2)):
        found |= records.service(name, {"target": 80, "published": 8000 + host, "mode": "host"})
        found |= records.task(name, f"{name}-1", 1, host)
    state.apply(records.snapshot(found))
    assert state.cluster is not None
    network = state.cluster.network(1)
    parameters = Parameters.of(state.cluster, 1, Devices(*DEVICES[:3], network.bridge_mac))

    async def live() -> None:
        driver = drivers.make(backend, parameters)
        kernel, told = Refusing(driver), asyncio.Event()
        rules = Rules(state, Chosen(driver, ""), parameters, Mode.REPORT, told.set, Tally())
        try:
            await rules.start(parameters)
            async with asyncio.TaskGroup() as tasks:
                rules.look_after(parameters, tasks)
                await until(lambda: kernel.tries > 4)
                messages = [problem.message for problem in rules.problems()]
                assert any("Cannot allocate memory; tried " in each for each in messages)
                assert any(data.startswith(bytes((10, 0, 1, 2))) for data in await targets(driver))
                kernel.going = False
                told.clear()
                await until(lambda: not list(rules.problems()))
                await told.wait()
                assert any(data.startswith(BAD) for data in await targets(driver))
                tasks.create_task(_stop())
        except* _Stopped:
            pass
        finally:
            rules.close()

    node.run(live())


class _Stopped(Exception):
    pass


async def _stop() -> None:
    raise _Stopped


async def targets(driver: Driver) -> list[bytes]:
    return [data for (name, _), data in (await driver.read()).items() if name == "targets4"]

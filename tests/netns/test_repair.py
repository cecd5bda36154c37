"""What somebody does to single elements is known exactly, and put right without reading others."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from mesh.agent.planner import Plans
from mesh.agent.state import State
from mesh.dataplane.nftables import NftablesDriver
from mesh.engine.healing import Repair
from mesh.engine.reconciler import Reconciler
from mesh.rules import marks
from tests.support import records, rules
from tests.support.records import KEYS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.netns

_LONG = 30.0


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with rules.namespace():
        yield


@pytest.fixture
async def driver() -> AsyncIterator[NftablesDriver]:
    with closing(NftablesDriver(rules.PARAMETERS)) as made:
        await made.prepare()
        yield made


@pytest.fixture
async def reconciler(driver: NftablesDriver) -> Reconciler:
    found = records.cluster()
    allow = ["198.51.100.0/24"]
    found |= records.service(
        "web", {"target": 80, "published": 8080, "mode": "ingress"}, allow=allow
    )
    found |= records.task("web", "web-1", 1, 2) | records.task("web", "web-2", 2, 2)
    found |= records.vip("web", 1) | records.ingress("web", 8080, 80)
    state = State(KEYS, "n1")
    state.apply(records.snapshot(found))
    made = Reconciler(Plans(state), driver, lambda _delta: None, marks.DEFAULT)
    await made.start({})
    made.repaired()
    return made


@pytest.mark.parametrize(
    ("tampering", "count"),
    [
        ("delete element inet mesh meshports4 { tcp . 8080 }", 1),
        ("add element inet mesh known4 { 10.1.0.77 }", 1),
        ("add element inet mesh targets4 { 0x00033303 . 1 : 10.0.3.3 . 33 }", 1),
        ("delete element inet mesh vips4 { 10.1.0.1 . tcp . 80 }; "
         "add element inet mesh vips4 { 10.1.0.1 . tcp . 80 : 0x00099901 }", 1),
        ("flush map inet mesh targets4", 2),
        ("flush set inet mesh allow4", 1),
        ("flush set inet mesh limited", 1),
        ("flush map inet mesh via", 2),
    ],
)  # fmt: skip
async def test_touched_elements_are_put_right(
    driver: NftablesDriver, reconciler: Reconciler, tampering: str, count: int
) -> None:
    before = await driver.read()
    rules.nft(tampering)

    async with asyncio.timeout(_LONG):
        found = await driver.tampered(0.01)
    assert found.elements is not None
    await reconciler.repair(found.elements)

    assert await driver.read() == before
    assert len(found.elements) == count
    assert reconciler.repaired().elements >= count


async def test_what_was_put_back_meanwhile_is_left_alone(
    driver: NftablesDriver, reconciler: Reconciler
) -> None:
    before = await driver.read()

    await reconciler.repair(before.keys())

    assert await driver.read() == before
    assert reconciler.repaired() == Repair()


@pytest.mark.parametrize(
    "tampering",
    [
        "flush chain inet mesh dispatch",
        "flush set inet mesh own4",
        "flush map inet mesh via; add chain inet mesh foreign",
        "flush ruleset",
    ],
)
async def test_where_more_was_touched_everything_is_looked_at(
    driver: NftablesDriver, reconciler: Reconciler, tampering: str
) -> None:
    before = await driver.read()
    rules.nft(tampering)

    async with asyncio.timeout(_LONG):
        found = await driver.tampered(0.01)
    await reconciler.heal()

    assert found.elements is None
    assert await driver.read() == before

"""What every rule driver does alike: changes are whole, reads are true, damage is mended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.dataplane.memory import MemoryDriver
from mesh.delta import Delta
from mesh.errors import ApplyFailed, NotFound
from mesh.model.publish import Protocol
from mesh.rules import elements, nft
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from tests.support import drivers, rules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from mesh.dataplane.protocol import Driver
    from mesh.rules.elements import ElementKey, Elements

pytestmark = pytest.mark.netns


@pytest.fixture
def namespace() -> Iterator[None]:
    with rules.namespace():
        yield


@pytest.fixture(params=["memory", *drivers.KERNEL])
async def driver(request: pytest.FixtureRequest, namespace: None) -> AsyncIterator[Driver]:
    memory = request.param == "memory"
    found = MemoryDriver() if memory else drivers.make(request.param, rules.PARAMETERS)
    await found.prepare()
    yield found
    found.close()


def adding(found: Elements) -> Delta[ElementKey, bytes]:
    return Delta(add=found)


def service(replicas: int, *, number: int = 1) -> Forwarding:
    port = Frontend(Scope.INGRESS, None, Protocol.TCP, 30000 + number)
    pool = tuple(Backend(f"10.0.{i >> 8}.{i & 255}", 80) for i in range(replicas))
    return Forwarding(f"service{number}", (port,), pool)


@pytest.mark.parametrize("name", elements.SETS)
async def test_elements_of_every_set_read_back_as_written(driver: Driver, name: str) -> None:
    wanted = rules.samples(elements.SETS[name], 5)

    await driver.apply(adding(wanted))

    assert await driver.read() == wanted


async def test_applying_what_is_there_changes_nothing(driver: Driver) -> None:
    wanted = {
        key: data for spec in elements.SETS.values() for key, data in rules.samples(spec, 3).items()
    }
    await driver.apply(adding(wanted))

    await driver.apply(adding(wanted))
    found = await driver.read()

    assert not Delta.between(found, wanted)


async def test_a_change_removes_adds_and_replaces_at_once(driver: Driver) -> None:
    before, after = (rules.samples(elements.SETS["vips4"], count) for count in (4, 6))
    changed = next(iter(before))
    after[changed] = elements.mark_bytes(0x77)
    gone = list(before)[2]
    del after[gone]
    await driver.apply(adding(before))

    await driver.apply(Delta.between(before, after))

    assert await driver.read() == after


async def test_an_empty_change_is_no_change(driver: Driver) -> None:
    await driver.apply(Delta())

    assert await driver.read() == {}


async def test_a_large_change_is_one_change(driver: Driver) -> None:
    wanted = rules.samples(elements.SETS["targets6"], 2000)

    await driver.apply(adding(wanted))
    found = await driver.read()
    await driver.apply(Delta(remove=wanted))

    assert found == wanted
    assert await driver.read() == {}


@pytest.mark.parametrize("name", ["vips6", "ports4", "zones"])
async def test_new_data_for_an_existing_key_is_refused_whole(driver: Driver, name: str) -> None:
    wanted = rules.samples(elements.SETS[name], 9)
    culprit = list(wanted)[6]
    existing = {culprit: rules.samples(elements.SETS[name], 1).popitem()[1]}
    await driver.apply(adding(existing))

    with pytest.raises(ApplyFailed) as failure:
        await driver.apply(adding(rules.samples(elements.SETS["nodes4"], 3) | wanted))

    assert elements.describe(culprit) in str(failure.value)
    assert await driver.read() == existing


async def test_removing_what_is_not_there_is_refused_whole(driver: Driver) -> None:
    there = rules.samples(elements.SETS["hairpin4"], 3)
    missing = list(rules.samples(elements.SETS["hairpin4"], 4).items())[3]
    await driver.apply(adding(there))

    with pytest.raises(ApplyFailed) as failure:
        await driver.apply(
            Delta({**there, missing[0]: b""}, rules.samples(elements.SETS["via"], 1))
        )

    assert elements.describe(missing[0]) in str(failure.value)
    assert await driver.read() == there


async def test_some_elements_are_read_for_themselves(driver: Driver) -> None:
    wanted = nft.lower(service(3), Ids())
    others = {("known4", bytes((10, 1, 0, 9))): b"", ("known6", bytes(16)): b""}
    await driver.apply(adding(wanted))

    assert await driver.read_some({**wanted, **others}) == wanted
    assert await driver.read_some(others) == {}


async def test_nested_ranges_are_fine(driver: Driver) -> None:
    ranges = ("10.0.0.0/8", "10.0.0.0/24", "0.0.0.0/0", "2001:db8::/32", "2001:db8::1/128")
    wanted = {elements.allow_key(0x400, prefix): b"" for prefix in ranges}
    wanted["limited", elements.mark_bytes(0x400)] = b""

    await driver.apply(adding(wanted))

    assert await driver.read() == wanted


@pytest.mark.parametrize("replicas", [0, 1, 32, 33, 300, 1023])
async def test_pools_of_every_size_are_accepted(driver: Driver, replicas: int) -> None:
    wanted = nft.lower(service(replicas), Ids())

    await driver.apply(adding(wanted))

    assert await driver.read() == wanted


async def test_preparing_again_keeps_all_elements(driver: Driver) -> None:
    wanted = nft.lower(service(300), Ids())
    await driver.apply(adding(wanted))

    await driver.prepare()

    assert await driver.read() == wanted


async def test_after_removal_there_is_nothing_to_read(driver: Driver) -> None:
    await driver.apply(adding(rules.samples(elements.SETS["via"], 3)))

    await driver.remove()

    with pytest.raises(NotFound):
        await driver.read()
    await driver.remove()
    await driver.prepare()
    assert await driver.read() == {}

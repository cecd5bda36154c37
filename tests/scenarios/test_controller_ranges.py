"""Ranges of ports: given, changed and freed at once, whoever is elected meanwhile."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec
import pytest

from mesh.model.allocation import PortAllocation
from mesh.model.publish import Protocol
from mesh.store.memory import MemoryStore
from mesh.store.schema import encode
from tests.support.allocations import CLUSTER, KEYS, Allocations, ingress

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.model.publish import PublishedPort

RANGE = range(8000, 9000)


@pytest.fixture
async def world() -> Allocations:
    world = Allocations(MemoryStore())
    await world.store.put(KEYS.cluster, encode(CLUSTER))
    return world


def ranged(*spans: Iterable[int]) -> tuple[PublishedPort, ...]:
    return tuple(ingress(number, number) for span in spans for number in span)


async def held(world: Allocations, service: str) -> list[int]:
    """The numbers that a service has."""
    found = (await world.ports()).items()
    return sorted(int(key.partition("/")[2]) for key, (owner, _) in found if owner == service)


async def steps(world: Allocations, since: int) -> list[tuple[int, int]]:
    """How many ports were given, and how many freed, at each revision after one."""
    changed: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
    stream = world.store.watch({KEYS.ports: since})
    await anext(stream)
    await world.store.put(f"{KEYS.ports}end", b"")
    while True:
        for change in (await anext(stream)).changes:
            if change.key.endswith("/end"):
                await stream.aclose()
                await world.store.delete(change.key)
                return [(given, freed) for given, freed in changed.values()]
            changed[change.revision][change.value is None] += 1


async def now(world: Allocations) -> int:
    return (await world.store.list(KEYS.cluster)).revision


async def test_a_range_is_given_and_freed_in_one_step_each(world: Allocations) -> None:
    async with world.controller():
        await world.settled()
        before = await now(world)
        await world.service("a", *ranged(RANGE), ingress(None))
        await world.settled()
        given = await held(world, "a")
        items = (await world.store.list(KEYS.under("allocations/vips"), KEYS.ports)).items
        await world.store.delete(KEYS.service("a"))
        await world.settled()

    assert given == [*RANGE, 30000]
    assert len({item.mod_revision for item in items}) == 1, "the VIP comes with them"
    assert await steps(world, before) == [(1001, 0), (0, 1001)]


async def test_a_range_is_extended_moved_and_cut_in_one_step_each(world: Allocations) -> None:
    spans = (RANGE, range(8000, 9500), range(9000, 10000), range(9400, 9500))
    taken = []
    async with world.controller():
        await world.settled()
        before = await now(world)
        for span in spans:
            await world.service("a", *ranged(span))
            await world.settled()
            taken.append(await held(world, "a"))

    assert taken == [list(span) for span in spans]
    assert await steps(world, before) == [(1000, 0), (500, 0), (500, 1000), (0, 900)]


async def test_of_a_range_the_ports_of_others_are_left_out_and_come_when_they_are_free(
    world: Allocations,
) -> None:
    await world.service("b", ingress(8500))
    async with world.controller():
        await world.settled()
        before = await now(world)
        await world.service("a", *ranged(RANGE))
        await world.settled()
        meanwhile, problems = await held(world, "a"), await world.problems()
        await world.store.delete(KEYS.service("b"))
        await world.settled()

    assert meanwhile == [number for number in RANGE if number != 8500]
    assert problems == {"services/a": ("8500/tcp",)}
    assert await held(world, "a") == [*RANGE]
    assert await world.problems() == {}
    assert await steps(world, before) == [(999, 0), (0, 1), (1, 0)]


async def test_protected_ports_of_a_range_are_left_out_unless_forced(world: Allocations) -> None:
    plain = ranged(range(2300, 2500))
    forced = tuple(msgspec.structs.replace(port, force=True) for port in plain)
    async with world.controller():
        await world.service("a", *plain)
        await world.settled()
        meanwhile, problems = await held(world, "a"), await world.problems()
        await world.service("a", *forced)
        await world.settled()

    assert {*range(2300, 2500)}.difference(meanwhile) == {2379, 2380}
    assert problems == {"services/a": ("2379/tcp", "2380/tcp")}
    assert await held(world, "a") == [*range(2300, 2500)]


async def test_who_waits_for_a_whole_range_gets_it_at_once(world: Allocations) -> None:
    await world.service("a", *ranged(RANGE))
    async with world.controller():
        await world.settled()
        await world.service("b", *ranged(RANGE))
        await world.settled()
        before, none = await now(world), await held(world, "b")
        await world.store.delete(KEYS.service("a"))
        await world.settled()

    assert none == []
    assert await held(world, "b") == [*RANGE]
    assert await steps(world, before) == [(0, 1000), (1000, 0)]
    assert await world.problems() == {}


async def test_what_an_earlier_version_left_half_given_is_completed_in_one_step(
    world: Allocations,
) -> None:
    await world.service("a", *ranged(RANGE))
    for number in RANGE[:124]:
        record = PortAllocation(service="a", target=number)
        await world.store.put(KEYS.port_allocation("tcp", number), encode(record))
    before = await now(world)

    async with world.controller():
        await world.settled()

    assert await held(world, "a") == [*RANGE]
    assert await steps(world, before) == [(876, 0)]


async def test_what_an_earlier_version_left_half_freed_is_whole_again_in_one_step(
    world: Allocations,
) -> None:
    """The service was made anew meanwhile."""
    async with world.controller():
        await world.service("a", *ranged(RANGE))
        await world.settled()
    for number in RANGE[:124]:
        await world.store.delete(KEYS.port_allocation("tcp", number))
    await world.service("a", *ranged(RANGE, (7000,)))
    before = await now(world)

    async with world.controller():
        await world.settled()

    assert await held(world, "a") == [7000, *RANGE]
    assert await steps(world, before) == [(125, 0)]


async def test_a_range_of_dynamic_ports_and_of_every_protocol_is_one_step(
    world: Allocations,
) -> None:
    wide = msgspec.structs.replace(CLUSTER, ingress_ports=(30000, 31999))
    await world.store.put(KEYS.cluster, encode(wide))
    ports = [ingress(None, target, protocol) for target in range(1, 101) for protocol in Protocol]
    before = await now(world)

    async with world.controller():
        await world.service("a", *ports)
        await world.settled()

    given = await world.ports()
    assert len(given) == 300
    assert {key.partition("/")[0] for key in given} == {"tcp", "udp", "sctp"}
    assert await steps(world, before) == [(300, 0)]


async def test_each_range_of_several_services_is_a_step(world: Allocations) -> None:
    for number in range(4):
        first = 10_000 + 1000 * number
        await world.service(f"r{number}", *ranged(range(first, first + 1000)))
    await world.service("small", ingress(8080))
    before = await now(world)

    async with world.controller():
        await world.settled()

    assert await steps(world, before) == [(1000, 0)] * 4 + [(1, 0)]

"""The controller: ports of services that select nodes."""

from __future__ import annotations

import pytest

from mesh.store.memory import MemoryStore
from mesh.store.schema import encode
from tests.support.allocations import CLUSTER, KEYS, Allocations, ingress


@pytest.fixture
async def world() -> Allocations:
    world = Allocations(MemoryStore())
    await world.store.put(KEYS.cluster, encode(CLUSTER))
    return world


async def test_services_that_select_nodes_may_have_the_same_port(world: Allocations) -> None:
    await world.service("west", ingress(8080), publish_on="zone=a")
    await world.service("east", ingress(8080, 81), publish_on="zone=b")

    async with world.controller():
        await world.settled()
        both = await world.shares()
        await world.store.delete(KEYS.service("west"))
        await world.settled()

    assert both == {"tcp/8080/west": 80, "tcp/8080/east": 81}
    assert await world.shares() == {"tcp/8080/east": 81}
    assert await world.problems() == {}


async def test_a_port_that_a_service_has_everywhere_is_shared_with_nobody(
    world: Allocations,
) -> None:
    await world.service("web", ingress(8080))
    await world.service("west", ingress(8080), publish_on="zone=a")

    async with world.controller():
        await world.settled()
        before, told = await world.shares(), await world.problems()
        await world.service("web", ingress(8081))
        await world.settled()

    assert before == {}
    assert told == {"services/west": ("8080/tcp",)}
    assert await world.shares() == {"tcp/8080/west": 80}
    assert await world.problems() == {}


async def test_a_service_that_comes_to_select_nodes_keeps_its_port(world: Allocations) -> None:
    await world.service("web", ingress(8080))

    async with world.controller():
        await world.settled()
        await world.service("web", ingress(8080), publish_on="zone=a")
        await world.settled()
        shared, left = await world.shares(), await world.ports()
        await world.service("web", ingress(8080))
        await world.settled()

    assert (shared, left) == ({"tcp/8080/web": 80}, {})
    assert await world.shares() == {}
    assert await world.ports() == {"tcp/8080": ("web", 80)}


async def test_dynamic_ports_leave_out_what_is_shared(world: Allocations) -> None:
    await world.service("west", ingress(30000), publish_on="zone=a")

    async with world.controller():
        await world.settled()
        await world.service("web", ingress(None))
        await world.settled()
        await world.service("dynamic", ingress(None), publish_on="zone=a")
        await world.settled()

    assert await world.ports() == {"tcp/30001": ("web", 80), "tcp/30002": ("dynamic", 80)}

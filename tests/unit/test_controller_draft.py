"""What a draft demands of the store, so that decisions made on an old picture do no harm."""

from __future__ import annotations

import pytest

from mesh.controller.draft import Draft
from mesh.controller.picture import Picture
from mesh.store.memory import MemoryStore
from mesh.store.protocol import MAX_OPERATIONS, Change
from mesh.store.schema import encode
from tests.support.allocations import CLUSTER, KEYS, Allocations, ingress


@pytest.fixture
async def world() -> Allocations:
    world = Allocations(MemoryStore())
    await world.store.put(KEYS.cluster, encode(CLUSTER))
    return world


async def drafted(world: Allocations) -> Draft:
    """What a controller would write now."""
    picture = Picture(KEYS, {})
    picture.load((await world.store.list("/")).items)
    draft = Draft(picture)
    draft.fill()
    return draft


async def succeeds(world: Allocations, draft: Draft) -> bool:
    result = await world.store.transact(draft.conditions, draft.operations, draft.parts)
    return result.succeeded


async def test_a_place_that_was_given_meanwhile_is_not_given_again(world: Allocations) -> None:
    await world.service("a")
    for_a = await drafted(world)
    await world.store.delete(KEYS.service("a"))
    await world.service("b")
    for_b = await drafted(world)

    assert await succeeds(world, for_a)
    assert not await succeeds(world, for_b)
    assert await world.vips() == {"a": (1,)}


async def test_of_a_range_no_place_that_was_given_meanwhile_is_given_again(
    world: Allocations,
) -> None:
    await world.service("b", *map(ingress, range(5000, 5300)))
    late = await drafted(world)
    await world.service("b", ingress(5000))
    await world.service("a", ingress(5150))
    assert await succeeds(world, await drafted(world))

    assert not await succeeds(world, late)
    assert (await world.ports())["tcp/5150"] == ("a", 80)


async def test_a_place_that_changed_hands_meanwhile_is_not_freed(world: Allocations) -> None:
    await world.service("a", ingress(8080), vip="none")
    assert await succeeds(world, await drafted(world))
    await world.store.delete(KEYS.service("a"))
    late = await drafted(world)
    assert await succeeds(world, await drafted(world))
    await world.service("b", ingress(8080), vip="none")
    assert await succeeds(world, await drafted(world))

    assert not await succeeds(world, late)
    assert await world.ports() == {"tcp/8080": ("b", 80)}


async def test_a_place_that_changed_hands_meanwhile_is_not_rewritten(world: Allocations) -> None:
    await world.service("a", ingress(8080, 80), vip="none")
    assert await succeeds(world, await drafted(world))
    await world.service("a", ingress(8080, 81), vip="none")
    late = await drafted(world)
    await world.store.delete(KEYS.service("a"))
    assert await succeeds(world, await drafted(world))
    await world.service("b", ingress(8080), vip="none")
    assert await succeeds(world, await drafted(world))

    assert not await succeeds(world, late)
    assert await world.ports() == {"tcp/8080": ("b", 80)}


async def test_what_comes_back_before_its_owner_is_not_freed(world: Allocations) -> None:
    """Of one transaction, each prefix is heard of for itself, in any order."""
    await world.service("a", ingress(8080))
    assert await succeeds(world, await drafted(world))
    picture = Picture(KEYS, {})
    known = (await world.store.list("/")).items
    picture.load(item for item in known if item.key != KEYS.service("a"))
    draft = Draft(picture)
    draft.fill()

    assert draft.operations
    assert not await succeeds(world, draft)


async def test_services_too_many_for_one_transaction_take_several(world: Allocations) -> None:
    for number in range(300):
        await world.service(f"s{number}", ingress(2000 + number), vip="none")

    sizes = await all_drafts(world)

    assert len(await world.ports()) == 300
    assert max(sizes) < MAX_OPERATIONS
    assert min(sizes) > 0


async def test_a_large_service_has_a_transaction_for_itself(world: Allocations) -> None:
    await world.service("a", ingress(8080))
    await world.service("b", *map(ingress, range(5000, 5000 + MAX_OPERATIONS)))
    await world.service("c", ingress(8081))

    sizes = await all_drafts(world)

    assert len(await world.ports()) == MAX_OPERATIONS + 2
    a_vip_a_port_and_the_cursor = 3
    assert sizes == [
        a_vip_a_port_and_the_cursor,
        MAX_OPERATIONS + 2,
        a_vip_a_port_and_the_cursor,
    ]


async def test_only_what_no_request_can_hold_is_given_in_several(world: Allocations) -> None:
    name = "n" * 60
    await world.service(name, *map(ingress, range(20_000, 30_000)), vip="none")

    sizes = await all_drafts(world)

    assert len(await world.ports()) == 10_000
    assert len(sizes) == 2


async def all_drafts(world: Allocations) -> list[int]:
    """Write everything that is missing; how many operations each transaction had."""
    picture = Picture(KEYS, {})
    picture.load((await world.store.list("/")).items)
    sizes = []
    while picture.has_marked():
        draft = Draft(picture)
        draft.fill()
        sizes.append(draft.size)
        result = await world.store.transact(draft.conditions, draft.operations, draft.parts)
        assert result.succeeded
        draft.committed(result.revision)
    return sizes


async def test_what_was_freed_stays_free_when_the_watch_tells_of_the_gift(
    world: Allocations,
) -> None:
    await world.service("a")
    picture = Picture(KEYS, {})
    picture.load((await world.store.list("/")).items)
    given = await committed(world, picture)
    item = await world.store.get(KEYS.vip_allocation(1))
    await world.store.delete(KEYS.service("a"))
    picture.observe([Change(KEYS.service("a"), None, given + 1)])
    await committed(world, picture)

    picture.observe([Change(KEYS.vip_allocation(1), item, given)])

    assert picture.taken["vips"] == {}


async def committed(world: Allocations, picture: Picture) -> int:
    """The revision at which everything that is missing in the picture was written."""
    draft = Draft(picture)
    draft.fill()
    result = await world.store.transact(draft.conditions, draft.operations, draft.parts)
    assert result.succeeded
    draft.committed(result.revision)
    return result.revision

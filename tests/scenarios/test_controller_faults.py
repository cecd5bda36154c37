"""The controller where records are broken, leaders change and others write too."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from mesh.controller.lead import lead
from mesh.model.allocation import VipAllocation
from mesh.store.memory import MemoryStore
from mesh.store.protocol import TransactionResult
from mesh.store.schema import encode
from tests.support.allocations import CLUSTER, KEYS, Allocations, ingress
from tests.support.stores import LIMIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.store.protocol import Compare, Delete, Part, Put


@pytest.fixture
async def world() -> Allocations:
    world = Allocations(MemoryStore())
    await world.store.put(KEYS.cluster, encode(CLUSTER))
    return world


@pytest.mark.parametrize("value", [b"{", b'{"name": "a", "vip": 7}', b"\xff", b'{"name": "b"}'])
async def test_an_unreadable_service_keeps_what_it_has(world: Allocations, value: bytes) -> None:
    await world.service("a", ingress(8080))
    async with world.controller():
        await world.settled()
        await world.store.put(KEYS.service("a"), value)
        await world.settled()
    async with world.controller():
        await world.settled()
        problems = await world.problems()

        assert await world.vips() == {"a": (1,)}
        assert await world.ports() == {"tcp/8080": ("a", 80)}
        await world.service("a", ingress(8080))
        await world.settled()

    assert problems == {"services/a": ("record",)}
    assert await world.problems() == {}


@pytest.mark.parametrize("value", [None, b"nonsense", b'{"id": "c", "prefix6": "::/0"}'])
async def test_nothing_is_freed_or_given_without_a_cluster_record(
    world: Allocations, value: bytes | None
) -> None:
    await world.service("a", ingress(8080))
    async with world.controller():
        await world.settled()
    before = (await world.store.list(KEYS.under("allocations"))).items
    await world.store.delete(KEYS.service("a"))
    await world.service("b")
    if value is None:
        await world.store.delete(KEYS.cluster)
    else:
        await world.store.put(KEYS.cluster, value)

    async with world.controller() as task:
        await asyncio.wait({task}, timeout=0.2)
        untouched = (await world.store.list(KEYS.under("allocations"))).items == before
        await world.store.put(KEYS.cluster, encode(CLUSTER))
        await world.settled()

    assert untouched
    assert await world.vips() == {"b": (2,)}


async def test_a_cluster_record_that_is_lost_stops_everything(world: Allocations) -> None:
    async with world.controller() as task:
        await world.service("a")
        await world.settled()
        await world.store.delete(KEYS.cluster)
        await world.store.delete(KEYS.service("a"))
        await asyncio.wait({task}, timeout=0.2)

        assert await world.vips() == {"a": (1,)}


async def test_the_last_good_version_of_an_unreadable_service_goes_on_waiting(
    world: Allocations,
) -> None:
    await world.service("a", ingress(8080))
    await world.service("b", ingress(8080))
    async with world.controller():
        await world.settled()
        await world.store.put(KEYS.service("b"), b"?")
        await world.settled()
        problems = await world.problems()
        await world.store.delete(KEYS.service("a"))
        await world.settled()

    assert problems == {"services/b": ("record", "8080/tcp")}
    assert await world.ports() == {"tcp/8080": ("b", 80)}


class Reluctant(MemoryStore):
    """A store that refuses the next transaction, as though a condition did not hold."""

    refuses = False

    async def transact(
        self,
        conditions: Sequence[Compare],
        operations: Sequence[Put | Delete],
        parts: Sequence[Part] = (),
    ) -> TransactionResult:
        if self.refuses:
            self.refuses = False
            return TransactionResult(False, 0)
        return await super().transact(conditions, operations, parts)


async def test_a_refused_transaction_is_decided_again_and_nothing_is_forgotten() -> None:
    store = Reluctant()
    world = Allocations(store)
    await store.put(KEYS.cluster, encode(CLUSTER))
    await world.service("a", ingress(8080))
    await world.service("b", ingress(8080))
    async with world.controller():
        await world.settled()
        await store.put(KEYS.service("b"), b"?")
        await world.settled()
        store.refuses = True
        await world.service("c")
        await world.settled()
        await store.delete(KEYS.service("a"))
        await world.settled()

    assert await world.vips() == {"b": (2,), "c": (3,)}
    assert await world.ports() == {"tcp/8080": ("b", 80)}


async def test_an_allocation_somebody_gives_to_a_ghost_is_taken_back(world: Allocations) -> None:
    await world.service("a")
    ghost = VipAllocation(service="ghost", addresses=("10.1.0.1", "fd00:1:0:f000::1"))
    async with world.controller():
        await world.settled()
        await world.store.put(KEYS.vip_allocation(1), encode(ghost))
        await world.settled()

    assert await world.vips() == {"a": (2,)}


async def test_a_port_that_changes_hands_is_nobody_s_problem(world: Allocations) -> None:
    await world.service("a", ingress(8080), vip="10.1.0.3")
    async with world.controller():
        await world.settled()
    await world.service("b", ingress(8080), vip="10.1.0.3")
    await world.store.delete(KEYS.service("a"))
    before = (await world.store.list("/")).revision
    async with world.controller():
        await world.settled()

    assert await world.ports() == {"tcp/8080": ("b", 80)}
    assert await world.vips() == {"b": (3,)}
    async with aclosing(world.store.watch({KEYS.under("status/services"): before})) as stream:
        await anext(stream)
        await world.store.put(KEYS.status("services", "end"), b"{}")
        first = await anext(stream)
    assert [change.key for change in first.changes] == [KEYS.status("services", "end")]


async def test_an_allocation_that_cannot_be_read_is_given_to_nobody(world: Allocations) -> None:
    await world.store.put(KEYS.vip_allocation(1), b"?")
    await world.store.put(KEYS.port_allocation("tcp", 8080), b"?")
    await world.service("a", ingress(8080))

    async with world.controller():
        await world.settled()
        problems = await world.problems()
        await world.store.delete(KEYS.port_allocation("tcp", 8080))
        await world.settled()

    record = await world.store.get(KEYS.vip_allocation(1))
    assert record is not None
    assert record.value == b"?"
    assert problems == {"services/a": ("8080/tcp",)}
    assert await world.ports() == {"tcp/8080": ("a", 80)}


async def test_records_of_any_size_leave_the_other_services_in_peace(world: Allocations) -> None:
    long = b'{"name": "long", "vip": "' + b"x" * 1_000_000 + b'"}'
    await world.store.put(KEYS.service("long"), long)
    await world.service("greedy", *(ingress(None, target) for target in range(1, 5000)))
    await world.service("meek", ingress(8080))
    async with world.controller():
        await world.settled()

    statuses = (await world.store.list(KEYS.under("status/services"))).items
    assert (await world.ports())["tcp/8080"] == ("meek", 80)
    assert set(await world.problems()) == {"services/long", "services/greedy"}
    assert max(len(item.value) for item in statuses) < 100_000


async def test_an_allocation_somebody_deletes_is_given_again(world: Allocations) -> None:
    await world.service("a", ingress(8080))
    async with world.controller():
        await world.settled()
        await world.store.delete(KEYS.port_allocation("tcp", 8080))
        await world.settled()

    assert await world.ports() == {"tcp/8080": ("a", 80)}


async def test_of_two_vips_the_one_given_first_stays(world: Allocations) -> None:
    await world.service("a")
    for index in (4, 2):
        addresses = (f"10.1.0.{index}", f"fd00:1:0:f000::{index}")
        record = VipAllocation(service="a", addresses=addresses)
        await world.store.put(KEYS.vip_allocation(index), encode(record))

    async with world.controller():
        await world.settled()

    assert await world.vips() == {"a": (4,)}


async def test_a_service_with_more_ports_than_a_transaction_takes_gets_all(
    world: Allocations,
) -> None:
    await world.service("a", *(ingress(port) for port in range(1000, 1300)))

    async with world.controller():
        await world.settled()
        given = len(await world.ports())
        await world.store.delete(KEYS.service("a"))
        await world.settled()

    assert given == 300
    assert await world.ports() == {}


async def test_a_leader_whose_term_is_over_writes_nothing(world: Allocations) -> None:
    async with world.controller() as deposed:
        await world.settled()
        await world.elect()
        before = (await world.store.list(KEYS.under("allocations"))).items
        await world.service("a")

        await asyncio.wait_for(deposed, LIMIT)

    assert (await world.store.list(KEYS.under("allocations"))).items == before


async def test_two_controllers_that_both_believe_to_lead_share_nothing_out_twice(
    world: Allocations,
) -> None:
    guard = await world.elect()
    both = [asyncio.create_task(lead(world.store, KEYS, guard)) for _ in range(2)]
    for number in range(6):
        await world.service(f"s{number}", ingress(8080 + number))
        await asyncio.sleep(0)
    await world.settled()
    await world.store.delete(KEYS.service("s3"))
    await world.settled()
    for task in both:
        task.cancel()
    await asyncio.gather(*both, return_exceptions=True)

    assert {name: len(indexes) for name, indexes in (await world.vips()).items()} == {
        f"s{number}": 1 for number in (0, 1, 2, 4, 5)
    }


async def test_an_idle_controller_writes_nothing(world: Allocations) -> None:
    await world.service("a", ingress(8080), ingress(None))
    await world.service("b", ingress(8080))
    async with world.controller():
        await world.settled()
    before = (await world.store.list("/")).items

    async with world.controller():
        await world.settled()

    changed = {item.key for item in set((await world.store.list("/")).items) ^ set(before)}
    assert changed <= {KEYS.leader}


async def test_a_service_s_allocations_come_in_one_transaction(world: Allocations) -> None:
    await world.service("a", ingress(8080), ingress(None), ingress(8081))

    async with world.controller():
        await world.settled()

    items = (await world.store.list(KEYS.under("allocations"))).items
    assert len({item.mod_revision for item in items if b'"service"' in item.value}) == 1

"""The controller against a whole store: who gets what, for how long, and what goes wrong when."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec
import pytest

from mesh.controller.lead import lead
from mesh.model.allocation import NodeAllocation, PortAllocation, VipAllocation
from mesh.model.cluster import Cluster
from mesh.model.node import Node, Role
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from mesh.model.report import Status
from mesh.model.service import ServiceSpec
from mesh.store.memory import MemoryStore
from mesh.store.protocol import Compare, Delete, Put
from mesh.store.schema import Keys, decode, encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

KEYS = Keys()
CLUSTER = Cluster(
    id="c",
    prefix6="fd00:1::/48",
    vips4="10.1.0.0/29",
    overlay4="10.0.0.0/29",
    ingress_ports=(30000, 30002),
)
PATIENCE = 20.0


def ingress(
    published: int | None, target: int = 80, protocol: Protocol = Protocol.TCP
) -> PublishedPort:
    return PublishedPort(
        target=target, published=published, protocol=protocol, mode=PublishMode.INGRESS
    )


class World:
    """A store and what the tests do to it and read from it."""

    def __init__(self) -> None:
        self.store = MemoryStore()

    async def service(self, name: str, *ports: PublishedPort, vip: str = "auto") -> None:
        spec = ServiceSpec(name=name, ports=ports, vip=vip)
        await self.store.put(KEYS.service(name), encode(spec))

    async def node(self, name: str) -> None:
        node = Node(
            name=name, role=Role.WORKER, public_key="A" * 43 + "=", endpoints=(), addresses=()
        )
        await self.store.put(KEYS.node(name), encode(node))

    async def elect(self) -> Compare:
        """Make somebody else the leader: the guard that holds from now on."""
        return Compare(KEYS.leader, await self.store.put(KEYS.leader, b"somebody"))

    async def vips(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for item in (await self.store.list(KEYS.under("allocations/vips"))).items:
            record = decode(item.key, item.value, VipAllocation)
            index = int(item.key.rpartition("/")[2])
            assert record.addresses == (f"10.1.0.{index}", f"fd00:1:0:f000::{index}")
            found[record.service] = (*found.get(record.service, ()), index)
        return found

    async def ports(self) -> dict[str, tuple[str, int]]:
        return {
            item.key.removeprefix(KEYS.under("allocations/ports")): (record.service, record.target)
            for item in (await self.store.list(KEYS.under("allocations/ports"))).items
            for record in (decode(item.key, item.value, PortAllocation),)
        }

    async def numbers(self) -> dict[str, int]:
        return {
            decode(item.key, item.value, NodeAllocation).node: int(item.key.rpartition("/")[2])
            for item in (await self.store.list(KEYS.under("allocations/nodes"))).items
        }

    async def problems(self) -> dict[str, tuple[str, ...]]:
        """What each service's and node's status is about."""
        return {
            item.key.removeprefix(KEYS.under("status")): tuple(
                problem.about for problem in decode(item.key, item.value, Status).problems
            )
            for item in (
                await self.store.list(KEYS.under("status/services"), KEYS.under("status/nodes"))
            ).items
        }

    @asynccontextmanager
    async def controller(self) -> AsyncIterator[asyncio.Task[None]]:
        """A newly elected leader at work."""
        task = asyncio.create_task(lead(self.store, KEYS, await self.elect()))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until an awaitable condition holds."""
        async with asyncio.timeout(PATIENCE):
            while not await condition():  # type: ignore[misc]
                await asyncio.sleep(0.001)

    async def settled(self) -> None:
        """Wait until the controller has dealt with everything written so far.

        It works in the order of revisions, so a node that is written now gets its number last.
        """
        await self.node("last")
        await self.until(self._has_last)
        await self.store.delete(KEYS.node("last"))
        await self.until(self._lacks_last)

    async def _has_last(self) -> bool:
        return "last" in await self.numbers() or "nodes/last" in await self.problems()

    async def _lacks_last(self) -> bool:
        return not await self._has_last()


@pytest.fixture
async def world() -> World:
    world = World()
    await world.store.put(KEYS.cluster, encode(CLUSTER))
    return world


async def test_services_get_vips_in_the_order_they_were_created(world: World) -> None:
    await world.service("b")
    await world.service("a")

    async with world.controller():
        await world.settled()
        await world.service("c")
        await world.settled()

    assert await world.vips() == {"b": (1,), "a": (2,), "c": (3,)}


async def test_nodes_get_the_lowest_free_numbers(world: World) -> None:
    for name in ("x", "y", "z"):
        await world.node(name)

    async with world.controller():
        await world.settled()
        await world.store.delete(KEYS.node("y"))
        await world.settled()
        await world.node("w")
        await world.settled()

    assert await world.numbers() == {"x": 1, "w": 2, "z": 3}


async def test_a_node_too_many_is_reported_and_gets_the_next_number_freed(world: World) -> None:
    for number in range(7):
        await world.node(f"n{number}")

    async with world.controller():
        await world.until(world.problems)
        before = await world.problems()
        await world.store.delete(KEYS.node("n2"))
        await world.settled()

    assert before == {"nodes/n6": ("number",)}
    assert (await world.numbers())["n6"] == 3
    assert await world.problems() == {}


async def test_a_service_may_do_without_a_vip(world: World) -> None:
    await world.service("a", vip="none")

    async with world.controller():
        await world.settled()

    assert await world.vips() == {}
    assert await world.problems() == {}


async def test_an_explicit_vip_is_given_and_one_given_by_chance_is_exchanged(world: World) -> None:
    await world.service("a", vip="10.1.0.5")
    await world.service("b")

    async with world.controller():
        await world.settled()
        before = await world.vips()
        await world.service("b", vip="10.1.0.4")
        await world.settled()

    assert before == {"a": (5,), "b": (1,)}
    assert await world.vips() == {"a": (5,), "b": (4,)}


async def test_a_taken_vip_is_reported_and_handed_over_when_it_is_freed(world: World) -> None:
    await world.service("a", vip="10.1.0.5")
    await world.service("b")
    async with world.controller():
        await world.settled()
        await world.service("b", vip="10.1.0.5")
        await world.settled()
        vips, problems = await world.vips(), await world.problems()

        await world.store.delete(KEYS.service("a"))
        await world.settled()

    assert vips == {"a": (5,), "b": (1,)}, "what b has stays until it can have what it wants"
    assert problems == {"services/b": ("vip",)}
    assert await world.vips() == {"b": (5,)}
    assert await world.problems() == {}


async def test_a_vip_outside_the_range_is_reported(world: World) -> None:
    await world.service("a", ingress(8080), vip="192.0.2.1")

    async with world.controller():
        await world.settled()

    assert await world.vips() == {}
    assert await world.problems() == {"services/a": ("vip",)}
    assert await world.ports() == {"tcp/8080": ("a", 80)}


async def test_freed_vips_rest_until_the_others_were_used(world: World) -> None:
    await world.service("a")
    async with world.controller():
        await world.settled()
        await world.store.delete(KEYS.service("a"))
        await world.settled()
    await world.service("b")

    async with world.controller():
        await world.settled()

    assert await world.vips() == {"b": (2,)}


async def test_vips_that_ran_out_are_reported_and_given_when_one_is_freed(world: World) -> None:
    for number in range(7):
        await world.service(f"s{number}")

    async with world.controller():
        await world.settled()
        before = await world.problems()
        await world.store.delete(KEYS.service("s3"))
        await world.settled()

    assert before == {"services/s6": ("vip",)}
    assert (await world.vips())["s6"] == (4,)
    assert await world.problems() == {}


async def test_a_port_belongs_to_the_oldest_service_and_the_others_hear_of_it(
    world: World,
) -> None:
    await world.service("old", ingress(8080))
    await world.service("new", ingress(8080), ingress(8081, 81))
    await world.service("newest", ingress(8080))

    async with world.controller():
        await world.settled()
        ports, problems = await world.ports(), await world.problems()
        await world.store.delete(KEYS.service("old"))
        await world.settled()

    assert ports == {"tcp/8080": ("old", 80), "tcp/8081": ("new", 81)}
    assert problems == {"services/new": ("8080/tcp",), "services/newest": ("8080/tcp",)}
    assert (await world.ports())["tcp/8080"] == ("new", 80)
    assert await world.problems() == {"services/newest": ("8080/tcp",)}


async def test_tcp_and_udp_ports_are_different_ports(world: World) -> None:
    await world.service("a", ingress(8080))
    await world.service("b", ingress(8080, protocol=Protocol.UDP))

    async with world.controller():
        await world.settled()

    assert await world.ports() == {"tcp/8080": ("a", 80), "udp/8080": ("b", 80)}


async def test_host_mode_ports_are_not_allocated(world: World) -> None:
    await world.service("a", PublishedPort(target=80, published=8080))

    async with world.controller():
        await world.settled()

    assert await world.ports() == {}


async def test_dynamic_ports_are_kept_through_changes_of_the_service(world: World) -> None:
    await world.service("a", ingress(None, 80), ingress(None, 90))
    async with world.controller():
        await world.settled()
        before = await world.ports()
        await world.service("a", ingress(None, 90), ingress(None, 91), ingress(8080))
        await world.settled()

    assert before == {"tcp/30000": ("a", 80), "tcp/30001": ("a", 90)}
    assert await world.ports() == {
        "tcp/30000": ("a", 91),
        "tcp/30001": ("a", 90),
        "tcp/8080": ("a", 80),
    }


async def test_dynamic_ports_that_ran_out_are_reported_and_given_when_freed(world: World) -> None:
    await world.service("a", ingress(None, 80), ingress(None, 81))
    await world.service("b", ingress(None, 80), ingress(None, 81))

    async with world.controller():
        await world.settled()
        problems = await world.problems()
        await world.service("a", ingress(None, 80))
        await world.settled()

    assert problems == {"services/b": ("81/tcp",)}
    assert await world.problems() == {}
    assert await world.ports() == {
        "tcp/30000": ("a", 80),
        "tcp/30001": ("b", 81),
        "tcp/30002": ("b", 80),
    }


@pytest.mark.parametrize("port", [CLUSTER.wireguard_port, CLUSTER.steering_port])
async def test_the_overlay_s_own_ports_cannot_be_published(world: World, port: int) -> None:
    await world.service("a", ingress(port, protocol=Protocol.UDP))
    await world.service("b", ingress(port, protocol=Protocol.TCP))

    async with world.controller():
        await world.settled()

    assert await world.ports() == {f"tcp/{port}": ("b", 80)}
    assert await world.problems() == {"services/a": (f"{port}/udp",)}


async def test_a_changed_target_is_noted_and_the_port_stays(world: World) -> None:
    await world.service("a", ingress(8080, 80))
    async with world.controller():
        await world.settled()
        await world.service("a", ingress(8080, 81))
        await world.settled()

    assert await world.ports() == {"tcp/8080": ("a", 81)}


async def test_a_deleted_service_leaves_nothing(world: World) -> None:
    await world.service("a", ingress(8080), ingress(None))
    await world.service("b", ingress(8080), vip="none")
    async with world.controller():
        await world.settled()
        await world.store.delete(KEYS.service("b"))
        await world.store.delete(KEYS.service("a"))
        await world.settled()

    assert await world.vips() == {}
    assert await world.ports() == {}
    assert await world.problems() == {}


async def test_what_was_deleted_while_nobody_led_is_freed(world: World) -> None:
    await world.service("a", ingress(8080))
    await world.service("b", ingress(8080))
    async with world.controller():
        await world.settled()
    await world.store.delete(KEYS.service("a"))
    await world.store.delete(KEYS.service("b"))

    async with world.controller():
        await world.settled()

    assert await world.vips() == {}
    assert await world.ports() == {}
    assert await world.problems() == {}


@pytest.mark.parametrize("value", [b"{", b'{"name": "a", "vip": 7}', b"\xff", b'{"name": "b"}'])
async def test_an_unreadable_service_keeps_what_it_has(world: World, value: bytes) -> None:
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
    world: World, value: bytes | None
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


async def test_an_allocation_that_cannot_be_read_is_given_to_nobody(world: World) -> None:
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


async def test_an_allocation_somebody_deletes_is_given_again(world: World) -> None:
    await world.service("a", ingress(8080))
    async with world.controller():
        await world.settled()
        await world.store.delete(KEYS.port_allocation("tcp", 8080))
        await world.settled()

    assert await world.ports() == {"tcp/8080": ("a", 80)}


async def test_of_two_vips_the_one_given_first_stays(world: World) -> None:
    await world.service("a")
    for index in (4, 2):
        addresses = (f"10.1.0.{index}", f"fd00:1:0:f000::{index}")
        record = VipAllocation(service="a", addresses=addresses)
        await world.store.put(KEYS.vip_allocation(index), encode(record))

    async with world.controller():
        await world.settled()

    assert await world.vips() == {"a": (4,)}


async def test_a_service_with_more_ports_than_a_transaction_takes_gets_all(world: World) -> None:
    await world.service("a", *(ingress(port) for port in range(1000, 1300)))

    async with world.controller():
        await world.settled()
        given = len(await world.ports())
        await world.store.delete(KEYS.service("a"))
        await world.settled()

    assert given == 300
    assert await world.ports() == {}


async def test_a_leader_whose_term_is_over_writes_nothing(world: World) -> None:
    async with world.controller() as deposed:
        await world.settled()
        await world.elect()
        before = (await world.store.list(KEYS.under("allocations"))).items
        await world.service("a")

        await asyncio.wait_for(deposed, PATIENCE)

    assert (await world.store.list(KEYS.under("allocations"))).items == before


async def test_two_controllers_that_both_believe_to_lead_share_nothing_out_twice(
    world: World,
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


async def test_an_idle_controller_writes_nothing(world: World) -> None:
    await world.service("a", ingress(8080), ingress(None))
    await world.service("b", ingress(8080))
    async with world.controller():
        await world.settled()
    before = (await world.store.list("/")).items

    async with world.controller():
        await world.settled()

    changed = {item.key for item in set((await world.store.list("/")).items) ^ set(before)}
    assert changed <= {KEYS.leader}


async def test_a_service_s_allocations_come_in_one_transaction(world: World) -> None:
    await world.service("a", ingress(8080), ingress(None), ingress(8081))

    async with world.controller():
        await world.settled()

    items = (await world.store.list(KEYS.under("allocations"))).items
    assert len({item.mod_revision for item in items if b'"service"' in item.value}) == 1


def test_a_status_is_what_operators_read() -> None:
    status = msgspec.json.decode(b'{"problems":[{"about":"vip","message":"taken"}]}', type=Status)

    assert [problem.about for problem in status.problems] == ["vip"]
    assert (Delete("k"), Put("k", b"")) != ()

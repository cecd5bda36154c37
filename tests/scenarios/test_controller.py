"""The controller: who gets which number, for how long, and who hears of it."""

from __future__ import annotations

import msgspec
import pytest

from mesh.model.listener import Listener, Listening
from mesh.model.publish import Protocol, PublishedPort
from mesh.store.memory import MemoryStore
from mesh.store.schema import encode
from tests.support.allocations import CLUSTER, KEYS, Allocations, ingress


@pytest.fixture
async def world() -> Allocations:
    world = Allocations(MemoryStore())
    await world.store.put(KEYS.cluster, encode(CLUSTER))
    return world


async def test_services_get_vips_in_the_order_they_were_created(world: Allocations) -> None:
    await world.service("b")
    await world.service("a")

    async with world.controller():
        await world.settled()
        await world.service("c")
        await world.settled()

    assert await world.vips() == {"b": (1,), "a": (2,), "c": (3,)}


async def test_nodes_get_the_lowest_free_numbers(world: Allocations) -> None:
    for name in ("x", "y", "z"):
        await world.node(name)

    async with world.controller():
        await world.settled()
        await world.store.delete(KEYS.node("y"))
        await world.settled()
        await world.node("w")
        await world.settled()

    assert await world.numbers() == {"x": 1, "w": 2, "z": 3}


async def test_a_node_too_many_is_reported_and_gets_the_next_number_freed(
    world: Allocations,
) -> None:
    for number in range(7):
        await world.node(f"n{number}")

    async with world.controller():
        await world.settled()
        before = await world.problems()
        await world.store.delete(KEYS.node("n2"))
        await world.settled()

    assert before == {"nodes/n6": ("number",)}
    assert (await world.numbers())["n6"] == 3
    assert await world.problems() == {}


async def test_a_service_may_do_without_a_vip(world: Allocations) -> None:
    await world.service("a", vip="none")

    async with world.controller():
        await world.settled()

    assert await world.vips() == {}
    assert await world.problems() == {}


async def test_an_explicit_vip_is_given_and_one_given_by_chance_is_exchanged(
    world: Allocations,
) -> None:
    await world.service("a", vip="10.1.0.5")
    await world.service("b")

    async with world.controller():
        await world.settled()
        before = await world.vips()
        await world.service("b", vip="10.1.0.4")
        await world.settled()

    assert before == {"a": (5,), "b": (1,)}
    assert await world.vips() == {"a": (5,), "b": (4,)}


async def test_a_taken_vip_is_reported_and_handed_over_when_it_is_freed(world: Allocations) -> None:
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


async def test_a_vip_outside_the_range_is_reported(world: Allocations) -> None:
    await world.service("a", ingress(8080), vip="192.0.2.1")

    async with world.controller():
        await world.settled()

    assert await world.vips() == {}
    assert await world.problems() == {"services/a": ("vip",)}
    assert await world.ports() == {"tcp/8080": ("a", 80)}


async def test_freed_vips_rest_until_the_others_were_used(world: Allocations) -> None:
    await world.service("a")
    async with world.controller():
        await world.settled()
        await world.store.delete(KEYS.service("a"))
        await world.settled()
        await world.service("b")
        await world.settled()
        same_term = await world.vips()
        await world.store.delete(KEYS.service("b"))
        await world.settled()
    await world.service("c")
    async with world.controller():
        await world.settled()

    assert same_term == {"b": (2,)}
    assert await world.vips() == {"c": (3,)}


async def test_vips_that_ran_out_are_reported_and_given_when_one_is_freed(
    world: Allocations,
) -> None:
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
    world: Allocations,
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


async def test_a_local_health_port_belongs_to_one_service(world: Allocations) -> None:
    await world.service("a", ingress(8080), local_health=9000)
    await world.service("b", ingress(9000), local_health=8080)
    await world.service("c", local_health=22)

    async with world.controller():
        await world.settled()
        before, told = await world.ports(), await world.problems()
        await world.service("a")
        await world.settled()

    assert before == {"tcp/8080": ("a", 80), "tcp/9000": ("a", 0)}
    assert told == {"services/b": ("8080/tcp", "9000/tcp"), "services/c": ("22/tcp",)}
    assert await world.ports() == {"tcp/8080": ("b", 0), "tcp/9000": ("b", 80)}


async def test_tcp_and_udp_ports_are_different_ports(world: Allocations) -> None:
    await world.service("a", ingress(8080))
    await world.service("b", ingress(8080, protocol=Protocol.UDP))

    async with world.controller():
        await world.settled()

    assert await world.ports() == {"tcp/8080": ("a", 80), "udp/8080": ("b", 80)}


async def test_host_mode_ports_are_not_allocated(world: Allocations) -> None:
    await world.service("a", PublishedPort(target=80, published=8080))

    async with world.controller():
        await world.settled()

    assert await world.ports() == {}


async def test_dynamic_ports_are_kept_through_changes_of_the_service(world: Allocations) -> None:
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


async def test_dynamic_ports_that_ran_out_are_reported_and_given_when_freed(
    world: Allocations,
) -> None:
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
async def test_the_overlay_s_own_ports_cannot_be_published(world: Allocations, port: int) -> None:
    await world.service("a", ingress(port, protocol=Protocol.UDP))
    await world.service("b", ingress(port, protocol=Protocol.TCP))

    async with world.controller():
        await world.settled()

    assert await world.ports() == {f"tcp/{port}": ("b", 80)}
    assert await world.problems() == {"services/a": (f"{port}/udp",)}


async def test_protected_ports_are_published_by_force_only(world: Allocations) -> None:
    forced = ingress(2379)
    await world.service(
        "a", ingress(22), ingress(8080), msgspec.structs.replace(forced, force=True)
    )
    await world.service("b", ingress(22, protocol=Protocol.UDP))
    await world.service("c", *(ingress(n, protocol=Protocol.UDP) for n in (51820, 4790)))

    async with world.controller():
        await world.settled()

    assert await world.ports() == {
        "tcp/2379": ("a", 80),
        "tcp/8080": ("a", 80),
        "udp/22": ("b", 80),
    }
    assert await world.problems() == {
        "services/a": ("22/tcp",),
        "services/c": ("51820/udp", "4790/udp"),
    }


async def test_a_port_that_becomes_protected_is_freed_and_given_back_when_it_is_no_more(
    world: Allocations,
) -> None:
    await world.service("a", ingress(8080))
    async with world.controller():
        await world.settled()
        guarded = msgspec.structs.replace(CLUSTER, protected_ports=("8080",))
        await world.store.put(KEYS.cluster, encode(guarded))
        await world.settled()
        ports, problems = await world.ports(), await world.problems()
        await world.store.put(KEYS.cluster, encode(CLUSTER))
        await world.settled()

    assert ports == {}
    assert problems == {"services/a": ("8080/tcp",)}
    assert await world.ports() == {"tcp/8080": ("a", 80)}
    assert await world.problems() == {}


async def test_a_range_of_a_thousand_ports_is_allocated_whole(world: Allocations) -> None:
    await world.service("a", *(ingress(port, port) for port in range(10000, 11000)))

    async with world.controller():
        await world.settled()
        ports = await world.ports()
        await world.store.delete(KEYS.service("a"))
        await world.settled()

    assert ports == {f"tcp/{port}": ("a", port) for port in range(10000, 11000)}
    assert await world.ports() == {}


async def test_dynamic_ports_leave_out_the_overlay_s_own(world: Allocations) -> None:
    around = (CLUSTER.steering_port - 1, CLUSTER.steering_port + 1)
    cluster = msgspec.structs.replace(CLUSTER, ingress_ports=around)
    await world.store.put(KEYS.cluster, encode(cluster))
    await world.service("a", *(ingress(None, protocol=Protocol.UDP) for _ in range(3)))

    async with world.controller():
        await world.settled()

    assert set(await world.ports()) == {f"udp/{port}" for port in around}
    assert await world.problems() == {"services/a": ("80/udp",)}


async def test_a_changed_target_is_noted_and_the_port_stays(world: Allocations) -> None:
    await world.service("a", ingress(8080, 80))
    async with world.controller():
        await world.settled()
        await world.service("a", ingress(8080, 81))
        await world.settled()

    assert await world.ports() == {"tcp/8080": ("a", 81)}


async def test_a_deleted_service_leaves_nothing(world: Allocations) -> None:
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


async def test_what_was_deleted_while_nobody_led_is_freed(world: Allocations) -> None:
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


async def listen(world: Allocations, node: str, *ports: int) -> None:
    listeners = (Listener(protocol=Protocol.TCP, port=n, process="x", pid=1) for n in ports)
    await world.store.put(KEYS.listeners(node), encode(Listening(listeners=tuple(listeners))))


async def test_dynamic_ports_on_which_some_node_listens_are_not_given_out(
    world: Allocations,
) -> None:
    await listen(world, "n1", 30000)
    await listen(world, "n2", 30000, 30001)
    await world.service("a", ingress(None))
    await world.service("b", ingress(None))

    async with world.controller():
        await world.settled()
        before, told = await world.ports(), await world.problems()
        await listen(world, "n2", 30000)
        await world.settled()
        after = await world.ports()

    assert before == {"tcp/30002": ("a", 80)}
    assert told == {"services/b": ("80/tcp",)}
    assert after == {"tcp/30002": ("a", 80), "tcp/30001": ("b", 80)}


async def test_a_port_that_is_named_is_given_whoever_listens(world: Allocations) -> None:
    await listen(world, "n1", 30000)
    await world.store.put(KEYS.listeners("n2"), b"?")
    await world.service("a", ingress(30000))

    async with world.controller():
        await world.settled()

    assert await world.ports() == {"tcp/30000": ("a", 80)}

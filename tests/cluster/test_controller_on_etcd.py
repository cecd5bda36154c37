"""The controller on a real etcd, elected like in a cluster."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest

from mesh.controller.lead import lead
from mesh.store.election import Election
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_channel import EtcdOptions
from mesh.store.schema import encode
from tests.support.allocations import CLUSTER, KEYS, Allocations, ingress
from tests.support.etcd import Etcd, etcd
from tests.support.stores import LIMIT, eventually, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.cluster


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
async def world(server: Etcd) -> AsyncIterator[Allocations]:
    store = EtcdStore(EtcdOptions((server.url,)))
    await store.put(KEYS.cluster, encode(CLUSTER))
    yield Allocations(store)
    await store.close()


@asynccontextmanager
async def manager(world: Allocations, name: str) -> AsyncIterator[Election]:
    """A manager that campaigns and leads when elected."""
    election = Election(world.store, KEYS.leader, name, ttl=2)
    async with running(election.run(partial(lead, world.store, KEYS))):
        yield election


async def test_a_successor_keeps_what_was_given(world: Allocations) -> None:
    await world.service("a", ingress(8080), ingress(None))
    await world.service("b", ingress(8080))
    async with manager(world, "m2") as successor:
        async with manager(world, "m1"):
            await world.settled()
            before = (await world.vips(), await world.ports())
        await world.store.delete(KEYS.service("a"))
        await eventually(partial(_leads, successor))
        await world.settled()

        assert before == (
            {"a": (1,), "b": (2,)},
            {"tcp/8080": ("a", 80), "tcp/30000": ("a", 80)},
        )
        assert await world.vips() == {"b": (2,)}
        assert await world.ports() == {"tcp/8080": ("b", 80)}


async def _leads(election: Election) -> bool:
    return election.leading


async def test_whenever_a_controller_ends_services_have_all_of_a_range_or_nothing(
    world: Allocations,
) -> None:
    """It ends a little later each time: before, while and after it writes."""
    asked = [ingress(number, number) for number in range(8000, 9000)]
    seen: list[set[int]] = [set(), set()]
    delay = 0.0
    while seen != [{0, 1000}] * 2:
        for wanted, found in zip((asked, []), seen, strict=True):
            async with running(lead(world.store, KEYS, await world.elect())):
                await world.settled()
                await world.service("a", *wanted)
                await asyncio.sleep(delay)
            found.add(len(await world.ports()))
            assert found <= {0, 1000}
            async with running(lead(world.store, KEYS, await world.elect())):
                await world.settled()
            assert len(await world.ports()) == len(wanted)
        assert delay < LIMIT
        delay = 1.25 * delay + 0.002


async def test_allocation_goes_on_when_etcd_comes_back(server: Etcd, world: Allocations) -> None:
    async with manager(world, "m1"):
        await world.service("a")
        await world.settled()
        server.stop()
        server.start()
        await world.service("b")
        await world.settled()

    assert await world.vips() == {"a": (1,), "b": (2,)}


async def test_two_leaders_at_once_share_nothing_out_twice(world: Allocations) -> None:
    guard = await world.elect()
    async with (
        running(lead(world.store, KEYS, guard)),
        running(lead(world.store, KEYS, guard)),
    ):
        names = [f"s{number}" for number in range(6)]
        await asyncio.gather(*(world.service(name, ingress(None)) for name in names))
        await world.settled()
        await world.store.delete(KEYS.service("s3"))
        await world.settled()

        assert {name: len(given) for name, given in (await world.vips()).items()} == {
            name: 1 for name in names if name != "s3"
        }

"""What becomes of a service's clients when its replicas fall ill, and get well again.

On every backend, one lab of three nodes, whose replicas every test leaves well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.support import drivers
from tests.support.cluster import host, ingress, until, until_served
from tests.support.illness import BOTH, HOST, WEB, healthy_lab
from tests.support.probed import PORT, QUICK
from tests.support.requests import REFUSED, Answer, ask_all, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.illness import World

pytestmark = pytest.mark.cluster

NEW: Final = 8090
CYCLE: Final = 60


@pytest.fixture(scope="module", params=drivers.KERNEL)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with healthy_lab("health", request.param) as made:
        yield made


async def test_a_replica_that_is_ill_gets_nothing_new_until_it_is_well(world: World) -> None:
    async with stream(world.everything()) as traffic:
        with world.ill("a1"):
            await until_served(8 * world.everything(), {"b1"})
            told = world.told("a1")
            at_its_own_node = await ask_all(world.mesh.from_outside(HOST, "n1"))
        await world.all_well()

    assert traffic.failures == []
    assert (told["healthy"], told["reason"]) == (False, "HTTP 503")
    assert set(at_its_own_node) == {REFUSED}


async def test_without_a_replica_that_is_well_clients_are_refused_or_served_by_any(
    world: World,
) -> None:
    mesh = world.mesh
    with world.ill("a1", "b1"):
        await until_served(world.everything(), {REFUSED})
        mesh.service("web", *ingress(WEB), *host(HOST), health=QUICK | {"fallback": "any"})
        await mesh.settled()
        await until_served(8 * world.everything(), BOTH)
        at_its_own_node = await ask_all(mesh.from_outside(HOST, "n1"))
        world.health["b1"].status = 200
        await until_served(8 * world.everything(), {"b1"})
        mesh.service("web", *ingress(WEB), *host(HOST), health=QUICK)
    await world.all_well()

    assert {a.replica if isinstance(a, Answer) else a for a in at_its_own_node} == {"a1"}


@pytest.mark.parametrize("away", ["a moment", "longer than its lease"])
async def test_no_connection_fails_when_an_agent_is_killed_and_comes_back(
    world: World, away: str
) -> None:
    mesh = world.mesh
    before = world.told("a1")

    async with stream(world.everything()) as traffic:
        await traffic.more(CYCLE)
        await mesh.kill("n1")
        if away != "a moment":
            await until(lambda: not world.told("a1"), "its records end")
        await traffic.more(CYCLE)
        await mesh.start_again("n1")
        await mesh.settled()
        await traffic.more(2 * CYCLE)
        await world.all_well()
        await traffic.more(CYCLE)

    assert traffic.failures == []
    assert world.told("a1") == before


async def test_what_falls_ill_while_its_agent_is_away_is_out_when_it_is_back(world: World) -> None:
    mesh = world.mesh
    with world.ill("a1"):
        await mesh.kill("n1")
        await mesh.start_again("n1")
        await until_served(8 * world.everything(), {"b1"})
        await world.until_told(healthy=False, replica="a1")
        await mesh.kill("n1")
        await mesh.start_again("n1")
        await mesh.settled()
        await until_served(8 * world.everything(), {"b1"})
    await world.all_well()


async def test_no_connection_fails_while_checks_are_switched_on_and_changed(world: World) -> None:
    mesh = world.mesh
    mesh.service("new", *ingress(NEW))
    for replica in sorted(BOTH):
        mesh.task("new", replica)
    await mesh.allocated("new")
    await until_served(8 * mesh.from_outside(NEW), BOTH)

    async with stream(mesh.from_outside(NEW)) as traffic:
        for check in (QUICK, QUICK | {"type": "tcp", "port": PORT}, None, QUICK):
            mesh.service("new", *ingress(NEW), health=check)
            await mesh.settled()
            wanted = None if check is None else True
            await until(lambda: world.told("b1", "new").get("healthy") is wanted)  # noqa: B023
            await traffic.more(CYCLE)
    with world.ill("b1"):
        await until_served(8 * mesh.from_outside(NEW), {"a1"})
    mesh.remove("new")
    await mesh.settled()
    await world.all_well()

    assert traffic.failures == []

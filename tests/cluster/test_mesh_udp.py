"""A UDP client that never stops sending: it is served by who serves, and by nobody else.

One lab of two nodes, each with a replica.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.publish import Protocol
from tests.support.cluster import Cluster, cluster, ingress, until
from tests.support.requests import REFUSED, Answer, Ask, Held, again, held

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

WEB: Final = 8080


@pytest.fixture(scope="module")
def mesh() -> Iterator[Cluster]:
    with cluster("udp", 2, ("a1", "n1"), ("b1", "n2")) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    mesh.service("web", *ingress(WEB))
    for replica in ("a1", "b1"):
        mesh.task("web", replica)
    await mesh.allocated("web")


def _clients(mesh: Cluster) -> list[Ask]:
    """Eight UDP clients through each node, in both families."""
    through = mesh.from_outside(WEB)
    return [one for one in through if one.protocol is Protocol.UDP] * 8


def _replicas(outcomes: dict[Held, object]) -> set[object]:
    return {one.replica if isinstance(one, Answer) else one for one in outcomes.values()}


async def test_clients_of_a_replica_that_leaves_are_served_by_the_other(mesh: Cluster) -> None:
    async with held(_clients(mesh)) as first:
        mesh.untask("web", "a1")
        await mesh.settled()
        moved: dict[Held, object] = {}

        async def all_moved() -> bool:
            moved.update(await again(first))
            return _replicas(moved) == {"b1"}

        await until(all_moved, "nobody is served by a1 any more")

    assert _replicas(dict(first)) == {"a1", "b1"}
    mesh.task("web", "a1")
    await mesh.settled()


async def test_clients_of_a_service_without_replicas_are_refused_and_served_again(
    mesh: Cluster,
) -> None:
    async with held(_clients(mesh)[:4]) as first:
        mesh.untask("web", "a1")
        mesh.untask("web", "b1")
        await mesh.settled()

        async def is_served(expected: set[object]) -> bool:
            return _replicas(dict(await again(first))) <= expected

        await until(lambda: is_served({REFUSED, "silence"}), "nobody answers")
        for replica in ("a1", "b1"):
            mesh.task("web", replica)
        await mesh.settled()
        await until(lambda: is_served({"a1", "b1"}), "everybody is answered again")

    assert _replicas(dict(first)) <= {"a1", "b1"}

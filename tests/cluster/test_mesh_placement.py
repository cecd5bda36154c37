"""Where services answer and which replicas a node chooses among, as clients see it.

On every backend, one lab of three nodes; every test has a service of its own and leaves the labels
of the nodes as it found them: n1 and n2 in zone a, n3 in zone b.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from mesh.lab import environment
from tests.support import drivers
from tests.support.cluster import (
    LIMIT,
    PORT,
    Cluster,
    cluster,
    ingress,
    put,
    until_served,
)
from tests.support.requests import REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.requests import Ask

pytestmark = pytest.mark.cluster

MESH: Final = (sys.executable, "-m", "mesh", "--config", str(environment.CONFIG))
REPLICAS: Final = ("a1", "b1", "d1")
ZONES: Final = {"n1": "a", "n2": "a", "n3": "b"}
TIMES: Final = 8
"""Requests of each kind: none of three replicas is missed by all of them."""


@pytest.fixture(scope="module", params=drivers.KERNEL)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    placed = ((id, {"a": "n1", "b": "n2", "d": "n3"}[id[0]]) for id in (*REPLICAS, "a2", "d2"))
    with cluster("placement", 3, *placed, backend=request.param) as made:
        for node, zone in ZONES.items():
            label(made, node, zone=zone)
        yield made


def label(mesh: Cluster, node: str, **labels: str) -> None:
    """Give a node labels, and no others."""
    put(mesh, f"labels/{node}", {"labels": labels})


async def serve(mesh: Cluster, name: str, published: int, **fields: object) -> None:
    """A service with all replicas, in force on every node."""
    mesh.service(name, *ingress(published), **fields)
    for replica in REPLICAS:
        mesh.task(name, replica)
    await mesh.allocated(name)


def through(mesh: Cluster, published: int, *nodes: str) -> list[Ask]:
    """From outside, often enough to meet every replica."""
    return TIMES * mesh.from_outside(published, *nodes)


def inside(mesh: Cluster, name: str, container: str) -> list[Ask]:
    """From a container to the VIP."""
    return 2 * TIMES * mesh.asks((container,), mesh.vips(name), PORT)


def told(mesh: Cluster, node: str, *args: str) -> Any:
    """The document that a verb printed on a node."""
    pid = mesh.node(node).agent_pid
    enter = ("nsenter", f"--target={pid}", "--net", "--mount", "--pid", "--")
    done = subprocess.run(
        (*enter, *MESH, *args, "--json"), capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return json.loads(done.stdout)


async def test_a_node_prefers_the_replicas_of_its_zone_while_there_are_any(mesh: Cluster) -> None:
    await serve(mesh, "zoned", 8100, prefer="zone")
    await until_served(through(mesh, 8100, "n1", "n2"), {"a1", "b1"})
    await until_served(through(mesh, 8100, "n3"), {"d1"})
    await until_served(inside(mesh, "zoned", "a2"), {"a1", "b1"})
    await until_served(inside(mesh, "zoned", "d2"), {"d1"})
    there, _ = mesh.addresses("n3")
    source, _ = mesh.addresses("c1")
    shown = told(mesh, "n3", "trace", source, f"{there}:8100")

    put(mesh, "maintenance/n3", {"state": "draining"})
    await until_served(through(mesh, 8100, "n3"), {"a1", "b1"})
    put(mesh, "maintenance/n3", {"state": "active"})
    await until_served(through(mesh, 8100, "n3"), {"d1"})

    label(mesh, "n3", zone="a")
    await until_served(through(mesh, 8100), set(REPLICAS))
    label(mesh, "n3")
    label(mesh, "n2", zone="b")
    await until_served(through(mesh, 8100, "n1"), {"a1"})
    await until_served(through(mesh, 8100, "n3"), set(REPLICAS))
    for node, zone in ZONES.items():
        label(mesh, node, zone=zone)
    await mesh.settled()
    mesh.remove("zoned")

    assert shown["placement"] == "prefer zone: 1 of 3 replicas, those in zone 'b'"
    assert shown["agrees"] is True


@pytest.mark.parametrize(("prefer", "port"), [("local", 8101), ("local-only", 8102)])
async def test_a_local_replica_that_takes_no_connections_does_not_count(
    mesh: Cluster, prefer: str, port: int
) -> None:
    await serve(mesh, prefer, port, prefer=prefer)
    others = {"b1", "d1"} if prefer == "local" else {REFUSED}
    await until_served(through(mesh, port, "n1"), {"a1"})
    await until_served(through(mesh, port, "n2"), {"b1"})

    for change in ({"state": "draining"}, {"weight": 0}):
        mesh.task(prefer, "a1", **change)
        await until_served(through(mesh, port, "n1"), others)
        mesh.task(prefer, "a1")
        await until_served(through(mesh, port, "n1"), {"a1"})
    put(mesh, "maintenance/n1", {"state": "draining"})
    await until_served(through(mesh, port, "n1"), others)
    put(mesh, "maintenance/n1", {"state": "active"})
    await until_served(through(mesh, port, "n1"), {"a1"})
    mesh.remove(prefer)

"""Health when etcd is away, when a replica is gone without a word, and by commands.

One lab of three nodes, whose replicas every test leaves well.
"""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.cluster import ingress, until, until_served
from tests.support.illness import BOTH, WEB, healthy_lab
from tests.support.requests import stream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.illness import World

pytestmark = pytest.mark.cluster

NEW: Final = 8090
CYCLE: Final = 60
LONGER_THAN_A_LEASE: Final = 24 * CYCLE
"""Requests, 5 milliseconds apart at least."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with healthy_lab("health-failures") as made:
        yield made


async def test_nothing_changes_while_etcd_is_away_and_comes_back(world: World) -> None:
    mesh = world.mesh
    before = {replica: world.told(replica) for replica in BOTH}

    async with stream(world.everything()) as traffic:
        await mesh.kill("etcd")
        await traffic.more(CYCLE)
        await mesh.start_again("etcd")
        await until(mesh.answers, "etcd is back")
        await mesh.signal("etcd", signal.SIGSTOP)
        await traffic.more(LONGER_THAN_A_LEASE)
        await mesh.signal("etcd", signal.SIGCONT)
        await until(mesh.answers, "etcd is back")
        await traffic.more(LONGER_THAN_A_LEASE)
        await world.all_well()

    assert traffic.failures == []
    assert {replica: world.told(replica) for replica in BOTH} == before


async def test_a_node_takes_its_own_ill_replica_out_without_etcd(world: World) -> None:
    mesh = world.mesh
    through = mesh.from_outside(WEB, "n1")
    before = world.told("a1")["since"]
    await until(lambda: before < f"{datetime.now(UTC):%FT%TZ}", "a verdict of now is another one")
    await mesh.kill("etcd")
    with world.ill("a1"):
        await until_served(8 * through, {"b1"})
    await until_served(8 * through, BOTH)
    await mesh.start_again("etcd")
    await until(mesh.answers, "etcd is back")
    await mesh.settled()
    await until(
        lambda: world.told("a1").get("since", "") > before, "what was found meanwhile is told"
    )
    await world.all_well()


async def test_a_record_that_somebody_removes_comes_back(world: World) -> None:
    before = world.told("a1")

    async with stream(world.everything()) as traffic:
        world.mesh.records.delete("health/n1/a1")
        await until(lambda: world.told("a1") == before, "the record is back")
        await world.all_well()

    assert traffic.failures == []


async def test_a_command_in_the_replicas_network_decides(world: World, tmp_path: Path) -> None:
    mesh = world.mesh
    ready = tmp_path / "ready"
    script = f'test -e {ready} && test "$MESH_TASK" = b1 && ip -o addr | grep -q "$MESH_ADDRESS"'
    check = {"type": "exec", "command": ["sh", "-c", script], "interval": "200ms", "fall": 2}
    mesh.service("new", *ingress(NEW), health=check)
    for replica in sorted(BOTH):
        mesh.task("new", replica, netns=_netns(world, replica))
    await mesh.allocated("new")
    await until(lambda: world.told("b1", "new").get("starting") is False, "b1 fails")
    ready.touch()
    await until_served(8 * mesh.from_outside(NEW), {"b1"})
    reason = world.told("a1", "new")["reason"]
    mesh.remove("new")
    await mesh.settled()
    await until(lambda: not world.told("b1", "new"), "its verdict goes with it")

    assert reason == "exit status 1"


def _netns(world: World, replica: str) -> str:
    """Where the replica's own record says that its network namespace is."""
    found = world.mesh.records.get(f"tasks/idle/{replica}")["netns"]
    assert isinstance(found, str)
    return found


async def test_a_replica_that_is_gone_without_a_word_is_out_of_every_pool(world: World) -> None:
    mesh = world.mesh
    await mesh.start(("x1", "n3"))
    mesh.service("new", *ingress(NEW), health={"type": "tcp", "interval": "200ms", "fall": 2})
    for replica in ("a1", "x1"):
        mesh.task("new", replica)
    await mesh.allocated("new")
    await until_served(8 * mesh.from_outside(NEW), {"a1", "x1"})

    await mesh.kill("x1")
    await until(lambda: world.told("x1", "new").get("healthy") is False, "x1 fails")
    await until_served(8 * mesh.from_outside(NEW), {"a1"})
    mesh.remove("new")
    await mesh.settled()
